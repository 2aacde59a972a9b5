"""What a micro-batch holds: tokens, shifted labels, positions, sub-rows, and whose each token is."""

import numpy as np
import pytest
import torch

from mindspeed_lora.data.batch import Batch, NumberedSample, Padding, collate
from mindspeed_lora.data.sample import Sample
from mindspeed_lora.errors import Failed


def sample(
    tokens: list[int],
    labels: list[int],
    number: int = 0,
    sub_rows: tuple[int, ...] | None = None,
    position_ids: list[int] | None = None,
) -> NumberedSample:
    own = None if position_ids is None else np.array(position_ids)
    return NumberedSample(number, Sample(np.array(tokens), np.array(labels), sub_rows, own))


def one_a_row(*samples: NumberedSample, padding: Padding, fill_to: int = 0) -> Batch:
    return collate([[entry] for entry in samples], padding, fill_to)


def test_labels_are_shifted_and_padding_predicts_nothing() -> None:
    batch = one_a_row(
        sample([1, 2, 3, 4], [-100, -100, 3, 4], 7),
        sample([5, 6], [-100, 6], 8),
        padding=Padding(pad_token_id=9),
    )
    assert batch.tokens.tolist() == [[1, 2, 3, 4, 9, 9, 9, 9], [5, 6, 9, 9, 9, 9, 9, 9]]
    assert batch.labels.tolist() == [[-100, 3, 4] + [-100] * 5, [6] + [-100] * 7]
    assert batch.position_ids.tolist() == list(range(8))
    assert batch.sub_rows is None
    assert (batch.num_tokens, batch.num_loss_tokens) == (6, 3)
    assert batch.sample_ids.tolist() == [[7] * 4 + [-1] * 4, [8] * 2 + [-1] * 6]
    assert batch.sample_positions.tolist() == [[0, 1, 2, 3] + [-1] * 4, [0, 1] + [-1] * 6]
    for tensor in (batch.tokens, batch.labels, batch.position_ids, batch.sample_ids, batch.sample_positions):
        assert tensor.dtype == torch.int64
        assert tensor.is_contiguous()


def test_a_known_following_token_is_the_last_target() -> None:
    batch = one_a_row(sample([1, 2], [1, 2, 3]), padding=Padding(pad_token_id=0, seq_length=2))
    assert batch.labels.tolist() == [[2, 3]]
    assert batch.num_loss_tokens == 2


def test_samples_of_one_row_do_not_touch_each_other() -> None:
    rows = [
        [sample([1, 2, 3], [1, 2, 3], 4), sample([5, 6], [5, 6], 5), sample([7], [7], 6)],
        [sample([8, 9], [8, 9], 7)],
    ]
    batch = collate(rows, Padding(pad_token_id=0, multiple_of=4), fill_to=3)
    assert batch.tokens.tolist() == [[1, 2, 3, 5, 6, 7, 0, 0], [8, 9, 0, 0, 0, 0, 0, 0], [0] * 8]
    nothing = -100
    assert batch.labels.tolist() == [
        [2, 3, nothing, 6] + [nothing] * 4,
        [9] + [nothing] * 7,
        [nothing] * 8,
    ]
    assert batch.position_ids.tolist() == [[0, 1, 2, 0, 1, 0, 6, 7], list(range(8)), list(range(8))]
    assert batch.sub_rows == ((3, 2, 1, 2), (2, 6), (8,))
    assert batch.sample_ids.tolist()[0] == [4, 4, 4, 5, 5, 6, -1, -1]
    assert batch.sample_positions.tolist()[0] == [0, 1, 2, 0, 1, 0, -1, -1]
    assert batch.lengths.tolist() == [[3, 3, 3, 2, 2, 1, 1, 1], [2, 2] + [1] * 6, [1] * 8]
    assert (batch.num_tokens, batch.num_loss_tokens) == (8, 4)


def test_a_row_without_padding_has_no_filler() -> None:
    batch = collate([[sample([1, 2], [1, 2]), sample([3], [3])]], Padding(pad_token_id=0, multiple_of=1))
    assert batch.sub_rows == ((2, 1),)


