"""The rows of a run: training and validation part of the prepared data, and their batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mindspeed_lora.config.data import DataConfig
from mindspeed_lora.config.jobs import TrainJob
from mindspeed_lora.config.resolve_training import has_validation
from mindspeed_lora.config.training import TrainingConfig
from mindspeed_lora.data.batch import Padding
from mindspeed_lora.data.batches import EvalBatches, StepBatches
from mindspeed_lora.data.chat_template import chat_template
from mindspeed_lora.data.dealing import BatchShape, Dealing, OneSampleARow, PackedRows
from mindspeed_lora.data.documents import split_documents
from mindspeed_lora.data.gpt_dataset import EndOfDocument, GptDataset
from mindspeed_lora.data.indexed_dataset import IndexedDataset
from mindspeed_lora.data.prepared_info import PreparedInfo, check_tokenizer, read_info
from mindspeed_lora.data.sample import Sample
from mindspeed_lora.data.sampling import SampleOrder
from mindspeed_lora.data.sft_dataset import SftDataset, count_documents
from mindspeed_lora.data.template_files import chosen_template
from mindspeed_lora.data.tokenizer import LazyTokenizer
from mindspeed_lora.errors import Refused
from mindspeed_lora.training.packed_data import check_ends, check_packed, end_of_document


@dataclass(frozen=True)
class AssumedRows:
    """The rows of a dry run whose data are not there: as many as one step takes, of the full length."""

    count: int
    longest: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Sample:
        raise AssertionError("a dry run reads no row")


RowsDataset = SftDataset | GptDataset | AssumedRows


@dataclass(frozen=True, kw_only=True)
class TrainingRows:
    """Opened data, the same on every rank."""

    train: RowsDataset
    valid: RowsDataset | None
    """None where nothing is evaluated."""
    data: DataConfig
    training: TrainingConfig
    seq_length: int
    pad_token_id: int
    vocab_size: int
    chat_template: str | None
    """Renders the very tokens that the rows have; None where that is not known."""
    notices: tuple[str, ...]

    def train_batches(
        self, dp_rank: int, dp_size: int, pad_to: int | None, micro_batch_multiple: int = 1
    ) -> StepBatches:
        """The micro-batches of each step for one data-parallel rank."""
        order = SampleOrder(len(self.train), self.training.seed, shuffle=not self.data.no_shuffle)
        return StepBatches(self.train, order, self._dealing(dp_rank, dp_size, pad_to, micro_batch_multiple))

    def eval_batches(
        self, dp_rank: int, dp_size: int, pad_to: int | None, micro_batch_multiple: int = 1
    ) -> EvalBatches | None:
        """The evaluation rows for one data-parallel rank: ``--eval-iters`` global batches, or all (−1)."""
        if self.valid is None:
            return None
        iters, batch = self.training.eval_iters, self.training.global_batch_size
        num_samples = None if iters < 0 else iters * batch
        dealing = self._dealing(dp_rank, dp_size, pad_to, micro_batch_multiple)
        return EvalBatches(self.valid, dealing, num_samples)

    def tokenizer_writer(
        self, tokenizer: LazyTokenizer | None, keep_chat_template: bool
    ) -> Callable[[Path], None]:
        """A function that puts the tokenizer's files into a folder, with the template that was trained."""
        template = None if keep_chat_template else self.chat_template

        def write(folder: Path) -> None:
            if tokenizer is None:
                return
            loaded = tokenizer.loaded
            own = loaded.chat_template
            try:
                loaded.chat_template = template or own
                loaded.save_pretrained(folder)
            finally:
                loaded.chat_template = own

        return write

    def _dealing(self, dp_rank: int, dp_size: int, pad_to: int | None, micro_batch_multiple: int) -> Dealing:
        shape = BatchShape(
            micro_batch_size=self.training.micro_batch_size,
            global_batch_size=self.training.global_batch_size,
            dp_rank=dp_rank,
            dp_size=dp_size,
            micro_batch_multiple=micro_batch_multiple,
        )
        padding = Padding(
            pad_token_id=self.pad_token_id,
            seq_length=self.seq_length if pad_to is None else None,
            multiple_of=pad_to or 1,
            vocab_size=self.vocab_size,
        )
        return (
            PackedRows(shape, padding, self.seq_length)
            if self.data.packing
            else OneSampleARow(shape, padding)
        )


