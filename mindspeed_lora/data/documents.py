"""Which documents of a prepared data set belong to training, validation and test."""

from __future__ import annotations

import math

from mindspeed_lora.errors import Refused


def split_documents(num_documents: int, split: str) -> tuple[range, range, range]:
    """Contiguous parts in file order for shares like ``949,50,1``, cut where Megatron-core cuts them.

    Shares left out are 0; the three parts together are all documents.
    """
    try:
        shares = [float(share) for share in split.replace("/", ",").split(",")]
    except ValueError:
        shares = []
    if not 1 <= len(shares) <= 3 or min(shares) < 0 or not math.isfinite(sum(shares)) or sum(shares) <= 0:
        raise Refused(f"--split {split}: expected one to three shares like 949,50,1, not all of them 0")
    total = sum(shares)
    normalized = [share / total for share in shares] + [0.0] * (3 - len(shares))
    bounds = [round(sum(normalized[:part]) * num_documents) for part in range(3)] + [num_documents]
    # A part without a share ends where it starts, whatever rounding made of the sums.
    for part in (2, 1):
        if normalized[part] == 0:
            bounds[part] = bounds[part + 1]
    return range(bounds[0], bounds[1]), range(bounds[1], bounds[2]), range(bounds[2], bounds[3])
