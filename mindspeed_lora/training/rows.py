"""The rows of a run: training and validation part of the prepared data, and their batches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mindspeed_lora.config.data import DataConfig
from mindspeed_lora.config.jobs import TrainJob
from mindspeed_lora.config.training import TrainingConfig
from mindspeed_lora.data.batch import Padding
from mindspeed_lora.data.batches import EvalBatches, StepBatches
from mindspeed_lora.data.blend import BlendedDataset, BlendOrder
from mindspeed_lora.data.chat_template import chat_template
from mindspeed_lora.data.dealing import BatchShape, Dealing, OneSampleARow, PackedRows
from mindspeed_lora.data.prepared_info import PreparedInfo
from mindspeed_lora.data.sampling import SampleOrder, epoch_samples
from mindspeed_lora.data.sft_dataset import SftDataset
from mindspeed_lora.data.template_files import chosen_template
from mindspeed_lora.data.tokenizer import LazyTokenizer
from mindspeed_lora.errors import Refused
from mindspeed_lora.training.data_sets import AssumedRows, DataSets, RowsDataset, single_sets
from mindspeed_lora.training.packed_data import check_packed


@dataclass(frozen=True, kw_only=True)
class TrainingRows:
    """Opened data, the same on every rank."""

    train: RowsDataset
    valid: RowsDataset | None
    """None where nothing is evaluated."""
    test: RowsDataset | None = None
    """None where nothing is tested."""
    data: DataConfig
    training: TrainingConfig
    seq_length: int
    pad_token_id: int
    vocab_size: int
    chat_template: str | None
    """Renders the very tokens that the rows have; None where that is not known."""
    notices: tuple[str, ...]

    @property
    def blend(self) -> list[float] | None:
        """What the order of a blend depends on: its weights, or its sizes; None for a single data set."""
        if not isinstance(self.train, BlendedDataset):
            return None
        return [*(self.train.weights or map(len, self.train.parts))]

    @property
    def epoch_samples(self) -> int:
        """Samples of one epoch of the training part, those of ``--padded-samples`` included."""
        return epoch_samples(len(self.train), self._epoch_multiple)

    @property
    def _epoch_multiple(self) -> int:
        return self.training.global_batch_size if self.data.padded_samples else 1

    def train_batches(
        self, dp_rank: int, dp_size: int, pad_to: int | None, micro_batch_multiple: int = 1
    ) -> StepBatches:
        """The micro-batches of each step for one data-parallel rank."""
        seed, shuffle = self.training.seed, not self.data.no_shuffle
        order: SampleOrder | BlendOrder
        if isinstance(self.train, BlendedDataset):
            order = BlendOrder(self.train, seed, shuffle)
        else:
            order = SampleOrder(len(self.train), seed, shuffle, self._epoch_multiple)
        return StepBatches(self.train, order, self._dealing(dp_rank, dp_size, pad_to, micro_batch_multiple))

    def eval_batches(
        self, dp_rank: int, dp_size: int, pad_to: int | None, micro_batch_multiple: int = 1
    ) -> EvalBatches | None:
        """The evaluation rows for one data-parallel rank: ``--eval-iters`` global batches, or all (−1)."""
        return self._evaluation(self.valid, self._dealing(dp_rank, dp_size, pad_to, micro_batch_multiple))

    def test_batches(
        self, dp_rank: int, dp_size: int, pad_to: int | None, micro_batch_multiple: int = 1
    ) -> EvalBatches | None:
        """The same of the rows for the test loss."""
        return self._evaluation(self.test, self._dealing(dp_rank, dp_size, pad_to, micro_batch_multiple))

    def _evaluation(self, rows: RowsDataset | None, dealing: Dealing) -> EvalBatches | None:
        if rows is None:
            return None
        iters, batch = self.training.eval_iters, self.training.global_batch_size
        num_samples = None if iters < 0 else iters * batch
        order = None
        if isinstance(rows, BlendedDataset) and num_samples is not None:
            order = BlendOrder(rows, shuffle=False).order
        return EvalBatches(rows, dealing, num_samples, order)

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
    """Opens the data of training, evaluation and test.

    Raises:
        Refused: files are missing or damaged, no row is left, or they were prepared with another tokenizer.
    """
    sets = DataSets(job, seq_length, tokenizer)
    for prefix, info in sets.prefixes():
        _check_preparation(job, prefix, info)
    if job.data.padded_samples and isinstance(sets.train, BlendedDataset):
        raise Refused(
            "--padded-samples fills up the epochs of one data set, and --data-path names several; leave it out"
        )
    template, differing = _chat_template(job, sets, tokenizer)
    return TrainingRows(
        train=sets.train,
        valid=sets.valid,
        test=sets.test,
        data=job.data,
        training=job.training,
        seq_length=seq_length,
        pad_token_id=_pad_token(sets.infos[0], tokenizer, vocab_size),
        vocab_size=vocab_size,
        chat_template=template,
        notices=(*_notices(job.data, sets), *differing),
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


def _check_preparation(job: TrainJob, prefix: str, info: PreparedInfo) -> None:
    """Refuse flags of preparing that prepared rows contradict."""
    if job.training.stage != "sft":
        return
    if "loss_on" in job.given and info.loss_on != job.raw_rows.loss_on:
        raise Refused(
            f"--loss-on {job.raw_rows.loss_on} contradicts --data-path {prefix}, which was prepared with --loss-on "
            f"{info.loss_on}; leave it out, or prepare the data again"
        )
    if job.raw_rows.pack and info.pack is None:
        raise Refused(
            f"--pack contradicts --data-path {prefix}, which was prepared without it; leave it out, prepare the data "
            "again, or pack while training (--packing)"
        )


def _chat_template(
    job: TrainJob, sets: DataSets, tokenizer: LazyTokenizer | None
) -> tuple[str | None, tuple[str, ...]]:
    """The prepared data's template; for data that tell none, that of ``--prompt-type``. And notices on it."""
    prompt_type = job.tokenizer.prompt_type
    for prefix, info in sets.prefixes():
        if prompt_type is not None and info.prompt_type is not None and prompt_type != info.prompt_type:
            raise Refused(
                f"--prompt-type {prompt_type} contradicts --data-path {prefix}, which was prepared with "
                f"{info.prompt_type}; leave it out, or prepare the data again"
            )
    if sets.infos[0] is None:
        if prompt_type is None or tokenizer is None:
            return None, ()
        return chat_template(chosen_template(job.tokenizer), tokenizer.loaded), ()
    templates = {info.chat_template: prefix for prefix, info in reversed(list(sets.prefixes()))}
    notices: tuple[str, ...] = ()
    if len(templates) > 1:
        first, other = list(reversed(templates.values()))[:2]
        notices = (
            f"{other} was prepared with another chat template than {first}, whose own is kept with the model",
        )
    return sets.infos[0].chat_template, notices


def _pad_token(info: PreparedInfo | None, tokenizer: LazyTokenizer | None, vocab_size: int) -> int:
    """What fills rows up; which token does not matter to any number, but it must be in the vocabulary."""
    given = info.pad_token_id if info else None
    if given is not None and 0 <= given < vocab_size:
        return given
    own = (tokenizer.loaded.pad_token_id, tokenizer.loaded.eos_token_id) if tokenizer is not None else ()
    return next((token for token in own if token is not None and 0 <= token < vocab_size), 0)


def _notices(data: DataConfig, sets: DataSets) -> tuple[str, ...]:
    notices: tuple[str, ...] = ()
    infos = dict(sets.prefixes())
    for rows in single_sets(sets.train):
        if not isinstance(rows, SftDataset):
            continue
        notices += check_packed(data, infos.get(rows.prefix), rows)
        if rows.num_cut or rows.num_dropped:
            where = f" of {rows.prefix}" if isinstance(sets.train, BlendedDataset) else ""
            notices += (
                f"rows{where} longer than --seq-length {rows.seq_length}: {rows.num_cut} cut, {rows.num_dropped} "
                f"dropped (--overlong {data.overlong})",
            )
    return notices
