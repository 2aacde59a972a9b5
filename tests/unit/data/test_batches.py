from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mindspeed_lora.data.batches import BatchShape, EvalBatches, Padding, StepBatches, collate
from mindspeed_lora.data.sample import Sample
from mindspeed_lora.data.sampling import SampleOrder
from mindspeed_lora.errors import Failed


@dataclass
class Rows:
    """Row i holds 1 + i % 5 tokens of value i; all but its first carry loss."""

    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        tokens = np.full(1 + index % 5, index, dtype=np.int64)
        return Sample(tokens, tokens)


def sample(tokens: list[int], labels: list[int]) -> Sample:
    return Sample(np.array(tokens, dtype=np.int64), np.array(labels, dtype=np.int64))


def test_labels_are_shifted_and_padding_predicts_nothing() -> None:
    batch = collate(
        [sample([1, 2, 3, 4], [-100, -100, 3, 4]), sample([5, 6], [-100, 6])], Padding(pad_token_id=9)
    )
    assert batch.tokens.tolist() == [[1, 2, 3, 4, 9, 9, 9, 9], [5, 6, 9, 9, 9, 9, 9, 9]]
    assert batch.labels.tolist() == [[-100, 3, 4] + [-100] * 5, [6] + [-100] * 7]
    assert batch.position_ids.tolist() == [list(range(8))] * 2
    assert (batch.num_tokens, batch.num_loss_tokens) == (6, 3)
    assert batch.sample_ids.tolist() == [0, 1]
    for tensor in (batch.tokens, batch.labels, batch.position_ids, batch.sample_ids):
        assert tensor.dtype == torch.int64
        assert tensor.is_contiguous()


def test_a_known_following_token_is_the_last_target() -> None:
    batch = collate([sample([1, 2], [1, 2, 3])], Padding(pad_token_id=0, seq_length=2))
    assert batch.labels.tolist() == [[2, 3]]
    assert batch.num_loss_tokens == 2


def test_fixed_length() -> None:
    padding = Padding(pad_token_id=0, seq_length=5)
    assert collate([sample([1], [1])], padding).tokens.shape == (1, 5)
    with pytest.raises(ValueError, match="6 tokens"):
        collate([sample([1] * 6, [1] * 6)], padding)


@pytest.mark.parametrize(("longest", "multiple", "expected"), [(1, 8, 8), (8, 8, 8), (9, 8, 16), (9, 1, 9)])
def test_variable_length_is_a_multiple(longest: int, multiple: int, expected: int) -> None:
    assert Padding(pad_token_id=0, multiple_of=multiple).length(longest) == expected


def test_a_token_outside_of_the_vocabulary_is_named() -> None:
    padding = Padding(pad_token_id=0, vocab_size=10)
    assert collate([sample([9], [9])], padding).num_tokens == 1
    with pytest.raises(Failed, match="sample 42 holds the token id 10"):
        collate([sample([1], [1]), sample([10], [10])], padding, [41, 42])


def test_step_takes_the_next_samples_and_wraps() -> None:
    order = SampleOrder(10, shuffle=False)
    batches = StepBatches(
        Rows(10), order, BatchShape(micro_batch_size=2, global_batch_size=4), Padding(pad_token_id=0)
    )
    steps = [[batch.tokens[:, 0].tolist() for batch in batches.step(k)] for k in (1, 2, 3)]
    assert steps == [[[0, 1], [2, 3]], [[4, 5], [6, 7]], [[8, 9], [0, 1]]]
    assert batches.step(3)[1].sample_ids.tolist() == [10, 11]
    # The lengths of the rows of one micro-batch alone decide its padding.
    assert batches.step(1)[0].tokens.shape == (2, 8)


@settings(deadline=None)
@given(
    micro_batch_size=st.integers(1, 3),
    dp_size=st.integers(1, 4),
    accumulation=st.integers(1, 3),
    step=st.integers(1, 20),
    seed=st.integers(0, 5),
)
def test_layout_does_not_change_which_samples_make_a_step(
    micro_batch_size: int, dp_size: int, accumulation: int, step: int, seed: int
) -> None:
    size = micro_batch_size * dp_size * accumulation
    order = SampleOrder(7, seed)
    expected = [order.order((step - 1) * size + j) for j in range(size)]
    found: list[int] = []
    per_rank = [
        StepBatches(
            Rows(7),
            order,
            BatchShape(
                micro_batch_size=micro_batch_size, global_batch_size=size, dp_rank=rank, dp_size=dp_size
            ),
            Padding(pad_token_id=0),
        ).step(step)
        for rank in range(dp_size)
    ]
    for micro_batch in range(accumulation):
        for rank in range(dp_size):
            found += per_rank[rank][micro_batch].tokens[:, 0].tolist()
    assert found == expected


def test_a_global_batch_that_does_not_divide() -> None:
    with pytest.raises(ValueError, match="global batch 6"):
        BatchShape(micro_batch_size=2, global_batch_size=6, dp_size=2)


@pytest.mark.parametrize("seq_length", [None, 6])
@pytest.mark.parametrize(("count", "limit"), [(10, None), (10, 7), (3, 100), (1, None)])
def test_evaluation_sees_each_sample_once(seq_length: int | None, count: int, limit: int | None) -> None:
    padding = Padding(pad_token_id=0, seq_length=seq_length)
    ranks = [EvalBatches(Rows(count), padding, 2, rank, 2, limit) for rank in range(2)]
    batches = [list(rank) for rank in ranks]
    assert len(batches[0]) == len(batches[1]) == len(ranks[0])
    seen = [number for rank in batches for batch in rank for number in batch.sample_ids.tolist()]
    assert sorted(number for number in seen if number >= 0) == list(range(min(count, limit or count)))
    for batch in (batch for rank in batches for batch in rank):
        fillers = batch.sample_ids < 0
        assert (batch.labels[fillers] == -100).all()
        if seq_length is not None:
            assert batch.tokens.shape == (2, 6)


def test_evaluation_of_nothing() -> None:
    assert list(EvalBatches(Rows(0), Padding(pad_token_id=0), 2)) == []
