"""What a rank will hold at the peak of a step, by part, told from sizes alone.

What one layer keeps for the backward pass is in :mod:`mindspeed_lora.training.layer_memory`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mindspeed_lora.adapters.spec import PartSpec
from mindspeed_lora.checkpoint.canonical import (
    EMBEDDING,
    FINAL_LAYERNORM,
    OUTPUT_LAYER,
    layer_tensors,
    tensor_rule,
)
from mindspeed_lora.checkpoint.loading.local_parameters import is_of_experts
from mindspeed_lora.config.stages import ModelChunk
from mindspeed_lora.models.vocab_loss import logits_bytes
from mindspeed_lora.training.heap_memory import heap_bytes, stranded_bytes
from mindspeed_lora.training.layer_memory import FP32, MemoryQuestion, layer_sizes
from mindspeed_lora.training.optimizer_states import PORTION
from mindspeed_lora.training.quantized_memory import QuantizedMemory, quantized_memory


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


@dataclass(frozen=True, kw_only=True)
class RankParameters:
    """What the ranks of one pipeline stage hold, in elements; micro-batches and recomputation do not change it."""

    base: int
    factors: int
    """Of the adapter, and single rows of the vocabulary."""
    trained: int
    quantized: QuantizedMemory

    def __add__(self, other: RankParameters) -> RankParameters:
        """What both hold together."""
        return RankParameters(
            base=self.base + other.base,
            factors=self.factors + other.factors,
            trained=self.trained + other.trained,
            quantized=self.quantized + other.quantized,
        )


def rank_parameters(
    question: MemoryQuestion, pp_rank: int, known: dict[object, RankParameters] | None = None
) -> RankParameters:
    """The parameters of one pipeline stage; TP ranks do not differ. Layers of one kind are counted once.

    Args:
        question: the job.
        pp_rank: of the stage.
        known: what a layer of each kind holds, kept by who asks for more stages, of whatever placement, where tensor
            and expert parallelism have the same sizes.
    """
    known = {} if known is None else known
    chunks, adapter = question.placement.rank_chunks(pp_rank), question.adapter
    ends = {name: size for chunk in chunks for name, size in _end_tensors(chunk, question).items()}
    held = _held(question, ends, () if adapter is None else adapter.layer_parts.get(None, ()))
    for layer in (layer for chunk in chunks for layer in chunk.layers):
        kind = _kind(question, layer)
        if kind not in known:
            parts = () if adapter is None else adapter.layer_parts.get(layer, ())
            known[kind] = _held(question, layer_tensors(question.shape, layer), parts)
        held += known[kind]
    return held


def _kind(question: MemoryQuestion, layer: int) -> object:
    """The same for layers that hold the same."""
    adapter, quantization = question.adapter, question.quantization
    if adapter is not None and adapter.trained:
        return layer
    return (
        question.shape.has_experts(layer),
        -1 if adapter is None else adapter.layer_kinds.get(layer, -1),
        -1 if quantization is None else quantization.layer_kinds.get(layer, -1),
    )


def _held(
    question: MemoryQuestion, own: Mapping[str, tuple[int, ...]], parts: Sequence[PartSpec]
) -> RankParameters:
    """Of these canonical tensors and the pairs of factors on them."""
    base = sum(_local(name, size, question) for name, size in own.items())
    factors = sum(
        _local(name, size, question)
        for part in parts
        if part.weight in own
        for name, size in part.tensors.items()
    )
    rows, besides = _trained_besides(question, own)
    return RankParameters(
        base=base,
        factors=factors + rows,
        trained=base if question.adapter is None else factors + rows + besides,
        quantized=quantized_memory(question, own),
    )


def predict_memory(
    question: MemoryQuestion, pp_rank: int, parameters: RankParameters | None = None
) -> RankMemory:
    """The prediction for the ranks of one pipeline stage; ``parameters`` where they are known already."""
    held = rank_parameters(question, pp_rank) if parameters is None else parameters
    trained, quantized = held.trained, held.quantized
    states = 2 if question.itemsize == FP32 else 3
    owners = question.dp * question.cp if question.distributed_optimizer else 1
    state = trained * states * FP32 // owners
    here = _paged_bytes_here(question, states) if question.training.paged_optimizer else state
    activations, buffers = _activations(question, pp_rank), _buffers(question, pp_rank) + quantized.tile
    logits = _logits(question) if pp_rank == question.placement.pp_size - 1 else 0
    return RankMemory(
        parameters=held.base + held.factors,
        trained=trained,
        quantized=quantized,
        weights=(held.base - quantized.weights) * question.itemsize + quantized.bytes,
        adapters=held.factors * question.itemsize,
        gradients=trained * FP32,
        optimizer=min(state, here),
        paged=state if question.training.paged_optimizer else 0,
        activations=activations,
        logits=logits,
        buffers=buffers,
        heap=heap_bytes(question, activations + logits + buffers) + stranded_bytes(question, pp_rank),
    )


def _paged_bytes_here(question: MemoryQuestion, states: int) -> int:
    """The window that is updated, and on CUDA the one that comes next."""
    return PORTION * states * FP32 * (1 if question.on_cpu else 2)


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
        return final + sum(layer_sizes(question, chunk.slots))
    count = training.recompute_num_layers or 1
    if training.recompute_method == "block":
        return (
            final + boundary * min(count, len(chunk.slots)) + sum(layer_sizes(question, chunk.slots[count:]))
        )
    return final + boundary * math.ceil(len(chunk.slots) / count)


def _made_anew(question: MemoryQuestion, chunk: ModelChunk) -> int:
    """What the backward pass of one recomputed piece brings back."""
    training = question.training
    if training.recompute_granularity != "full":
        return 0
    count = training.recompute_num_layers or 1
    sizes = layer_sizes(question, chunk.slots)
    if training.recompute_method == "block":
        # The layers that were kept are the last ones: their turn comes first, and what they kept is free by then.
        return max(0, max(sizes[:count], default=0) - sum(sizes[count:]))
    return max((sum(sizes[first : first + count]) for first in range(0, len(sizes), count)), default=0)


def _logits(question: MemoryQuestion) -> int:
    """One chunk of logits in float32 (and in the dtype of the weights), and two gradients of the hidden states."""
    row = question.vocab_size // question.tp * FP32
    chunk = min(logits_bytes(on_cpu=question.on_cpu), question.tokens * row)
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


def _end_tensors(chunk: ModelChunk, question: MemoryQuestion) -> dict[str, tuple[int, ...]]:
    """Canonical tensors of a chunk outside of its layers, the vocabulary padded; a tied embedding is at both ends."""
    shape = question.shape
    rows = (question.vocab_size, shape.hidden_size)
    tensors: dict[str, tuple[int, ...]] = {EMBEDDING: rows} if chunk.is_first else {}
    if chunk.is_last:
        tensors[FINAL_LAYERNORM] = (shape.hidden_size,)
        untied = question.adapter is not None and question.adapter.untied
        if shape.untie_embeddings_and_output_weights or untied or not chunk.is_first:
            tensors[OUTPUT_LAYER] = rows
    return tensors


def _local(name: str, size: tuple[int, ...], question: MemoryQuestion) -> int:
    """Elements of a tensor on one rank; of an expert's on average over the EP ranks."""
    if is_of_experts(name):
        return math.prod(size) // (question.ep * (1 if tensor_rule(name).axis is None else question.etp))
    return math.prod(size) // (1 if tensor_rule(name).axis is None else question.tp)
