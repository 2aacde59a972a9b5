"""What a rank will hold at the peak of generation or scoring, by part, told from sizes alone.

Nothing is kept for a backward pass: beside weights and the keys and values of all layers there is what one layer needs
at once for the tokens that go through together. Letters: b rows, s tokens of a row that go through at once, t the TP
size, n and g query and key/value heads of width d, f the width of the MLP.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from mindspeed_lora.checkpoint.canonical import (
    EMBEDDING,
    OUTPUT_LAYER,
    canonical_tensors,
    padded_vocab_size,
    tensor_rule,
)
from mindspeed_lora.checkpoint.loading.local_parameters import is_of_experts
from mindspeed_lora.config.training import TrainingConfig
from mindspeed_lora.inference.generator import Request
from mindspeed_lora.inference.model_plan import ModelPlan
from mindspeed_lora.training.heap_memory import heap_bytes
from mindspeed_lora.training.layer_memory import FP32, MemoryQuestion
from mindspeed_lora.training.memory import rank_parameters


@dataclass(frozen=True)
class Work:
    """What goes through the model together, at the most."""

    rows: int
    """Of the cache: prompts, or the beams of one; or continuations that are scored."""
    capacity: int
    """Slots of a row of the cache."""
    tokens: int
    """b · s of the longest pass."""
    scored: int
    """Rows of logits at once."""

    @classmethod
    def of_prompts(cls, requests: Sequence[Request], batch: int) -> Work:
        """Answers to these prompts, so many at once."""
        works = []
        for first in range(0, len(requests), batch):
            taken = requests[first : first + batch]
            longest = max(len(request.tokens) for request in taken)
            room = max(request.max_new_tokens for request in taken)
            works.append(cls(len(taken), longest + room - 1, longest * len(taken), len(taken)))
        return cls.most(works)

    @classmethod
    def of_beams(cls, requests: Sequence[Request], batch: int, beams: int) -> Work:
        """Answers to these prompts by so many beams, one prompt after the other; one beam is no search."""
        if beams == 1:
            return cls.of_prompts(requests, batch)
        found = cls.of_prompts(requests, 1)
        return dataclasses.replace(found, rows=beams, scored=beams)

    @classmethod
    def most(cls, works: Iterable[Work]) -> Work:
        """The most of each size."""
        found = [dataclasses.astuple(one) for one in works]
        return cls(*(max(sizes) for sizes in zip(*found, strict=True))) if found else cls(1, 1, 1, 1)


@dataclass(frozen=True, kw_only=True)
class InferenceMemory:
    """Bytes of one rank, by part, and its parameters."""

    parameters: int
    weights: int
    adapters: int
    cache: int
    """Keys and values."""
    activations: int
    """Of the layer that needs most."""
    logits: int
    reading: int
    """What reading the weights takes beyond all that comes after it: the largest tensor, before it is cut."""
    heap: int
    """On the CPU: holes in the C library's heap, and what libraries take, as in training."""

    @property
    def parts(self) -> dict[str, int]:
        """By name."""
        return {
            "weights": self.weights,
            "adapters": self.adapters,
            "keys and values": self.cache,
            "activations": self.activations,
            "logits": self.logits,
            "reading": self.reading,
            "heap": self.heap,
        }

    @property
    def total(self) -> int:
        """The sum of the parts."""
        return sum(self.parts.values())


def predict_inference_memory(
    plan: ModelPlan, work: Work, world_size: int, itemsize: int, on_cpu: bool
) -> list[InferenceMemory]:
    """The prediction for a rank of each pipeline stage."""
    question = _question(plan, work, world_size, itemsize, on_cpu)
    return [_of_stage(plan, question, work, stage) for stage in range(plan.placement.pp_size)]


def memory_rows(found: Sequence[InferenceMemory], process: int) -> list[tuple[str, str]]:
    """Rows of the table: each part in MiB, of the rank that holds most, and all ranks where there are stages."""
    most = max(found, key=lambda memory: memory.total)
    rows = [(f"memory: {part}", _mib(size)) for part, size in most.parts.items()]
    if process:
        rows.append(("memory: process (Python, libraries)", _mib(process)))
    stages = f" (stages: {', '.join(_mib(memory.total + process) for memory in found)})"
    return [*rows, ("memory: total", _mib(most.total + process) + (stages if len(found) > 1 else ""))]


def _mib(size: int) -> str:
    return f"{size / 2**20:,.0f} MiB"


