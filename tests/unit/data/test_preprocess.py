"""``preprocess_data.py`` from its flags to its files."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mindspeed_lora.config.commands import parse
from mindspeed_lora.config.jobs import PreprocessJob
from mindspeed_lora.data.indexed_dataset import IndexedDataset
from mindspeed_lora.data.prepared_info import read_info
from mindspeed_lora.data.preprocess import preprocess
from mindspeed_lora.data.sft_dataset import PACKED_KEYS, SftDataset, packed_prefix
from mindspeed_lora.data.summary import Summary
from mindspeed_lora.data.tokenizer import load_tokenizer, tokenizer_fingerprint
from mindspeed_lora.errors import Refused
from tests.conftest import Assets
from tests.unit.data.made_tokenizers import save_tokenizer

ROOT = Path(__file__).parents[3]
ROWS = [
    {
        "instruction": f"Count to {i}.",
        "input": "in words" if i % 3 else "",
        "output": "one two " * (1 + i % 9),
    }
    for i in range(700)
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer") / "model")


def write_rows(folder: Path, rows: list[Any] = ROWS, name: str = "rows.json") -> Path:
    (folder / name).write_text(json.dumps(rows))
    return folder / name


def arguments(source: Path, tokenizer: Path, prefix: Path, *flags: str) -> list[str]:
    return [
        *("--input", str(source), "--tokenizer-name-or-path", str(tokenizer)),
        *("--output-prefix", str(prefix), *flags),
    ]


def run(source: Path, tokenizer: Path, prefix: Path, *flags: str) -> Summary:
    job = parse("preprocess", arguments(source, tokenizer, prefix, *flags))
    assert isinstance(job, PreprocessJob)
    return preprocess(job)


def all_bytes(folder: Path, prefix: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name.startswith(prefix)}


def test_files_of_an_alpaca_set(tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ("--handler-name", "AlpacaStyleInstructionHandler", "--prompt-type", "llama2")
    summary = run(write_rows(tmp_path), tokenizer, tmp_path / "new" / "folder" / "data", *flags)
    assert (summary.read, summary.kept) == (700, 700)
    prefix = tmp_path / "new" / "folder" / "data"
    assert sorted(os.listdir(prefix.parent)) == sorted(
        [f"data_packed_{key}_document.{kind}" for key in PACKED_KEYS for kind in ("bin", "idx")]
        + ["data_packed_info.json"]
    )
    loaded = load_tokenizer(tokenizer)
    sets = {key: IndexedDataset(packed_prefix(prefix, key)) for key in PACKED_KEYS}
    for i, row in enumerate(ROWS):
        question = "\n".join(filter(None, [row["instruction"], row["input"]]))
        prompt = [loaded.bos_token_id, *loaded.encode(f"[INST] {question} [/INST]")]
        answer = [*loaded.encode(row["output"]), loaded.eos_token_id]
        assert sets["input_ids"][i].tolist() == prompt + answer
        assert sets["attention_mask"][i].tolist() == [1] * len(prompt + answer)
        assert sets["labels"][i].tolist() == [-100] * len(prompt) + answer
    assert {dataset.dtype for dataset in sets.values()} == {np.dtype(np.int32)}
    assert "rows kept              700" in capsys.readouterr().out


def test_the_information(tmp_path: Path, tokenizer: Path) -> None:
    prefix = tmp_path / "data"
    flags = ("--prompt-type", "qwen", "--seq-length", "60", "--overlong", "truncate")
    summary = run(write_rows(tmp_path), tokenizer, prefix, *flags)
    info = read_info(prefix)
    loaded = load_tokenizer(tokenizer)
    assert info is not None
    assert info.tokenizer_fingerprint == tokenizer_fingerprint(loaded)
    assert (info.prompt_type, info.seq_length, info.overlong, info.loss_on) == (
        "qwen",
        60,
        "truncate",
        "assistant",
    )
    assert info.eos_token_id == loaded.convert_tokens_to_ids("<|im_end|>")
    assert info.pad_token_id == loaded.eos_token_id
    assert (info.num_documents, info.num_tokens, info.num_loss_tokens, info.longest) == (
        summary.kept,
        summary.tokens,
        summary.loss_tokens,
        60,
    )
    messages = [{"role": "user", "content": ROWS[0]["instruction"]}]
    first = SftDataset(prefix, 4096)[0].input_ids.tolist()
    prompt = loaded.apply_chat_template(
        messages, chat_template=info.chat_template, add_generation_prompt=True, return_dict=False
    )
    assert first[: len(prompt)] == prompt


@pytest.mark.parametrize("packing", [(), ("--neat-pack", "--seq-length", "64")], ids=str)
def test_any_number_of_workers_gives_the_same_bytes(
    tmp_path: Path, tokenizer: Path, packing: tuple[str, ...]
) -> None:
    source = write_rows(tmp_path)
    for workers in ("1", "2", "3"):
        (tmp_path / workers).mkdir()
        flags = ("--prompt-type", "llama2", "--workers", workers, *packing)
        run(source, tokenizer, tmp_path / workers / "data", *flags)
    one, two, three = (all_bytes(tmp_path / workers, "data") for workers in ("1", "2", "3"))
    assert len(one) == 7
    assert one == two == three


@pytest.mark.parametrize("flag", ["--pack", "--neat-pack"])
def test_packed_rows(tmp_path: Path, tokenizer: Path, flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Every row is in some packed row, whole and in input order; attention_mask tells which is which."""
    source = write_rows(tmp_path)
    flags = ("--prompt-type", "llama2", "--seq-length", "80")
    single = run(source, tokenizer, tmp_path / "single", *flags)
    summary = run(source, tokenizer, tmp_path / "data", *flags, flag)
    info = read_info(tmp_path / "data")
    sets = {key: IndexedDataset(packed_prefix(tmp_path / "data", key)) for key in PACKED_KEYS}
    assert info is not None and (info.num_rows, info.num_documents) == (700, len(sets["labels"]))
    assert (info.pack, info.longest) == ("neat" if flag == "--neat-pack" else "plain", 80)
    assert (info.num_tokens, info.num_loss_tokens) == (single.tokens, single.loss_tokens)
    assert all(set(dataset.sequence_lengths.tolist()) == {80} for dataset in sets.values())
    rows = SftDataset(tmp_path / "single", 80)
    expected = sorted(rows[i].input_ids.tolist() + rows[i].labels.tolist() for i in range(700))
    found = []
    for tokens, mask, labels in zip(*(sets[key] for key in PACKED_KEYS), strict=True):
        real = int((mask > 0).sum())
        assert not mask[real:].any() and (labels[real:] == -100).all()
        assert (tokens[real:] == info.pad_token_id).all()
        if flag == "--neat-pack":
            assert mask[:real].tolist() == sorted(mask[:real]) and (mask[:1] == 1).all()
            parts = [mask == number for number in range(1, int(mask.max()) + 1)]
            found += [tokens[part].tolist() + labels[part].tolist() for part in parts]
        else:
            assert set(mask[:real].tolist()) == {1}
    assert found == [] or sorted(found) == expected
    assert flag == "--pack" or found
    filled = single.tokens / (80 * len(sets["labels"]))
    assert (
        f"packed rows   {summary.packed:>12,}  of 80 tokens, {filled:.2%} filled" in capsys.readouterr().out
    )


