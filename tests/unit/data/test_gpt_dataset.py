from pathlib import Path

import numpy as np
import pytest
import torch

from mindspeed_lora.data.gpt_dataset import EndOfDocument, GptDataset
from mindspeed_lora.data.indexed_dataset import IndexedDatasetBuilder
from mindspeed_lora.errors import Refused

DOCUMENTS = [[1, 2, 3], [], [4, 5, 6, 7, 8, 9, 10, 11], [12], [13, 14, 15, 16, 17]]


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    builder = IndexedDatasetBuilder(tmp_path / "text_document")
    for document in DOCUMENTS:
        builder.add_document(document)
    builder.publish()
    return tmp_path / "text_document"


@pytest.mark.parametrize("seq_length", [1, 3, 4, 5, 16])
def test_windows_in_file_order(prefix: Path, seq_length: int) -> None:
    stream = np.arange(1, 18)
    dataset = GptDataset(prefix, seq_length, shuffle=False)
    assert len(dataset) == 16 // seq_length
    for i in range(len(dataset)):
        sample = dataset[i]
        assert sample.input_ids.tolist() == stream[i * seq_length : (i + 1) * seq_length].tolist()
        assert sample.labels.tolist() == stream[i * seq_length : (i + 1) * seq_length + 1].tolist()


def test_shuffled_documents_depend_on_the_seed_alone(prefix: Path) -> None:
    def read(seed: int) -> list[int]:
        dataset = GptDataset(prefix, 4, seed=seed)
        return np.concatenate([dataset[i].input_ids for i in range(len(dataset))]).tolist()

    assert read(1) == read(1)
    assert len({tuple(read(seed)) for seed in range(8)}) > 1
    # Documents stay whole: what follows a token is its successor, unless a document ends there.
    stream = read(3)
    for token, follower in zip(stream, stream[1:], strict=False):
        assert follower == token + 1 or token in {3, 11, 12, 17}


def test_the_windows_are_megatrons(prefix: Path) -> None:
    # The windows that Megatron-core's compiled helper finds for the same documents.
    from megatron.core.datasets import helpers

    lengths = np.array([len(document) for document in DOCUMENTS], dtype=np.int32)
    order = np.arange(len(DOCUMENTS), dtype=np.int32)
    index = helpers.build_sample_idx(lengths, order, 3, 1, int(lengths.sum()), True, 1)
    dataset = GptDataset(prefix, 3, shuffle=False)
    assert len(dataset) == len(index) - 1
    for i, (document, offset) in enumerate(index[:-1]):
        flat = [token for tokens in DOCUMENTS[document:] for token in tokens][offset:]
        assert dataset[i].labels.tolist() == flat[:4]


def test_a_part_of_the_documents(prefix: Path) -> None:
    dataset = GptDataset(prefix, 4, documents=range(3, 5), shuffle=False)
    assert len(dataset) == 1
    assert dataset[0].labels.tolist() == [12, 13, 14, 15, 16]


def test_a_small_corpus_gives_one_short_sample(prefix: Path) -> None:
    dataset = GptDataset(prefix, 100, shuffle=False)
    assert (len(dataset), dataset.longest) == (1, 16)
    assert len(dataset[0].input_ids) == 16


def test_no_document_and_too_few_tokens(prefix: Path) -> None:
    assert len(GptDataset(prefix, 4, documents=range(0))) == 0
    with pytest.raises(Refused, match="1 tokens"):
        GptDataset(prefix, 4, documents=range(3, 4))


class TestEndOfDocument:
    """Megatron's switches; token 9 ends a document."""

    STREAM = np.array([1, 2, 9, 3, 9, 9, 4, 5, 6])
    """Eight tokens and the one that follows them."""

    def test_attention_and_positions(self) -> None:
        sample = EndOfDocument(token_id=9, reset_attention_mask=True, reset_position_ids=True).sample(
            self.STREAM
        )
        assert sample.sub_rows == (3, 2, 1, 2)
        assert sample.positions().tolist() == [0, 1, 2, 0, 1, 0, 0, 1]
        assert sample.labels.tolist() == self.STREAM.tolist(), (
            "an end token predicts the next document's first"
        )

    def test_attention_alone(self) -> None:
        sample = EndOfDocument(token_id=9, reset_attention_mask=True).sample(self.STREAM)
        assert sample.sub_rows == (3, 2, 1, 2)
        assert sample.positions().tolist() == list(range(8))

    def test_positions_alone(self) -> None:
        sample = EndOfDocument(token_id=9, reset_position_ids=True).sample(self.STREAM)
        assert sample.sub_rows is None
        assert sample.positions().tolist() == [0, 1, 2, 0, 1, 0, 0, 1]

    def test_loss(self) -> None:
        sample = EndOfDocument(token_id=9, mask_loss=True).sample(self.STREAM)
        assert sample.labels.tolist() == [1, 2, 9, -100, 9, -100, -100, 5, 6]
        assert sample.sub_rows is None and sample.position_ids is None
        assert self.STREAM[3] == 3, "the tokens of the file stay as they are"

    def test_an_end_token_at_the_end(self) -> None:
        end = EndOfDocument(token_id=9, reset_attention_mask=True, mask_loss=True)
        sample = end.sample(np.array([1, 2, 9, 4]))
        assert sample.sub_rows is None
        assert sample.labels.tolist() == [1, 2, 9, -100]

    def test_as_megatron_has_it(self) -> None:
        from megatron.core.datasets.gpt_dataset import _get_ltor_masks_and_position_ids as megatron

        tokens = torch.from_numpy(self.STREAM[:-1])
        mask, loss, positions = megatron(tokens, 9, True, True, True, True)
        end = EndOfDocument(token_id=9, reset_attention_mask=True, reset_position_ids=True, mask_loss=True)
        sample = end.sample(self.STREAM)
        assert sample.positions().tolist() == positions.tolist()
        assert ((sample.labels[1:] != -100) == loss.bool().numpy()).all()
        assert sample.sub_rows is not None
        blocks = [torch.ones(length, length).tril() for length in sample.sub_rows]
        assert torch.equal(mask[0], torch.block_diag(*blocks) < 0.5)

    def test_which_token_ends_documents(self, prefix: Path) -> None:
        assert GptDataset(prefix, 4).ends_documents_with(12)
        assert not GptDataset(prefix, 4).ends_documents_with(2)

    def test_windows(self, prefix: Path) -> None:
        end = EndOfDocument(token_id=3, reset_attention_mask=True)
        assert GptDataset(prefix, 5, shuffle=False, end=end)[0].sub_rows == (3, 2)
