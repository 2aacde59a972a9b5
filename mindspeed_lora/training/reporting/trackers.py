"""Weights & Biases, SwanLab and MLflow: the scalars of a run in the user's experiment tracker.

None of them is needed to train, and none may hold up a run: each lives in a thread of its own, which makes the
connection, gets the values from a queue, and is given up, with one notice, when something in it fails.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import queue
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Any, Protocol

from mindspeed_lora.atomic import atomic_text
from mindspeed_lora.config.logging import LoggingConfig
from mindspeed_lora.errors import Refused
from mindspeed_lora.training.reporting.records import EvaluationRecord, StepRecord
from mindspeed_lora.training.reporting.scalars import Scalars, evaluation_scalars, step_scalars

RUNS_FILE = "trackers.json"
"""Under ``--save``: the trackers' names of this run, by which a resumed run goes on in them."""
_WAITING = 10_000
_CLOSING_SECONDS = 20.0
"""For all trackers together: a scheduler may not wait longer for the end of a run."""
_PACKAGES = {"mlflow": "mlflow (or mlflow-skinny)"}


class Tracker(Protocol):
    """An open run of a tracker."""

    def log(self, values: Scalars, iteration: int) -> None:
        """Add the values of an iteration."""

    def finish(self) -> None:
        """End the run."""


@dataclass(frozen=True, kw_only=True)
class TrackedRun:
    """What a tracker is told of a run at its start."""

    project: str
    name: str
    id: str
    """The same where the run is resumed."""
    folder: Path
    """For files that the tracker keeps here."""
    config: Mapping[str, Any]
    resumed: bool


class Wandb:
    """A run of Weights & Biases; offline where ``WANDB_MODE`` says so, or nobody has logged in."""

    def __init__(self, run: TrackedRun) -> None:
        wandb: Any = importlib.import_module("wandb")

        run.folder.mkdir(parents=True, exist_ok=True)
        mode = os.environ.get("WANDB_MODE") or ("online" if _has_wandb_login() else "offline")
        self._run: Any = wandb.init(
            project=run.project,
            name=run.name,
            id=run.id,
            dir=str(run.folder),
            config=dict(run.config),
            mode=mode,
            resume="allow",
            settings=wandb.Settings(console="off", silent=True),
        )

    def log(self, values: Scalars, iteration: int) -> None:
        """Add the values of an iteration."""
        self._run.log(values, step=iteration)

    def finish(self) -> None:
        """End the run."""
        self._run.finish()


class Swanlab:
    """A run of SwanLab; offline where ``SWANLAB_MODE`` says so, or nobody has logged in."""

    def __init__(self, run: TrackedRun) -> None:
        swanlab: Any = importlib.import_module("swanlab")

        run.folder.mkdir(parents=True, exist_ok=True)
        logged_in = "SWANLAB_API_KEY" in os.environ or (Path.home() / ".swanlab" / ".netrc").exists()
        mode = os.environ.get("SWANLAB_MODE") or ("cloud" if logged_in else "offline")
        online = {"id": run.id, "resume": "allow"} if mode == "cloud" else {}
        self._swanlab = swanlab
        swanlab.init(
            project=run.project,
            experiment_name=run.name,
            logdir=str(run.folder),
            config=dict(run.config),
            mode=mode,
            **online,
        )

    def log(self, values: Scalars, iteration: int) -> None:
        """Add the values of an iteration."""
        self._swanlab.log(values, step=iteration)

    def finish(self) -> None:
        """End the run."""
        self._swanlab.finish()


class Mlflow:
    """A run of MLflow: at ``MLFLOW_TRACKING_URI``, else in a database file under ``--save``."""

    def __init__(self, run: TrackedRun) -> None:
        mlflow: Any = importlib.import_module("mlflow")

        uri = os.environ.get("MLFLOW_TRACKING_URI")
        if uri is None:
            run.folder.mkdir(parents=True, exist_ok=True)
            # What MLflow keeps in files is being given up by it, a database of its own needs the full package.
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
            uri = run.folder.resolve().as_uri()
        self._client: Any = mlflow.MlflowClient(tracking_uri=uri)
        found = self._client.get_experiment_by_name(run.project)
        experiment = found.experiment_id if found is not None else self._client.create_experiment(run.project)
        known = self._known(experiment, run) if run.resumed else None
        if known is None:
            made = self._client.create_run(experiment, run_name=run.name, tags={"run": run.id})
            self._id = made.info.run_id
            for key, value in run.config.items():
                self._client.log_param(self._id, key, str(value)[:500])
        else:
            self._id = known
            self._client.update_run(self._id, status="RUNNING")

    def _known(self, experiment: str, run: TrackedRun) -> str | None:
        """The run that a resumed one goes on in."""
        runs = self._client.search_runs([experiment], filter_string=f"tags.run = '{run.id}'")
        return str(runs[0].info.run_id) if runs else None

    def log(self, values: Scalars, iteration: int) -> None:
        """Add the values of an iteration."""
        for key, value in values.items():
            self._client.log_metric(self._id, key, value, step=iteration)

    def finish(self) -> None:
        """End the run."""
        self._client.set_terminated(self._id)


OPENERS: dict[str, Callable[[TrackedRun], Tracker]] = {"wandb": Wandb, "swanlab": Swanlab, "mlflow": Mlflow}


