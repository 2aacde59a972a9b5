"""The whole script on a tiny model: that it works and compares like with like. No figure is judged."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import train_vs_trl
from comparison.process import ROOT
from comparison.profile_parts import PARTS
from comparison.setting import Inputs, Setting
from comparison.sides import SideRun, Step

HAS_TRL = importlib.util.find_spec("trl") is not None


def run_script(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "benchmarks/train_vs_trl.py", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_steps_of_the_whole_comparison(model: str, data: str, tmp_path: Path) -> None:
    """More samples than rows, so that the rows start again."""
    out, sides = (
        tmp_path / "new" / "out.json",
        ["ours:packed", "trl:4", "trl:packed"] if HAS_TRL else ["ours:packed"],
    )
    done = run_script(
        *("--model", model, "--data", data, "--rows", "12"),
        *("--steps", "2", "--warmup", "1", "--repeats", "1"),
        *("--threads", "1"),
        *("--profile", "--json", str(out), "--sides", *sides),
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(out.read_text())
    assert [side["name"] for side in report["sides"]] == ["ours, packed", "TRL, batch 4", "TRL, packed"][
        : len(sides)
    ]
    assert report["first_losses_agree"]
    for side in report["sides"]:
        assert [len(run["steps"]) for run in side["runs"]] == [3]
        assert side["tokens_per_second"]["lowest"] > side["loss_tokens_per_second"]["lowest"] > 0
        assert side["peak_memory_bytes"] > 100e6
        assert side["real_share"] is None or 0 < side["real_share"] <= 1
        assert side["losses"] == [step["loss"] for step in side["runs"][0]["steps"]]
    if HAS_TRL:
        ours, peer, packed = report["sides"]
        assert packed["losses"] != peer["losses"]
        assert report["best_peer"] in (peer["name"], packed["name"])
        assert ours["losses"] == pytest.approx(peer["losses"], abs=1e-3)
        assert (
            report["ratios"][0]["peak_memory_bytes"] == ours["peak_memory_bytes"] / peer["peak_memory_bytes"]
        )
        assert "ours / TRL, batch 4" in done.stdout
    profile = report["profile"]
    assert tuple(profile["parts"]) == PARTS
    assert sum(p["ms"] for p in profile["parts"].values()) == pytest.approx(profile["profiled_step_ms"])
    assert all(part["ms"] > 0 for part in profile["parts"].values())
    assert profile["share_of_peak"] > 0
    for heading in (
        "real tokens/s",
        "peak resident memory, GB",
        "products with frozen weights",
        "command: python",
    ):
        assert heading in done.stdout
    assert {"cpu", "cores", "memory_bytes", "load_average"} <= set(report["machine"])
    assert {"torch", "megatron-core", "transformers"} <= set(report["versions"])
    assert report["setting"]["rows"] == 12


@dataclass(frozen=True)
class MadeSide:
    """A side that trains nothing and always has the same loss."""

    name: str
    loss: float
    rows_at_once: int = 8
    same_rows: bool = True

    def run(self, setting: Setting, inputs: Inputs, folder: Path) -> SideRun:
        assert folder.is_dir()
        return SideRun((Step(self.loss, 10.0, 80, 40),) * setting.num_steps, 1000, 1.0)


@pytest.mark.parametrize(("loss", "status"), [(2.5, 0), (2.50005, 0), (2.5002, 1), (float("nan"), 1)])
def test_losses_that_differ_are_told_loudly(
    loss: float,
    status: int,
    model: str,
    data: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    inputs = Inputs(data_prefix="p", rows_file="r", start_adapter="a", lengths=((10, 5),))
    monkeypatch.setattr(train_vs_trl, "make_inputs", lambda _setting, _folder: inputs)
    sides = [MadeSide("ours", 2.5), MadeSide("peer", loss)]
    monkeypatch.setattr(train_vs_trl, "_sides", lambda _options: sides)
    out = tmp_path / "out.json"
    found = train_vs_trl.main(["--model", model, "--data", data, "--repeats", "1", "--json", str(out)])
    shown = capsys.readouterr()
    assert found == status
    assert ("WARNING: the first loss of peer is" in shown.err) == bool(status)
    assert ("First losses agree" in shown.out) == (not status)
    assert json.loads(out.read_text())["first_losses_agree"] == (not status)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "/nowhere"], "--model /nowhere: there is no config.json"),
        (["--repeats", "0"], "--repeats 0 measures nothing"),
        (["--data", "/nowhere.json"], "--data /nowhere.json: no such file"),
        (["--sides", "ours:3"], "--sides ours:3: no such side"),
        (["--sides", "ours:1+kept"], "--sides ours:1+kept: no such side"),
    ],
)
def test_what_cannot_be_is_refused(
    arguments: list[str], message: str, model: str, data: str, capsys: pytest.CaptureFixture[str]
) -> None:
    status = train_vs_trl.main(["--sides", "ours:1", "--model", model, "--data", data, *arguments])
    assert status == 2
    assert message in capsys.readouterr().err


@pytest.mark.skipif(HAS_TRL, reason="TRL is installed")
def test_without_trl_one_sentence_tells_how_to_get_it(
    model: str, data: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_vs_trl.main(["--model", model, "--data", data]) == 2
    assert "make bench" in capsys.readouterr().err


def test_a_process_that_fails_leaves_its_log(
    model: str, data: str, capsys: pytest.CaptureFixture[str]
) -> None:
    bad = Path(data).with_name("bad.json")
    bad.write_text("[]")
    assert train_vs_trl.main(["--sides", "ours:1", "--model", model, "--data", str(bad)]) == 1
    message = capsys.readouterr().err
    assert "preprocess_data.py" in message
    log = Path(message.rpartition("its output is in ")[2].strip())
    assert log.read_text()


def test_sides_take_turns(
    model: str, data: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs = Inputs(data_prefix="p", rows_file="r", start_adapter="a", lengths=((10, 5),))
    monkeypatch.setattr(train_vs_trl, "make_inputs", lambda _setting, _folder: inputs)
    monkeypatch.setattr(train_vs_trl, "_sides", lambda _options: [MadeSide("a", 1.0), MadeSide("b", 1.0)])
    assert train_vs_trl.main(["--model", model, "--data", data, "--repeats", "2"]) == 0
    turns = [line.split(":")[0] for line in capsys.readouterr().err.splitlines() if " of 2:" in line]
    assert turns == ["a, 1 of 2", "b, 1 of 2", "a, 2 of 2", "b, 2 of 2"]
