"""What a run reports."""

from __future__ import annotations

from dataclasses import dataclass

from mindspeed_lora.config.flags import AT_LEAST_ONE, Check, Section, flag

TRACKERS = ("wandb", "swanlab", "mlflow")
_REPORTS = ("tensorboard", *TRACKERS, "none")
_KNOWN_REPORTS = Check(
    f"names among {', '.join(_REPORTS)}, separated by commas",
    lambda text: all(word in _REPORTS for word in text.split(",") if word),
)


@dataclass(frozen=True, kw_only=True)
class LoggingConfig(Section):
    """Iteration lines, tensorboard and experiment trackers."""

    log_interval: int = flag("steps between iteration lines", 1, check=AT_LEAST_ONE)
    log_throughput: bool = flag("add tokens and TFLOP per second to the iteration line", False)
    tensorboard_log_interval: int = flag("steps between tensorboard events", 1, check=AT_LEAST_ONE)
    tensorboard_dir: str | None = flag(
        "folder of tensorboard events; left out: <save>/tensorboard", metavar="DIR"
    )
    report_to: tuple[str, ...] | None = flag(
        "who gets the values of the steps: tensorboard, wandb, swanlab, mlflow, none; left out: tensorboard, and "
        "wandb with --wandb-project",
        check=_KNOWN_REPORTS,
        metavar="NAME[,NAME]",
    )
    wandb_project: str | None = flag(
        "project (of MLflow: experiment) of the trackers; left out: mindspeed_lora"
    )
    wandb_exp_name: str | None = flag("name of the run in the trackers; left out: that of the folder --save")
    wandb_save_dir: str | None = flag("folder of wandb's files; left out: <save>/wandb", metavar="DIR")

    @property
    def reports(self) -> tuple[str, ...]:
        """The names of ``--report-to``, each once, in their order."""
        words = [word for text in self.report_to or () for word in text.split(",") if word]
        return tuple(dict.fromkeys(words))

    @property
    def trackers(self) -> tuple[str, ...]:
        """The experiment trackers that are asked for."""
        if self.report_to is None:
            return ("wandb",) if self.wandb_project else ()
        return tuple(name for name in self.reports if name in TRACKERS)

    @property
    def events(self) -> bool:
        """Whether tensorboard events are to be written where nothing names their folder."""
        return self.report_to is None or "tensorboard" in self.reports
