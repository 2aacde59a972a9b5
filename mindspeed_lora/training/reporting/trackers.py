"""Weights & Biases, SwanLab and MLflow: the scalars of a run in the user's experiment tracker.

None of them is needed to train, and none may hold up a run: each lives in a thread of its own, which makes the
connection, gets the values from a queue, and is given up, with one notice, when something in it fails.
"""

from __future__ import annotations

import importlib.util
import json
import queue
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mindspeed_lora.atomic import atomic_text
from mindspeed_lora.config.logging import LoggingConfig
from mindspeed_lora.errors import Refused
from mindspeed_lora.training.reporting.records import EvaluationRecord, StepRecord
from mindspeed_lora.training.reporting.scalars import Scalars, evaluation_scalars, step_scalars
from mindspeed_lora.training.reporting.tracker_runs import OPENERS, TrackedRun, Tracker

RUNS_FILE = "trackers.json"
"""Under ``--save``: the trackers' names of this run, by which a resumed run goes on in them."""
_WAITING = 10_000
_CLOSING_SECONDS = 20.0
"""For all trackers together: a scheduler may not wait longer for the end of a run."""
_PACKAGES = {"mlflow": "mlflow (or mlflow-skinny)"}


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
