"""What one layer keeps of one micro-batch between forward and backward pass, and the question that decides it.

Shapes: T tokens of a micro-batch on this rank (b · s / cp), of which SP leaves T/t to norms and residuals; t the TP
size, n and g query and key/value heads of width d, f the width of the MLP, r the ranks of a linear's adapters.

Per layer and token (``models/layer.py``, ``models/mla.py``, ``adapters/schedules/``):

================================  ============================================================
norms                             h/σ each, their inputs (σ = t under SP, else 1)
``linear_qkv``, ``linear_fc1``    h/σ if something reads it for a weight or factor gradient, and Σ r
attention                         q, k, v: (n + 2 g) d/t, its output n d/t, log-sum-exp n/t (float32)
``linear_proj``                   its input is attention's output; Σ r
SwiGLU                            2 f/t, its input
``linear_fc2``                    f/t if something reads it, and Σ r
dropout of the adapters           a byte for every element of every factor A's input
================================  ============================================================

Multi-latent attention, with latent widths l and heads of d + e and v, in place of the second and third line:

================================  ============================================================
down projections, or ``q_proj``   h/σ if something reads it, and Σ r
norms of the latents              (l_q + l_kv + e)/σ, their inputs
up projections                    l/σ each if something reads it, and Σ r
attention                         n (2 (d + e) + v)/t, its output n v/t, log-sum-exp n/t (float32)
================================  ============================================================

Experts in place of the MLP, with E experts of which a token takes k, each of width f, balanced: T/t · k · ETP rows a
rank, and of each

================================  ============================================================
its tokens                        h if ``linear_fc1`` is read for a weight or factor gradient, and Σ r
SwiGLU                            2 f/ETP, its input
``linear_fc2``                    f/ETP if something reads it, and Σ r
the exchange                      k numbers of 8 bytes, its weight (float32)
the router                        4 E/k, its logits and scores (float32)
================================  ============================================================

Shared experts are an MLP.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from mindspeed_lora.adapters.spec import AdapterSpec, PartSpec
from mindspeed_lora.checkpoint.canonical import layer_linears
from mindspeed_lora.checkpoint.loading.quantization import QuantPlan
from mindspeed_lora.config.shape import MLAShape, ModelShape
from mindspeed_lora.config.stages import LayerPlacement
from mindspeed_lora.config.training import TrainingConfig
from mindspeed_lora.device import has_accelerator

FP32 = 4
_ROW_PARALLEL = ("linear_proj", "linear_fc2")


@dataclass(frozen=True, kw_only=True)
class MemoryQuestion:
    """A job, as far as its memory depends on it."""

    shape: ModelShape
    placement: LayerPlacement
    adapter: AdapterSpec | None
    """None: all parameters are trained."""
    quantization: QuantPlan | None = None
    """None: all weights are held in the dtype that is computed in."""
    training: TrainingConfig
    tp: int
    cp: int
    dp: int
    ep: int = 1
    etp: int = 1
    sequence_parallel: bool
    distributed_optimizer: bool
    seq_length: int
    """Positions of the longest row of a micro-batch."""
    vocab_size: int
    """Padded to the layout."""
    itemsize: int
    """Bytes of an element in the dtype that is computed in."""
    on_cpu: bool = field(default_factory=lambda: not has_accelerator())
    """Whether the ranks compute on CPUs; left out: whether this machine would."""

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

    @cached_property
    def known_layers(self) -> dict[tuple[bool, int], int]:
        """What :func:`layer_sizes` has found for one layer of each kind."""
        return {}


def layer_sizes(question: MemoryQuestion, layers: Sequence[int | None]) -> list[int]:
    """:func:`layer_bytes` of several layers; those of one kind are counted once."""
    kinds = {} if question.adapter is None else question.adapter.layer_kinds
    known, sizes = question.known_layers, []
    for layer in layers:
        if layer is None:
            sizes.append(0)
            continue
        kind = question.shape.has_experts(layer), kinds.get(layer, -1)
        if kind not in known:
            known[kind] = layer_bytes(question, layer)
        sizes.append(known[kind])
    return sizes


def layer_bytes(question: MemoryQuestion, layer: int | None) -> int:
    """What one layer keeps of one micro-batch without recomputation; a no-op keeps nothing."""
    if layer is None:
        return 0
    shape, tp, tokens = question.shape, question.tp, question.tokens
    heads, value_width = shape.num_attention_heads, shape.proj_input_size // shape.num_attention_heads
    selective = question.training.recompute_granularity == "selective"
    ranks = _ranks(question, layer)
    read = _read(question, layer, ranks)
    of_attention, latent = _heads_and_latents(shape, read)
    output_kept = "linear_proj" in read or not selective
    per_token = of_attention // tp + output_kept * heads * value_width // tp + _rank_of_attention(ranks)
    per_residual = latent + shape.hidden_size * (2 + bool(read & _FROM_HIDDEN))
    sums = 0 if selective else tokens * heads // tp * FP32
    kept = (tokens * per_token + question.residual_tokens * per_residual) * question.itemsize
    mlp = _expert_bytes if shape.has_experts(layer) else _mlp_bytes
    return kept + sums + mlp(question, read, ranks) + _mask_bytes(question, layer)


def _rank_of_attention(ranks: Mapping[str, int]) -> int:
    return sum(rank for linear, rank in ranks.items() if "linear_fc" not in linear)


def _mlp_bytes(
    question: MemoryQuestion,
    read: Collection[str],
    ranks: Mapping[str, int],
    width: int | None = None,
    place: str = "",
) -> int:
    """Of an ordinary MLP, or of shared experts (``place``) of this width."""
    inner = (question.shape.ffn_hidden_size if width is None else width) // question.tp
    first, second = f"{place}linear_fc1", f"{place}linear_fc2"
    per_token = 2 * inner + (second in read) * inner + ranks.get(first, 0) + ranks.get(second, 0)
    per_residual = (first in read) * question.shape.hidden_size
    return (question.tokens * per_token + question.residual_tokens * per_residual) * question.itemsize


def _expert_bytes(question: MemoryQuestion, read: Collection[str], ranks: Mapping[str, int]) -> int:
    """Of a router, its experts and the shared ones."""
    moe = question.shape.moe
    assert moe is not None
    own = math.ceil(question.tokens / question.tp)
    inner, rows = moe.ffn_hidden_size // question.etp, own * moe.topk * question.etp
    per_row = (
        ("experts.linear_fc1" in read) * question.shape.hidden_size
        + 2 * inner
        + ("experts.linear_fc2" in read) * inner
        + ranks.get("experts.linear_fc1", 0)
        + ranks.get("experts.linear_fc2", 0)
    )
    exchange = rows * (8 * moe.topk + FP32) + own * 4 * moe.num_experts * FP32
    kept = rows * per_row * question.itemsize + exchange
    if moe.shared_ffn_hidden_size:
        kept += _mlp_bytes(question, read, ranks, moe.shared_ffn_hidden_size, "shared_experts.")
    return kept


_FROM_HIDDEN = {"linear_qkv", "linear_q_proj", "linear_q_down_proj", "linear_kv_down_proj"}
"""The linears of attention that read the normed hidden states."""


def _heads_and_latents(shape: ModelShape, read: Collection[str]) -> tuple[int, int]:
    """Features of q, k and v of all heads, and of what stands between them and the hidden states."""
    heads, mla = shape.num_attention_heads, shape.mla
    if mla is None:
        return (heads + 2 * shape.num_query_groups) * shape.kv_channels, 0
    return heads * (2 * mla.head_size + mla.v_head_dim), _latents(mla, read)


def _latents(mla: MLAShape, read: Collection[str]) -> int:
    query = mla.q_lora_rank or 0
    normed = query * ("linear_q_up_proj" in read) + mla.kv_lora_rank * ("linear_kv_up_proj" in read)
    return query + mla.kv_lora_rank + mla.qk_pos_emb_head_dim + normed


def _read(question: MemoryQuestion, layer: int, ranks: Counter[str]) -> set[str]:
    """The linears whose input something needs for a weight or factor gradient."""
    if question.adapter is None:
        return {_linear(place) for place in layer_linears(question.shape, layer)}
    return {linear for linear, rank in ranks.items() if rank}


def _ranks(question: MemoryQuestion, layer: int) -> Counter[str]:
    """Σ r of the adapters on each of the layer's linears; of the experts' on one of them."""
    ranks: Counter[str] = Counter()
    for part in _parts(question, layer):
        ranks[_linear(part.module)] += part.rank
    return ranks


def _parts(question: MemoryQuestion, layer: int) -> tuple[PartSpec, ...]:
    """The pairs of factors of a layer; of its experts' those of the first one."""
    return () if question.adapter is None else question.adapter.layer_places.get(layer, ())


def _linear(module: str) -> str:
    """Name of a linear; of experts and of shared ones with their place."""
    name = module.rpartition(".")[2]
    if ".shared_experts." in module:
        return f"shared_experts.{name}"
    return f"experts.{name}" if ".experts." in module else name


def _mask_bytes(question: MemoryQuestion, layer: int) -> int:
    """Of the adapters' dropout masks, one for every factor A."""
    adapter = question.adapter
    if adapter is None or adapter.dropout == 0.0:
        return 0
    return sum(_mask_of(question, part) for part in _parts(question, layer))


def _mask_of(question: MemoryQuestion, part: PartSpec) -> int:
    row_parallel = part.linear in _ROW_PARALLEL
    if question.shape.moe is not None and ".mlp.experts." in part.module:
        rows = math.ceil(question.tokens / question.tp) * question.shape.moe.topk * question.etp
        return rows * part.in_features // (question.etp if row_parallel else 1)
    if row_parallel:
        return question.tokens * part.in_features // question.tp
    return question.residual_tokens * part.in_features