def test_sub_rows_inside_of_a_sample() -> None:
    """A row that was packed when it was prepared is one sample: its tokens are counted through."""
    batch = one_a_row(
        sample([1, 2, 3, 4], [1, 2, -100, 4], 2, sub_rows=(2, 2)), padding=Padding(pad_token_id=0)
    )
    assert batch.sub_rows == ((2, 2, 4),)
    assert batch.position_ids.tolist() == [[0, 1, 0, 1, 4, 5, 6, 7]]
    assert batch.lengths.tolist() == [[2, 2, 2, 2, 1, 1, 1, 1]]
    assert batch.sample_positions.tolist() == [[0, 1, 2, 3, -1, -1, -1, -1]]


def test_positions_of_its_own() -> None:
    batch = one_a_row(
        sample([1, 2, 3], [1, 2, 3], position_ids=[0, 1, 0]), padding=Padding(pad_token_id=0, multiple_of=1)
    )
    assert batch.sub_rows is None, "attention runs through all the same"
    assert batch.position_ids.tolist() == [[0, 1, 0]]
    assert batch.lengths.tolist() == [[2, 2, 1]]


def test_no_row_is_one_of_padding() -> None:
    batch = collate([], Padding(pad_token_id=3, multiple_of=2))
    assert batch.tokens.tolist() == [[3, 3]] and batch.labels.tolist() == [[-100, -100]]
    assert (batch.num_tokens, batch.num_loss_tokens, batch.sub_rows) == (0, 0, None)


def test_fixed_length() -> None:
    padding = Padding(pad_token_id=0, seq_length=5)
    assert one_a_row(sample([1], [1]), padding=padding).tokens.shape == (1, 5)
    with pytest.raises(ValueError, match="6 tokens"):
        one_a_row(sample([1] * 6, [1] * 6), padding=padding)
    with pytest.raises(ValueError, match="6 tokens"):
        collate([[sample([1] * 3, [1] * 3), sample([1] * 3, [1] * 3)]], padding)


@pytest.mark.parametrize(("longest", "multiple", "expected"), [(1, 8, 8), (8, 8, 8), (9, 8, 16), (9, 1, 9)])
def test_variable_length_is_a_multiple(longest: int, multiple: int, expected: int) -> None:
    assert Padding(pad_token_id=0, multiple_of=multiple).length(longest) == expected


def test_a_token_outside_of_the_vocabulary_is_named() -> None:
    padding = Padding(pad_token_id=0, vocab_size=10)
    assert one_a_row(sample([9], [9]), padding=padding).num_tokens == 1
    with pytest.raises(Failed, match="sample 42 holds the token id 10"):
        collate([[sample([1], [1], 41)], [sample([1], [1], 43), sample([10], [10], 42)]], padding)


def test_some_positions_of_every_row() -> None:
    """Labels are those of the whole row: the last position of a part predicts the first of the next."""
    batch = one_a_row(
        sample([1, 2, 3, 4], [1, 2, 3, 4], 7),
        sample([5, 6], [5, 6], 8),
        padding=Padding(pad_token_id=9, multiple_of=4),
    )
    part = batch.at(torch.tensor([1, 2]))
    assert part.tokens.tolist() == [[2, 3], [6, 9]]
    assert part.labels.tolist() == [[3, 4], [-100, -100]]
    assert part.position_ids.tolist() == [1, 2]
    assert part.sample_ids.tolist() == [[7, 7], [8, -1]]
    assert part.sample_positions.tolist() == [[1, 2], [1, -1]]
    assert (part.num_tokens, part.num_loss_tokens) == (batch.num_tokens, batch.num_loss_tokens)
    packed = collate(
        [[sample([1, 2], [1, 2]), sample([3, 4], [3, 4])]], Padding(pad_token_id=9, multiple_of=4)
    )
    part = packed.at(torch.tensor([0, 3]))
    assert part.position_ids.tolist() == [[0, 1]]
    assert part.sub_rows == packed.sub_rows == ((2, 2),)
