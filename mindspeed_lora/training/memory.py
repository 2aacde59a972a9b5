"""What a rank will hold at the peak of a step, by part, told from sizes alone.

Shapes: T tokens of a micro-batch on this rank (b · s / cp), of which SP leaves T/t to norms and residuals; t the TP
size, n and g query and key/value heads of width d, f the width of the MLP, r the ranks of a linear's adapters.

Per layer and token, what the forward pass keeps for the backward pass (``models/layer.py``, ``adapters/schedules/``):

================================  ============================================================
norms                             h/σ each, their inputs (σ = t under SP, else 1)
``linear_qkv``, ``linear_fc1``    h/σ if something reads it for a weight or factor gradient, and Σ r
attention                         q, k, v: (n + 2 g) d/t, its output n d/t, log-sum-exp n/t (float32)
``linear_proj``                   its input is attention's output; Σ r
SwiGLU                            2 f/t, its input
``linear_fc2``                    f/t if something reads it, and Σ r
dropout of the adapters           a byte for every element of every factor A's input
================================  ============================================================
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from mindspeed_lora.adapters.spec import AdapterSpec
from mindspeed_lora.checkpoint.canonical import (
    EMBEDDING,
    FINAL_LAYERNORM,
    OUTPUT_LAYER,
    canonical_tensors,
    layer_tensors,
    tensor_rule,
)
from mindspeed_lora.config.shape import ModelShape
from mindspeed_lora.config.stages import LayerPlacement, ModelChunk
from mindspeed_lora.config.training import TrainingConfig
from mindspeed_lora.device import has_accelerator
from mindspeed_lora.device.heap import KEPT_BYTES
from mindspeed_lora.models.vocab_loss import logits_bytes

FP32 = 4
_LIBRARIES = 50 << 20
"""What products take beside their outputs, measured; as much again for the connections of gloo."""


@dataclass(frozen=True, kw_only=True)
class MemoryQuestion:
    """A job, as far as its memory depends on it."""

    shape: ModelShape
    placement: LayerPlacement
    adapter: AdapterSpec | None
    """None: all parameters are trained."""
    training: TrainingConfig
    tp: int
    cp: int
    dp: int
    sequence_parallel: bool
    distributed_optimizer: bool
    seq_length: int
    """Positions of the longest row of a micro-batch."""
    vocab_size: int
    """Padded to the layout."""
    itemsize: int
    """Bytes of an element in the dtype that is computed in."""

    @property
    def tokens(self) -> int:
        """T, of one micro-batch on one rank."""
        return self.training.micro_batch_size * math.ceil(self.seq_length / self.cp)

    @property
    def residual_tokens(self) -> int:
        """Tokens for which this rank computes norms and residuals."""
        return math.ceil(self.tokens / self.tp) if self.sequence_parallel else self.tokens

    @property
    def num_micro_batches(self) -> int:
        """Of one rank in one step."""
        return max(1, self.training.global_batch_size // (self.training.micro_batch_size * self.dp))


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """Bytes of one rank at the peak, by part, and its parameters."""

    parameters: int
    trained: int
    weights: int
    """All that is frozen, or trained without an adapter."""
    adapters: int
    gradients: int
    """float32, of what is trained."""
    optimizer: int
    """Both moments, and a float32 master copy where the parameters are of another dtype."""
    activations: int
    """Kept between forward and backward pass, of all micro-batches under way."""
    logits: int
    """Of one chunk of positions, and the gradient of the hidden states that comes of them."""
    buffers: int
    """Passing: what the backward pass of a layer needs at once, what pipeline stages exchange, gathered sequences."""
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
        if f"{part.module}.weight" in own
    )
    rows, besides = _trained_besides(question, own)
    factors += rows
    trained = base if adapter is None else factors + besides
    states = 2 if question.itemsize == FP32 else 3
    owners = question.dp * question.cp if question.distributed_optimizer else 1
    activations, buffers = _activations(question, pp_rank), _buffers(question, pp_rank)
    logits = _logits(question) if any(chunk.is_last for chunk in chunks) else 0
    return RankMemory(
        parameters=base + factors,
        trained=trained,
        weights=base * question.itemsize,
        adapters=factors * question.itemsize,
        gradients=trained * FP32,
        optimizer=trained * states * FP32 // owners,
        activations=activations,
        logits=logits,
        buffers=buffers,
        heap=0 if has_accelerator() else _heap(question, activations + logits + buffers),
    )


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


def layer_bytes(question: MemoryQuestion, layer: int | None) -> int:
    """What one layer keeps of one micro-batch without recomputation; a no-op keeps nothing."""
    if layer is None:
        return 0
    shape, tp, tokens = question.shape, question.tp, question.tokens
    heads, width = shape.num_attention_heads, shape.kv_channels
    attention = (heads + 2 * shape.num_query_groups) * width // tp
    selective = question.training.recompute_granularity == "selective"
    ranks = _ranks(question, layer)
    reads = (
        dict.fromkeys(ranks, True) if question.adapter is None else {name: r > 0 for name, r in ranks.items()}
    )
    output_kept = reads["linear_proj"] or not selective
    per_token = (
        attention
        + output_kept * heads * width // tp
        + 2 * shape.ffn_hidden_size // tp
        + reads["linear_fc2"] * shape.ffn_hidden_size // tp
        + sum(ranks.values())
    )
    per_residual = shape.hidden_size * (2 + reads["linear_qkv"] + reads["linear_fc1"])
    sums = 0 if selective else tokens * heads // tp * FP32
    kept = (tokens * per_token + question.residual_tokens * per_residual) * question.itemsize
    return kept + sums + _mask_bytes(question, layer)


def _ranks(question: MemoryQuestion, layer: int) -> dict[str, int]:
    """Σ r of the adapters on each of the layer's linears."""
    ranks = dict.fromkeys(("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2"), 0)
    for part in question.adapter.parts if question.adapter is not None else ():
        if part.module.startswith(f"decoder.layers.{layer}."):
            ranks[part.linear] += part.rank
    return ranks


def _mask_bytes(question: MemoryQuestion, layer: int) -> int:
    """Of the adapters' dropout masks, one for every factor A."""
    adapter = question.adapter
    if adapter is None or adapter.dropout == 0.0:
        return 0
    inputs = {
        "linear_qkv": question.residual_tokens * question.shape.hidden_size,
        "linear_proj": question.tokens * question.shape.proj_input_size // question.tp,
        "linear_fc1": question.residual_tokens * question.shape.hidden_size,
        "linear_fc2": question.tokens * question.shape.ffn_hidden_size // question.tp,
    }
    of_layer = (part for part in adapter.parts if part.module.startswith(f"decoder.layers.{layer}."))
    return sum(inputs[part.linear] for part in of_layer)


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
    """Elements of a tensor on one TP rank."""
    return math.prod(size) // (1 if tensor_rule(name).axis is None else question.tp)
