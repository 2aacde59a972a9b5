"""How a global batch becomes the micro-batches of each rank."""

from collections.abc import Callable

import numpy as np
import pytest

from mindspeed_lora.data.batch import Batch, Padding
from mindspeed_lora.data.dealing import BatchShape, OneSampleARow, PackedRows
from mindspeed_lora.data.sample import Sample

VARIABLE = Padding(pad_token_id=0, multiple_of=1)


def fetch_of(lengths: list[int]) -> Callable[[int], Sample]:
    """Sample i has ``lengths[i]`` tokens."""
    return lambda number: Sample(np.full(lengths[number], 1), np.full(lengths[number], 1))


def packed(
    lengths: list[int], capacity: int = 10, padding: Padding = VARIABLE, **shape: int
) -> list[list[Batch]]:
    """The micro-batches of every rank."""
    sizes = {"micro_batch_size": 1, "dp_size": 1, "global_batch_size": 96, **shape}
    return [
        PackedRows(BatchShape(**sizes, dp_rank=rank), padding, capacity).micro_batches(
            range(len(lengths)), fetch_of(lengths)
        )
        for rank in range(sizes["dp_size"])
    ]


def test_a_global_batch_that_does_not_divide() -> None:
    with pytest.raises(ValueError, match="global batch 6"):
        BatchShape(micro_batch_size=2, global_batch_size=6, dp_size=2)


def test_the_rows_of_one_micro_batch_alone_decide_its_padding() -> None:
    dealing = OneSampleARow(BatchShape(micro_batch_size=2, global_batch_size=4), VARIABLE)
    batches = dealing.micro_batches(range(4), fetch_of([3, 5, 2, 1]))
    assert [tuple(batch.tokens.shape) for batch in batches] == [(2, 5), (2, 2)]


def test_packing_takes_as_few_rows_as_fit() -> None:
    (batches,) = packed([3, 6, 4, 7, 3, 1])
    assert sorted(batch.num_tokens for batch in batches) == [7, 8, 9], "evenly, since they fit so too"
    (batches,) = packed([3, 6, 4, 7])
    assert [batch.num_tokens for batch in batches] == [10, 10]


def test_no_padding_where_lengths_may_vary() -> None:
    (batches,) = packed([3, 6, 4, 7, 3, 1])
    assert all(batch.tokens.numel() == batch.num_tokens for batch in batches)


def test_a_fixed_length_fixes_every_shape() -> None:
    for rank in packed(
        [3, 6, 9], padding=Padding(pad_token_id=0, seq_length=12), micro_batch_size=2, dp_size=2
    ):
        assert [tuple(batch.tokens.shape) for batch in rank] == [(2, 12)]


def test_ranks_have_as_many_micro_batches_and_about_as_many_tokens() -> None:
    lengths = np.random.RandomState(3).randint(1, 300, size=96).tolist()
    ranks = packed(lengths, 512, dp_size=4, micro_batch_size=2)
    assert len({len(rank) for rank in ranks}) == 1
    tokens = [sum(batch.num_tokens for batch in rank) for rank in ranks]
    assert sum(tokens) == sum(lengths)
    assert max(tokens) < 1.05 * min(tokens)


def test_as_many_micro_batches_as_the_schedule_wants() -> None:
    (batches,) = packed([6, 6, 6], micro_batch_multiple=2)
    assert sorted(batch.num_tokens for batch in batches) == [0, 6, 6, 6]
    (batches,) = packed([4, 4, 5, 5, 6], micro_batch_multiple=4)
    assert sorted(batch.num_tokens for batch in batches) == [5, 5, 6, 8], (
        "rather smaller rows than empty ones"
    )


def test_every_rank_gets_work_where_one_row_would_hold_all() -> None:
    ranks = packed([2, 2, 2, 2], dp_size=2)
    assert [[batch.num_tokens for batch in rank] for rank in ranks] == [[4], [4]]


def test_samples_without_tokens_take_no_row() -> None:
    (batches,) = packed([0, 3])
    assert [batch.num_tokens for batch in batches] == [3]
    (batches,) = packed([0])
    assert [batch.num_tokens for batch in batches] == [0], "a step has a micro-batch all the same"
