"""Packed rows as they are written: plain ones run through, neat ones keep their rows apart."""

import os
from pathlib import Path

import numpy as np

from mindspeed_lora.data.packed_rows import PackFormat, RowSpool

NOTHING = -100
ROWS = [([1, 2, 3], [NOTHING, 2, 3]), ([4, 5, 6, 7], [4, 5, 6, 7]), ([8, 9], [NOTHING, 9])]


def form(neat: bool, seq_length: int = 6) -> PackFormat:
    return PackFormat(seq_length=seq_length, pad_token_id=0, neat=neat)


def packed(folder: Path, neat: bool, rows: list[tuple[list[int], list[int]]] = ROWS) -> list[list[list[int]]]:
    spool = RowSpool(folder / "rows")
    for input_ids, labels in rows:
        spool.add(np.array(input_ids, dtype=np.int32), np.array(labels, dtype=np.int32))
    found = []
    for row, weights in spool.packed(form(neat)):
        assert weights is None
        found.append([part.tolist() for part in row])
    spool.close()
    assert os.listdir(folder) == [], "nothing stays"
    return found


def test_plain(tmp_path: Path) -> None:
    """The label of the first token of a row stays: the row before it predicts it, as in Megatron."""
    assert packed(tmp_path, neat=False) == [
        [[1, 2, 3, 0, 0, 0], [1, 1, 1, 0, 0, 0], [NOTHING, 2, 3] + [NOTHING] * 3],
        [[4, 5, 6, 7, 8, 9], [1] * 6, [4, 5, 6, 7, NOTHING, 9]],
    ]


def test_neat(tmp_path: Path) -> None:
    assert packed(tmp_path, neat=True) == [
        [[1, 2, 3, 0, 0, 0], [1, 1, 1, 0, 0, 0], [NOTHING, 2, 3] + [NOTHING] * 3],
        [[4, 5, 6, 7, 8, 9], [1, 1, 1, 1, 2, 2], [NOTHING, 5, 6, 7, NOTHING, 9]],
    ]


def test_first_token_of_a_later_row_is_never_predicted() -> None:
    first, second = np.array([1, 2]), np.array([3, 4])
    rows = [(first, first, None), (second, second, None)]
    (_, _, labels), _ = form(neat=True).row(rows)
    assert labels.tolist() == [NOTHING, 2, NOTHING, 4, NOTHING, NOTHING]
    (_, _, labels), _ = form(neat=False).row(rows)
    assert labels.tolist() == [1, 2, 3, 4, NOTHING, NOTHING]


def test_dtype(tmp_path: Path) -> None:
    assert {part.dtype for part in form(True).row([])[0]} == {np.dtype(np.int32)}


def test_weights_stay_with_their_rows(tmp_path: Path) -> None:
    spool = RowSpool(tmp_path / "rows")
    weights = [None, np.array([1, 0.5, 2, 1], dtype=np.float32), None]
    for (input_ids, labels), own in zip(ROWS, weights, strict=True):
        spool.add(np.array(input_ids, dtype=np.int32), np.array(labels, dtype=np.int32), own)
    (first, none), (second, found) = spool.packed(form(neat=True))
    spool.close()
    assert none is None and found is not None and found.dtype == np.float32
    assert (first[0].tolist(), second[0].tolist()) == ([1, 2, 3, 0, 0, 0], [4, 5, 6, 7, 8, 9])
    assert found.tolist() == [1, 0.5, 2, 1, 1, 1]


def test_no_rows(tmp_path: Path) -> None:
    assert packed(tmp_path, neat=True, rows=[]) == []
