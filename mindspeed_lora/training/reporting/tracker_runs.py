"""A run of Weights & Biases, SwanLab or MLflow, each behind the same two methods.

Offline is what their packages call it: nobody has to be logged in, and nothing ever asks for a key at a terminal.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from netrc import NetrcParseError, netrc
from pathlib import Path
from typing import Any, Protocol

from mindspeed_lora.training.reporting.scalars import Scalars


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


def _has_wandb_login() -> bool:
    """Whether a key is there, without which the package would ask for one at the terminal."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai").partition("//")[2].partition("/")[0]
    try:
        return netrc(os.environ.get("NETRC")).authenticators(host.partition(":")[0]) is not None
    except (OSError, NetrcParseError):
        return False
