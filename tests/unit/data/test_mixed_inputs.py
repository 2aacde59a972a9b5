"""``preprocess_data.py`` with several inputs, broken rows, pairs and ``dataset_info.json``, from flags to files."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mindspeed_lora.config.commands import parse
from mindspeed_lora.data.indexed_dataset import IndexedDataset
from mindspeed_lora.data.merging import merge
from mindspeed_lora.data.preprocess import preprocess
from mindspeed_lora.data.sft_dataset import packed_prefix
from mindspeed_lora.data.show import show
from mindspeed_lora.data.summary import Summary
from mindspeed_lora.data.tokenizer import load_tokenizer
from mindspeed_lora.errors import Refused
from tests.unit.data.made_tokenizers import save_tokenizer

ALPACA_ROWS = [{"instruction": f"add {n}", "input": "", "output": f"print({n})"} for n in range(500)]
SHAREGPT_ROWS = [
    {
        "conversations": [
            {"from": "human", "value": f"Human {n}"},
            {"from": "gpt", "value": "Mix flour " * (n % 5 + 1)},
        ]
    }
    for n in range(300)
]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def inputs(tmp_path: Path) -> list[Path]:
    alpaca, sharegpt = tmp_path / "alpaca.json", tmp_path / "sharegpt.jsonl.gz"
    alpaca.write_text(json.dumps(ALPACA_ROWS))
    sharegpt.write_bytes(gzip.compress("".join(json.dumps(row) + "\n" for row in SHAREGPT_ROWS).encode()))
    return [alpaca, sharegpt]


def run(given: str | Path, tokenizer: Path, prefix: Path, *flags: str) -> Summary:
    words = [
        "--input",
        str(given),
        "--tokenizer-name-or-path",
        str(tokenizer),
        "--output-prefix",
        str(prefix),
    ]
    return preprocess(parse("preprocess", [*words, "--prompt-type", "chatml", *flags]))


def prepared(folder: Path, name: str) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.glob(f"{name}_*")}


@pytest.mark.parametrize(
    "flags",
    [
        ("--mix-strategy", "concat"),
        ("--mix-strategy", "interleave_under", "--max-samples", "200"),
        ("--mix-strategy", "interleave_over", "--interleave-probs", "0.3,0.7", "--seed", "5"),
        ("--neat-pack", "--seq-length", "64", "--mix-strategy", "interleave_under", "--streaming"),
    ],
    ids=" ".join,
)
def test_the_same_bytes_for_any_number_of_workers(
    tmp_path: Path, tokenizer: Path, inputs: list[Path], flags: tuple[str, ...]
) -> None:
    given = ",".join(map(str, inputs))
    found = []
    for number, more in enumerate([(), ("--workers", "3"), ("--n-subs", "2")]):
        folder = tmp_path / str(number)
        summary = run(given, tokenizer, folder / "data", *flags, *more)
        found.append(prepared(folder, "data"))
    assert len(found[0]) == 7
    assert found[0] == found[1] == found[2]
    if "concat" in flags:
        assert summary.kept == 800
    if "200" in flags:
        assert summary.kept == 400


def test_broken_rows_are_told_and_left_out(
    tmp_path: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [json.dumps(row) for row in ALPACA_ROWS]
    lines[7], lines[300] = "{broken", json.dumps({"instruction": 5, "output": "x"})
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(lines))
    summary = run(path, tokenizer, tmp_path / "data", "--workers", "2")
    assert (summary.read, summary.kept, summary.broken) == (500, 498, 2)
    output = capsys.readouterr()
    assert f"notice: left out: {path}, line 8: not valid JSON" in output.err
    assert f"notice: left out: {path}, line 301: instruction is the number 5; expected text" in output.err
    assert "rows broken              2  0.40%, left out" in output.out
    assert len(IndexedDataset(packed_prefix(tmp_path / "data", "labels"))) == 498
    with pytest.raises(
        Refused, match=r"2 of 500 rows \(0.40%\) are broken, more than --max-bad-rows 1 allows: .*line 8"
    ):
        run(path, tokenizer, tmp_path / "data", "--max-bad-rows", "1")
    with pytest.raises(Refused, match="--max-bad-rows 0.1% allows"):
        run(path, tokenizer, tmp_path / "data", "--max-bad-rows", "0.1%")
    assert run(path, tokenizer, tmp_path / "data", "--max-bad-rows", "2").kept == 498


def test_a_file_of_nothing_but_broken_rows_is_not_read_to_its_end(tmp_path: Path, tokenizer: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(ALPACA_ROWS[0]) + "\n" + "x\n" * 5000)
    with pytest.raises(Refused, match="5,000 of 5,001 rows"):
        run(path, tokenizer, tmp_path / "data")
    path.write_text("x\n" * 5000)
    handler = ("--handler-name", "AlpacaStyleInstructionHandler")
    with pytest.raises(Refused, match=r"1,024 of 1,024 rows .*line 1: .*; .*line 2: .*; .*line 3: .* …"):
        run(path, tokenizer, tmp_path / "data", *handler)


def test_a_chat_template_that_refuses_a_row(tmp_path: Path) -> None:
    """What a row alone cannot tell is a broken row, too."""
    template = (
        "{% for m in messages %}{% if m.content == 'no' %}{{ raise_exception('not this one') }}{% endif %}"
        "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
    )
    folder = save_tokenizer(tmp_path / "model", chat_template=template)
    rows = [
        *SHAREGPT_ROWS,
        {"conversations": [{"from": "human", "value": "no"}, {"from": "gpt", "value": "A"}]},
    ]
    path = tmp_path / "rows.json"
    path.write_text(json.dumps(rows))
    words = [
        "--input",
        str(path),
        "--tokenizer-name-or-path",
        str(folder),
        "--output-prefix",
        str(tmp_path / "d"),
    ]
    summary = preprocess(parse("preprocess", words))
    assert (summary.kept, summary.broken) == (300, 1)
    assert summary.problems[0].endswith(
        "row 301: the tokenizer's chat template refuses the messages: not this one"
    )


def test_pairs(tmp_path: Path, tokenizer: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"instruction": f"add {n}", "chosen": f"print({n})", "rejected": "# 3 wait"} for n in range(40)
    ]
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps([*rows, {"instruction": "x", "chosen": "y"}]))
    summary = run(path, tokenizer, tmp_path / "data", "--max-bad-rows", "5%", "--workers", "2")
    assert (summary.kept, summary.broken) == (40, 1)
    loaded = load_tokenizer(tokenizer)
    keys = ("chosen_input_ids", "chosen_labels", "rejected_input_ids", "rejected_labels")
    sets = {key: IndexedDataset(packed_prefix(tmp_path / "data", key)) for key in keys}
    prompt = loaded.encode("<|im_start|>user\nadd 3<|im_end|>\n<|im_start|>assistant\n")
    end = loaded.convert_tokens_to_ids("<|im_end|>")
    for side, text in (("chosen", "print(3)"), ("rejected", "# 3 wait")):
        answer = [*loaded.encode(text), end]
        assert sets[f"{side}_input_ids"][3].tolist() == prompt + answer
        assert sets[f"{side}_labels"][3].tolist() == [-100] * len(prompt) + answer
    with pytest.raises(Refused, match="pairs are not packed"):
        run(path, tokenizer, tmp_path / "data", "--pack", "--seq-length", "64")


def test_llama_factory(tmp_path: Path, tokenizer: Path, inputs: list[Path]) -> None:
    info = {
        "one": {"file_name": inputs[0].name, "num_samples": 10},
        "two": {"file_name": inputs[1].name, "formatting": "sharegpt"},
    }
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    handler = ("--handler-name", "LlamaFactoryInstructionHandler", "--dataset-dir", str(tmp_path))
    summary = run("one,two", tokenizer, tmp_path / "data", *handler, "--max-samples", "25")
    assert summary.kept == 35


def test_legacy_handlers_take_the_alpaca_template(tmp_path: Path, tokenizer: Path) -> None:
    path = tmp_path / "moss.json"
    path.write_text(json.dumps([{"chat": {"turn_1": {"Human": "a<eoh>", "MOSS": "b<eom>"}}}]))
    words = [
        "--input",
        str(path),
        "--tokenizer-name-or-path",
        str(tokenizer),
        "--output-prefix",
        str(tmp_path / "d"),
    ]
    preprocess(parse("preprocess", [*words, "--handler-name", "MOSSInstructionHandler"]))
    loaded = load_tokenizer(tokenizer)
    text = loaded.decode(IndexedDataset(packed_prefix(tmp_path / "d", "input_ids"))[0])
    assert text.endswith("### Instruction:\na\n\n### Response:\nb</s>")


def shown(given: Path, tokenizer: Path, *flags: str) -> Callable[[], None]:
    words = [
        "--input",
        str(given),
        "--tokenizer-name-or-path",
        str(tokenizer),
        "--prompt-type",
        "chatml",
        *flags,
    ]
    job = parse("preprocess", words)
    return lambda: show(job)


def test_show(
    tmp_path: Path, tokenizer: Path, inputs: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.iterdir())
    shown(inputs[0], tokenizer, "--show", "2")()
    output = capsys.readouterr().out
    assert "\033" not in output
    assert output.count("\nrow ") == 2 and f"row 2: {inputs[0]}, row 2" in output
    assert "  user       add 1\n  assistant  print(1)\n" in output
    loss = next(line for line in output.splitlines() if line.startswith("  loss "))
    assert loss.split()[-1].startswith("pr|in|t") and loss.endswith("<|im_end|>")
    assert sorted(tmp_path.iterdir()) == before


def test_show_packed_rows_and_others(
    tmp_path: Path, tokenizer: Path, inputs: list[Path], capsys: pytest.CaptureFixture[str]
) -> None:
    shown(inputs[1], tokenizer, "--show", "1", "--neat-pack", "--seq-length", "128")()
    output = capsys.readouterr().out
    assert "the first 64 rows, packed to 128 tokens" in output
    assert "---- 1: positions 0 to " in output and "---- 2: positions " in output
    pairs = tmp_path / "pairs.json"
    pairs.write_text(json.dumps([{"instruction": "Q", "chosen": "a\x1b[31m", "rejected": "b"}]))
    shown(pairs, tokenizer, "--show", "5")()
    output = capsys.readouterr().out
    assert "chosen: " in output and "rejected: " in output and "\x1b" not in output
    text = tmp_path / "text.txt"
    text.write_text("one two\nthree\n")
    job = ["--input", str(text), "--tokenizer-name-or-path", str(tokenizer), "--show", "3"]
    show(parse("preprocess", job))
    assert "text: " in capsys.readouterr().out


def test_show_in_colour(tokenizer: Path, inputs: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    import io

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    words = ["--input", str(inputs[0]), "--tokenizer-name-or-path", str(tokenizer), "--show", "1"]
    job = parse("preprocess", [*words, "--prompt-type", "llama2"])
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    colourful, plain = Terminal(), Terminal()
    show(job, colourful)
    assert "\033[1;32m" in colourful.getvalue()
    monkeypatch.setenv("NO_COLOR", "1")
    show(job, plain)
    assert "\033" not in plain.getvalue()


def test_merging(tmp_path: Path, tokenizer: Path, inputs: list[Path]) -> None:
    parts = tmp_path / "parts"
    run(inputs[0], tokenizer, parts / "a")
    run(inputs[1], tokenizer, parts / "b")
    run(",".join(map(str, inputs)), tokenizer, tmp_path / "whole")
    keys = [f"packed_{key}_document" for key in ("input_ids", "attention_mask", "labels")]
    words = ["--input", str(parts), "--output-prefix", str(tmp_path / "merged"), "--merge-group-keys", *keys]
    merge(parse("preprocess", words))
    for key in keys:
        for suffix in (".bin", ".idx"):
            merged, whole = (tmp_path / f"{name}_{key}{suffix}" for name in ("merged", "whole"))
            assert merged.read_bytes() == whole.read_bytes()
    with pytest.raises(Refused, match="--merge-group-keys nothing: no data set in"):
        merge(parse("preprocess", [*words, "nothing"]))
    (parts / "b_packed_labels_document.idx").unlink()
    with pytest.raises(Refused, match=r"b_packed_labels_document\.idx is missing"):
        merge(parse("preprocess", words))


def test_merging_again_does_not_take_in_what_was_merged(
    tmp_path: Path, inputs: list[Path], tokenizer: Path
) -> None:
    run(inputs[1], tokenizer, tmp_path / "parts" / "a")
    run(inputs[1], tokenizer, tmp_path / "parts" / "b")
    key = "packed_input_ids_document"
    words = ["--input", str(tmp_path / "parts"), "--output-prefix", str(tmp_path / "parts" / "all")]
    for _ in range(2):
        merge(parse("preprocess", [*words, "--merge-group-keys", key]))
        assert len(IndexedDataset(tmp_path / "parts" / f"all_{key}")) == 2 * len(SHAREGPT_ROWS)


def test_merging_does_not_lose_weights(tmp_path: Path, inputs: list[Path], tokenizer: Path) -> None:
    weighted = tmp_path / "weighted.jsonl"
    rows = [{**row, "weight": 0.5} for row in SHAREGPT_ROWS[:3]]
    weighted.write_text("".join(json.dumps(row) + "\n" for row in rows))
    parts = tmp_path / "parts"
    run(weighted, tokenizer, parts / "a")
    keys = [f"packed_{key}_document" for key in ("input_ids", "attention_mask", "labels")]
    words = ["--input", str(parts), "--output-prefix", str(tmp_path / "all"), "--merge-group-keys", *keys]
    with pytest.raises(Refused, match="a_packed_loss_weights_document weighs labels .*left behind"):
        merge(parse("preprocess", words))
    words.append("packed_loss_weights")
    merge(parse("preprocess", words))
    run(inputs[1], tokenizer, parts / "b")
    with pytest.raises(Refused, match="parts/b has no weights of its labels"):
        merge(parse("preprocess", words))


def test_an_input_that_is_never_drawn_never_ends(tmp_path: Path, inputs: list[Path], tokenizer: Path) -> None:
    flags = ["--mix-strategy", "interleave_over", "--interleave-probs", "1,0"]
    with pytest.raises(Refused, match="--interleave-probs 1,0: an input that is never drawn never ends"):
        run(",".join(map(str, inputs)), tokenizer, tmp_path / "mixed", *flags)
