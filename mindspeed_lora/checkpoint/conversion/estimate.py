"""What a conversion will take, as text.

Sizes of weights are exact: a plan has every byte of every file. The time is a range over rates of writing, since the
target's disk is not tried by writing to it; how fast the source reads is measured on its largest tensor.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mindspeed_lora.checkpoint.conversion.progress import readable_size
from mindspeed_lora.checkpoint.storage.manifest import MANIFEST_FILE

FAST, SLOW = 2e9, 1e8
"""Rates of writing that the time is told for, in bytes a second: a fast local disk, and a slow or remote one."""

PROCESS_BYTES = 300_000_000
"""What a conversion may take beside its tensors."""

_FILES_SHOWN = 12


@dataclass(frozen=True)
class Estimate:
    """What a conversion will take."""

    files: dict[str, int]
    """Exact size of every file of weights by path within the target."""
    small_bytes: int
    """About what configuration, tokenizer, index and checksums take."""
    largest: tuple[str, int]
    """The largest tensor and its bytes, as read or as written, whichever is more."""
    read_bytes: int
    workers: int
    read_rate: float | None = None
    """Bytes a second that the source was read at; None where it cannot be read."""

    @property
    def total_bytes(self) -> int:
        """Everything that is written."""
        return sum(self.files.values()) + self.small_bytes

    @property
    def peak_bytes(self) -> int:
        """Peak memory at most, above what Python and its libraries take."""
        return 2 * self.largest[1] * self.workers + PROCESS_BYTES

    def seconds(self, write_rate: float) -> float:
        """Duration where the target's disk takes so many bytes a second."""
        reading = self.read_bytes / self.read_rate if self.read_rate else 0.0
        return max(self.total_bytes / write_rate, reading)


def existing_folder(target: Path) -> Path:
    """The nearest folder above a target that is there."""
    return next(folder for folder in target.absolute().parents if folder.is_dir())


def estimate_lines(estimate: Estimate, target: Path) -> list[str]:
    """The estimate as text."""
    lines = [f"would write {target}"]
    shown = list(estimate.files.items())
    if len(shown) > _FILES_SHOWN:
        shown = [*shown[: _FILES_SHOWN - 1], shown[-1]]
    width = max(len(path) for path, _ in shown)
    lines += [f"  {path:<{width}}  {size:>18,} bytes" for path, size in shown]
    if len(estimate.files) > len(shown):
        lines.insert(-1, f"  … {len(estimate.files) - len(shown)} more")
    place = existing_folder(target)
    free = shutil.disk_usage(place).free
    holds = "holds it" if free >= estimate.total_bytes else "does not hold it"
    name, size = estimate.largest
    rows: Sequence[tuple[str, str]] = (
        (
            "weights",
            f"{readable_size(sum(estimate.files.values()))} in {len(estimate.files)} files "
            f"({sum(estimate.files.values()):,} bytes)",
        ),
        (
            "beside them",
            f"about {readable_size(estimate.small_bytes)} of configuration, tokenizer, {MANIFEST_FILE}",
        ),
        ("disk", f"{readable_size(free)} free at {place}: {holds}"),
        ("time", _time(estimate)),
        (
            "memory",
            f"at most {readable_size(estimate.peak_bytes)} above what the imports take: 2 × {readable_size(size)} "
            f"({name}) × {estimate.workers} workers + {readable_size(PROCESS_BYTES)}",
        ),
    )
    return [*lines, *(f"{title:<12} {text}" for title, text in rows)]


def _time(estimate: Estimate) -> str:
    fast, slow = estimate.seconds(FAST), estimate.seconds(SLOW)
    read = (
        f"; its source reads at {readable_size(estimate.read_rate)}/s (measured, perhaps from memory)"
        if estimate.read_rate
        else ""
    )
    return (
        f"{_duration(fast)} where the disk takes {readable_size(FAST)}/s, {_duration(slow)} at "
        f"{readable_size(SLOW)}/s (not tried){read}"
    )


def _duration(seconds: float) -> str:
    if seconds < 1:
        return "under 1 s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
