"""Several inputs as one stream of rows: one after the other, or interleaved.

Interleaved rows come in turn, or as a generator seeded with ``--seed`` draws their inputs; the order is that of
``datasets.interleave_datasets``, which MindSpeed-LLM and LLaMA-Factory use. It is formed before rows are dealt out
to workers, so that it does not depend on their number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mindspeed_lora.data.readers import BadRow, Row
from mindspeed_lora.errors import Refused

MIX_STRATEGIES = ("concat", "interleave_under", "interleave_over")
Stream = tuple[Callable[[], Iterator[Row | BadRow]], int]
"""A function that gives the rows of an input from the first on, and its size."""
_DRAWN_AT_ONCE = 1000
"""So many draws are one call of the generator, in ``datasets`` and therefore here."""


@dataclass(frozen=True)
class Mixing:
    """How the rows of several inputs are put into one order."""

    strategy: str = "concat"
    """``interleave_under`` ends with the shortest input, ``interleave_over`` when each has been read to its end,
    repeating those that end before."""
    probabilities: tuple[float, ...] | None = None
    """Of each input to give the next row; None: they take turns."""
    seed: int = 1234


def mixed_rows(streams: Sequence[Stream], mixing: Mixing) -> Iterator[Row | BadRow]:
    """The rows of all inputs in order; ``fraction`` is of everything."""
    if len(streams) == 1:
        yield from streams[0][0]()
        return
    if mixing.strategy == "concat":
        yield from _one_after_the_other(streams)
        return
    inputs = [_Input(rows) for rows, _ in streams]
    over = mixing.strategy == "interleave_over"
    drawn = _in_turn(inputs, over) if mixing.probabilities is None else _by_chance(inputs, mixing, over)
    done = 0.0
    for row in drawn:
        fractions = [given.fraction for given in inputs]
        done = max(done, min(fractions) if over else max(fractions))
        yield row.at(done, row.source)


def _one_after_the_other(streams: Sequence[Stream]) -> Iterator[Row | BadRow]:
    total = sum(size for _, size in streams)
    before = 0
    for rows, size in streams:
        for row in rows():
            yield row.at((before + row.fraction * size) / total, row.source)
        before += size


class _Input:
    """The rows of one input, over and over; the next one is known beforehand."""

    def __init__(self, rows: Callable[[], Iterator[Row | BadRow]]) -> None:
        self._rows = rows
        self.has_ended = False
        """Whether its last row has been given once."""
        self.fraction = 0.0
        self._start()

    def _start(self) -> None:
        self._iterator = self._rows()
        first = next(self._iterator, None)
        if first is None:
            raise Refused("--mix-strategy: one of the inputs has no rows")
        self._next = first

    def take(self) -> Row | BadRow:
        """The next row; behind the last one, the first again."""
        row = self._next
        if not self.has_ended:
            self.fraction = row.fraction
        following = next(self._iterator, None)
        if following is None:
            self.has_ended, self.fraction = True, 1.0
            self._start()
        else:
            self._next = following
        return row


def _in_turn(inputs: Sequence[_Input], over: bool) -> Iterator[Row | BadRow]:
    """Whole rounds: as many as the shortest input has rows, or the longest (``over``)."""
    enough = all if over else any
    while not enough(given.has_ended for given in inputs):
        for given in inputs:
            yield given.take()


def _by_chance(inputs: Sequence[_Input], mixing: Mixing, over: bool) -> Iterator[Row | BadRow]:
    """Each row from the input that is drawn, until one has ended, or each (``over``)."""
    generator = np.random.default_rng(mixing.seed)
    enough = all if over else any
    while True:
        draws = generator.choice(len(inputs), size=_DRAWN_AT_ONCE, p=mixing.probabilities)
        for number in draws.tolist():
            if enough(given.has_ended for given in inputs):
                return
            yield inputs[number].take()
