"""Published scripts with ``--dry-run`` appended, in one process, with none of the files that they name."""

from __future__ import annotations

from pathlib import Path

import pytest

from mindspeed_lora import entry
from tests.unit.config.test_published import REFUSED, SCRIPTS

FUNCTIONS = {
    "posttrain": entry._train,
    "pretrain": entry._train,
    "convert": entry._convert,
    "preprocess": entry._preprocess,
    "inference": entry._infer,
    "evaluation": entry._evaluate,
}


@pytest.mark.parametrize(("name", "command", "processes", "words"), SCRIPTS, ids=[s[0] for s in SCRIPTS])
def test_a_script(
    name: str,
    command: str,
    processes: int,
    words: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    launched = ["--world-size", str(processes)] if command in ("posttrain", "inference", "evaluation") else []
    with pytest.raises(SystemExit) as left:
        entry.run(command, [*words, *launched, "--dry-run"], FUNCTIONS[command])
    shown = capsys.readouterr()
    if name in REFUSED:
        assert left.value.code == 0 or REFUSED[name] in shown.err
        return
    assert left.value.code == 0, shown.err
    assert shown.out.splitlines()[-1].startswith("dry run: ")
    assert shown.err.count("no effect here") <= 1 and "is not there" in shown.err
    assert list(tmp_path.iterdir()) == []
