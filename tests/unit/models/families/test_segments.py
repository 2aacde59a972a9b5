from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mindspeed_lora.models.families.segments import Piece, Segment, part_sizes, pieces

SEGMENTS = [Segment(0, 0, 4), Segment(1, 0, 2), Segment(0, 4, 8), Segment(1, 2, 4)]


def test_pieces_of_a_range_over_several_segments():
    assert list(pieces(SEGMENTS, [(2, 9)])) == [
        Piece(0, 2, 4, 0),
        Piece(1, 0, 2, 2),
        Piece(0, 4, 7, 4),
    ]


def test_part_sizes():
    assert part_sizes(SEGMENTS) == (8, 4)


@given(
    sizes=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 4)), min_size=1, max_size=8),
    bounds=st.lists(st.tuples(st.integers(0, 40), st.integers(0, 40)), max_size=4),
)
def test_pieces_are_what_indexing_gives(sizes, bounds):
    segments, length, whole = [], [0, 0, 0], []
    for part, size in sizes:
        segments.append(Segment(part, length[part], length[part] + size))
        whole += [(part, index) for index in range(length[part], length[part] + size)]
        length[part] += size
    ranges = [tuple(min(bound, len(whole)) for bound in sorted(pair)) for pair in bounds]
    expected = [whole[index] for start, stop in ranges for index in range(start, stop)]
    found = [None] * len(expected)
    for part, start, stop, at in pieces(segments, ranges):
        found[at : at + stop - start] = [(part, index) for index in range(start, stop)]
    assert found == expected
