"""What preparing a data set came to: rows, tokens, lengths."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from mindspeed_lora.data.outcome import Outcome

PROBLEMS_TOLD = 10
"""So many broken rows are named."""
_BAR_WIDTH = 40
_BARS = 12


@dataclass
class Summary:
    """Counts over all rows of a run."""

    read: int = 0
    kept: int = 0
    cut: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    """Number of dropped rows by reason."""
    broken: int = 0
    problems: list[str] = field(default_factory=list)
    """What is wrong with the first broken rows."""
    tokens: int = 0
    loss_tokens: int = 0
    lengths: Counter[int] = field(default_factory=Counter)
    """Number of kept rows by length."""
    packed: int = 0
    """Rows that the kept ones were packed to …"""
    packed_length: int = 0
    """… each of so many tokens."""

    def add(self, outcome: Outcome) -> int:
        """Count one row; returns its tokens."""
        self.read += 1
        if outcome.problem is not None:
            self.broken += 1
            self.problems += [outcome.problem] if len(self.problems) < PROBLEMS_TOLD else []
            return 0
        if outcome.reason is not None:
            self.dropped[outcome.reason] += 1
            return 0
        length = outcome.num_tokens or len(outcome.documents[0])
        self.kept += 1
        self.cut += outcome.was_cut
        self.tokens += length
        self.loss_tokens += outcome.num_loss_tokens
        self.lengths[length] += 1
        return length

    def state(self) -> dict[str, Any]:
        """What JSON can hold of the counts."""
        values = ((item.name, getattr(self, item.name)) for item in fields(self))
        return {name: list(value.items()) if isinstance(value, Counter) else value for name, value in values}

    @classmethod
    def restored(cls, state: Mapping[str, Any]) -> Summary:
        """From what :meth:`state` gave."""
        summary = cls()
        for name, value in state.items():
            counted = isinstance(getattr(summary, name), Counter)
            setattr(summary, name, Counter(dict(value)) if counted else value)
        return summary

    @property
    def longest(self) -> int:
        """Length of the longest kept row."""
        return max(self.lengths, default=0)

    def text(self, seconds: float) -> str:
        """The summary as lines for people."""
        lines = [f"rows read     {self.read:>12,}", f"rows kept     {self.kept:>12,}"]
        if self.cut:
            lines.append(f"  of them cut {self.cut:>12,}  to --seq-length")
        lines.append(f"rows dropped  {sum(self.dropped.values()):>12,}")
        lines += [f"              {count:>12,}  {reason}" for reason, count in self.dropped.most_common()]
        if self.broken:
            lines.append(f"rows broken   {self.broken:>12,}  {self.broken / self.read:.2%}, left out")
        lines.append(f"tokens        {self.tokens:>12,}  {self.tokens / max(self.kept, 1):,.1f} a row")
        if self.packed:
            filled = self.tokens / (self.packed * self.packed_length)
            lines.append(
                f"packed rows   {self.packed:>12,}  of {self.packed_length:,} tokens, {filled:.2%} filled"
            )
        share = self.loss_tokens / max(self.tokens, 1)
        lines.append(f"  with loss   {self.loss_tokens:>12,}  {share:.1%}")
        rate = self.tokens / max(seconds, 1e-9)
        lines.append(f"time          {seconds:>11,.1f}s  {rate:,.0f} tokens/s")
        return "\n".join([*lines, *self._histogram()])

    def _histogram(self) -> list[str]:
        if not self.lengths:
            return []
        step = _round_step(self.longest / _BARS)
        bars: Counter[int] = Counter()
        for length, count in self.lengths.items():
            bars[(length - 1) // step] += count
        most = max(bars.values())
        lines = ["rows by length in tokens"]
        for number in range(max(bars) + 1):
            label = f"{number * step + 1:,}-{(number + 1) * step:,}"
            bar = "#" * -(-bars[number] * _BAR_WIDTH // most)
            lines.append(f"{label:>14}  {bars[number]:>11,}  {bar}".rstrip())
        return lines


def _round_step(exact: float) -> int:
    """The next of 1, 2, 4, 8, … that gives no more bars than wanted."""
    step = 1
    while step < exact:
        step *= 2
    return step