def open_rows(
    job: TrainJob, seq_length: int, vocab_size: int, tokenizer: LazyTokenizer | None
) -> TrainingRows:
    """Opens ``--data-path`` and the validation part.

    Raises:
        Refused: files are missing or damaged, no row is left, or they were prepared with another tokenizer.
    """
    data, training = job.data, job.training
    prefix = data.data_path
    assert prefix is not None, "checked with the flags"
    info = read_info(prefix)
    if tokenizer is not None:
        check_tokenizer(info, tokenizer, prefix)
        if data.valid_data_path is not None:
            check_tokenizer(read_info(data.valid_data_path), tokenizer, data.valid_data_path)
    train_part, valid_part, _ = split_documents(_num_documents(job, prefix), data.split)
    end = end_of_document(data, info, tokenizer) if training.stage == "pretrain" else None
    train = _open(job, prefix, seq_length, train_part, end)
    if len(train) == 0:
        raise Refused(f"--data-path {prefix}: no row is left for training (--split {data.split}); add rows")
    return TrainingRows(
        train=train,
        valid=_open_valid(job, prefix, seq_length, valid_part, end),
        data=data,
        training=training,
        seq_length=seq_length,
        pad_token_id=_pad_token(info, tokenizer, vocab_size),
        vocab_size=vocab_size,
        chat_template=_chat_template(job, info, tokenizer),
        notices=_notices(data, info, train),
    )


def assumed_rows(
    job: TrainJob, seq_length: int, vocab_size: int, tokenizer: LazyTokenizer | None
) -> TrainingRows:
    """What stands for the rows in a dry run whose ``--data-path`` is not there."""
    return TrainingRows(
        train=AssumedRows(job.training.global_batch_size, seq_length),
        valid=None,
        data=job.data,
        training=job.training,
        seq_length=seq_length,
        pad_token_id=0,
        vocab_size=vocab_size,
        chat_template=None,
        notices=(),
    )


def _num_documents(job: TrainJob, prefix: str) -> int:
    return count_documents(prefix) if job.training.stage == "sft" else len(IndexedDataset(prefix))


def _open(
    job: TrainJob, prefix: str, seq_length: int, documents: range | None, end: EndOfDocument | None
) -> RowsDataset:
    if job.training.stage == "sft":
        info = read_info(prefix)
        packed = info is None or info.pack is not None
        return SftDataset(prefix, seq_length, job.data.overlong, documents, packed)
    shuffle = not job.data.no_shuffle
    text = GptDataset(prefix, seq_length, documents, job.training.seed, shuffle, end)
    check_ends(job.data, text)
    return text


def _open_valid(
    job: TrainJob, prefix: str, seq_length: int, part: range, end: EndOfDocument | None
) -> RowsDataset | None:
    if job.training.eval_iters == 0 or not has_validation(job):
        return None
    own = job.data.valid_data_path
    path, documents = (prefix, part) if own is None else (own, None)
    valid = _open(job, path, seq_length, documents, end)
    if len(valid) == 0:
        where = f"--split {job.data.split} of {prefix}" if own is None else f"--valid-data-path {own}"
        raise Refused(
            f"--eval-iters {job.training.eval_iters}: {where} leaves no row for validation; add rows, or leave "
            "the evaluation out"
        )
    return valid


def _chat_template(job: TrainJob, info: PreparedInfo | None, tokenizer: LazyTokenizer | None) -> str | None:
    """The prepared data's template; for data that tell none, that of ``--prompt-type``."""
    prompt_type = job.tokenizer.prompt_type
    if info is None:
        if prompt_type is None or tokenizer is None:
            return None
        return chat_template(chosen_template(job.tokenizer), tokenizer.loaded)
    if prompt_type is not None and info.prompt_type is not None and prompt_type != info.prompt_type:
        raise Refused(
            f"--prompt-type {prompt_type} contradicts --data-path {job.data.data_path}, which was prepared with "
            f"{info.prompt_type}; leave it out, or prepare the data again"
        )
    return info.chat_template


def _pad_token(info: PreparedInfo | None, tokenizer: LazyTokenizer | None, vocab_size: int) -> int:
    """What fills rows up; which token does not matter to any number, but it must be in the vocabulary."""
    given = info.pad_token_id if info else None
    if given is not None and 0 <= given < vocab_size:
        return given
    own = (tokenizer.loaded.pad_token_id, tokenizer.loaded.eos_token_id) if tokenizer is not None else ()
    return next((token for token in own if token is not None and 0 <= token < vocab_size), 0)


def _notices(data: DataConfig, info: PreparedInfo | None, train: RowsDataset) -> tuple[str, ...]:
    if not isinstance(train, SftDataset):
        return ()
    notices = check_packed(data, info, train)
    if train.num_cut or train.num_dropped:
        notices += (
            f"rows longer than --seq-length {train.seq_length}: {train.num_cut} cut, {train.num_dropped} dropped "
            f"(--overlong {data.overlong})",
        )
    return notices
