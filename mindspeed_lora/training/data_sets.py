"""The prepared data sets of a run, opened: single ones, or several as one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from mindspeed_lora.config.blend import BlendSpec, parse_blend
from mindspeed_lora.config.jobs import TrainJob
from mindspeed_lora.config.resolve_training import has_share, has_validation
from mindspeed_lora.data.blend import BlendedDataset
from mindspeed_lora.data.documents import split_documents
from mindspeed_lora.data.gpt_dataset import GptDataset
from mindspeed_lora.data.indexed_dataset import IndexedDataset
from mindspeed_lora.data.prepared_info import PreparedInfo, check_tokenizer, read_info
from mindspeed_lora.data.sample import Sample
from mindspeed_lora.data.sft_dataset import SftDataset, count_documents
from mindspeed_lora.data.tokenizer import LazyTokenizer
from mindspeed_lora.errors import Refused
from mindspeed_lora.training.packed_data import check_ends, end_of_document

_TRAIN, _VALID, _TEST = 0, 1, 2
"""Parts of ``--split``."""


@dataclass(frozen=True)
class AssumedRows:
    """The rows of a dry run whose data are not there: as many as one step takes, of the full length."""

    count: int
    longest: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        raise AssertionError("a dry run reads no row")


OneDataset = SftDataset | GptDataset
RowsDataset = OneDataset | AssumedRows | BlendedDataset[Any]


def single_sets(dataset: RowsDataset | None) -> tuple[OneDataset, ...]:
    """The data sets that a blend is made of, or the one itself."""
    if isinstance(dataset, BlendedDataset):
        return dataset.parts
    return () if dataset is None or isinstance(dataset, AssumedRows) else (dataset,)


class DataSets:
    """Opens what the flags name.

    Raises:
        Refused: files are missing or damaged, no row is left, or they were prepared with another tokenizer.
    """

    def __init__(self, job: TrainJob, seq_length: int, tokenizer: LazyTokenizer | None) -> None:
        self._job = job
        self._seq_length = seq_length
        self._tokenizer = tokenizer
        self._infos: dict[str, PreparedInfo | None] = {}
        self.train = self._train()
        self.valid = self._valid()
        self.test = self._test()
        """None where nothing is tested."""

    @property
    def infos(self) -> tuple[PreparedInfo | None, ...]:
        """What is told of each data set, that of training first; None for one that tells nothing."""
        return tuple(self._infos.values())

    def prefixes(self) -> Iterator[tuple[str, PreparedInfo]]:
        """The data sets that tell something, and what."""
        yield from ((prefix, info) for prefix, info in self._infos.items() if info is not None)

    def _train(self) -> RowsDataset:
        data = self._job.data
        if data.train_data_path is not None:
            return self._whole("train_data_path", data.train_data_path)
        assert data.data_path is not None, "checked with the flags"
        return self._needed(data.data_path, _TRAIN)

    def _valid(self) -> RowsDataset | None:
        data, job = self._job.data, self._job
        if job.training.eval_iters == 0 or not has_validation(job):
            return None
        if data.valid_data_path is not None:
            return self._whole("valid_data_path", data.valid_data_path)
        assert data.data_path is not None, "the split is of --data-path"
        return self._needed(data.data_path, _VALID)

    def _test(self) -> RowsDataset | None:
        """Data of their own, or the third share of ``--split``, which may round to nothing (``949,50,1``)."""
        data = self._job.data
        if self._job.training.eval_iters == 0:
            return None
        if data.test_data_path is not None:
            return self._whole("test_data_path", data.test_data_path)
        if data.data_path is None or not has_share(self._job, _TEST):
            return None
        return self._blend("--data-path", data.data_path, _TEST)

    def _whole(self, name: str, words: tuple[str, ...]) -> RowsDataset:
        """All documents of the data sets that a flag names."""
        flag = "--" + name.replace("_", "-")
        found = self._blend(flag, words, None)
        assert found is not None, "refused where it is empty"
        return found

    def _needed(self, words: tuple[str, ...], part: int) -> RowsDataset:
        """A part of ``--split`` that has rows."""
        found = self._blend("--data-path", words, part)
        if found is None:
            raise Refused(self._nothing_left("--data-path", words[-1], part))
        return found

    def _blend(self, flag: str, words: tuple[str, ...], part: int | None) -> RowsDataset | None:
        """All documents, or one part of ``--split``, of the data sets that the words name; None where it is empty."""
        spec: BlendSpec = parse_blend(words, flag)
        opened = [self._open(path, part) for path in spec.paths]
        # A small set may leave nothing for validation or test beside larger ones.
        may_be_empty = part in (_VALID, _TEST)
        kept = [index for index, rows in enumerate(opened) if len(rows) or not may_be_empty]
        empty = next((path for path, rows in zip(spec.paths, opened, strict=True) if not len(rows)), "")
        if empty and not may_be_empty:
            raise Refused(self._nothing_left(flag, empty, part))
        if not kept:
            return None
        if len(opened) == 1:
            return opened[0]
        weights = None if spec.weights is None else [spec.weights[index] for index in kept]
        return BlendedDataset([opened[index] for index in kept], weights)

    def _open(self, prefix: str, part: int | None) -> OneDataset:
        info = self._info(prefix)
        documents = None
        if part is not None:
            documents = split_documents(self._num_documents(prefix), self._job.data.split)[part]
        return self._rows(prefix, info, documents)

    def _nothing_left(self, flag: str, prefix: str, part: int | None) -> str:
        job = self._job
        split = "" if part is None else f" (--split {job.data.split})"
        if flag in ("--data-path", "--train-data-path") and part != _VALID:
            return f"{flag} {prefix}: no row is left for training{split}; add rows"
        where = f"--split {job.data.split} of {prefix}" if part is not None else f"{flag} {prefix}"
        what = "the test loss" if flag == "--test-data-path" else "validation"
        return (
            f"--eval-iters {job.training.eval_iters}: {where} leaves no row for {what}; add rows, or leave the "
            "evaluation out"
        )

    def _rows(self, prefix: str, info: PreparedInfo | None, documents: range | None) -> OneDataset:
        job = self._job
        if job.training.stage == "sft":
            packed = info is None or info.pack is not None
            return SftDataset(prefix, self._seq_length, job.data.overlong, documents, packed)
        end = end_of_document(job.data, info, self._tokenizer)
        shuffle = not job.data.no_shuffle
        text = GptDataset(prefix, self._seq_length, documents, job.training.seed, shuffle, end)
        check_ends(job.data, text)
        return text

    def _num_documents(self, prefix: str) -> int:
        return count_documents(prefix) if self._job.training.stage == "sft" else len(IndexedDataset(prefix))

    def _info(self, prefix: str) -> PreparedInfo | None:
        """What is told of a data set, checked against the tokenizer when it is first asked for."""
        if prefix not in self._infos:
            self._infos[prefix] = info = read_info(prefix)
            if self._tokenizer is not None:
                check_tokenizer(info, self._tokenizer, prefix)
        return self._infos[prefix]
