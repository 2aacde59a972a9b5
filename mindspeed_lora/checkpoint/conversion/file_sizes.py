"""Bytes on disk."""

from __future__ import annotations

import os
from pathlib import Path


def disk_use(folder: Path) -> tuple[int, int]:
    """Number and bytes of the files in a folder; what links lead to counts where it lies."""
    number = size = 0
    for place, _, names in os.walk(folder):
        for name in names:
            number += 1
            size += os.lstat(os.path.join(place, name)).st_size
    return number, size
