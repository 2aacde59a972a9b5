"""Step times with and without --lora-fusion on hardware that is not at hand, by the cost model.

    python tools/overlap_model.py --model llama-2-7b --tokens 4096 --tp 8 --tflops 500 --link-gb 300 --latency-us 12
    python tools/overlap_model.py --table                                        three clusters, beside published gains
    python tools/overlap_model.py --validate benchmarks/results/cclora.json      against the measured sweep

The linears are played through as `mindspeed_lora/adapters/schedules/cost.py` does when it chooses a plan. Attention
costs its products, element-wise steps their bytes. Interleaved halves hide what fits into the compute; what is left
are the ends of a layer, where a first half gathers and a last one scatters with only its own rows to compute.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from comparison.table import table  # noqa: E402

from mindspeed_lora.adapters.schedules import Family, SchedulePlan  # noqa: E402
from mindspeed_lora.adapters.schedules.cost import (  # noqa: E402
    Device,
    LinearShape,
    best,
    candidates,
    linear_time,
)
from mindspeed_lora.adapters.schedules.plan import UNFUSED  # noqa: E402

_ELEMENT_WISE_PASSES = 34
"""Reads and writes of a hidden state by a layer's norms, residuals, rotation and SwiGLU, forward and backward."""


@dataclass(frozen=True)
class Model:
    """A Llama-like model."""

    hidden_size: int
    ffn_hidden_size: int
    layers: int
    heads: int
    kv_heads: int


MODELS = {
    "llama-2-7b": Model(4096, 11008, 32, 32, 32),
    "llama-3-8b": Model(4096, 14336, 32, 32, 8),
    "llama-2-70b": Model(8192, 28672, 80, 64, 8),
}


