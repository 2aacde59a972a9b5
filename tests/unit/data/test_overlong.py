import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mindspeed_lora.data.overlong import kept_positions


def labels(*runs: int) -> np.ndarray:
    """Labels by runs: lengths of prompt, answer, prompt, answer …"""
    return np.concatenate([np.full(n, -100 if i % 2 == 0 else 1) for i, n in enumerate(runs)])


def kept(runs: tuple[int, ...], seq_length: int, overlong: str) -> list[int] | None:
    positions = kept_positions(labels(*runs), seq_length, overlong)
    return None if positions is None else positions.tolist()


@pytest.mark.parametrize("overlong", ["truncate", "proportional", "drop"])
def test_a_row_that_fits_exactly_is_kept_whole(overlong: str) -> None:
    assert kept((3, 2), 5, overlong) == [0, 1, 2, 3, 4]


def test_truncate_cuts_the_end() -> None:
    assert kept((3, 5), 6, "truncate") == [0, 1, 2, 3, 4, 5]


def test_truncate_without_answer_left_drops() -> None:
    assert kept((6, 5), 6, "truncate") is None


def test_an_only_first_label_is_no_loss() -> None:
    # The label of the first token has no position that predicts it.
    assert kept((0, 1, 5), 1, "truncate") is None


def test_drop() -> None:
    assert kept((3, 5), 7, "drop") is None


def test_proportional_keeps_a_short_answer_whole() -> None:
    # 3 · 2 < 10: the prompt alone is cut, to 7.
    assert kept((20, 3), 10, "proportional") == [*range(7), 20, 21, 22]


def test_proportional_keeps_a_short_prompt_whole() -> None:
    assert kept((3, 20), 10, "proportional") == list(range(10))


def test_proportional_cuts_both() -> None:
    # int(10 · 12 / 20) = 6 of the answer, the rest of the room for the prompt.
    assert kept((8, 12), 10, "proportional") == [0, 1, 2, 3, *range(8, 14)]


def test_proportional_goes_turn_by_turn() -> None:
    assert kept((2, 2, 20, 2), 10, "proportional") == [*range(8), 24, 25]
    assert kept((2, 8, 4, 4), 10, "proportional") == list(range(10))


@settings(deadline=None)
@given(
    runs=st.lists(st.integers(1, 12), min_size=1, max_size=6),
    seq_length=st.integers(1, 30),
    overlong=st.sampled_from(["truncate", "proportional"]),
    answer_first=st.booleans(),
)
def test_what_is_kept_is_in_order_fits_and_carries_loss(
    runs: list[int], seq_length: int, overlong: str, answer_first: bool
) -> None:
    row = labels(*([0, *runs] if answer_first else runs))
    positions = kept_positions(row, seq_length, overlong)
    if len(row) <= seq_length:
        assert positions is not None and len(positions) == len(row)
    elif positions is not None:
        assert len(positions) <= seq_length
        assert (np.diff(positions) > 0).all()
        assert (row[positions][1:] != -100).any()
