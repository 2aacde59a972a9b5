"""Figures of a side over all of its repetitions, and what they say beside each other."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from comparison.setting import Inputs, Setting
from comparison.sides import Side, SideRun, Step, computed_positions
from comparison.table import table

LOSS_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Spread:
    """A figure over the measured steps of all repetitions."""

    median: float
    lowest: float
    highest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """The spread of at least one value."""
        return cls(statistics.median(values), min(values), max(values))


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What a side reached; warm-up steps are left out of all but the losses."""

    name: str
    rows_at_once: int | None
    """Rows of a micro-batch; None: packed."""
    same_rows: bool
    """Whether its losses are comparable."""
    tokens_per_second: Spread
    """Real tokens, without padding."""
    loss_tokens_per_second: Spread
    step_ms: Spread
    peak_memory_bytes: int
    """The largest over the repetitions."""
    process_seconds: float
    """Median over the repetitions, start-up included."""
    real_share: float | None
    """Real tokens among the positions that were computed; None where rows are packed."""
    losses: tuple[float, ...]
    """Of all steps of the first repetition."""

    def to_json(self) -> dict[str, Any]:
        """As nested dictionaries."""
        return asdict(self)


def summarise(setting: Setting, inputs: Inputs, side: Side, runs: Sequence[SideRun]) -> Summary:
    """The figures of a side."""
    measured: list[Step] = [step for run in runs for step in run.steps[setting.warmup :]]
    tokens = sum(step.tokens for step in runs[0].steps[setting.warmup :])
    return Summary(
        name=side.name,
        rows_at_once=side.rows_at_once,
        same_rows=side.same_rows,
        tokens_per_second=Spread.of([step.tokens / step.elapsed_ms * 1000 for step in measured]),
        loss_tokens_per_second=Spread.of([step.loss_tokens / step.elapsed_ms * 1000 for step in measured]),
        step_ms=Spread.of([step.elapsed_ms for step in measured]),
        peak_memory_bytes=max(run.peak_memory_bytes for run in runs),
        process_seconds=statistics.median(run.seconds for run in runs),
        real_share=(
            tokens / computed_positions(setting, inputs, side.rows_at_once) if side.rows_at_once else None
        ),
        losses=tuple(step.loss for step in runs[0].steps),
    )


def ratios(ours: Summary, peer: Summary) -> dict[str, float]:
    """Ours divided by the peer's."""
    return {
        "tokens_per_second": ours.tokens_per_second.median / peer.tokens_per_second.median,
        "loss_tokens_per_second": ours.loss_tokens_per_second.median / peer.loss_tokens_per_second.median,
        "step_ms": ours.step_ms.median / peer.step_ms.median,
        "peak_memory_bytes": ours.peak_memory_bytes / peer.peak_memory_bytes,
    }


def best_peer(peers: Sequence[Summary]) -> Summary | None:
    """The fastest of the peers that run as their documentation tells."""
    own = [peer for peer in peers if "memory kept" not in peer.name]
    return max(own, key=lambda peer: peer.tokens_per_second.median, default=None)


def loss_difference(ours: Summary, peer: Summary) -> float:
    """Between the first losses, which come before any update."""
    return abs(ours.losses[0] - peer.losses[0])


def comparison_table(summaries: Sequence[Summary]) -> str:
    """A column a side, and one for the ratio of the first to each of the others."""
    first, *peers = summaries
    quotients = [ratios(first, peer) for peer in peers]

    def row(label: str, cells: Sequence[str], key: str | None = None) -> list[str]:
        return [label, *cells, *(f"{quotient[key]:.2f}" if key else "" for quotient in quotients)]

    return table(
        ["", *(s.name for s in summaries), *(f"ours / {peer.name}" for peer in peers)],
        [
            row("real tokens/s", [_spread(s.tokens_per_second) for s in summaries], "tokens_per_second"),
            row(
                "loss-carrying tokens/s",
                [_spread(s.loss_tokens_per_second) for s in summaries],
                "loss_tokens_per_second",
            ),
            row("step, s", [_spread(s.step_ms, 1e-3, 2) for s in summaries], "step_ms"),
            row(
                "peak resident memory, GB",
                [f"{s.peak_memory_bytes / 1e9:.2f}" for s in summaries],
                "peak_memory_bytes",
            ),
            row(
                "real share of positions",
                ["" if s.real_share is None else f"{s.real_share:.0%}" for s in summaries],
            ),
            row("first loss", [f"{s.losses[0]:.6f}" for s in summaries]),
            row("last loss", [f"{s.losses[-1]:.6f}" for s in summaries]),
        ],
    )


def _spread(spread: Spread, unit: float = 1.0, digits: int = 0) -> str:
    low, middle, high = (f"{v * unit:.{digits}f}" for v in (spread.lowest, spread.median, spread.highest))
    return f"{middle} ({low}–{high})"