def test_demo_rows_leave_little_padding(tmp_path: Path, smollm2: Assets) -> None:
    flags = ("--seq-length", "2048", "--neat-pack")
    summary = run(smollm2.data / "alpaca_en_demo.json", smollm2.model, tmp_path / "data", *flags)
    assert summary.kept == 999
    assert summary.tokens / (2048 * summary.packed) > 0.97


def test_overlong_rows_are_cut_before_they_are_packed(tmp_path: Path, tokenizer: Path) -> None:
    flags = ("--prompt-type", "llama2", "--seq-length", "40", "--neat-pack")
    cut = run(write_rows(tmp_path), tokenizer, tmp_path / "data", *flags, "--overlong", "proportional")
    assert cut.cut > 0 and cut.kept == 700 and cut.longest == 40
    dropped = run(write_rows(tmp_path), tokenizer, tmp_path / "data", *flags, "--overlong", "drop")
    assert dropped.dropped == {"longer than --seq-length": cut.cut}
    info = read_info(tmp_path / "data")
    assert info is not None and info.num_rows == 700 - cut.cut


def test_rows_that_cannot_be_packed(tmp_path: Path, tokenizer: Path) -> None:
    flags = ("--prompt-type", "llama2", "--pack", "--seq-length", "1")
    with pytest.raises(Refused, match="none of 700 rows can be used .*without loss when cut"):
        run(write_rows(tmp_path), tokenizer, tmp_path / "data", *flags)
    text = write_rows(tmp_path, [{"text": "one two"}], "text.json")
    handler = ("--handler-name", "GeneralPretrainHandler", "--seq-length", "8")
    with pytest.raises(Refused, match="--neat-pack: training cuts plain text into full windows by itself"):
        run(text, tokenizer, tmp_path / "data", *handler, "--neat-pack")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.json", "text.json"]


