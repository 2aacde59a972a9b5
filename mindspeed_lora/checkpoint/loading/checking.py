"""Checksums of what is loaded, where no rank reads whole tensors.

A tensor that one rank reads from first to last byte is checked as it passes. Under tensor parallelism each rank reads
slices, so the ranks of a node read the files once more, each some of them.
"""

from __future__ import annotations

import os

from mindspeed_lora.checkpoint.source import Source
from mindspeed_lora.checkpoint.storage.manifest import check_files
from mindspeed_lora.parallel.groups import ParallelGroups


def check_share(source: Source, groups: ParallelGroups) -> None:
    """Check this rank's share of the files behind a source.

    Raises:
        Failed: a file is missing or damaged.
    """
    if groups.tp_size == 1 or source.manifest_folder is None:
        return
    size = int(os.environ.get("LOCAL_WORLD_SIZE", groups.world_size))
    rank = int(os.environ.get("LOCAL_RANK", groups.rank))
    check_files(source.manifest_folder, (rank % size, size))
