"""What a rank will hold at the peak of a step, by part, told from sizes alone.

What one layer keeps for the backward pass is in :mod:`mindspeed_lora.training.layer_memory`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from mindspeed_lora.checkpoint.canonical import (
    EMBEDDING,
    FINAL_LAYERNORM,
    OUTPUT_LAYER,
    canonical_tensors,
    layer_tensors,
    tensor_rule,
)
from mindspeed_lora.checkpoint.loading.local_parameters import is_of_experts
from mindspeed_lora.config.stages import ModelChunk
from mindspeed_lora.device import has_accelerator
from mindspeed_lora.device.heap import KEPT_BYTES
from mindspeed_lora.models.vocab_loss import logits_bytes
from mindspeed_lora.training.layer_memory import FP32, MemoryQuestion, layer_bytes
from mindspeed_lora.training.optimizer_states import PORTION
from mindspeed_lora.training.quantized_memory import QuantizedMemory, quantized_memory

_LIBRARIES = 50 << 20
"""What products take beside their outputs, measured; as much again for the connections of gloo."""


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """Bytes of one rank at the peak, by part, and its parameters."""

    parameters: int
    trained: int
    quantized: QuantizedMemory
    """Counted in ``weights``, and the buffer for dequantised tiles in ``buffers``."""
    weights: int
    """All that is frozen, or trained without an adapter."""
    adapters: int
    gradients: int
    """float32, of what is trained."""
    optimizer: int
    """Both moments, and a float32 master copy where the parameters are of another dtype; of paged ones a window."""
    activations: int
    """Kept between forward and backward pass, of all micro-batches under way."""
    logits: int
    """Of one chunk of positions, and the gradient of the hidden states that comes of them."""
    buffers: int
    """Passing: what the backward pass of a layer needs at once, what pipeline stages exchange, gathered sequences."""
    paged: int
    """Of ``--paged-optimizer``: in a file, or on CUDA in the host's memory. No part of the total."""
    heap: int
    """On the CPU what the C library's heap holds beside what is alive, and what libraries take in the first step."""

    @property
    def total(self) -> int:
        """The sum of the parts."""
        return sum(self.parts.values())

    @property
    def parts(self) -> dict[str, int]:
        """By name."""
        names = (
            *("weights", "adapters", "gradients", "optimizer"),
            *("activations", "logits", "buffers", "heap"),
        )
        return {name: getattr(self, name) for name in names}


def predict_memory(question: MemoryQuestion, pp_rank: int) -> RankMemory:
    """The prediction for the ranks of one pipeline stage; TP ranks do not differ."""
    chunks = question.placement.rank_chunks(pp_rank)
    own = {name: size for chunk in chunks for name, size in _tensors(chunk, question).items()}
    base = sum(_local(name, size, question) for name, size in own.items())
    adapter = question.adapter
    factors = sum(
        _local(name, size, question)
        for part in (adapter.parts if adapter is not None else ())
        for name, size in part.tensors.items()
        if part.weight in own
    )
    rows, besides = _trained_besides(question, own)
    factors += rows
    trained = base if adapter is None else factors + besides
    states = 2 if question.itemsize == FP32 else 3
    owners = question.dp * question.cp if question.distributed_optimizer else 1
    state = trained * states * FP32 // owners
    here = _paged_bytes_here(states) if question.training.paged_optimizer else state
    quantized = quantized_memory(question, own)
    activations, buffers = _activations(question, pp_rank), _buffers(question, pp_rank) + quantized.tile
    logits = _logits(question) if any(chunk.is_last for chunk in chunks) else 0
    return RankMemory(
        parameters=base + factors,
        trained=trained,
        quantized=quantized,
        weights=(base - quantized.weights) * question.itemsize + quantized.bytes,
        adapters=factors * question.itemsize,
        gradients=trained * FP32,
        optimizer=min(state, here),
        paged=state if question.training.paged_optimizer else 0,
        activations=activations,
        logits=logits,
        buffers=buffers,
        heap=0 if has_accelerator() else _heap(question, activations + logits + buffers),
    )


def _paged_bytes_here(states: int) -> int:
    """The window that is updated, and on CUDA the one that comes next."""
    return PORTION * states * FP32 * (2 if has_accelerator() else 1)


def _trained_besides(question: MemoryQuestion, own: Mapping[str, tuple[int, ...]]) -> tuple[int, int]:
    """Elements of single trained rows of the vocabulary, and of the base's tensors that an adapter trains."""
    adapter = question.adapter
    if adapter is None:
        return 0, 0
    tied = not question.shape.untie_embeddings_and_output_weights and not adapter.untied
    names = {tensor.name for tensor in adapter.trained}
    rows = besides = 0
    for name, size in own.items():
        tensor = EMBEDDING if tied and name == OUTPUT_LAYER else name
        besides += _local(name, size, question) if tensor in names else 0
        rows += sum(len(one.tokens) * one.width for one in adapter.token_rows if one.tensor == tensor)
    return rows, besides


