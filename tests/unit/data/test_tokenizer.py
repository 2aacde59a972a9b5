import json
import shutil
from pathlib import Path

import pytest
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from mindspeed_lora.data.tokenizer import (
    encode_batch,
    files_digest,
    lazy_tokenizer,
    load_tokenizer,
    pad_token_id,
    tokenizer_fingerprint,
)
from mindspeed_lora.errors import Refused
from tests.unit.data.made_tokenizers import CORPUS, KINDS, make_tokenizer, save_tokenizer

TEXTS = ["", "Hello  world\n", "<|im_start|>user\nä 好<|im_end|>\n\n", "[INST] a [/INST]", " </s> x"]


@pytest.mark.parametrize("kind", KINDS)
def test_batches_are_what_the_tokenizer_gives(
    tokenizers: dict[str, PreTrainedTokenizerFast], kind: str
) -> None:
    expected = [tokenizers[kind].encode(text, add_special_tokens=False) for text in TEXTS]
    assert encode_batch(tokenizers[kind], TEXTS) == expected
    assert encode_batch(tokenizers[kind], []) == []


def test_a_folder_and_its_files_name_the_tokenizer(tmp_path: Path) -> None:
    folder = save_tokenizer(tmp_path / "model")
    by_folder = load_tokenizer(folder)
    by_file = load_tokenizer(folder / "tokenizer.json")
    assert by_folder.get_vocab() == by_file.get_vocab()


def test_the_fingerprint_does_not_depend_on_the_place(tmp_path: Path) -> None:
    here = save_tokenizer(tmp_path / "here")
    there = tmp_path / "else" / "where"
    shutil.copytree(here, there)
    fingerprint = tokenizer_fingerprint(load_tokenizer(here))
    assert tokenizer_fingerprint(load_tokenizer(there)) == fingerprint
    # Saved again by transformers, and after use with padding and truncation.
    again = load_tokenizer(here)
    again(["a", "b c"], padding=True, truncation=True, max_length=4) if again.pad_token else None
    again.save_pretrained(tmp_path / "again")
    assert tokenizer_fingerprint(load_tokenizer(tmp_path / "again")) == fingerprint


def test_the_fingerprint_tells_tokenizers_apart(tmp_path: Path) -> None:
    folder = save_tokenizer(tmp_path / "model")
    fingerprints = {tokenizer_fingerprint(load_tokenizer(folder))}
    fingerprints |= {tokenizer_fingerprint(make_tokenizer(kind)) for kind in KINDS[1:]}
    fingerprints.add(tokenizer_fingerprint(make_tokenizer("gpt2", corpus=CORPUS[:1])))
    more = load_tokenizer(folder)
    more.add_tokens(["<extra>"])
    fingerprints.add(tokenizer_fingerprint(more))
    fingerprints.add(tokenizer_fingerprint(_with(folder, tmp_path / "merges", swap_merges)))
    fingerprints.add(tokenizer_fingerprint(_with(folder, tmp_path / "vocabulary", swap_vocabulary)))
    assert len(fingerprints) == len(KINDS) + 4


def swap_merges(content: dict) -> None:
    merges = content["model"]["merges"]
    merges[-1], merges[-2] = merges[-2], merges[-1]


def swap_vocabulary(content: dict) -> None:
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]


def _with(folder: Path, target: Path, change: object) -> PreTrainedTokenizerFast:
    shutil.copytree(folder, target)
    content = json.loads((target / "tokenizer.json").read_text())
    change(content)  # type: ignore[operator]
    (target / "tokenizer.json").write_text(json.dumps(content))
    return load_tokenizer(target)


@pytest.mark.parametrize(
    ("name", "auto_map"),
    [
        ("tokenizer_config.json", {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}),
        ("tokenizer_config.json", {"AutoTokenizer": "someone/model--tokenization_own.OwnTokenizer"}),
        ("tokenizer_config.json", ["tokenization_own.OwnTokenizer", None]),
        ("config.json", {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]}),
    ],
)
def test_code_of_the_folder_is_refused_by_name(tmp_path: Path, name: str, auto_map: object) -> None:
    folder = save_tokenizer(tmp_path / "model")
    proof = tmp_path / "was run"
    (folder / "tokenization_own.py").write_text(f"open({str(proof)!r}, 'w')")
    path = folder / name
    content = json.loads(path.read_text()) if path.exists() else {"model_type": "llama"}
    path.write_text(json.dumps({**content, "auto_map": auto_map}))
    with pytest.raises(Refused, match=r"tokenization_own\.py: .*--trust-remote-code"):
        load_tokenizer(folder)
    assert not proof.exists()


