"""Copies between host and device beside what is computed, in an order of their own."""

from __future__ import annotations

import contextlib
from typing import Protocol

import torch

from mindspeed_lora.device.runtime import current_device


class CopyStream(Protocol):
    """Copies that follow one another."""

    pins: bool
    """Whether memory of the host has to be pinned for them."""

    @property
    def device(self) -> torch.device:
        """Where the copies are computed on."""
        ...

    def copying(self) -> contextlib.AbstractContextManager[object]:
        """What is copied within follows the copies before it, beside what is computed."""
        ...

    def mark(self) -> object:
        """The copies that have been asked for until now."""
        ...

    def used_after(self, mark: object) -> None:
        """What is computed from now on waits for the copies of a mark."""
        ...

    def copied_after_use(self) -> None:
        """What is copied from now on waits for what has been asked to be computed."""
        ...

    def finish(self) -> None:
        """Waits on the host until all copies have been made."""
        ...


class CudaCopyStream:
    """A CUDA stream."""

    pins = True

    def __init__(self) -> None:
        self._stream = torch.cuda.Stream()

    @property
    def device(self) -> torch.device:
        """Where the copies are computed on."""
        return current_device()

    def copying(self) -> contextlib.AbstractContextManager[object]:
        """What is copied within follows the copies before it."""
        stream: contextlib.AbstractContextManager[object] = torch.cuda.stream(self._stream)
        return stream

    def mark(self) -> object:
        """An event of the copying stream."""
        return self._stream.record_event()

    def used_after(self, mark: object) -> None:
        """The computing stream waits for the event."""
        assert isinstance(mark, torch.cuda.Event)
        torch.cuda.current_stream().wait_event(mark)

    def copied_after_use(self) -> None:
        """The copies wait for the computing stream."""
        self._stream.wait_stream(torch.cuda.current_stream())

    def finish(self) -> None:
        """Waits on the host until all copies have been made."""
        self._stream.synchronize()
