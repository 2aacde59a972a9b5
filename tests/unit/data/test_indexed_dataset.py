import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mindspeed_lora.data.gpt_dataset import GptDataset
from mindspeed_lora.data.indexed_dataset import IndexedDataset, IndexedDatasetBuilder, token_dataset
from mindspeed_lora.data.sft_dataset import SftDataset, packed_prefix
from mindspeed_lora.errors import Refused

ROWS = [[1, 2, 3], [], [-100, 7], [2**31 - 1]]


def write(prefix: Path, rows: list[list[int]], dtype: type = np.int32) -> None:
    builder = IndexedDatasetBuilder(prefix, dtype)
    for row in rows:
        builder.add_document(row)
    builder.publish()


def write_with_megatron(prefix: Path, rows: list[list[int]]) -> None:
    import torch
    from megatron.core.datasets import indexed_dataset

    builder = indexed_dataset.IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    for row in rows:
        builder.add_item(torch.IntTensor(row))
        builder.end_document()
    builder.finalize(f"{prefix}.idx")


def test_files_are_those_that_megatron_writes(tmp_path: Path) -> None:
    write(tmp_path / "ours", ROWS)
    write_with_megatron(tmp_path / "theirs", ROWS)
    for suffix in (".bin", ".idx"):
        assert (tmp_path / f"ours{suffix}").read_bytes() == (tmp_path / f"theirs{suffix}").read_bytes()


def test_megatron_reads_our_files(tmp_path: Path) -> None:
    from megatron.core.datasets import indexed_dataset

    write(tmp_path / "ours", ROWS)
    theirs = indexed_dataset.IndexedDataset(str(tmp_path / "ours"))
    assert [theirs[i].tolist() for i in range(len(theirs))] == ROWS
    assert theirs.document_indices.tolist() == [0, 1, 2, 3, 4]


def test_megatrons_documents_of_several_sequences(tmp_path: Path) -> None:
    import torch
    from megatron.core.datasets import indexed_dataset

    builder = indexed_dataset.IndexedDatasetBuilder(str(tmp_path / "a.bin"), dtype=np.uint16)
    for row in ([5, 6], [7], [8, 9, 10]):
        builder.add_item(torch.IntTensor(row))
        if row != [5, 6]:
            builder.end_document()
    builder.finalize(str(tmp_path / "a.idx"))
    dataset = IndexedDataset(tmp_path / "a")
    assert dataset.dtype == np.uint16
    assert (len(dataset), dataset.num_documents) == (3, 2)
    assert dataset.get(2, offset=1, length=1).tolist() == [9]
    assert dataset.get(2, offset=1).tolist() == [9, 10]


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(st.lists(st.integers(0, 255), max_size=9), max_size=8),
    dtype=st.sampled_from([np.uint8, np.uint16, np.int32, np.int64, np.float32, np.float64]),
)
def test_what_is_written_is_read(tmp_path: Path, rows: list[list[int]], dtype: type) -> None:
    write(tmp_path / "a", rows, dtype)
    dataset = IndexedDataset(tmp_path / "a")
    assert [dataset[i].tolist() for i in range(len(dataset))] == rows
    assert dataset.dtype == dtype


def test_rows_are_views_of_the_file(tmp_path: Path) -> None:
    write(tmp_path / "a", ROWS)
    row = IndexedDataset(tmp_path / "a")[0]
    assert not row.flags.owndata
    assert not row.flags.writeable


def test_nothing_appears_before_publish_and_the_old_set_stays(tmp_path: Path) -> None:
    write(tmp_path / "a", [[1]])
    builder = IndexedDatasetBuilder(tmp_path / "a")
    builder.add_document([2, 3])
    builder.finish()
    assert IndexedDataset(tmp_path / "a")[0].tolist() == [1]
    builder.discard()
    assert sorted(os.listdir(tmp_path)) == ["a.bin", "a.idx"]


