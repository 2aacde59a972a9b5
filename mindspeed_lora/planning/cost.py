"""How long a step takes, by a model of few numbers; it ranks layouts, and is no measurement.

A stage's time for one micro-batch is the sum of

===============  ===================================================================================
products         their operations (forward, input gradients, what is computed again) by peak × efficiency, at least
                 the reading of the weights
element-wise     the bytes of norms, residuals and activations by the memory's bandwidth; with QLoRA those of
                 dequantising too
tensor           4 gathers or scatters of hidden states a layer in each pass by the link
context          keys and values around the ring, as far as attention does not hide them
experts          2 exchanges of a token's k copies a layer in each pass
stages           its messages to the neighbours
===============  ===================================================================================

and at least what the host needs to start the kernels. A step of m micro-batches over p stages with v chunks each
takes m + (p − 1)/v of them (interleaved 1F1B, Narayanan et al. 2021, arXiv 2104.04473, section 2.2), and then the sum
of the gradients over the replicas and the update.
"""

from __future__ import annotations

from dataclasses import dataclass

from mindspeed_lora.config.layout_plan import MachineConfig
from mindspeed_lora.training.layer_memory import MemoryQuestion
from mindspeed_lora.training.memory import RankMemory
from mindspeed_lora.training.reporting.model_flops import ModelFlops

_HIDDEN_PASSES = 34
"""Reads and writes of a hidden state by a layer's norms, residuals and rotation, forward and backward."""
_INNER_PASSES = 8
"""The same of the MLP's inner features by SwiGLU."""
_HOST_SECONDS = 4e-4
"""What the host needs to start one layer's kernels, forward and backward."""
_GIGA = 1e9
_UPDATE_BYTES = 28
"""Gradient, master and moments read, master, moments and parameter written, of one trained number."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step, by what they go to."""

    products: float
    element_wise: float
    tensor: float
    context: float
    experts: float
    stages: float
    host: float
    """What the host takes longer than the device."""
    bubble: float
    data: float
    """Gradients over replicas, and the update."""

    @property
    def total(self) -> float:
        """Their sum."""
        return sum(vars(self).values())

    @property
    def largest_wait(self) -> str:
        """What most of the time goes to beside products."""
        parts = {name: value for name, value in vars(self).items() if name != "products"}
        return max(parts, key=lambda name: parts[name])


def step_time(
    question: MemoryQuestion, stage: RankMemory, model: ModelFlops, machine: MachineConfig, gpus: int
) -> StepTime:
    """The time of a step whose slowest stage holds ``stage`` (its weights are what is read)."""
    count, placement = question.num_micro_batches, question.placement
    layers = max(
        sum(len(chunk.layers) for chunk in placement.rank_chunks(rank)) for rank in range(placement.pp_size)
    )
    one = _micro_batch(question, stage, model, machine, gpus, layers)
    busy = sum(one.values())
    host = max(0.0, _HOST_SECONDS * layers * _again(question, layers) - busy)
    bubble = (placement.pp_size - 1) / placement.vp_size * (busy + host)
    parts = {name: count * seconds for name, seconds in one.items()}
    return StepTime(**parts, host=count * host, bubble=bubble, data=_replicas(question, stage, machine, gpus))


def _micro_batch(
    question: MemoryQuestion,
    stage: RankMemory,
    model: ModelFlops,
    machine: MachineConfig,
    gpus: int,
    layers: int,
) -> dict[str, float]:
    shape, tokens = question.shape, question.tokens
    share, again = layers / shape.num_layers, _again(question, layers)
    length = question.seq_length
    logits = 4.0 * shape.vocab_size * shape.hidden_size
    of_layers = share * (model.per_token - logits)
    attention = share * model.per_token_and_length * length
    rate = machine.tflops * 1e12 * machine.efficiency
    selective = question.training.recompute_granularity == "selective"
    operations = again * (of_layers + attention) + (attention / 3 if selective else 0.0) + logits
    memory = machine.memory_gb * _GIGA
    read = 2 * again * (stage.weights + stage.adapters) / memory
    return {
        "products": max(tokens * operations / question.tp / rate, read),
        "element_wise": _element_wise(question, stage, layers, again) / memory,
        "tensor": _tensor(question, machine, layers, again),
        "context": _context(question, machine, layers, again, tokens * attention / question.tp / rate),
        "experts": _experts(question, machine, share, again),
        "stages": _messages(question, machine, gpus),
    }


