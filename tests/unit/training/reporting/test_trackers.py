"""Experiment trackers; the packages themselves where they are installed, without a network."""

from __future__ import annotations

import importlib.util
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from mindspeed_lora.config.commands import parse
from mindspeed_lora.config.logging import LoggingConfig
from mindspeed_lora.errors import Refused
from mindspeed_lora.training.reporting import EvaluationRecord, trackers
from mindspeed_lora.training.reporting.scalars import Scalars
from mindspeed_lora.training.reporting.tracker_runs import TrackedRun
from mindspeed_lora.training.reporting.trackers import Trackers, check_trackers
from tests.unit.training.reporting.records import step_record


class Recorded:
    """In the place of a package's run."""

    def __init__(self, run: TrackedRun) -> None:
        self.run = run
        self.logged: list[tuple[int, Scalars]] = []
        self.finished = False

    def log(self, values: Scalars, iteration: int) -> None:
        self.logged.append((iteration, values))

    def finish(self) -> None:
        self.finished = True


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[Recorded]:
    """The runs that were opened, of whatever tracker."""
    runs: list[Recorded] = []

    def open_run(run: TrackedRun) -> Recorded:
        runs.append(Recorded(run))
        return runs[-1]

    for name in trackers.OPENERS:
        monkeypatch.setitem(trackers.OPENERS, name, open_run)
    return runs


def config(*words: str) -> LoggingConfig:
    job = parse("posttrain", ["--data-path", "rows", "--lora-r", "4", *words])
    assert isinstance(job.logging, LoggingConfig)
    return job.logging


def track(logging: LoggingConfig, save: Path, notices: list[str], resumed: int = 0) -> None:
    """Steps 1 and 2 after the resumed one, and an evaluation."""
    every = Trackers(logging, save, resumed > 0, {"lr": 1e-4}, notices.append)
    for iteration in range(resumed + 1, resumed + 3):
        every.step(step_record(iteration, lm_loss=float(iteration)), 8)
    every.evaluation(EvaluationRecord(resumed + 2, 1.5, 10))
    every.close()


@pytest.mark.parametrize(
    ("words", "expected", "events"),
    [
        ((), (), True),
        (("--wandb-project", "p"), ("wandb",), True),
        (("--report-to", "none"), (), False),
        (("--report-to", "none", "--wandb-project", "p"), (), False),
        (("--report-to", "tensorboard"), (), True),
        (("--report-to", "tensorboard,wandb,swanlab,mlflow"), ("wandb", "swanlab", "mlflow"), True),
        (("--report-to", "mlflow", "wandb"), ("mlflow", "wandb"), False),
    ],
)
def test_who_is_asked_for(words: tuple[str, ...], expected: tuple[str, ...], events: bool) -> None:
    assert config(*words).trackers == expected
    assert config(*words).events is events


def test_an_unknown_name() -> None:
    with pytest.raises(Refused, match="--report-to comet: expected names among tensorboard, wandb"):
        config("--report-to", "comet")


def test_a_missing_package_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check_trackers(config())
    with pytest.raises(Refused, match=r"--report-to mlflow: .*pip install mlflow \(or mlflow-skinny\)"):
        check_trackers(config("--report-to", "mlflow"))
    with pytest.raises(Refused, match="--wandb-project: the package wandb is not installed"):
        check_trackers(config("--wandb-project", "p"))


def test_values_names_and_resuming(opened: list[Recorded], tmp_path: Path) -> None:
    notices: list[str] = []
    names = ("--wandb-project", "p", "--wandb-exp-name", "e", "--wandb-save-dir", str(tmp_path / "w"))
    track(config("--report-to", "wandb,mlflow", *names), tmp_path, notices)
    wandb, mlflow = opened if opened[0].run.folder.name == "w" else reversed(opened)
    assert (wandb.run.project, wandb.run.name, wandb.run.folder) == ("p", "e", tmp_path / "w")
    assert mlflow.run.folder == tmp_path / "mlflow" and mlflow.run.config == {"lr": 1e-4}
    iterations = [iteration for iteration, _ in wandb.logged]
    assert iterations == [1, 2, 2] and wandb.finished and not notices
    assert wandb.logged[1][1]["lm loss"] == 2.0 and wandb.logged[2][1]["lm loss validation"] == 1.5
    track(config("--wandb-project", "p"), tmp_path, notices, resumed=2)
    assert opened[2].run.id == wandb.run.id and opened[2].run.resumed
    track(config("--wandb-project", "p"), tmp_path, notices)
    assert opened[3].run.id != wandb.run.id, "a fresh run"


def test_what_fails_is_one_notice(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(run: TrackedRun) -> Any:
        raise SystemExit("no network")

    class Failing(Recorded):
        def log(self, values: Scalars, iteration: int) -> None:
            raise ValueError("disk\nfull")

    monkeypatch.setitem(trackers.OPENERS, "wandb", fail)
    monkeypatch.setitem(trackers.OPENERS, "mlflow", Failing)
    notices: list[str] = []
    track(config("--report-to", "wandb,mlflow"), tmp_path, notices)
    assert sorted(notices) == [
        "mlflow gets no more values: disk full",
        "wandb gets no more values: no network",
    ]


def test_a_tracker_that_hangs_holds_up_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    release = threading.Event()

    def hang(run: TrackedRun) -> Any:
        release.wait(30)
        return Recorded(run)

    monkeypatch.setitem(trackers.OPENERS, "swanlab", hang)
    monkeypatch.setattr(trackers, "_CLOSING_SECONDS", 0.1)
    notices: list[str] = []
    started = time.monotonic()
    track(config("--report-to", "swanlab"), tmp_path, notices)
    assert time.monotonic() - started < 5
    assert len(notices) == 1 and "not written yet" in notices[0]
    release.set()


def test_wandb_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    notices: list[str] = []
    track(config("--wandb-project", "p"), tmp_path, notices)
    assert not notices
    files = list((tmp_path / "wandb").rglob("*.wandb"))
    assert len(files) == 1 and files[0].stat().st_size > 0


def test_mlflow_in_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    notices: list[str] = []
    for resumed in (0, 2):
        track(config("--report-to", "mlflow"), tmp_path, notices, resumed)
    assert not notices
    client = mlflow.MlflowClient(tracking_uri=(tmp_path / "mlflow").as_uri())
    (run,) = client.search_runs([client.get_experiment_by_name("mindspeed_lora").experiment_id])
    history = client.get_metric_history(run.info.run_id, "lm loss")
    assert [(metric.step, metric.value) for metric in history] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 4.0)]
    assert run.info.status == "FINISHED" and run.data.params["lr"] == "0.0001"


def test_swanlab_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("swanlab")
    monkeypatch.setenv("SWANLAB_MODE", "offline")
    notices: list[str] = []
    track(config("--report-to", "swanlab"), tmp_path, notices)
    assert not notices
    assert any((tmp_path / "swanlab").rglob("*"))
