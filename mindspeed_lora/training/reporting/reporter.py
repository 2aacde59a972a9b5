"""What a run tells while it goes: the lines on the console, the metrics, the events and the picture."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from mindspeed_lora.config.logging import LoggingConfig
from mindspeed_lora.training.reporting.console import Console
from mindspeed_lora.training.reporting.iteration_line import evaluation_lines, iteration_line
from mindspeed_lora.training.reporting.layout import ParameterCounts, layout_lines
from mindspeed_lora.training.reporting.metrics import MetricsFile
from mindspeed_lora.training.reporting.model_flops import ModelFlops, tflops_per_gpu
from mindspeed_lora.training.reporting.plot import draw_loss
from mindspeed_lora.training.reporting.progress import Progress
from mindspeed_lora.training.reporting.records import EvaluationRecord, StepRecord
from mindspeed_lora.training.reporting.tensorboard import TensorboardEvents, tensorboard_installed
from mindspeed_lora.training.reporting.trackers import Trackers

TENSORBOARD_FOLDER = "tensorboard"


class Reporter:
    """Rank 0's voice; the other ranks have :meth:`silent`, which has the same methods and does nothing.

    To be made when the iteration to start from is known and before the first step: it cuts the metrics of
    later iterations. A context manager, so that an error leaves the terminal and the files in order.
    """

    def __init__(
        self,
        logging: LoggingConfig,
        save: Path | None,
        total_steps: int,
        global_batch_size: int,
        resumed_iteration: int = 0,
        *,
        is_terminal: bool | None = None,
        world_size: int = 1,
        model_flops: ModelFlops | None = None,
        config: Mapping[str, Any] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """``is_terminal`` None: whether standard output is one. ``model_flops`` is for --log-throughput.

        ``config`` is what experiment trackers keep of the run's flags.
        """
        self._logging = logging
        self._total_steps = total_steps
        self._global_batch_size = global_batch_size
        self._world_size = world_size
        self._model_flops = model_flops if logging.log_throughput else None
        self._clock = clock
        self._iteration = resumed_iteration
        self._interval: list[StepRecord] = []
        self._told_of_metrics = False
        self._console = Console(is_terminal)
        self._progress = Progress(total_steps, self._console.is_terminal, clock())
        self._metrics = None if save is None else MetricsFile(save, resumed_iteration)
        self._events = self._open_events(save, resumed_iteration)
        self._trackers = Trackers(logging, save, resumed_iteration > 0, config or {}, self.notice)

    @staticmethod
    def silent() -> Reporter:
        """The voice of every rank but 0: none."""
        return SilentReporter()

    def notice(self, text: str) -> None:
        """One sentence that the user should know, on standard error."""
        self._console.notice(text)

    def layout(self, rows: Sequence[tuple[str, str]], counts: ParameterCounts | None = None) -> None:
        """Print the table of the layout (of :func:`layout_rows`) and the share of trained parameters."""
        self._console.line("\n".join(layout_lines(rows, counts)))

    def step(self, record: StepRecord) -> None:
        """Report a step that has ended: metrics, events, iteration line every --log-interval, progress."""
        self._iteration = record.iteration
        self._append(record.metrics())
        if self._events is not None and record.iteration % self._logging.tensorboard_log_interval == 0:
            self._events.step(record)
        self._trackers.step(record, self._global_batch_size)
        self._interval.append(record)
        if record.iteration % self._logging.log_interval == 0:
            self._print_interval()
        now = self._clock()
        self._progress.step(record, now)
        if self._progress.due(now):
            self._show_progress(now)

    def evaluation(self, record: EvaluationRecord) -> None:
        """Report an evaluation: metrics, events, Megatron's line."""
        self._append(record.metrics())
        if self._events is not None:
            self._events.evaluation(record)
        self._trackers.evaluation(record)
        self._console.line("\n".join(evaluation_lines(record)))

    def saved(self, path: Path, seconds: float) -> None:
        """Report a checkpoint that is whole on the disk, and bring the metrics there too."""
        if self._metrics is not None:
            self._tell_of_metrics(self._metrics.sync())
        self._console.line(
            f"  successfully saved checkpoint from iteration {self._iteration:7d} to {path} ({seconds:.1f} s)"
        )

    def finish(self) -> None:
        """End a run that is done or was stopped: draw ``loss.png`` and close everything."""
        metrics = self._metrics
        self.close()
        if metrics is None:
            return
        try:
            picture = draw_loss(metrics.path)
        except Exception as error:
            self.notice(f"loss.png is not drawn: {' '.join(str(error).split()) or type(error).__name__}")
            return
        if picture is not None:
            self._console.line(f"  loss curve: {picture}")

    def close(self) -> None:
        """Close the files and leave the live line; nothing is drawn. Harmless when closed."""
        self._console.close()
        if self._events is not None:
            self._events.close()
            self._events = None
        self._trackers.close()
        if self._metrics is not None:
            if self._metrics.flush() is not None:
                self.notice(f"{self._metrics.path} lacks its last {self._metrics.waiting} lines")
            self._metrics.close()
            self._metrics = None

    def __enter__(self) -> Reporter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _open_events(self, save: Path | None, resumed_iteration: int) -> TensorboardEvents | None:
        """Events where they were asked for; else under --save, where tensorboard is installed."""
        if self._logging.tensorboard_dir is not None:
            folder = Path(self._logging.tensorboard_dir)
        elif save is not None and self._logging.events and tensorboard_installed():
            folder = save / TENSORBOARD_FOLDER
        else:
            return None
        return TensorboardEvents(folder, resumed_iteration, self._global_batch_size, self.notice)

    def _show_progress(self, now: float) -> None:
        if self._console.is_terminal:
            self._console.live(self._progress.text(now, self._console.width))
        else:
            self._console.line(self._progress.text(now))

    def _print_interval(self) -> None:
        tflops = None
        if self._model_flops is not None:
            samples = self._global_batch_size * len(self._interval)
            tflops = tflops_per_gpu(self._model_flops, self._interval, samples, self._world_size)
        line = iteration_line(
            self._interval, self._total_steps, self._global_batch_size, datetime.now(), tflops
        )
        self._interval.clear()
        self._console.line(line)

    def _append(self, record: dict[str, object]) -> None:
        if self._metrics is not None:
            self._tell_of_metrics(self._metrics.append(record))

    def _tell_of_metrics(self, error: OSError | None) -> None:
        """Say once that metrics could not be written; they are tried again with the next step."""
        if error is not None and self._metrics is not None and not self._told_of_metrics:
            self._told_of_metrics = True
            self.notice(f"{self._metrics.path} cannot be written now: {error.strerror}")


class SilentReporter(Reporter):
    """A reporter that says and writes nothing."""

    def __init__(self) -> None:
        pass

    def notice(self, text: str) -> None:
        """Say nothing."""

    def layout(self, rows: Sequence[tuple[str, str]], counts: ParameterCounts | None = None) -> None:
        """Say nothing."""

    def step(self, record: StepRecord) -> None:
        """Say nothing."""

    def evaluation(self, record: EvaluationRecord) -> None:
        """Say nothing."""

    def saved(self, path: Path, seconds: float) -> None:
        """Say nothing."""

    def finish(self) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""
