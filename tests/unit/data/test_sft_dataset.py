from pathlib import Path

import numpy as np
import pytest

from mindspeed_lora.data.sft_dataset import SftDataset, count_documents
from mindspeed_lora.errors import Refused
from tests.unit.data.packed_files import row, write_packed

ROWS = [row(2, 3), row(4, 6, 10), row(9, 1, 30), row(1, 1, 50)]


@pytest.fixture
def prefix(tmp_path: Path) -> Path:
    write_packed(tmp_path / "data", ROWS)
    return tmp_path / "data"


def test_rows_come_back_unshifted(prefix: Path) -> None:
    dataset = SftDataset(prefix, seq_length=10)
    assert len(dataset) == count_documents(prefix) == 4
    for i, (input_ids, labels) in enumerate(ROWS):
        assert dataset[i].input_ids.tolist() == input_ids
        assert dataset[i].labels.tolist() == labels
        assert dataset[i].input_ids.dtype == dataset[i].labels.dtype == np.int64
    assert (dataset.num_cut, dataset.num_dropped, dataset.longest) == (0, 0, 10)


def test_longer_rows_are_cut_and_those_without_loss_leave_the_order(prefix: Path) -> None:
    dataset = SftDataset(prefix, seq_length=8)
    assert (dataset.num_cut, dataset.num_dropped, len(dataset), dataset.longest) == (1, 1, 3, 8)
    assert dataset[1].input_ids.tolist() == list(range(10, 18))
    assert dataset[1].labels.tolist() == [-100] * 4 + list(range(14, 18))
    # Row 2 lost its only answer token: item 2 is the next row.
    assert dataset[2].input_ids.tolist() == [50, 51]


def test_proportional_keeps_the_answer(prefix: Path) -> None:
    dataset = SftDataset(prefix, seq_length=8, overlong="proportional")
    assert (dataset.num_cut, dataset.num_dropped) == (2, 0)
    assert dataset[2].input_ids.tolist() == [30, 31, 32, 33, 34, 35, 36, 39]
    assert dataset[2].labels.tolist() == [-100] * 7 + [39]


def test_drop(prefix: Path) -> None:
    dataset = SftDataset(prefix, seq_length=8, overlong="drop")
    assert (dataset.num_cut, dataset.num_dropped, len(dataset)) == (0, 2, 2)


def test_a_part_of_the_documents(prefix: Path) -> None:
    dataset = SftDataset(prefix, seq_length=8, documents=range(1, 4))
    assert [len(dataset[i].input_ids) for i in range(len(dataset))] == [8, 2]


def test_files_of_different_runs_are_refused(tmp_path: Path, prefix: Path) -> None:
    write_packed(tmp_path / "other", ROWS[:3])
    for suffix in ("bin", "idx"):
        other = tmp_path / f"other_packed_labels_document.{suffix}"
        other.replace(tmp_path / f"data_packed_labels_document.{suffix}")
    with pytest.raises(Refused, match="different lengths"):
        SftDataset(prefix, seq_length=8)


def test_a_prefix_with_packed_is_put_right(prefix: Path) -> None:
    with pytest.raises(Refused, match=f"that is {prefix}$"):
        SftDataset(f"{prefix}_packed_input_ids_document", seq_length=8)
    with pytest.raises(Refused, match=r"--output-prefix of preprocess_data\.py"):
        SftDataset(f"{prefix}x", seq_length=8)


class TestPacked:
    """Rows whose attention mask counts what they were packed from."""

    ROWS = [
        ([1, 2, 3, 4, 5, 6, 0, 0], [1, 2, 3, 4, 5, 6, -100, -100]),
        ([7, 8, 9, 7, 8, 9, 7, 8], [-100, 8, 9, 7, 8, 9, 7, 8]),
        ([5, 6, 0, 0, 0, 0, 0, 0], [-100, 6, -100, -100, -100, -100, -100, -100]),
    ]
    MASKS = [[1, 1, 1, 2, 2, 3, 0, 0], [1] * 8, [1, 1, 0, 0, 0, 0, 0, 0]]

    @pytest.fixture
    def prefix(self, tmp_path: Path) -> Path:
        write_packed(tmp_path / "data", self.ROWS, self.MASKS)
        return tmp_path / "data"

    def test_sub_rows(self, prefix: Path) -> None:
        dataset = SftDataset(prefix, seq_length=8)
        assert [dataset[i].sub_rows for i in range(3)] == [(3, 2, 1), None, None]
        assert dataset[0].input_ids.tolist() == [1, 2, 3, 4, 5, 6], "padding at the end is left out"
        assert dataset[0].labels.tolist() == [1, 2, 3, -100, 5, -100], "first tokens are not predicted"
        assert dataset[0].positions().tolist() == [0, 1, 2, 0, 1, 0]
        assert dataset[1].labels.tolist() == [-100, 8, 9, 7, 8, 9, 7, 8]
        assert dataset[2].input_ids.tolist() == [5, 6]
        assert dataset.tells_sub_rows()

    def test_padding_does_not_make_a_row_overlong(self, prefix: Path) -> None:
        dataset = SftDataset(prefix, seq_length=6)
        assert (dataset.num_cut, dataset.num_dropped) == (1, 0)
        assert [len(dataset[i].input_ids) for i in range(3)] == [6, 6, 2]

    def test_cut(self, prefix: Path) -> None:
        dataset = SftDataset(prefix, seq_length=4)
        assert (dataset[0].sub_rows, dataset[0].labels.tolist()) == ((3, 1), [1, 2, 3, -100])
        assert SftDataset(prefix, seq_length=4, overlong="drop").num_dropped == 2

    def test_rows_that_are_known_to_be_single_need_no_mask(self, prefix: Path) -> None:
        dataset = SftDataset(prefix, seq_length=8, packed=False)
        assert dataset[0].sub_rows is None and len(dataset[0].input_ids) == 8
        assert not dataset.tells_sub_rows()

    def test_zeros_between_rows_are_nobody_s(self, tmp_path: Path) -> None:
        write_packed(tmp_path / "other", [([1, 2, 3, 4, 5], [1, 2, 3, 4, 5])], [[1, 1, 0, 2, 2]])
        sample = SftDataset(tmp_path / "other", seq_length=8)[0]
        assert (sample.sub_rows, sample.labels.tolist()) == ((2, 1, 2), [1, 2, -100, -100, 5])

    def test_only_padding(self, tmp_path: Path) -> None:
        write_packed(tmp_path / "other", [([0, 0], [-100, -100])], [[0, 0]])
        assert SftDataset(tmp_path / "other", seq_length=8)[0].input_ids.tolist() == []

    def test_a_mask_of_another_run_is_refused(self, tmp_path: Path) -> None:
        write_packed(tmp_path / "other", self.ROWS, [[1, 1]] * 3)
        with pytest.raises(Refused, match="input_ids and attention_mask have different lengths"):
            SftDataset(tmp_path / "other", seq_length=8)

    def test_a_file_that_is_cut_off_is_refused(self, prefix: Path) -> None:
        path = Path(f"{prefix}_packed_attention_mask_document.bin")
        path.write_bytes(path.read_bytes()[:-4])
        with pytest.raises(
            Refused, match="attention_mask_document.bin: 92 bytes, but its index reaches to byte 96"
        ):
            SftDataset(prefix, seq_length=8)
