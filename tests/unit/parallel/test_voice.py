"""Which error a process ends with, in a world of one."""

from __future__ import annotations

import pytest

from mindspeed_lora.errors import Failed, PeerFailure
from mindspeed_lora.parallel.groups import ParallelGroups
from mindspeed_lora.parallel.voice import speak_or_leave


@pytest.mark.parametrize(
    "error", [ValueError("mine"), Failed("a full disk"), RuntimeError("gloo: connection closed by peer")]
)
def test_one_process_ends_with_its_own_error(groups: ParallelGroups, error: Exception) -> None:
    assert speak_or_leave(error, groups) is error


def test_silence_stays_silence(groups: ParallelGroups) -> None:
    error = PeerFailure(0)
    assert speak_or_leave(error, groups) is error