def test_a_template_has_no_effect_on_plain_text(
    tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = write_rows(tmp_path, [{"text": "one two"}])
    flags = ("--handler-name", "GeneralPretrainHandler", "--prompt-type", "qwen")
    run(text, tokenizer, tmp_path / "data", *flags)
    assert "notice: --prompt-type has no effect on plain text" in capsys.readouterr().err


def test_messages_by_the_tokenizers_own_template(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}"
        "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    folder = save_tokenizer(tmp_path / "model", chat_template=template)
    chat = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A b"}]
    source = write_rows(tmp_path, [{"messages": chat}, {"messages": chat[:1]}, {"messages": chat * 2}])
    summary = run(source, folder, tmp_path / "data")
    assert (summary.kept, dict(summary.dropped)) == (2, {"there is no assistant message": 1})
    notices = capsys.readouterr().err.splitlines()
    assert notices == [
        "notice: default taken: --handler-name OpenAIInstructionHandler",
        "notice: default taken: --hf-chat-template",
    ]
    loaded = load_tokenizer(folder)
    dataset = SftDataset(tmp_path / "data", 4096)
    for i, messages in enumerate((chat, chat * 2)):
        sample = dataset[i]
        assert sample.input_ids.tolist() == loaded.apply_chat_template(messages, return_dict=False)
        trained = loaded.decode(sample.labels[sample.labels != -100].tolist())
        assert trained == "A b<|im_end|>" * (i + 1)
    info = read_info(tmp_path / "data")
    assert info is not None and info.chat_template == template


def test_plain_text(tmp_path: Path, tokenizer: Path) -> None:
    source = write_rows(tmp_path, [{"text": "one two"}, {"text": ""}, {"text": "three"}])
    flags = ("--handler-name", "GeneralPretrainHandler", "--append-eod")
    summary = run(source, tokenizer, tmp_path / "data", *flags)
    assert (summary.kept, dict(summary.dropped)) == (2, {"the text is empty": 1})
    dataset = IndexedDataset(tmp_path / "data_text_document")
    loaded = load_tokenizer(tokenizer)
    assert [dataset[i].tolist() for i in range(2)] == [
        [*loaded.encode(text), loaded.eos_token_id] for text in ("one two", "three")
    ]
    info = read_info(tmp_path / "data_text_document")
    assert info is not None and info.num_tokens == summary.tokens


def test_several_columns_of_text(tmp_path: Path, tokenizer: Path) -> None:
    flags = ("--handler-name", "GeneralPretrainHandler", "--append-eod", "--json-keys", "output", "input")
    summary = run(write_rows(tmp_path), tokenizer, tmp_path / "data", *flags)
    assert (summary.kept, summary.loss_tokens) == (len(ROWS), summary.tokens)
    loaded = load_tokenizer(tokenizer)
    for key in ("output", "input"):
        texts = [row[key] for row in ROWS if row[key]]
        documents = IndexedDataset(f"{tmp_path / 'data'}_{key}_document")
        assert len(documents) == documents.num_documents == len(texts)
        assert documents[1].tolist() == [*loaded.encode(texts[1]), loaded.eos_token_id]
        info = read_info(f"{tmp_path / 'data'}_{key}_document")
        assert info is not None
        assert (info.num_documents, info.num_tokens) == (len(texts), int(documents.sequence_lengths.sum()))
    with pytest.raises(Refused, match="--json-keys input: no row has text in this column; leave it out"):
        run(write_rows(tmp_path, ROWS[:1]), tokenizer, tmp_path / "none", *flags)
    assert not list(tmp_path.glob("*none*"))


def test_a_folder_of_files(tmp_path: Path, tokenizer: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    for name, rows in (("b.json", ROWS[3:5]), ("a.json", ROWS[:3])):
        write_rows(folder, rows, name)
    run(folder, tokenizer, tmp_path / "data", "--prompt-type", "llama2")
    run(write_rows(tmp_path, ROWS[:5]), tokenizer, tmp_path / "same", "--prompt-type", "llama2")
    for key in PACKED_KEYS:
        name = f"_packed_{key}_document.bin"
        assert (tmp_path / f"data{name}").read_bytes() == (tmp_path / f"same{name}").read_bytes()


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "the file has no rows"),
        ([{"instruction": "I"}], "row 1: cannot tell what the columns"),
        ([ROWS[0], {"instruction": "I"}], r"rows\.json, row 2: output is missing; found instruction"),
        (
            [*ROWS[:300], *[{"instruction": "I", "output": 5}] * 4],
            "4 of 304 .*row 301: output is the number 5",
        ),
        ([{"instruction": "", "output": ""}], r"none of 1 rows can be used \(1 × question and answer"),
    ],
)
@pytest.mark.parametrize("workers", ["1", "2"])
def test_bad_rows_leave_no_files(
    tmp_path: Path, tokenizer: Path, rows: list[Any], message: str, workers: str
) -> None:
    source = write_rows(tmp_path, rows)
    with pytest.raises(Refused, match=message):
        run(source, tokenizer, tmp_path / "out" / "data", "--prompt-type", "llama2", "--workers", workers)
    assert not (tmp_path / "out").exists() or os.listdir(tmp_path / "out") == []


