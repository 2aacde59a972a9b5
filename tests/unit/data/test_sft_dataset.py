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