def _question(plan: ModelPlan, work: Work, world_size: int, itemsize: int, on_cpu: bool) -> MemoryQuestion:
    parallel = plan.job.parallel
    tp = parallel.tensor_model_parallel_size
    return MemoryQuestion(
        shape=plan.shape,
        placement=plan.placement,
        adapter=plan.adapter.spec if plan.adapter is not None else None,
        quantization=plan.quantization,
        training=TrainingConfig(),
        tp=tp,
        cp=1,
        dp=parallel.data_parallel_size(world_size),
        ep=parallel.expert_parallel_size,
        etp=parallel.expert_tensor_size,
        sequence_parallel=False,
        distributed_optimizer=False,
        seq_length=work.tokens,
        vocab_size=padded_vocab_size(plan.shape, plan.job.model.make_vocab_size_divisible_by or 1, tp),
        itemsize=itemsize,
        on_cpu=on_cpu,
    )


def _of_stage(plan: ModelPlan, question: MemoryQuestion, work: Work, stage: int) -> InferenceMemory:
    held = rank_parameters(question, stage)
    layers = [layer for chunk in plan.placement.rank_chunks(stage) for layer in chunk.layers]
    cache = work.rows * work.capacity * len(layers) * _cached(question) * question.itemsize
    activations = work.tokens * _widest(question) * question.itemsize + held.quantized.tile
    logits = _logits(question, work) if stage == plan.placement.pp_size - 1 else 0
    return InferenceMemory(
        parameters=held.base + held.factors,
        weights=(held.base - held.quantized.weights) * question.itemsize + held.quantized.bytes,
        adapters=held.factors * question.itemsize,
        cache=cache,
        activations=activations,
        logits=logits,
        reading=max(0, _reading(plan, question, stage) - cache - activations - logits),
        heap=heap_bytes(question, cache + activations + logits),
    )


def _cached(question: MemoryQuestion) -> int:
    """Elements of a layer's keys and values for one slot: g (d + v)/t, of latent attention those of all heads."""
    shape = question.shape
    if shape.mla is not None:
        return shape.num_attention_heads * (shape.mla.head_size + shape.mla.v_head_dim) // question.tp
    return 2 * shape.num_query_groups * shape.kv_channels // question.tp


def _widest(question: MemoryQuestion) -> int:
    """Elements that a layer needs for one token at once: attention's, or those of its MLP or experts.

    The residual and the normed input are there in both; in attention q, k, v, their rotated copies and the output
    (2 n + 4 g) d/t + n d/t; in an MLP both halves, their product and the output 3 f/t + h.
    """
    shape, tp = question.shape, question.tp
    heads = shape.num_attention_heads
    values = shape.proj_input_size // heads
    width = shape.mla.head_size if shape.mla is not None else shape.kv_channels
    groups = heads if shape.mla is not None else shape.num_query_groups
    attention = (2 * (heads + 2 * groups) * width + heads * values) // tp
    mlp = 3 * shape.ffn_hidden_size // tp + shape.hidden_size
    if shape.moe is not None:
        inner = 3 * shape.moe.ffn_hidden_size // question.etp + 2 * shape.hidden_size
        experts = shape.moe.topk * inner * question.etp // tp
        experts += 3 * (shape.moe.shared_ffn_hidden_size or 0) // tp
        mlp = max(mlp if shape.moe.dense_layers else 0, experts)
    return 2 * shape.hidden_size + max(attention, mlp)


def _logits(question: MemoryQuestion, work: Work) -> int:
    """The shard, all of them, and two copies in float32 from which one is chosen."""
    shard = question.vocab_size // question.tp * question.itemsize if question.tp > 1 else 0
    return work.scored * (shard + question.shape.vocab_size * (question.itemsize + 2 * FP32))


def _reading(plan: ModelPlan, question: MemoryQuestion, stage: int) -> int:
    """The largest tensor of the stage in the dtype of its file, as this rank reads it."""
    chunks = plan.placement.rank_chunks(stage)
    ends = {
        EMBEDDING: any(chunk.is_first for chunk in chunks),
        OUTPUT_LAYER: any(chunk.is_last for chunk in chunks),
    }
    sizes = [
        math.prod(size) * plan.source.dtype(name).itemsize // _cut(name, question)
        for name, size in canonical_tensors(plan.source.shape).items()
        if ends.get(name, True)
    ]
    return max(sizes, default=0)


def _cut(name: str, question: MemoryQuestion) -> int:
    """Over how many ranks a tensor is cut."""
    if tensor_rule(name).axis is None:
        return 1
    return question.etp if is_of_experts(name) else question.tp