@dataclass(frozen=True)
class Job:
    """A micro-batch of a model on TP ranks with sequence parallelism."""

    model: Model
    tokens: int
    row: int
    """Tokens of a row, which attention sees."""
    tp: int
    rank: int = 16
    element_size: int = 2

    @property
    def linears(self) -> dict[str, LinearShape]:
        """Those of one layer, as a rank has them."""
        m, t = self.model, self.tp
        width = m.hidden_size // m.heads
        sizes = {
            "linear_qkv": (True, m.hidden_size, (m.heads + 2 * m.kv_heads) * width // t),
            "linear_proj": (False, m.heads * width // t, m.hidden_size),
            "linear_fc1": (True, m.hidden_size, 2 * m.ffn_hidden_size // t),
            "linear_fc2": (False, m.ffn_hidden_size // t, m.hidden_size),
        }
        return {
            name: LinearShape(column, self.tokens, inside, out, self.rank, t, t > 1, self.element_size)
            for name, (column, inside, out) in sizes.items()
        }

    def other_seconds(self, device: Device) -> float:
        """Attention and element-wise steps of one layer, forward and backward, without communication."""
        scores = 2 * self.tokens * self.row * self.model.hidden_size / self.tp
        attention = 3.5 * 2 * scores / 2 / (0.6 * device.flops)
        moved = _ELEMENT_WISE_PASSES * self.tokens * self.model.hidden_size * self.element_size / self.tp
        return attention + moved / device.memory


@dataclass(frozen=True)
class Prediction:
    """Of one layer, in seconds."""

    step: float
    communication: float
    plans: tuple[SchedulePlan, ...]


def predict(job: Job, device: Device, plans: Sequence[SchedulePlan], other: float) -> Prediction:
    """One layer whose linears follow each other, each with its plan; ``other``: attention and element-wise steps."""
    clocks = [
        linear_time(plan, shape, device) for plan, shape in zip(plans, job.linears.values(), strict=True)
    ]
    return Prediction(
        other + sum(clock.now for clock in clocks), sum(clock.travelling for clock in clocks), tuple(plans)
    )


def choose(
    job: Job, device: Device, family: Family | None, merge: bool | None, chunks: int | None
) -> list[SchedulePlan]:
    """The plan of every linear, as training chooses it."""
    return [best(candidates(family, merge, chunks), shape, device) for shape in job.linears.values()]


def predict_interleaved(job: Job, device: Device, other: float, chunks: int | None = None) -> Prediction:
    """One layer in two halves by turns."""
    half = replace(job, tokens=job.tokens // 2)
    plans = choose(half, device, Family.ONE_COLLECTIVE, None, chunks)
    clocks = [
        linear_time(plan, shape, device) for plan, shape in zip(plans, half.linears.values(), strict=True)
    ]
    compute = other + 2 * sum(clock.computing for clock in clocks)
    communication = 2 * sum(clock.travelling for clock in clocks)
    ends = 0.0
    for shape, plan in zip(half.linears.values(), plans, strict=True):
        if shape.column:
            gather = device.latency + (shape.tp - 1) * shape.tokens // shape.tp * shape.in_features * (
                shape.element_size / device.link
            )
            own = 2 * shape.tokens / shape.tp * shape.in_features * shape.out_features / device.flops
            ends += max(0.0, gather - (own if plan.chunks else 0.0))
    return Prediction(max(compute + ends, communication), communication, tuple(plans))


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what was asked for; the exit status."""
    options = _parser().parse_args(arguments)
    if options.validate is not None:
        print(validation(json.loads(options.validate.read_text())))
    elif options.table:
        print(clusters())
    else:
        device = Device(
            1e12 * options.tflops, 1e9 * options.memory_gb, 1e9 * options.link_gb, 1e-6 * options.latency_us
        )
        row = min(options.row or options.tokens, options.tokens)
        job = Job(MODELS[options.model], options.tokens, row, options.tp, options.rank)
        print(table(_HEADING, [_row(options.model, job, device)]))
        for name, plan in zip(job.linears, choose(job, device, None, None, None), strict=True):
            print(f"{name}: {plan}")
    return 0


_HEADING = [
    "",
    "layer unfused, ms",
    "communication",
    "one-collective",
    "published",
    "auto",
    "auto, interleaved",
    "model, unfused, ms",
    "gain",
]


def _row(name: str, job: Job, device: Device) -> list[str]:
    other = job.other_seconds(device)
    unfused = predict(job, device, [UNFUSED] * 4, other)
    one = predict(job, device, [SchedulePlan(Family.ONE_COLLECTIVE)] * 4, other)
    published = predict(job, device, [SchedulePlan(Family.OVERLAPPED, 0)] * 4, other)
    auto = predict(job, device, choose(job, device, None, None, None), other)
    halves = predict_interleaved(job, device, other)
    fused = min(auto.step, halves.step)
    return [
        name,
        f"{1e3 * unfused.step:.3g}",
        f"{100 * unfused.communication / unfused.step:.0f}%",
        *(f"{1e3 * found.step:.3g}" for found in (one, published, auto, halves)),
        f"{1e3 * unfused.step * job.model.layers:.4g}",
        f"{100 * (unfused.step / fused - 1):.0f}%",
    ]


_CLUSTERS = {
    "8 × H100, NVLink": (Device(6.0e14, 2.6e12, 3.0e11, 1.2e-5), 8),
    "8 × A2 class, HCCS": (Device(2.2e14, 1.3e12, 1.2e11, 2.5e-5), 8),
    "2 × 8 H100, 400 Gb/s": (Device(6.0e14, 2.6e12, 4.5e10, 3.0e-5), 16),
}
"""Reached, not peak: bf16 products, memory, one rank's share of the link, a collective's latency."""


def clusters() -> str:
    """Llama-2-7B under TP with SP on three clusters: packed rows of 4096 tokens, and micro-batches of short rows."""
    rows = []
    for cluster, (device, tp) in _CLUSTERS.items():
        for kind, tokens, row in (("packed, 4096 tokens", 4096, 4096), ("dynamic, 4 rows of 256", 1024, 256)):
            rows.append(
                _row(f"{cluster}, TP {tp}: {kind}", Job(MODELS["llama-2-7b"], tokens, row, tp), device)
            )
    assumed = "\n".join(
        f"{name}: {device.flops / 1e12:.0f} TFLOP/s, memory {device.memory / 1e12:.1f} TB/s, link "
        f"{device.link / 1e9:.0f} GB/s, latency {device.latency * 1e6:.0f} µs"
        for name, (device, _) in _CLUSTERS.items()
    )
    return f"{table(_HEADING, rows)}\n\nAssumed, reached and not peak:\n{assumed}"


def validation(found: dict[str, Any]) -> str:
    """Predicted and measured steps of a sweep, whose compute alone and link rates are given."""
    sizes = found["sizes"]
    layers = sizes["layers"]
    model = Model(sizes["hidden_size"], sizes["ffn_hidden_size"], layers, sizes["heads"], sizes["heads"])
    tokens = sizes["seq_length"] * sizes["micro_batch_size"]
    job = Job(model, tokens, sizes["seq_length"], found["ranks"], sizes["rank"], element_size=4)
    rows, errors = [], []
    for rate in found["rates"]:
        if rate["ratio"] is None:
            continue
        sent = found["bytes_sent"]
        measured = Device(**rate["speeds"])
        device = replace(measured, link=sent / rate["communication_seconds"])
        linears = sum(linear_time(UNFUSED, shape, device).computing for shape in job.linears.values())
        # What the products leave of the measured compute are attention and element-wise steps.
        scale = min(1.0, rate["compute_seconds"] / layers / linears)
        other = max(0.0, rate["compute_seconds"] / layers - linears * scale)
        device = replace(device, flops=device.flops / scale, memory=device.memory / scale)
        one = SchedulePlan(Family.ONE_COLLECTIVE)
        predicted = {
            "unfused": predict(job, device, [UNFUSED] * 4, other),
            "no chunks": predict(job, device, [one] * 4, other),
            "fused": predict(job, device, choose(job, device, None, None, None), other),
            "published, merge": predict(job, device, [SchedulePlan(Family.OVERLAPPED, 0)] * 4, other),
            "interleaved": predict_interleaved(job, device, other),
        }
        for name, prediction in predicted.items():
            step = statistics.median(rate["step_seconds"][name])
            error = layers * prediction.step / step - 1
            errors.append(abs(error))
            rows.append(
                [
                    f"{rate['ratio']:g}",
                    name,
                    f"{step:.3f}",
                    f"{layers * prediction.step:.3f}",
                    f"{100 * error:+.0f}%",
                ]
            )
    heading = ["communication / compute", "", "measured, s", "predicted, s", "error"]
    mean, largest = 100 * statistics.mean(errors), 100 * max(errors)
    return f"{table(heading, rows)}\n\nerror: {mean:.0f}% on average, {largest:.0f}% at most"


def _parser() -> argparse.ArgumentParser:
    description, _, _ = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(description=description)
    add = parser.add_argument
    add("--table", action="store_true", help="three clusters")
    add("--validate", type=Path, metavar="FILE", help="what benchmarks/cclora.py --json wrote")
    add("--model", choices=MODELS, default="llama-2-7b")
    add("--tokens", type=int, default=4096, help="of a micro-batch (default: %(default)s)")
    add("--row", type=int, help="tokens of a row, which attention sees (default: all)")
    add("--tp", type=int, default=8, help="tensor-parallel ranks (default: %(default)s)")
    add("--rank", type=int, default=16, help="of the adapters (default: %(default)s)")
    add("--tflops", type=float, default=600, help="products, reached (default: %(default)s)")
    add("--memory-gb", type=float, default=2600, help="GB/s of element-wise work (default: %(default)s)")
    add("--link-gb", type=float, default=300, help="GB/s that a rank sends (default: %(default)s)")
    add("--latency-us", type=float, default=12, help="of a collective (default: %(default)s)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