def test_the_digest_of_the_files(tmp_path: Path) -> None:
    folder = save_tokenizer(tmp_path / "model")
    digest = files_digest(folder, True)
    shutil.copytree(folder, tmp_path / "copy")
    (tmp_path / "copy" / "model.safetensors").write_text("weights do not matter")
    assert files_digest(tmp_path / "copy" / "tokenizer.json", True) == digest
    assert files_digest(folder, False) != digest
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json"):
        shutil.copytree(folder, tmp_path / name)
        with (tmp_path / name / name).open("a") as stream:
            stream.write(" ")
        assert files_digest(tmp_path / name, True) != digest


def test_a_lazy_tokenizer_is_loaded_once_and_when_needed(tmp_path: Path) -> None:
    folder = save_tokenizer(tmp_path / "model")
    lazy = lazy_tokenizer(folder)
    assert lazy.files_digest == files_digest(folder, True)
    assert lazy.loaded is lazy.loaded
    assert lazy.loaded.get_vocab() == load_tokenizer(folder).get_vocab()
    assert lazy_tokenizer(folder, trust_remote_code=True).files_digest is None, "its code may do anything"
    with pytest.raises(Refused, match="no such folder"):
        lazy_tokenizer(tmp_path / "nowhere")
    content = {"model_type": "llama", "auto_map": {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}}
    (folder / "config.json").write_text(json.dumps(content))
    with pytest.raises(Refused, match="--trust-remote-code"):
        lazy_tokenizer(folder)


def test_code_of_a_model_is_no_obstacle(tmp_path: Path) -> None:
    folder = save_tokenizer(tmp_path / "model")
    config = {"model_type": "llama", "auto_map": {"AutoModelForCausalLM": "modeling_own.OwnModel"}}
    (folder / "config.json").write_text(json.dumps(config))
    load_tokenizer(folder)


def test_code_runs_when_trusted(tmp_path: Path) -> None:
    folder = save_tokenizer(tmp_path / "model")
    (folder / "tokenization_own.py").write_text(
        "from transformers import PreTrainedTokenizerFast\n"
        "class OwnTokenizer(PreTrainedTokenizerFast):\n    greeting = 'hello'\n"
    )
    path = folder / "tokenizer_config.json"
    content = json.loads(path.read_text())
    content["auto_map"] = {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]}
    content["tokenizer_class"] = "OwnTokenizer"
    path.write_text(json.dumps(content))
    assert load_tokenizer(folder, trust_remote_code=True).greeting == "hello"


def test_wrong_paths_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="nowhere: no such folder"):
        load_tokenizer(tmp_path / "nowhere")
    with pytest.raises(Refused, match="cannot be loaded .*no tokenizer file") as refused:
        load_tokenizer(tmp_path)
    assert "\n" not in str(refused.value)
    folder = save_tokenizer(tmp_path / "model")
    (folder / "tokenizer.json").write_text('{"broken"')
    with pytest.raises(Refused, match=r"cannot be loaded .*tokenizer\.json") as refused:
        load_tokenizer(folder)
    assert "\n" not in str(refused.value)
    (folder / "config.json").write_text('{"model_type": "llama", "hidden_size": "64"}')
    with pytest.raises(Refused, match=r"config\.json: .*'hidden_size' expected int, got str") as refused:
        load_tokenizer(folder)
    assert "\n" not in str(refused.value)


def test_padding(tokenizers: dict[str, PreTrainedTokenizerFast]) -> None:
    tokenizer = make_tokenizer("gpt2")
    assert pad_token_id(tokenizer) == tokenizer.eos_token_id
    tokenizer.pad_token = "<unk>"
    assert pad_token_id(tokenizer) == tokenizer.unk_token_id
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizers["gpt2"].backend_tokenizer)
    assert pad_token_id(bare) == 0


def test_a_tokenizer_that_cuts_and_pads_by_itself(tmp_path: Path) -> None:
    """As some published files make it; rows are neither cut nor padded."""
    folder = save_tokenizer(tmp_path / "model")
    plain = load_tokenizer(folder)
    texts = ["one two three four five six", "one"]
    expected = [plain.encode(text, add_special_tokens=False) for text in texts]
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.enable_truncation(2)
    backend.enable_padding()
    backend.save(str(folder / "tokenizer.json"))
    loaded = load_tokenizer(folder)
    assert encode_batch(loaded, texts) == encode_batch(loaded, texts, add_special_tokens=True) == expected
