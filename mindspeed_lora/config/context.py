"""Context parallelism: what is refused, and what the length of a row must be a multiple of."""

from __future__ import annotations

import math

from mindspeed_lora.config.parallel import ParallelConfig
from mindspeed_lora.config.shape import ModelShape
from mindspeed_lora.errors import Refused


def check_context(shape: ModelShape, parallel: ParallelConfig) -> None:
    """Refuse degrees of context parallelism that contradict each other or the model's heads."""
    size, degree = parallel.context_parallel_size, parallel.ulysses_degree_in_cp
    hybrid = parallel.context_parallel_algo == "hybrid_cp_algo"
    if size > 1 and hybrid and degree is None:
        raise Refused(
            "--context-parallel-algo hybrid_cp_algo needs --ulysses-degree-in-cp, a divisor of "
            f"--context-parallel-size {size}; add it"
        )
    if hybrid and degree is not None and size % degree:
        raise Refused(
            f"--ulysses-degree-in-cp {degree} does not divide --context-parallel-size {size}; change one of them"
        )
    if size > 1 and shape.attention_dropout > 0.0:
        raise Refused(
            f"--attention-dropout {shape.attention_dropout:g} with --context-parallel-size {size}: attention "
            "over cut rows drops nothing; use --attention-dropout 0, or no context parallelism"
        )
    _check_heads(shape, parallel)


def _check_heads(shape: ModelShape, parallel: ParallelConfig) -> None:
    """Each rank of an all-to-all gets as many query heads, and key/value heads whole or repeated."""
    degree, tp = parallel.context_degrees[0], parallel.tensor_model_parallel_size
    heads, groups = shape.num_attention_heads // tp, shape.num_query_groups // tp
    if heads % degree == 0 and (groups % degree == 0 or degree % groups == 0):
        return
    valid = [d for d in range(1, heads + 1) if heads % d == 0 and (groups % d == 0 or d % groups == 0)]
    raise Refused(
        f"an all-to-all of context parallelism over {degree} ranks cuts {heads} query and {groups} key/value heads "
        f"(the model's {shape.num_attention_heads} and {shape.num_query_groups} over "
        f"--tensor-model-parallel-size {tp}); it must divide the first and divide, or be a multiple of, the second: "
        f"use {', '.join(map(str, valid))}, or --context-parallel-algo megatron_cp_algo"
    )


def variable_multiple(parallel: ParallelConfig, pad_to_multiple_of: int) -> int:
    """What rows are padded to a multiple of where they differ in length."""
    tp, cp = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    cut = cp > 1 or (parallel.sequence_parallel and tp > 1)
    return math.lcm(pad_to_multiple_of, 2 * cp * tp if cut else 1)


def check_fixed_length(parallel: ParallelConfig, seq_length: int) -> None:
    """Refuse a fixed ``--seq-length`` that cannot be cut; the nearest one that can is named."""
    tp, cp = parallel.tensor_model_parallel_size, parallel.context_parallel_size
    over_tp = tp if parallel.sequence_parallel else 1
    multiple = 2 * cp * over_tp if cp > 1 else over_tp
    if seq_length % multiple == 0:
        return
    reasons = []
    if cp > 1:
        reasons.append(f"two equal chunks for each rank of --context-parallel-size {cp}")
    if over_tp > 1:
        reasons.append(f"--sequence-parallel over --tensor-model-parallel-size {tp}")
    nearest = max(1, math.floor(seq_length / multiple + 0.5)) * multiple
    raise Refused(
        f"--seq-length {seq_length} is not divisible by {multiple}, for {' and '.join(reasons)}; "
        f"the nearest one is {nearest}"
    )
