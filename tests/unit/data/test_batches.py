"""Which samples the global batches of a run and of an evaluation take."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mindspeed_lora.data.batch import Batch, Padding
from mindspeed_lora.data.batches import EvalBatches, StepBatches
from mindspeed_lora.data.dealing import BatchShape, Dealing, OneSampleARow, PackedRows
from mindspeed_lora.data.sample import Sample
from mindspeed_lora.data.sampling import SampleOrder

DEALINGS: list[Callable[[BatchShape], Dealing]] = [
    lambda shape: OneSampleARow(shape, Padding(pad_token_id=0)),
    lambda shape: OneSampleARow(shape, Padding(pad_token_id=0, seq_length=6)),
    lambda shape: PackedRows(shape, Padding(pad_token_id=0), 6),
    lambda shape: PackedRows(shape, Padding(pad_token_id=0, seq_length=6), 6),
]
"""One sample a row and packed, padded to the longest row and to a fixed length."""


@dataclass
class Rows:
    """Row i holds 1 + i % 5 tokens of value i; all but its first carry loss."""

    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        tokens = np.full(1 + index % 5, index, dtype=np.int64)
        return Sample(tokens, tokens)


def samples(batches: list[Batch]) -> list[int]:
    """The number of each sample in the batches, once for each of its first tokens."""
    return [
        int(number) for batch in batches for number in batch.sample_ids[batch.sample_positions == 0].tolist()
    ]


def test_step_takes_the_next_samples_and_wraps() -> None:
    order = SampleOrder(10, shuffle=False)
    shape = BatchShape(micro_batch_size=2, global_batch_size=4)
    batches = StepBatches(Rows(10), order, OneSampleARow(shape, Padding(pad_token_id=0)))
    steps = [[batch.tokens[:, 0].tolist() for batch in batches.step(k)] for k in (1, 2, 3)]
    assert steps == [[[0, 1], [2, 3]], [[4, 5], [6, 7]], [[8, 9], [0, 1]]]
    assert samples(batches.step(3)) == [8, 9, 10, 11]


@settings(deadline=None)
@given(
    dealing=st.sampled_from(DEALINGS),
    micro_batch_size=st.integers(1, 3),
    dp_size=st.integers(1, 4),
    accumulation=st.integers(1, 3),
    multiple=st.integers(1, 3),
    step=st.integers(1, 20),
    seed=st.integers(0, 5),
)
def test_layout_does_not_change_which_samples_make_a_step(
    dealing: Callable[[BatchShape], Dealing],
    micro_batch_size: int,
    dp_size: int,
    accumulation: int,
    multiple: int,
    step: int,
    seed: int,
) -> None:
    size = micro_batch_size * dp_size * accumulation
    order = SampleOrder(7, seed)
    per_rank = []
    for rank in range(dp_size):
        shape = BatchShape(
            micro_batch_size=micro_batch_size,
            global_batch_size=size,
            dp_rank=rank,
            dp_size=dp_size,
            micro_batch_multiple=multiple,
        )
        per_rank.append(StepBatches(Rows(7), order, dealing(shape)).step(step))
    expected = range((step - 1) * size, step * size)
    assert sorted(sum(map(samples, per_rank), [])) == list(expected)
    assert {len(batches) for batches in per_rank} == {len(per_rank[0])}, "else a rank would wait for its peer"
    assert len(per_rank[0]) % multiple == 0
    for batch in sum(per_rank, []):
        real = batch.sample_ids >= 0
        documents = [order.order(number) for number in batch.sample_ids[real].tolist()]
        assert batch.tokens[real].tolist() == documents


@pytest.mark.parametrize("dealing", DEALINGS)
@pytest.mark.parametrize(("count", "limit"), [(10, None), (10, 7), (3, 100), (1, None)])
def test_evaluation_sees_each_sample_once(
    dealing: Callable[[BatchShape], Dealing], count: int, limit: int | None
) -> None:
    shapes = [BatchShape(micro_batch_size=2, global_batch_size=4, dp_rank=rank, dp_size=2) for rank in (0, 1)]
    ranks = [EvalBatches(Rows(count), dealing(shape), limit) for shape in shapes]
    for _ in range(2):  # can be gone through again
        passes = [list(rank) for rank in ranks]
        assert [len(batches) for batches in passes[0]] == [len(batches) for batches in passes[1]]
        seen = samples([batch for rank in passes for batches in rank for batch in batches])
        assert sorted(seen) == list(range(min(count, limit or count)))


def test_evaluation_of_nothing() -> None:
    shape = BatchShape(micro_batch_size=2, global_batch_size=2)
    assert list(EvalBatches(Rows(0), OneSampleARow(shape, Padding(pad_token_id=0)))) == []
