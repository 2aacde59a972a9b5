"""The outcome of a comparison: printed, and written as JSON."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from comparison.machine import commit, machine, versions
from comparison.profiling import profile_text
from comparison.setting import Setting
from comparison.sides import SideRun
from comparison.summary import (
    LOSS_TOLERANCE,
    Summary,
    best_peer,
    comparison_table,
    loss_difference,
    ratios,
)

BUSY = 0.5
"""Load average at the start from which on figures are not to be trusted."""


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Under what circumstances was measured; taken before the work begins."""

    setting: Setting
    command: str
    date: str
    machine: dict[str, Any]
    versions: dict[str, str]
    commit: dict[str, Any]

    @classmethod
    def now(cls, setting: Setting, command: str) -> Facts:
        """The circumstances at this moment."""
        return cls(
            setting=setting.without_folders,
            command=command,
            date=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            machine=machine(),
            versions=versions(),
            commit=commit(),
        )

    def to_json(self) -> dict[str, Any]:
        """As nested dictionaries."""
        return asdict(self)

    @property
    def busy(self) -> bool:
        """Whether other work ran on the machine."""
        return bool(self.machine["load_average"] > BUSY)


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """All that was measured; ours is the first of the sides where it took part."""

    facts: Facts
    repeats: int
    summaries: Sequence[Summary]
    runs: Mapping[str, Sequence[SideRun]]
    profile: dict[str, Any] | None

    @property
    def disagreements(self) -> list[str]:
        """A sentence for each side whose first loss is not that of the first side."""
        return [
            f"the first loss of {peer.name} is {peer.losses[0]:.6f}, that of {first.name} {first.losses[0]:.6f}: they "
            f"differ by {loss_difference(first, peer):.1e} (at most {LOSS_TOLERANCE:g} is rounding), so the sides do "
            "not compute the same and the ratios mean nothing"
            for first in self.summaries[:1]
            for peer in self.summaries[1:]
            if peer.same_rows and not loss_difference(first, peer) <= LOSS_TOLERANCE
        ]

    def text(self) -> str:
        """The report in words and tables."""
        parts = [circumstances(self.facts, self.repeats)]
        if self.summaries:
            parts.append(comparison_table(self.summaries))
        if len(self.summaries) > 1 and not self.disagreements:
            parts.append(f"First losses agree (difference at most {LOSS_TOLERANCE:g}).")
        best = best_peer(self.summaries[1:])
        if best is not None:
            found = ratios(self.summaries[0], best)
            parts.append(
                f"The fastest peer is {best.name}: ours is {found['tokens_per_second']:.2f} times as fast, with "
                f"{found['peak_memory_bytes']:.2f} of its memory."
            )
        if self.profile is not None:
            parts.append(profile_text(self.profile))
        return "\n\n".join(parts)

    def write(self, path: Path) -> None:
        """The report as JSON."""
        first, peers = self.summaries[:1], self.summaries[1:]
        content = {
            "benchmark": "train_vs_trl",
            **{key: value for key, value in asdict(self.facts).items() if key != "setting"},
            "setting": {**asdict(self.facts.setting), "repeats": self.repeats},
            "sides": [
                {**summary.to_json(), "runs": [asdict(run) for run in self.runs[summary.name]]}
                for summary in self.summaries
            ],
            "ratios": [
                {"ours": ours.name, "peer": peer.name, **ratios(ours, peer)}
                for ours in first
                for peer in peers
            ],
            "best_peer": best.name if (best := best_peer(peers)) else None,
            "first_losses_agree": not self.disagreements,
            "profile": self.profile,
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def circumstances(facts: Facts, repeats: int) -> str:
    """What was measured how, on which machine, with which versions."""
    setting, where = facts.setting, facts.machine
    sha = facts.commit.get("sha", "unknown")[:12] + (" and changes" if facts.commit.get("changed") else "")
    return "\n".join(
        [
            f"{Path(setting.model).name}, fp32, LoRA of rank {setting.rank} on all linears, "
            f"{setting.global_batch_size} rows a step, at most {setting.seq_length} tokens a row, padded to the "
            f"longest of the micro-batch (multiple of {setting.pad_to_multiple_of}), {setting.threads} threads",
            f"median (lowest–highest) of {setting.steps} steps after {setting.warmup} for warm-up, "
            f"{repeats} times, sides in turn",
            f"{where['cpu']}, {where['cores']} cores, {where['memory_bytes'] / 1e9:.0f} GB; "
            f"load average {where['load_average']} at the start",
            ", ".join(f"{name} {number}" for name, number in facts.versions.items()) + f"; commit {sha}",
            f"command: {facts.command}",
        ]
    )