def _activations(question: MemoryQuestion, pp_rank: int) -> int:
    """Of the micro-batches under way, chunk by chunk, and with full recomputation those of the layers made anew."""
    chunks = question.placement.rank_chunks(pp_rank)
    kept = [_chunk_activations(question, chunk) for chunk in chunks]
    under_way = _chunks_under_way(question, pp_rank)
    # The first chunk has the most micro-batches under way; each visit of the schedule takes the next chunk.
    total = sum(kept[visit // question.placement.pp_size % len(chunks)] for visit in range(under_way))
    return total + max(_made_anew(question, chunk) for chunk in chunks)


def _chunks_under_way(question: MemoryQuestion, pp_rank: int) -> int:
    """Passes of a micro-batch through a chunk that wait for their backward pass at once (1F1B, interleaved)."""
    pp, vp = question.placement.pp_size, question.placement.vp_size
    warm_up = pp - pp_rank - 1 if vp == 1 else 2 * (pp - pp_rank - 1) + (vp - 1) * pp
    return min(warm_up + 1, question.num_micro_batches * vp)


def _chunk_activations(question: MemoryQuestion, chunk: ModelChunk) -> int:
    """Kept of one micro-batch by one chunk."""
    training, boundary = (
        question.training,
        question.residual_tokens * question.shape.hidden_size * question.itemsize,
    )
    final = boundary if chunk.is_last else 0
    if training.recompute_granularity != "full":
        return final + sum(layer_bytes(question, layer) for layer in chunk.slots)
    count = training.recompute_num_layers or 1
    if training.recompute_method == "block":
        return (
            final
            + boundary * min(count, len(chunk.slots))
            + sum(layer_bytes(question, layer) for layer in chunk.slots[count:])
        )
    return final + boundary * math.ceil(len(chunk.slots) / count)


def _made_anew(question: MemoryQuestion, chunk: ModelChunk) -> int:
    """What the backward pass of one recomputed piece brings back."""
    training = question.training
    if training.recompute_granularity != "full":
        return 0
    count = training.recompute_num_layers or 1
    sizes = [layer_bytes(question, layer) for layer in chunk.slots]
    if training.recompute_method == "block":
        # The layers that were kept are the last ones: their turn comes first, and what they kept is free by then.
        return max(0, max(sizes[:count], default=0) - sum(sizes[count:]))
    return max((sum(sizes[first : first + count]) for first in range(0, len(sizes), count)), default=0)


def _logits(question: MemoryQuestion) -> int:
    """One chunk of logits in float32 (and in the dtype of the weights), and two gradients of the hidden states."""
    row = question.vocab_size // question.tp * FP32
    chunk = min(logits_bytes(on_cpu=not has_accelerator()), question.tokens * row)
    copies = 1.0 if question.itemsize == FP32 else 1.5
    return int(chunk * copies) + question.tokens * question.shape.hidden_size * (FP32 + 2 * question.itemsize)


def _buffers(question: MemoryQuestion, pp_rank: int) -> int:
    """The gradients of an MLP between its products, whole sequences under SP, and the stage's messages."""
    shape, tokens = question.shape, question.tokens
    mlp = 3 * shape.ffn_hidden_size // question.tp * tokens
    if shape.moe is not None:
        rows = math.ceil(tokens / question.tp) * shape.moe.topk * question.etp
        experts = rows * 3 * (shape.moe.ffn_hidden_size // question.etp + shape.hidden_size)
        shared = 3 * shape.moe.shared_ffn_hidden_size // question.tp * tokens
        mlp = max(mlp if shape.moe.dense_layers else 0, experts + shared)
    residual = 3 * shape.hidden_size * question.residual_tokens
    gathered = shape.hidden_size * tokens if question.sequence_parallel and question.tp > 1 else 0
    messages = 2 * shape.hidden_size * question.residual_tokens if question.placement.pp_size > 1 else 0
    return (mlp + residual + gathered + messages) * question.itemsize


def _heap(question: MemoryQuestion, passing: int) -> int:
    """Measured, not derived: holes among tensors that come and go, and the libraries' own buffers.

    Blocks of one micro-batch lie elsewhere than those of the one before, which stay resident up to a gibibyte
    (``device/heap.py``).
    """
    holes = passing // (4 if passing <= KEPT_BYTES else 8)
    ranks = question.tp * question.cp * question.dp * question.placement.pp_size
    return holes + _LIBRARIES * (2 if ranks > 1 else 1)


def _tensors(chunk: ModelChunk, question: MemoryQuestion) -> dict[str, tuple[int, ...]]:
    """Canonical tensors of a chunk, with the padded vocabulary; a tied embedding stands at both ends."""
    shape, ends = question.shape, canonical_tensors(question.shape)
    rows = (question.vocab_size, shape.hidden_size)
    tensors: dict[str, tuple[int, ...]] = {EMBEDDING: rows} if chunk.is_first else {}
    for layer in chunk.layers:
        tensors.update(layer_tensors(shape, layer))
    if chunk.is_last:
        tensors[FINAL_LAYERNORM] = ends[FINAL_LAYERNORM]
        untied = question.adapter is not None and question.adapter.untied
        if shape.untie_embeddings_and_output_weights or untied or not chunk.is_first:
            tensors[OUTPUT_LAYER] = rows
    return tensors


def _local(name: str, size: tuple[int, ...], question: MemoryQuestion) -> int:
    """Elements of a tensor on one rank; of an expert's on average over the EP ranks."""
    if is_of_experts(name):
        return math.prod(size) // (question.ep * (1 if tensor_rule(name).axis is None else question.etp))
    return math.prod(size) // (1 if tensor_rule(name).axis is None else question.tp)