class BackgroundTracker:
    """A tracker in a thread of its own, until something in it fails."""

    def __init__(self, name: str, open_run: Callable[[], Tracker], notice: Callable[[str], None]) -> None:
        """``notice`` is called, by the thread that calls the methods, with one sentence when it is given up."""
        self._name = name
        self._notice = notice
        self._values: queue.Queue[tuple[Scalars, int] | None] = queue.Queue(_WAITING)
        self._error: str | None = None
        self._told = False
        self._thread = threading.Thread(target=self._work, args=(open_run,), name=name, daemon=True)
        self._thread.start()

    def log(self, values: Scalars, iteration: int) -> None:
        """Hand over the values of an iteration; never waits."""
        self._tell()
        if self._error is None:
            try:
                self._values.put_nowait((values, iteration))
            except queue.Full:
                self._error = f"it is {_WAITING} steps behind"

    def end(self) -> None:
        """No more values will come."""
        if self._error is None:
            try:
                self._values.put_nowait(None)
            except queue.Full:
                self._error = f"it is {_WAITING} steps behind"

    def close(self, seconds: float) -> None:
        """Wait until all is written, after :meth:`end`, so long at most."""
        if self._error is None:
            self._thread.join(seconds)
            if self._error is None and self._thread.is_alive():
                self._error = "its last values are not written yet, and the run has ended"
        self._tell()

    def _work(self, open_run: Callable[[], Tracker]) -> None:
        try:
            run = open_run()
            while self._error is None and (entry := self._values.get()) is not None:
                run.log(*entry)
            run.finish()
        # A package may leave by sys.exit where it cannot go on.
        except BaseException as error:
            self._error = " ".join(str(error).split())[:300] or type(error).__name__

    def _tell(self) -> None:
        if self._error is not None and not self._told:
            self._told = True
            self._notice(f"{self._name} gets no more values: {self._error}")


class Trackers:
    """All trackers of a run; without any it does nothing."""

    def __init__(
        self,
        logging: LoggingConfig,
        save: Path | None,
        resumed: bool,
        config: Mapping[str, Any],
        notice: Callable[[str], None],
    ) -> None:
        names = logging.trackers
        ids = _ids(names, save, resumed)
        run = f"{save.resolve().name}" if save is not None else "run"
        where = save if save is not None else Path()
        self._open = []
        for name in names:
            own = Path(logging.wandb_save_dir) if name == "wandb" and logging.wandb_save_dir else where / name
            tracked = TrackedRun(
                project=logging.wandb_project or "mindspeed_lora",
                name=logging.wandb_exp_name or run,
                id=ids[name],
                folder=own,
                config=config,
                resumed=resumed,
            )
            opener = OPENERS[name]
            self._open.append(
                BackgroundTracker(name, lambda opener=opener, tracked=tracked: opener(tracked), notice)  # type: ignore[misc]
            )

    def step(self, record: StepRecord, global_batch_size: int) -> None:
        """Hand over a step."""
        if self._open:
            by_both, by_iteration = step_scalars(record, global_batch_size)
            self._log({**by_both, **by_iteration, **record.router_losses}, record.iteration)

    def evaluation(self, record: EvaluationRecord) -> None:
        """Hand over an evaluation."""
        self._log(evaluation_scalars(record), record.iteration)

    def close(self) -> None:
        """End all runs; harmless when ended."""
        deadline = time.monotonic() + _CLOSING_SECONDS
        for tracker in self._open:
            tracker.end()
        while self._open:
            self._open.pop().close(max(0.0, deadline - time.monotonic()))

    def _log(self, values: Scalars, iteration: int) -> None:
        for tracker in self._open:
            tracker.log(values, iteration)


def check_trackers(logging: LoggingConfig) -> None:
    """Refuse a tracker whose package is not installed, before hours of training that it was to show.

    Raises:
        Refused: with the name for pip.
    """
    for name in (*logging.trackers, *(["tensorboard"] if "tensorboard" in logging.reports else [])):
        if importlib.util.find_spec(name) is None:
            flag = f"--report-to {name}" if name in logging.reports else "--wandb-project"
            raise Refused(
                f"{flag}: the package {name} is not installed here; pip install {_PACKAGES.get(name, name)}, "
                "or leave the flag out"
            )


def _ids(names: tuple[str, ...], save: Path | None, resumed: bool) -> dict[str, str]:
    """A name of the run for each tracker; a resumed run has those of before."""
    file = save / RUNS_FILE if save is not None else None
    known: dict[str, str] = {}
    if file is not None and resumed and file.is_file():
        try:
            known = {str(key): str(value) for key, value in json.loads(file.read_text("utf-8")).items()}
        except (OSError, ValueError, AttributeError):
            known = {}
    ids = {name: known.get(name) or secrets.token_hex(8) for name in names}
    if file is not None and names and ids != known:
        try:
            atomic_text(file, json.dumps({**known, **ids}, indent=2) + "\n")
        except OSError:
            # The run then only cannot be gone on with in its trackers.
            return ids
    return ids


def _has_wandb_login() -> bool:
    """Whether a key is there, without which the package would ask for one at the terminal."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").partition("//")[2].partition("/")[0]
    try:
        return netrc(os.environ.get("NETRC")).authenticators(host.partition(":")[0]) is not None
    except (OSError, NetrcParseError):
        return False