def _again(question: MemoryQuestion, layers: int) -> float:
    """By how much more is computed than without recomputation; a frozen model's backward pass costs one forward."""
    training = question.training
    if training.recompute_granularity != "full":
        return 1.0
    forward = 1 / 3 if question.adapter is None else 1 / 2
    pieces = min(layers, (training.recompute_num_layers or 1) * question.placement.vp_size)
    return 1.0 + forward * (pieces / layers if training.recompute_method == "block" else 1.0)


def _element_wise(question: MemoryQuestion, stage: RankMemory, layers: int, again: float) -> float:
    """Bytes that are read and written beside products."""
    shape, tokens = question.shape, question.tokens
    inner = shape.ffn_hidden_size / question.tp
    if shape.moe is not None:
        inner = (shape.moe.topk * shape.moe.ffn_hidden_size + shape.moe.shared_ffn_hidden_size) / question.tp
    hidden = _HIDDEN_PASSES * shape.hidden_size * question.residual_tokens
    passing = again * layers * (hidden + _INNER_PASSES * inner * tokens) * question.itemsize
    # The codes are read, the numbers written and read again, in each pass over the weights.
    held = stage.quantized
    return passing + 2 * again * (held.bytes + 2 * held.weights * question.itemsize)


def _tensor(question: MemoryQuestion, machine: MachineConfig, layers: int, again: float) -> float:
    tp = question.tp
    sent = question.tokens * question.shape.hidden_size * question.itemsize * (tp - 1) / tp
    each = sent / (machine.link_gb * _GIGA) + machine.latency_us * 1e-6
    return 8 * again * layers * each if tp > 1 else 0.0


def _context(
    question: MemoryQuestion, machine: MachineConfig, layers: int, again: float, attention: float
) -> float:
    """Keys and values go around in the forward pass, they and their gradients in the backward pass."""
    cp, shape = question.cp, question.shape
    if cp == 1:
        return 0.0
    features = 2 * shape.num_query_groups * shape.kv_channels / question.tp
    sent = question.tokens * features * question.itemsize * (cp - 1)
    within = question.tp * cp <= machine.gpus_per_node
    seconds = 3 * again * layers * sent / (_rate(machine, within) * _GIGA)
    return max(0.0, seconds - attention) + 3 * layers * (cp - 1) * machine.latency_us * 1e-6


def _experts(question: MemoryQuestion, machine: MachineConfig, share: float, again: float) -> float:
    shape, ep = question.shape, question.ep
    if shape.moe is None or ep * question.etp == 1:
        return 0.0
    layers = share * (shape.num_layers - len(shape.moe.dense_layers))
    ranks = ep * question.etp
    rows = question.tokens / question.tp * shape.moe.topk * question.etp
    sent = rows * shape.hidden_size * question.itemsize * (ranks - 1) / ranks
    within = ranks <= machine.gpus_per_node
    return 4 * again * layers * (sent / (_rate(machine, within) * _GIGA) + machine.latency_us * 1e-6)


def _messages(question: MemoryQuestion, machine: MachineConfig, gpus: int) -> float:
    pp, vp = question.placement.pp_size, question.placement.vp_size
    if pp == 1:
        return 0.0
    sent = question.residual_tokens * question.shape.hidden_size * question.itemsize
    within = gpus <= machine.gpus_per_node
    return 2 * vp * (sent / (_rate(machine, within) * _GIGA) + machine.latency_us * 1e-6)


def _replicas(question: MemoryQuestion, stage: RankMemory, machine: MachineConfig, gpus: int) -> float:
    """Gradients are summed in float32 and parameters gathered, in all about twice the gradients' bytes."""
    ranks = question.dp * question.cp
    update = stage.trained * _UPDATE_BYTES / ranks / (machine.memory_gb * _GIGA)
    if ranks == 1:
        return update
    within = gpus // question.placement.pp_size <= machine.gpus_per_node
    sent = 2 * stage.gradients * (ranks - 1) / ranks
    return update + sent / (_rate(machine, within) * _GIGA)


def _rate(machine: MachineConfig, within_node: bool) -> float:
    return machine.link_gb if within_node else machine.network_gb
