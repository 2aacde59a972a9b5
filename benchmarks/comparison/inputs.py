"""Makes what both sides read: the prepared rows, once, and the adapter from which both start."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from comparison.process import run_child
from comparison.setting import Inputs, Setting
from mindspeed_lora.errors import Refused


def make_inputs(setting: Setting, folder: Path, full_rows: bool = False) -> Inputs:
    """Prepare the rows with ``preprocess_data.py`` and write a starting adapter, all in ``folder``.

    With ``full_rows`` they are put together to rows of exactly ``seq_length`` tokens.

    Raises:
        Refused: the data file cannot be read.
    """
    prefix = folder / "rows"
    source = first_rows(Path(setting.data), setting.rows, folder)
    command = ["preprocess_data.py", "--input", str(source), "--output-prefix", str(prefix)]
    command += ["--tokenizer-name-or-path", setting.model, "--prompt-type", setting.prompt_type]
    command += ["--seq-length", str(setting.seq_length), "--overwrite", *(["--pack"] if full_rows else [])]
    run_child(command, setting.threads, folder / "preprocess.log")
    return inputs_of_rows(setting, prefix, folder)


def inputs_of_rows(setting: Setting, prefix: Path, folder: Path, tokenizer: Path | None = None) -> Inputs:
    """The inputs of rows that are prepared already, with a starting adapter, in ``folder``."""
    request = folder / "inputs.json"
    request.write_text(json.dumps({"setting": asdict(setting), "prefix": str(prefix), "folder": str(folder)}))
    run_child(["-m", "comparison.inputs_child", str(request)], setting.threads, folder / "inputs.log")
    made = json.loads((folder / "made.json").read_text())
    return Inputs(
        data_prefix=str(prefix),
        rows_file=made["rows_file"],
        start_adapter=made["start_adapter"],
        tokenizer=None if tokenizer is None else str(tokenizer),
        lengths=tuple((tokens, loss_tokens) for tokens, loss_tokens in made["lengths"]),
    )


def first_rows(data: Path, count: int | None, folder: Path) -> Path:
    """The data file, or a copy with its first ``count`` rows."""
    if not data.is_file():
        raise Refused(f"--data {data}: no such file; give a JSON or JSONL file of instruction rows")
    if count is None:
        return data
    cut = folder / f"first_rows{data.suffix}"
    text = data.read_text(encoding="utf-8")
    if data.suffix == ".jsonl":
        cut.write_text("".join(text.splitlines(keepends=True)[:count]), encoding="utf-8")
        return cut
    try:
        rows = json.loads(text)
    except ValueError as error:
        raise Refused(f"--data {data}: no JSON ({error}); --rows cuts JSON and JSONL files only") from error
    if not isinstance(rows, list):
        raise Refused(f"--data {data}: holds no list of rows; --rows cuts a list, leave it out")
    cut.write_text(json.dumps(rows[:count]), encoding="utf-8")
    return cut
