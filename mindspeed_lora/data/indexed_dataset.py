"""Megatron's indexed dataset: sequences of tokens in a ``.bin`` file, where each lies in an ``.idx`` file.

``.idx``, little endian: ``MMIDIDX\\0\\0``, version 1 (uint64), dtype code (uint8), number of sequences S
(uint64), number of document bounds D (uint64), lengths (int32[S]), byte offsets into ``.bin`` (int64[S]),
document bounds (int64[D]: document d holds the sequences ``bounds[d]`` to ``bounds[d + 1]``).
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mindspeed_lora.data.atomic_output import publish, remove_stale, temporary_sibling
from mindspeed_lora.data.growing_file import GrowingFile, Mark, flush
from mindspeed_lora.errors import Refused

_MAGIC = b"MMIDIDX\x00\x00"
_LEGACY_MAGIC = b"TNTIDX\x00\x00"
"""Of the older form, ``--dataset-impl lazy`` and ``cached``."""
_VERSION = 1
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES: dict[int, type[np.generic]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    6: np.float64,
    7: np.float32,
    8: np.uint16,
}
_CODES = {np.dtype(dtype): code for code, dtype in _DTYPES.items()}


def bin_path(prefix: str | Path) -> Path:
    """The file with the tokens."""
    return Path(f"{prefix}.bin")


def idx_path(prefix: str | Path) -> Path:
    """The file with lengths, offsets and document bounds."""
    return Path(f"{prefix}.idx")


class IndexedDataset:
    """Read access to ``{prefix}.bin`` and ``{prefix}.idx``; the tokens stay in the page cache."""

    def __init__(self, prefix: str | Path) -> None:
        self.prefix = str(prefix)
        for path in (bin_path(prefix), idx_path(prefix)):
            if not path.is_file():
                raise Refused(f"{path}: no such file; the data prefix is the path without .bin and .idx")
        self._read_index(idx_path(prefix))
        self._open_tokens(bin_path(prefix))

    def _read_index(self, path: Path) -> None:
        size = path.stat().st_size
        with open(path, "rb") as stream:
            header = stream.read(_HEADER.size)
        if header.startswith(_LEGACY_MAGIC):
            raise Refused(
                f"{path}: an index of Megatron's older form (it starts with TNTIDX, --dataset-impl lazy or cached), "
                "which is not read; prepare the data again, with --dataset-impl mmap where it is another system that "
                "prepares"
            )
        if len(header) < _HEADER.size or not header.startswith(_MAGIC):
            raise Refused(
                f"{path}: not a Megatron index file (it does not start with MMIDIDX); prepare the data again"
            )
        _, version, code, sequences, bounds = _HEADER.unpack(header)
        if version != _VERSION or code not in _DTYPES:
            raise Refused(
                f"{path}: index version {version} with dtype code {code}; expected version {_VERSION} "
                "and a code from 1 to 8"
            )
        self.dtype = np.dtype(_DTYPES[code])
        expected = _HEADER.size + sequences * 12 + bounds * 8
        # Megatron's multimodal files have one more byte a sequence at the end.
        if size not in (expected, expected + sequences):
            raise Refused(
                f"{path}: {size} bytes, but its header promises {expected}; the file is cut off or damaged"
            )
        index = np.memmap(path, dtype=np.uint8, mode="r")
        end_of_lengths = _HEADER.size + sequences * 4
        end_of_pointers = end_of_lengths + sequences * 8
        self.sequence_lengths: np.ndarray[Any, Any] = index[_HEADER.size : end_of_lengths].view(np.int32)
        self.sequence_pointers: np.ndarray[Any, Any] = index[end_of_lengths:end_of_pointers].view(np.int64)
        self.document_indices: np.ndarray[Any, Any] = index[end_of_pointers:expected].view(np.int64)

    def _open_tokens(self, path: Path) -> None:
        size = path.stat().st_size
        if len(self) == 0:
            self._tokens = np.zeros(0, dtype=np.uint8)
            return
        ends = self.sequence_pointers + self.sequence_lengths.astype(np.int64) * self.dtype.itemsize
        # Sums of hostile numbers wrap around, so that they are looked at one by one, too.
        first, last = int(self.sequence_pointers.min()), int(self.sequence_pointers.max())
        if first < 0 or int(self.sequence_lengths.min()) < 0 or max(last, int(ends.max())) > size:
            raise Refused(
                f"{path}: {size} bytes, but its index reaches to byte {max(last, int(ends.max()))}; "
                "the file is cut off or not the one that the index was made for"
            )
        self._tokens = np.memmap(path, dtype=np.uint8, mode="r") if size else np.zeros(0, dtype=np.uint8)

    def __len__(self) -> int:
        return len(self.sequence_lengths)

    def __getitem__(self, index: int) -> np.ndarray[Any, Any]:
        """Sequence ``index`` as a read-only view, ``[n]``."""
        return self.get(index)

    @property
    def num_documents(self) -> int:
        """Number of documents, each of one or more sequences."""
        return max(len(self.document_indices) - 1, 0)

    def get(self, index: int, offset: int = 0, length: int | None = None) -> np.ndarray[Any, Any]:
        """``length`` tokens of sequence ``index`` from ``offset``, as a read-only view, ``[length]``."""
        available = int(self.sequence_lengths[index]) - offset
        count = available if length is None else min(length, available)
        start = int(self.sequence_pointers[index]) + offset * self.dtype.itemsize
        return self._tokens[start : start + count * self.dtype.itemsize].view(self.dtype)


def token_dataset(prefix: str | Path) -> IndexedDataset:
    """An indexed data set of tokens, which are integers of any width.

    Raises:
        Refused: they are not.
    """
    dataset = IndexedDataset(prefix)
    if dataset.dtype.kind not in "iu":
        raise Refused(f"{idx_path(prefix)}: its entries are {dataset.dtype}; tokens and labels are integers")
    return dataset


class IndexedDatasetBuilder:
    """Writes an indexed dataset whose two files take their names once both are complete."""

    def __init__(
        self,
        prefix: str | Path,
        dtype: type[np.generic] = np.int32,
        taken_from: int | None = None,
        mark: Mark | None = None,
    ) -> None:
        """``taken_from`` and ``mark``: goes on with what a dead process had written
        (:class:`~mindspeed_lora.data.growing_file.GrowingFile`)."""
        self._targets = (bin_path(prefix), idx_path(prefix))
        self._dtype = np.dtype(dtype)
        remove_stale([self._targets[1]])
        self._file = GrowingFile(self._targets[0], taken_from, mark)

    @property
    def lengths(self) -> Sequence[int]:
        """Of the documents so far."""
        return self._file.lengths

    def add_document(self, tokens: Sequence[int] | np.ndarray[Any, Any]) -> None:
        """Append one document of one sequence, ``[n]``."""
        values = np.asarray(tokens, dtype=self._dtype)
        self._file.append(values.tobytes(), len(values))

    def mark(self) -> Mark:
        """Puts the documents so far on the disk."""
        return self._file.mark()

    def finish(self) -> list[tuple[Path, Path]]:
        """Flush both files under temporary names; returns the ``(temporary, target)`` pairs to publish."""
        self._file.close()
        lengths = np.frombuffer(self._file.lengths, dtype=np.int32)
        pointers = np.zeros(len(lengths), dtype=np.int64)
        np.cumsum(lengths[:-1].astype(np.int64) * self._dtype.itemsize, out=pointers[1:])
        temporary_index = temporary_sibling(self._targets[1])
        with open(temporary_index, "wb") as stream:
            code = _CODES[self._dtype]
            stream.write(_HEADER.pack(_MAGIC, _VERSION, code, len(lengths), len(lengths) + 1))
            stream.write(lengths.astype("<i4").tobytes())
            stream.write(pointers.astype("<i8").tobytes())
            stream.write(np.arange(len(lengths) + 1, dtype="<i8").tobytes())
            flush(stream)
        return [(temporary_sibling(target), target) for target in self._targets]

    def publish(self) -> None:
        """Finish both files and give them their names."""
        publish(self.finish())

    def discard(self) -> None:
        """Remove the unfinished files."""
        self._file.discard()
        temporary_sibling(self._targets[1]).unlink(missing_ok=True)
