"""What the C library's heap holds of a rank on the CPU beside what is alive: holes, and the libraries' own buffers."""

from __future__ import annotations

from mindspeed_lora.device.heap import KEPT_BYTES
from mindspeed_lora.training.layer_memory import MemoryQuestion

_LIBRARIES = 50 << 20
"""What products take beside their outputs, measured; as much again for the connections of gloo."""


def heap_bytes(question: MemoryQuestion, passing: int) -> int:
    """0 on a GPU. Measured, not derived: holes among tensors that come and go, and the libraries' own buffers.

    Blocks of one micro-batch lie elsewhere than those of the one before, which stay resident up to a gibibyte
    (``device/heap.py``).
    """
    if not question.on_cpu:
        return 0
    holes = passing // (4 if passing <= KEPT_BYTES else 8)
    ranks = question.tp * question.cp * question.dp * question.placement.pp_size
    return holes + _LIBRARIES * (2 if ranks > 1 else 1)


def stranded_bytes(question: MemoryQuestion, pp_rank: int) -> int:
    """Holes that the collectives of sequence parallelism leave in the C library's heap, between what layers keep.

    glibc (2.36) finds no room for an aligned block in a hole of the very same size: it looks for some bytes more.
    Each layer gathers its tokens twice, ``[T, h]``, and twice has a partial sum ``[T, h]`` and what arrives of it,
    ``[T/t, h]``; all are freed when what is kept lies above them already. Layers that are computed again leave none.
    """
    if (
        not (question.on_cpu and question.sequence_parallel)
        or question.training.recompute_granularity == "full"
    ):
        return 0
    layers = sum(len(chunk.layers) for chunk in question.placement.rank_chunks(pp_rank))
    held = 4 * question.tokens + 2 * question.residual_tokens
    return layers * held * question.shape.hidden_size * question.itemsize
