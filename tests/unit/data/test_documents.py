import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mindspeed_lora.data.documents import split_documents
from mindspeed_lora.errors import Refused


@pytest.mark.parametrize(
    ("count", "split", "expected"),
    [
        (999, "949,50,1", (range(0, 948), range(948, 998), range(998, 999))),
        (10, "100,0,0", (range(0, 10), range(10, 10), range(10, 10))),
        (10, "100", (range(0, 10), range(10, 10), range(10, 10))),
        (10, "90,10", (range(0, 9), range(9, 10), range(10, 10))),
        (10, "0,1,1", (range(0, 0), range(0, 5), range(5, 10))),
        (3, "0.7,0,0.3", (range(0, 2), range(2, 2), range(2, 3))),
    ],
)
def test_parts(count: int, split: str, expected: tuple[range, range, range]) -> None:
    assert split_documents(count, split) == expected


@settings(deadline=None)
@given(count=st.integers(0, 2000), shares=st.lists(st.integers(0, 1000), min_size=1, max_size=3))
def test_parts_cover_everything_in_order(count: int, shares: list[int]) -> None:
    if sum(shares) == 0:
        return
    parts = split_documents(count, ",".join(map(str, shares)))
    assert [document for part in parts for document in part] == list(range(count))
    for part, share in zip(parts, [*shares, 0, 0], strict=False):
        assert share > 0 or len(part) == 0


@settings(deadline=None)  # the first example imports megatron-core
@given(count=st.integers(1, 3000), shares=st.tuples(*[st.integers(0, 1000)] * 3))
def test_parts_are_megatrons(count: int, shares: tuple[int, int, int]) -> None:
    from megatron.core.datasets.blended_megatron_dataset_config import (
        convert_split_vector_to_split_matrix,
        parse_and_normalize_split,
    )

    if sum(shares) == 0:
        return
    split = ",".join(map(str, shares))
    matrix = convert_split_vector_to_split_matrix(parse_and_normalize_split(split))
    for part, bounds in zip(split_documents(count, split), matrix, strict=True):
        theirs = range(0) if bounds is None else range(round(bounds[0] * count), round(bounds[1] * count))
        assert list(part) == list(theirs)


@pytest.mark.parametrize("split", ["", "a,b", "0,0,0", "1,2,3,4", "-1,2", "nan,1", "inf"])
def test_nonsense_is_refused(split: str) -> None:
    with pytest.raises(Refused, match="--split"):
        split_documents(10, split)
