"""Packing: valid, deterministic, as tight as best fit decreasing by its definition, and fast."""

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mindspeed_lora.data.packing import Packing, best_fit_decreasing, even_bins

LENGTHS = st.lists(st.integers(1, 30), max_size=80)


def by_definition(lengths: list[int], capacity: int) -> list[int]:
    """How full the bins of best fit decreasing are, one row at a time."""
    filled: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [number for number, full in enumerate(filled) if full + length <= capacity]
        if fitting:
            filled[max(fitting, key=lambda number: filled[number])] += length
        else:
            filled.append(length)
    return sorted(filled)


def bins(packing: Packing) -> list[list[int]]:
    return [rows.tolist() for rows in packing]


def fills(packing: Packing, lengths: list[int]) -> list[int]:
    return [sum(lengths[row] for row in rows) for rows in bins(packing)]


def check_order(found: list[list[int]], count: int) -> None:
    """Each row once; bins by their first rows, the rows of a bin in input order."""
    assert sorted(sum(found, [])) == list(range(count))
    assert all(rows == sorted(rows) and rows for rows in found)
    assert [rows[0] for rows in found] == sorted(rows[0] for rows in found)


@settings(deadline=None, max_examples=300)
@given(lengths=LENGTHS, capacity=st.integers(30, 70))
def test_best_fit_decreasing_is_what_it_is_called(lengths: list[int], capacity: int) -> None:
    packing = best_fit_decreasing(lengths, capacity)
    check_order(bins(packing), len(lengths))
    assert sorted(fills(packing, lengths)) == by_definition(lengths, capacity)


@settings(deadline=None)
@given(lengths=LENGTHS, capacity=st.integers(30, 70), num_bins=st.integers(1, 40))
def test_even_bins(lengths: list[int], capacity: int, num_bins: int) -> None:
    packing = even_bins(lengths, capacity, num_bins)
    if packing is None:
        assert sum(lengths) > 0
        return
    check_order(bins(packing), len(lengths))
    assert len(packing) == min(num_bins, len(lengths))
    filled = fills(packing, lengths)
    assert max(filled, default=0) <= capacity
    if filled:
        # The last row into the fullest bin went into the emptiest at that time.
        assert max(filled) - min(filled) <= max(lengths)


def test_an_example() -> None:
    lengths = [3, 6, 4, 7, 3, 1]
    assert bins(best_fit_decreasing(lengths, 10)) == [[0, 3], [1, 2], [4, 5]]
    even = even_bins(lengths, 10, 3)
    assert even is not None and bins(even) == [[0, 2], [1, 4], [3, 5]]
    assert even_bins(lengths, 8, 3) is None


def test_rows_of_one_length() -> None:
    assert bins(best_fit_decreasing([5] * 7, 16)) == [[0, 1, 2], [3, 4, 5], [6]]


def test_nothing() -> None:
    assert bins(best_fit_decreasing([], 10)) == []


@pytest.mark.parametrize(("lengths", "found"), [([4, 11], "4 to 11"), ([0, 4], "0 to 4")])
def test_rows_that_fit_no_bin(lengths: list[int], found: str) -> None:
    with pytest.raises(ValueError, match=f"lengths from {found}; expected 1 to 10"):
        best_fit_decreasing(lengths, 10)
    with pytest.raises(ValueError, match=f"lengths from {found}; expected 1 to 10"):
        even_bins(lengths, 10, 5)


@pytest.mark.parametrize("capacity", [2048, 8192])
def test_a_million_lengths_in_seconds(capacity: int) -> None:
    """Half a second on an idle core; the bound leaves room for a busy one."""
    lengths = np.random.RandomState(1).randint(1, capacity + 1, size=1_000_000)
    start = time.process_time()
    packing = best_fit_decreasing(lengths, capacity)
    assert time.process_time() - start < 10
    assert lengths.sum() / (len(packing) * capacity) > 0.999