def test_leftovers_of_a_dead_process_are_removed(tmp_path: Path) -> None:
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / f".a.bin.tmp-{dead.pid}").write_bytes(b"left over")
    living = tmp_path / f".a.bin.tmp-{os.getppid()}"
    living.write_bytes(b"being written")
    write(tmp_path / "a", [[1]])
    assert sorted(os.listdir(tmp_path)) == [living.name, "a.bin", "a.idx"]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(Refused, match=r"nowhere\.bin: no such file"):
        IndexedDataset(tmp_path / "nowhere")


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_truncated_file_is_refused(tmp_path: Path, suffix: str) -> None:
    write(tmp_path / "a", ROWS)
    path = tmp_path / f"a{suffix}"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(Refused, match=rf"a\{suffix}: .*cut off"):
        IndexedDataset(tmp_path / "a")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a Megatron index file"),
        (b"TNTIDX\x00\x00" + b"\x00" * 60, "older form .it starts with TNTIDX"),
        (b"MMIDIDX\x00\x00" + (1).to_bytes(8, "little") + b"\x04" + b"\xff" * 16, "its header promises"),
        (b"MMIDIDX\x00\x00" + (2).to_bytes(8, "little") + b"\x04" + b"\x00" * 16, "index version 2"),
        (b"MMIDIDX\x00\x00" + (1).to_bytes(8, "little") + b"\x63" + b"\x00" * 16, "dtype code 99"),
    ],
)
def test_another_format_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "a.bin").write_bytes(b"")
    (tmp_path / "a.idx").write_bytes(content)
    with pytest.raises(Refused, match=message):
        IndexedDataset(tmp_path / "a")


@pytest.mark.parametrize(
    ("lengths", "pointers"),
    [
        ([3, 1], [0, 2**63 - 4]),  # the end wraps around
        ([3, -1], [0, 12]),
        ([3, 1], [-4, 12]),
        ([3, 2**31 - 1], [0, 12]),
        ([3, 2], [0, 12]),
    ],
)
def test_an_index_that_reaches_out_of_the_file_is_refused(
    tmp_path: Path, lengths: list[int], pointers: list[int]
) -> None:
    write(tmp_path / "a", [[1, 2, 3], [4]])
    content = bytearray((tmp_path / "a.idx").read_bytes())
    content[34:42] = np.array(lengths, dtype="<i4").tobytes()
    content[42:58] = np.array(pointers, dtype="<i8").tobytes()
    (tmp_path / "a.idx").write_bytes(content)
    with pytest.raises(Refused, match="16 bytes, but its index reaches"):
        IndexedDataset(tmp_path / "a")


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_plain_text_of_megatron_is_read(tmp_path: Path, dtype: type) -> None:
    """Whatever width its tokens have, with documents of several sentences."""
    import torch
    from megatron.core.datasets import indexed_dataset

    builder = indexed_dataset.IndexedDatasetBuilder(str(tmp_path / "a_text_document.bin"), dtype=dtype)
    for document in ([[5, 6], [7]], [[8, 9, 10]], [[11, 12]]):
        for sentence in document:
            builder.add_item(torch.tensor(sentence))
        builder.end_document()
    builder.finalize(str(tmp_path / "a_text_document.idx"))
    rows = GptDataset(tmp_path / "a_text_document", 3, shuffle=False)
    assert [rows[i].labels.tolist() for i in range(len(rows))] == [[5, 6, 7, 8], [8, 9, 10, 11]]
    assert rows[0].input_ids.dtype == np.int64


def test_instruction_rows_of_mindspeed_llm_are_read(tmp_path: Path) -> None:
    """Three sets without any information beside them, of int64 here."""
    import torch
    from megatron.core.datasets import indexed_dataset

    sets = {
        "input_ids": [[5, 6, 7], [8, 9]],
        "attention_mask": [[1] * 3, [1] * 2],
        "labels": [[-100, 6, 7], [-100, 9]],
    }
    for key, rows in sets.items():
        prefix = packed_prefix(tmp_path / "alpaca", key)
        builder = indexed_dataset.IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int64)
        for row in rows:
            builder.add_item(torch.tensor(row))
            builder.end_document()
        builder.finalize(f"{prefix}.idx")
    dataset = SftDataset(tmp_path / "alpaca", 16)
    assert [dataset[i].labels.tolist() for i in range(2)] == sets["labels"]
    assert [dataset[i].input_ids.tolist() for i in range(2)] == sets["input_ids"]


def test_tokens_are_integers(tmp_path: Path) -> None:
    write(tmp_path / "a", [[1, 2]], np.float32)
    with pytest.raises(Refused, match=r"a\.idx: its entries are float32"):
        token_dataset(tmp_path / "a")


def test_an_empty_data_set(tmp_path: Path) -> None:
    write(tmp_path / "a", [])
    assert len(IndexedDataset(tmp_path / "a")) == 0
    assert IndexedDataset(tmp_path / "a").num_documents == 0
