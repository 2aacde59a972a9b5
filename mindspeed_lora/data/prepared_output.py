"""The files of a prepared data set while they are written: indexed data sets, weights, and the information on them.

All are written beside their targets and renamed together at the end, so that an interrupted run leaves an earlier
set as it was. Now and then a journal notes how far they are; a run of the same job goes on from there.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mindspeed_lora.data.atomic_output import left_by_the_dead, publish, remove_stale, temporary_sibling
from mindspeed_lora.data.growing_file import Mark, can_take_over
from mindspeed_lora.data.indexed_dataset import IndexedDatasetBuilder, bin_path
from mindspeed_lora.data.outcome import Outcome
from mindspeed_lora.data.packed_rows import RowSpool
from mindspeed_lora.data.preparation import Preparation
from mindspeed_lora.data.prepared_info import PreparedInfo, info_path, text_info_path, to_json
from mindspeed_lora.data.row_work import TextWork
from mindspeed_lora.data.sample import number_trained
from mindspeed_lora.data.sft_dataset import WEIGHTS_KEY, packed_prefix
from mindspeed_lora.data.summary import Summary
from mindspeed_lora.errors import Refused

SECONDS_BETWEEN_MARKS = 5.0

Array = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Position:
    """How far an interrupted run was."""

    chunks: int = 0
    """So many chunks of rows are done."""
    seconds: float = 0.0
    """They took so long."""
    summary: Summary = dataclasses.field(default_factory=Summary)


def dataset_prefixes(prefix: str, preparation: Preparation) -> list[str]:
    """The paths of the indexed data sets that a run writes, without their suffixes."""
    keys = preparation.work.keys
    if not isinstance(preparation.work, TextWork):
        return [packed_prefix(prefix, key) for key in keys]
    return [f"{prefix}_{key}_document" for key in keys]


def job_key(preparation: Preparation, settings: Mapping[str, Any], files: Sequence[Path]) -> str:
    """What two runs have in common whose files are the same bytes: the inputs, as far as the file system tells, and
    all that shapes the rows."""
    inputs = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    content = [inputs, dict(settings), dataclasses.asdict(preparation.info)]
    return hashlib.sha256(json.dumps(content, default=str, sort_keys=True).encode()).hexdigest()


class PreparedOutput:
    """One indexed data set a key, weights where rows have them, and the information on all."""

    def __init__(
        self, prefix: str, preparation: Preparation, key: str, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """``key`` tells by :func:`job_key` whether what an interrupted run left behind may be gone on with."""
        self._info = preparation.info
        self._packing = preparation.packing
        self._key = key
        self._clock = clock
        self.prefixes = dataset_prefixes(prefix, preparation)
        self._text_keys = preparation.work.keys if isinstance(preparation.work, TextWork) else ()
        if not self._text_keys:
            self._info_paths = [info_path(prefix)]
        else:
            self._info_paths = [text_info_path(path) for path in self.prefixes]
        self._weights_prefix = packed_prefix(prefix, WEIGHTS_KEY)
        self._journal = Path(f"{prefix}_preparing")
        self._new_journal = Path(f"{prefix}_preparing.new")
        self._spool_path = spool = Path(f"{prefix}_packed_rows")
        left, journal = self._left_behind()
        marks: Mapping[str, Mark] = journal.get("marks", {})
        self.position = Position()
        """Where this run goes on."""
        if journal:
            summary = Summary.restored(journal["summary"])
            self.position = Position(journal["chunks"], journal["seconds"], summary)
        self._builders = [
            IndexedDatasetBuilder(path, np.int32, left, marks.get(path)) for path in self.prefixes
        ]
        self._weights: IndexedDatasetBuilder | None = None
        if self._weights_prefix in marks:
            self._weights = IndexedDatasetBuilder(
                self._weights_prefix, np.float32, left, marks[self._weights_prefix]
            )
        self._spool = None
        if self._packing is not None:
            self._spool = RowSpool(spool, left, marks.get(str(spool)))
        if journal:
            self._note(journal)
        own_files = [spool] if self._spool is None else []
        own_files += [Path(f"{self._weights_prefix}.bin")] if self._weights is None else []
        remove_stale([file.with_name(file.name + end) for file in own_files for end in ("", ".lengths")])
        remove_stale([*self._info_paths, self._journal, self._new_journal])
        self._marked_at = clock()

    def _left_behind(self) -> tuple[int | None, dict[str, Any]]:
        """The dead process whose files of the same job can be taken over, and its journal."""
        for process_id in left_by_the_dead(self._journal):
            path = temporary_sibling(self._journal, process_id)
            try:
                journal = json.loads(path.read_text(encoding="utf-8"))
            except (OSError, ValueError):
                continue
            if (
                isinstance(journal, dict)
                and journal.get("key") == self._key
                and all(
                    can_take_over(self._file(name), process_id, m) for name, m in journal["marks"].items()
                )
            ):
                return process_id, journal
        return None, {}

    def add(self, outcome: Outcome) -> None:
        """Append the documents of a row that is kept."""
        if outcome.reason is not None:
            return
        if self._spool is None:
            self._write(outcome.documents, outcome.weights)
        else:
            input_ids, _, labels = outcome.documents
            self._spool.add(input_ids, labels, outcome.weights)

    def mark(self, chunks: int, summary: Summary, seconds: float) -> None:
        """Note that so many chunks are done, after so long, if the last note is some seconds old."""
        if self._clock() - self._marked_at < SECONDS_BETWEEN_MARKS:
            return
        marks = {path: builder.mark() for path, builder in zip(self.prefixes, self._builders, strict=True)}
        if self._weights is not None:
            marks[self._weights_prefix] = self._weights.mark()
        if self._spool is not None:
            marks[str(self._spool_path)] = self._spool.mark()
        state = {"chunks": chunks, "seconds": seconds, "summary": summary.state()}
        self._note({"key": self._key, **state, "marks": marks})
        self._marked_at = self._clock()

    def _note(self, journal: Mapping[str, Any]) -> None:
        new = temporary_sibling(self._new_journal)
        _write_text(new, json.dumps(journal))
        os.replace(new, temporary_sibling(self._journal))

    def _file(self, name: str) -> Path:
        """The file that a name in the journal's marks means."""
        return self._spool_path if name == str(self._spool_path) else bin_path(name)

    def pack(self, summary: Summary) -> None:
        """Put the rows together, where that was asked for."""
        if self._spool is None or self._packing is None:
            return
        summary.packed_length = self._packing.seq_length
        summary.loss_tokens = 0
        for documents, weights in self._spool.packed(self._packing):
            self._write(documents, weights)
            summary.packed += 1
            summary.loss_tokens += number_trained(documents[2])
        self._spool.close()

    def _write(self, documents: Sequence[Array], weights: Array | None) -> None:
        if weights is not None and self._weights is None:
            self._weights = IndexedDatasetBuilder(self._weights_prefix, np.float32)
            for length in self._builders[0].lengths:
                self._weights.add_document(np.ones(length, dtype=np.float32))
        for builder, document in zip(self._builders, documents, strict=True):
            # Of several texts of a row some may be empty.
            if len(document) or not self._text_keys:
                builder.add_document(document)
        if self._weights is not None:
            ones = np.ones(len(documents[0]), dtype=np.float32)
            self._weights.add_document(ones if weights is None else weights)

    def publish(self, summary: Summary) -> None:
        """Give all files their names, the information last.

        Raises:
            Refused: one of several columns of text is empty in every row.
        """
        self._refuse_empty()
        lengths = [builder.lengths for builder in self._builders]
        pairs = [pair for builder in self._builders for pair in builder.finish()]
        if self._weights is not None:
            pairs += self._weights.finish()
            self.prefixes.append(self._weights_prefix)
        one_info = len(self._info_paths) == 1
        for number, path in enumerate(self._info_paths):
            own = pairs if one_info else pairs[2 * number : 2 * number + 2]
            sizes = {target.name: temporary.stat().st_size for temporary, target in own}
            info = self._with_counts(summary, sizes)
            if not one_info:
                documents, tokens = len(lengths[number]), int(sum(lengths[number]))
                info = dataclasses.replace(
                    info, num_documents=documents, num_tokens=tokens, num_loss_tokens=tokens
                )
            _write_text(temporary_sibling(path), to_json(info))
        if self._weights is None:
            self._remove_old_weights()
        publish([*pairs, *((temporary_sibling(path), path) for path in self._info_paths)])
        temporary_sibling(self._journal).unlink(missing_ok=True)

    def _refuse_empty(self) -> None:
        for key, builder in zip(self._text_keys, self._builders, strict=False):
            if not len(builder.lengths):
                raise Refused(f"--json-keys {key}: no row has text in this column; leave it out")

    def _remove_old_weights(self) -> None:
        """Those of an earlier set under this name would be read with the new one."""
        for suffix in (".idx", ".bin"):
            Path(self._weights_prefix + suffix).unlink(missing_ok=True)

    def _with_counts(self, summary: Summary, sizes: dict[str, int]) -> PreparedInfo:
        return dataclasses.replace(
            self._info,
            num_documents=summary.packed or summary.kept,
            num_rows=summary.kept if summary.packed else None,
            num_tokens=summary.tokens,
            num_loss_tokens=summary.loss_tokens,
            weighted=self._weights is not None,
            longest=summary.packed_length or summary.longest,
            files=sizes,
        )

    def discard(self) -> None:
        """Remove what is unfinished."""
        for builder in self._builders:
            builder.discard()
        if self._weights is not None:
            self._weights.discard()
        if self._spool is not None:
            self._spool.close()
        for path in (*self._info_paths, self._journal, self._new_journal):
            temporary_sibling(path).unlink(missing_ok=True)


def _write_text(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