def test_bad_flags(tmp_path: Path, tokenizer: Path) -> None:
    source = write_rows(tmp_path)
    with pytest.raises(Refused, match="--prompt-type lama2: unknown"):
        run(source, tokenizer, tmp_path / "data", "--prompt-type", "lama2")
    with pytest.raises(Refused, match="has no chat template"):
        run(source, tokenizer, tmp_path / "data", "--hf-chat-template")
    (tmp_path / "file").write_text("")
    with pytest.raises(Refused, match="output folder .*file cannot be made"):
        run(source, tokenizer, tmp_path / "file" / "data", "--prompt-type", "llama2")


def test_a_failed_run_leaves_the_earlier_set(tmp_path: Path, tokenizer: Path) -> None:
    run(write_rows(tmp_path, ROWS[:4]), tokenizer, tmp_path / "data", "--prompt-type", "llama2")
    before = all_bytes(tmp_path, "data")
    broken = write_rows(tmp_path, [*ROWS, *[{}] * 9], "broken.json")
    with pytest.raises(Refused, match="row 701"):
        run(broken, tokenizer, tmp_path / "data", "--prompt-type", "llama2")
    assert all_bytes(tmp_path, "data") == before
    assert not list(tmp_path.glob(".data*"))
    run(write_rows(tmp_path, ROWS[:5]), tokenizer, tmp_path / "data", "--prompt-type", "llama2")
    assert len(SftDataset(tmp_path / "data", 4096)) == 5


def test_a_full_disk_leaves_the_earlier_set(
    tmp_path: Path, tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(write_rows(tmp_path, ROWS[:4]), tokenizer, tmp_path / "data", "--prompt-type", "llama2")
    before = all_bytes(tmp_path, "data")
    synchronised: list[int] = []

    def full(descriptor: int) -> None:
        synchronised.append(descriptor)
        # The last of the seven files that are flushed: the information.
        if len(synchronised) == 7:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        run(write_rows(tmp_path, ROWS[:5]), tokenizer, tmp_path / "data", "--prompt-type", "llama2")
    assert all_bytes(tmp_path, "data") == before
    assert not list(tmp_path.glob(".data*"))


def test_a_killed_run_leaves_the_earlier_set(tmp_path: Path, tokenizer: Path) -> None:
    run(write_rows(tmp_path, ROWS[:4]), tokenizer, tmp_path / "data", "--prompt-type", "llama2")
    before = all_bytes(tmp_path, "data")
    many = write_rows(tmp_path, ROWS * 300, "many.json")
    packing = ("--neat-pack", "--seq-length", "64")
    flags = arguments(many, tokenizer, tmp_path / "data", "--prompt-type", "llama2", *packing)
    process = subprocess.Popen([sys.executable, str(ROOT / "preprocess_data.py"), *flags])
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(".data_packed_rows*")) and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert all_bytes(tmp_path, "data") == before
    assert list(tmp_path.glob(".data_packed_rows*")), "the rows that wait to be packed"
    run(write_rows(tmp_path, ROWS[:4]), tokenizer, tmp_path / "data", "--prompt-type", "llama2")
    assert not list(tmp_path.glob(".data*"))


def test_as_a_command(tmp_path: Path, tokenizer: Path) -> None:
    source = write_rows(tmp_path, ROWS[:200])
    command = [sys.executable, str(ROOT / "preprocess_data.py")]
    flags = arguments(source, tokenizer, tmp_path / "data", "--prompt-type", "llama2", "--workers", "2")
    done = subprocess.run([*command, *flags], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "rows kept              200" in done.stdout
    assert "\r" not in done.stderr
    flags[1] = str(tmp_path / "nowhere.json")
    refused = subprocess.run([*command, *flags], capture_output=True, text=True)
    assert refused.returncode == 2
    assert len(refused.stderr.splitlines()) == 1
    assert "nowhere.json: no such file or folder" in refused.stderr
