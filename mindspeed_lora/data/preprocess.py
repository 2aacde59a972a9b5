"""``preprocess_data.py``: rows of text become indexed data sets, with the information on how they were made.

All files of a run are written beside their targets and renamed together at the end, so that an interrupted
run leaves an earlier set as it was.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mindspeed_lora.config.jobs import PreprocessJob
from mindspeed_lora.data.atomic_output import prepare_folder, publish, remove_stale, temporary_sibling
from mindspeed_lora.data.bad_rows import BadRowLimit, CheckedWork, told
from mindspeed_lora.data.indexed_dataset import IndexedDatasetBuilder
from mindspeed_lora.data.packed_rows import RowSpool
from mindspeed_lora.data.preparation import Preparation, prepare
from mindspeed_lora.data.prepared_info import PreparedInfo, info_path, text_info_path, to_json
from mindspeed_lora.data.progress import Progress
from mindspeed_lora.data.readers import BadRow, Row
from mindspeed_lora.data.row_work import Outcome, TextWork
from mindspeed_lora.data.sample import IGNORE_INDEX
from mindspeed_lora.data.sft_dataset import packed_prefix
from mindspeed_lora.data.sources import Inputs, open_inputs
from mindspeed_lora.data.summary import Summary
from mindspeed_lora.data.worker_pool import ordered_map
from mindspeed_lora.errors import Refused

_ROWS_A_CHUNK = 128


def preprocess(job: PreprocessJob) -> Summary:
    """Prepare the rows of ``--input`` and print the summary.

    Raises:
        Refused: input or flags are wrong; nothing is written then.
    """
    for text in job.notices:
        _notice(text)
    assert job.preprocess.output_prefix is not None
    inputs = open_inputs(job.preprocess, _notice)
    preparation = prepare(job, inputs, _notice)
    prepare_folder(Path(job.preprocess.output_prefix).parent)
    output = _Output(job.preprocess.output_prefix, preparation)
    progress = Progress(job.preprocess.log_interval)
    try:
        summary = _run(job, preparation, inputs, output, progress)
        output.pack(summary)
        output.publish(summary)
    except BaseException:
        output.discard()
        raise
    finally:
        progress.close()
    for text in told(summary):
        _notice(text)
    print(summary.text(progress.seconds))
    print("written       " + "\n              ".join(str(path) for path in output.prefixes))
    return summary


def _run(
    job: PreprocessJob, preparation: Preparation, inputs: Inputs, output: _Output, progress: Progress
) -> Summary:
    summary = Summary()
    fractions: list[float] = []
    chunks = _chunks(inputs.rows(), fractions)
    limit = BadRowLimit(job.preprocess.max_bad_rows, job.preprocess.input or "")
    workers = max(job.preprocess.workers, job.preprocess.n_subs)
    for number, outcomes in enumerate(ordered_map(CheckedWork(preparation.work), chunks, workers)):
        tokens = sum(summary.add(outcome) for outcome in outcomes)
        for outcome in outcomes:
            output.add(outcome)
        progress.update(len(outcomes), tokens, fractions[number])
        limit.check_on_the_way(summary)
    limit.check(summary)
    if summary.kept == 0:
        reasons = ", ".join(f"{count} × {reason}" for reason, count in summary.dropped.most_common())
        raise Refused(f"--input {job.preprocess.input}: none of {summary.read} rows can be used ({reasons})")
    return summary


def _chunks(rows: Iterator[Row | BadRow], fractions: list[float]) -> Iterator[list[Row | BadRow]]:
    """Rows in order, many at a time; ``fractions`` gets how much of the input each chunk reaches to."""
    while chunk := list(itertools.islice(rows, _ROWS_A_CHUNK)):
        fractions.append(chunk[-1].fraction)
        yield chunk


def dataset_prefixes(prefix: str, preparation: Preparation) -> list[str]:
    """The paths of the indexed data sets that a run writes, without their suffixes."""
    keys = preparation.work.keys
    if not isinstance(preparation.work, TextWork):
        return [packed_prefix(prefix, key) for key in keys]
    return [f"{prefix}_{key}_document" for key in keys]


class _Output:
    """The files of a run: one indexed data set a key, and the information on them."""

    def __init__(self, prefix: str, preparation: Preparation) -> None:
        self._info = preparation.info
        self._packing = preparation.packing
        self.prefixes = dataset_prefixes(prefix, preparation)
        if not isinstance(preparation.work, TextWork):
            self._info_paths = [info_path(prefix)]
        else:
            self._info_paths = [text_info_path(path) for path in self.prefixes]
        spool = Path(f"{prefix}_packed_rows")
        remove_stale([*self._info_paths, spool])
        self._builders = [IndexedDatasetBuilder(path) for path in self.prefixes]
        self._spool = RowSpool(spool) if self._packing is not None else None

    def add(self, outcome: Outcome) -> None:
        """Append the documents of a row that is kept."""
        if outcome.reason is not None:
            return
        if self._spool is None:
            self._write(outcome.documents)
        else:
            input_ids, _, labels = outcome.documents
            self._spool.add(input_ids, labels)

    def pack(self, summary: Summary) -> None:
        """Put the rows together, where that was asked for."""
        if self._spool is None or self._packing is None:
            return
        summary.packed_length = self._packing.seq_length
        summary.loss_tokens = 0
        for documents in self._spool.packed(self._packing):
            self._write(documents)
            summary.packed += 1
            summary.loss_tokens += int((documents[2][1:] != IGNORE_INDEX).sum())
        self._spool.close()

    def _write(self, documents: Sequence[np.ndarray[Any, Any]]) -> None:
        for builder, document in zip(self._builders, documents, strict=True):
            builder.add_document(document)

    def publish(self, summary: Summary) -> None:
        """Give all files their names, the information last."""
        pairs = [pair for builder in self._builders for pair in builder.finish()]
        one_info = len(self._info_paths) == 1
        for number, path in enumerate(self._info_paths):
            own = pairs if one_info else pairs[2 * number : 2 * number + 2]
            sizes = {target.name: temporary.stat().st_size for temporary, target in own}
            self._write_info(path, self._with_counts(summary, sizes))
        publish([*pairs, *((temporary_sibling(path), path) for path in self._info_paths)])

    def _with_counts(self, summary: Summary, sizes: dict[str, int]) -> PreparedInfo:
        return dataclasses.replace(
            self._info,
            num_documents=summary.packed or summary.kept,
            num_rows=summary.kept if summary.packed else None,
            num_tokens=summary.tokens,
            num_loss_tokens=summary.loss_tokens,
            longest=summary.packed_length or summary.longest,
            files=sizes,
        )

    def _write_info(self, path: Path, info: PreparedInfo) -> None:
        with temporary_sibling(path).open("w", encoding="utf-8") as stream:
            stream.write(to_json(info))
            stream.flush()
            os.fsync(stream.fileno())

    def discard(self) -> None:
        """Remove what is unfinished."""
        for builder in self._builders:
            builder.discard()
        if self._spool is not None:
            self._spool.close()
        for path in self._info_paths:
            temporary_sibling(path).unlink(missing_ok=True)


def _notice(text: str) -> None:
    print(f"notice: {text}", file=sys.stderr)
