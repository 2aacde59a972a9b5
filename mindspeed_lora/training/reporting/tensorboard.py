"""Tensorboard events under the names that Megatron gives them.

A logger must never stop a run: the first error switches it off, with one notice. So the events are written
here and at once, not by the thread of a summary writer, whose errors cannot be caught where they happen.
"""

from __future__ import annotations

import importlib.util
import os
import socket
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mindspeed_lora.training.reporting.records import EvaluationRecord, StepRecord
from mindspeed_lora.training.reporting.scalars import evaluation_scalars, step_scalars


def tensorboard_installed() -> bool:
    """Whether the package is there; nothing is imported."""
    return importlib.util.find_spec("tensorboard") is not None


class TensorboardEvents:
    """Event files in ``folder``, beginning after iteration ``resumed_iteration``."""

    def __init__(
        self, folder: Path, resumed_iteration: int, global_batch_size: int, notice: Callable[[str], None]
    ) -> None:
        """``notice`` is called with one sentence when events can no longer be written."""
        self._notice = notice
        self._global_batch_size = global_batch_size
        self._consumed_samples = resumed_iteration * global_batch_size
        # Events of steps that an earlier process did and this one does again are hidden; a fresh run hides
        # all of the folder's.
        purge_step = resumed_iteration + 1 if resumed_iteration > 0 else 0
        self._file: EventFile | None = None
        try:
            self._file = EventFile(folder, purge_step)
        except Exception as error:
            self._switch_off(error)

    def step(self, record: StepRecord) -> None:
        """Write the scalars of a step."""
        self._consumed_samples = record.consumed_samples
        by_both, by_iteration = step_scalars(record, self._global_batch_size)
        self._write(by_both, by_iteration, record.iteration)

    def evaluation(self, record: EvaluationRecord) -> None:
        """Write the scalars of an evaluation."""
        self._write(evaluation_scalars(record), {}, record.iteration)

    def close(self) -> None:
        """Close the file; harmless when closed or switched off."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _write(self, by_both: dict[str, float], by_iteration: dict[str, float], iteration: int) -> None:
        """Write scalars over the iteration, and the first ones over the consumed samples too."""
        if self._file is None:
            return
        try:
            self._file.scalars({**by_both, **by_iteration}, iteration)
            by_samples = {f"{tag} vs samples": value for tag, value in by_both.items()}
            self._file.scalars(by_samples, self._consumed_samples)
        except Exception as error:
            self._switch_off(error)

    def _switch_off(self, error: Exception) -> None:
        self.close()
        reason = " ".join(str(error).split()) or type(error).__name__
        self._notice(f"no more tensorboard events are written: {reason}")


class EventFile:
    """One event file; each event is in it, whole, when the call that wrote it returns."""

    def __init__(self, folder: Path, purge_step: int) -> None:
        """Make the file; what earlier files of the folder have from ``purge_step`` on is hidden."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        self._event: Any = Event
        self._summary: Any = Summary
        folder.mkdir(parents=True, exist_ok=True)
        # The reader takes the files of a folder in the order of their names: the time goes first.
        name = f"events.out.tfevents.{time.time():017.6f}.{socket.gethostname()}.{os.getpid()}"
        self._file = (folder / name).open("xb", buffering=0)
        self._records: Any = RecordWriter(self._file)
        try:
            self._add(file_version="brain.Event:2")
            self._add(step=purge_step, session_log=SessionLog(status=SessionLog.START))
        except BaseException:
            self.close()
            raise

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Write the values of a step, by tag."""
        entries = [self._summary.Value(tag=tag, simple_value=float(value)) for tag, value in values.items()]
        self._add(step=int(step), summary=self._summary(value=entries))

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _add(self, **fields: Any) -> None:
        event = self._event(wall_time=time.time(), **fields)
        self._records.write(event.SerializeToString())
