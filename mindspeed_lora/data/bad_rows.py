"""Rows that are broken: left out, counted and told, up to the share that ``--max-bad-rows`` allows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mindspeed_lora.data.outcome import Outcome, Outcomes
from mindspeed_lora.data.readers import BadRow, Row
from mindspeed_lora.data.row_work import Work
from mindspeed_lora.data.summary import PROBLEMS_TOLD, Summary
from mindspeed_lora.errors import Refused

_READ_BEFORE_GIVING_UP = 1000
"""When so many rows are broken and none is whole, the rest need not be read."""
_BROKEN = "broken"


@dataclass(frozen=True)
class CheckedWork:
    """Does the work of whole rows, and tells what is wrong with the others."""

    work: Work

    def __call__(self, rows: Sequence[Row | BadRow]) -> Outcomes:
        """One outcome a row, in order."""
        whole = [row for row in rows if isinstance(row, Row)]
        outcomes = iter(self._work(whole))
        return Outcomes(
            next(outcomes) if isinstance(row, Row) else Outcome(reason=_BROKEN, problem=row.problem)
            for row in rows
        )

    def _work(self, rows: Sequence[Row]) -> list[Outcome]:
        try:
            return self.work(rows)
        except Refused as error:
            if len(rows) == 1:
                return [Outcome(reason=_BROKEN, problem=str(error))]
        # Again one by one: each for itself is whole or broken.
        return [outcome for row in rows for outcome in self._work([row])]


@dataclass(frozen=True)
class BadRowLimit:
    """How many rows may be broken."""

    text: str
    """``--max-bad-rows``: a share like ``1%``, or a number."""
    input: str

    def allows(self, summary: Summary) -> bool:
        """Whether so many of the rows may be broken."""
        if self.text.endswith("%"):
            return summary.broken <= summary.read * float(self.text[:-1]) / 100
        return summary.broken <= int(self.text)

    def check_on_the_way(self, summary: Summary) -> None:
        """Give up when there are nothing but broken rows."""
        if summary.broken == summary.read >= _READ_BEFORE_GIVING_UP:
            self.check(summary)

    def check(self, summary: Summary) -> None:
        """Refuse too many broken rows.

        Raises:
            Refused: with the first few.
        """
        if self.allows(summary):
            return
        share = summary.broken / summary.read
        first = "; ".join(summary.problems[:3])
        more = " …" if summary.broken > 3 else ""
        raise Refused(
            f"--input {self.input}: {summary.broken:,} of {summary.read:,} rows ({share:.2%}) are broken, more than "
            f"--max-bad-rows {self.text} allows: {first}{more}"
        )


def told(summary: Summary) -> list[str]:
    """Sentences on the broken rows that were left out."""
    sentences = [f"left out: {problem}" for problem in summary.problems]
    if summary.broken > PROBLEMS_TOLD:
        sentences.append(f"left out: {summary.broken - PROBLEMS_TOLD:,} more broken rows")
    return sentences
