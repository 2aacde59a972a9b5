"""``preprocess_data.py --show N``: the first rows as they would be trained, for people to look at.

Each row is shown as its messages, then its tokens in runs of the same kind: what carries loss stands in colour on a
terminal, and is named in any case. Rows that would be packed are shown with their boundaries. Nothing is written.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np

from mindspeed_lora.config.jobs import PreprocessJob
from mindspeed_lora.data.bad_rows import CheckedWork
from mindspeed_lora.data.conversation import Message, UnusableRow, split_tools
from mindspeed_lora.data.outcome import Outcome
from mindspeed_lora.data.packing import best_fit_decreasing
from mindspeed_lora.data.pair_work import PairWork
from mindspeed_lora.data.preparation import Preparation, prepare
from mindspeed_lora.data.readers import Row
from mindspeed_lora.data.row_work import InstructionWork, TextWork
from mindspeed_lora.data.sample import IGNORE_INDEX
from mindspeed_lora.data.sources import Inputs, open_inputs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ROWS_TO_PACK = 64
"""So many rows for each packed row are put together, to show what packing does."""
_LONGEST_TEXT = 200
_LOSS, _QUIET, _TITLE, _PLAIN = "\033[1;32m", "\033[2m", "\033[1m", "\033[0m"
_BETWEEN_TOKENS = "|"


@dataclass(frozen=True)
class _Part:
    """Tokens that are shown together: a row, one of a pair, a text."""

    name: str
    input_ids: np.ndarray[Any, Any]
    labels: np.ndarray[Any, Any]
    messages: Sequence[Message] = ()
    weights: np.ndarray[Any, Any] | None = None
    """float32 ``[n]``; None: every label weighs 1."""


def show(job: PreprocessJob, stream: TextIO | None = None) -> None:
    """Print the first ``--show`` rows.

    Raises:
        Refused: input or flags are wrong.
    """
    stream = stream if stream is not None else sys.stdout
    for text in job.notices:
        _notice(text)
    assert job.preprocess.show is not None
    inputs = open_inputs(job.preprocess, _notice)
    preparation = prepare(job, inputs, _notice)
    screen = _Screen(stream, _tokenizer(preparation))
    if preparation.packing is None:
        for number, (row, parts) in enumerate(
            itertools.islice(_kept(preparation, inputs), job.preprocess.show), 1
        ):
            screen.title(f"row {number}: {row.where}")
            for part in parts:
                screen.part(part)
        return
    wanted = job.preprocess.show * _ROWS_TO_PACK
    rows = [(row, parts[0]) for row, parts in itertools.islice(_kept(preparation, inputs), wanted)]
    length = preparation.packing.seq_length
    bins = best_fit_decreasing([len(part.input_ids) for _, part in rows], length)
    screen.title(
        f"the first {len(rows)} rows, packed to {length} tokens; all rows together are packed otherwise"
    )
    for number, chosen in enumerate(itertools.islice(bins, job.preprocess.show), 1):
        filled = sum(len(rows[index][1].input_ids) for index in chosen)
        screen.title(
            f"packed row {number}: {len(chosen)} rows, {filled} tokens, {length - filled} of padding"
        )
        start = 0
        for sub_row, index in enumerate(chosen.tolist(), 1):
            row, part = rows[index]
            stop = start + len(part.input_ids)
            name = f"---- {sub_row}: positions {start} to {stop - 1}: {row.where}"
            screen.part(replace(part, name=name))
            start = stop


def _kept(preparation: Preparation, inputs: Inputs) -> Iterator[tuple[Row, list[_Part]]]:
    """The rows that would be written, with what is shown of them; the others are told."""
    work = CheckedWork(preparation.work)
    for row in inputs.rows():
        (outcome,) = work([row])
        if outcome.reason is not None or not isinstance(row, Row):
            _notice(
                outcome.problem or f"dropped: {row.where if isinstance(row, Row) else ''}: {outcome.reason}"
            )
            continue
        yield row, _parts(preparation, row, outcome)


def _parts(preparation: Preparation, row: Row, outcome: Outcome) -> list[_Part]:
    work, documents = preparation.work, outcome.documents
    if isinstance(work, PairWork):
        chosen, rejected = work.handler.pair(row)
        return [
            _Part("chosen", documents[0], documents[1], chosen),
            _Part("rejected", documents[2], documents[3], rejected),
        ]
    if isinstance(work, InstructionWork):
        return [_Part("", documents[0], documents[2], _messages(work, row), outcome.weights)]
    return [_Part(key, tokens, tokens) for key, tokens in zip(work.keys, documents, strict=True)]


def _messages(work: InstructionWork, row: Row) -> Sequence[Message]:
    try:
        return work.handler.messages(row)
    except UnusableRow:
        return ()


def _tokenizer(preparation: Preparation) -> PreTrainedTokenizerBase:
    work = preparation.work.single if isinstance(preparation.work, PairWork) else preparation.work
    if isinstance(work, TextWork):
        return work.tokenizer
    assert isinstance(work, InstructionWork)
    tokenizer: PreTrainedTokenizerBase = work.encoder.tokenizer
    return tokenizer


class _Screen:
    """Where rows are shown."""

    def __init__(self, stream: TextIO, tokenizer: PreTrainedTokenizerBase) -> None:
        self._stream = stream
        self._tokenizer = tokenizer
        self._colour = stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
        self._texts: dict[int, str] = {}

    def title(self, text: str) -> None:
        """A line that begins something new."""
        self._print("\n" + self._painted(_safe(text), _TITLE))

    def part(self, part: _Part) -> None:
        """Messages, and tokens by runs with and without loss."""
        trained = part.labels != IGNORE_INDEX
        counts = f"{len(part.input_ids)} tokens, {int(trained[1:].sum())} with loss"
        self._print(f"{_safe(part.name)}: {counts}" if part.name else counts)
        messages, tools = split_tools(part.messages)
        if tools:
            self._print(f"  {'tools':<10} {len(tools)}")
        for message in messages:
            self._print(f"  {message['role']:<10} {_shown(message)}")
        weighing = trained.astype(np.float32) if part.weights is None else trained * part.weights
        for start, stop in _runs(weighing):
            kind, colour = ("loss", _LOSS) if trained[start] else ("no loss", _QUIET)
            if trained[start] and weighing[start] != 1:
                kind = f"loss × {weighing[start]:g}"
            tokens = [
                self._token(int(token), int(label))
                for token, label in zip(part.input_ids[start:stop], part.labels[start:stop], strict=True)
            ]
            self._print(f"  {kind:<10} {self._painted(_BETWEEN_TOKENS.join(tokens), colour)}")

    def _token(self, token: int, label: int) -> str:
        """A token as text; with what it is trained to be, where that is something else."""
        text = self._text(token)
        return text if label in (token, IGNORE_INDEX) else f"{text}(to be {self._text(label)})"

    def _text(self, token: int) -> str:
        if token not in self._texts:
            text = self._tokenizer.decode([token])
            # A part of a character, or a blank that the tokenizer leaves out at the beginning of a text.
            if "\ufffd" in text or not text:
                text = str(self._tokenizer.convert_ids_to_tokens(token))
            self._texts[token] = _safe(text)
        return self._texts[token]

    def _painted(self, text: str, colour: str) -> str:
        return f"{colour}{text}{_PLAIN}" if self._colour else text

    def _print(self, text: str) -> None:
        self._stream.write(text + "\n")


def _safe(text: str) -> str:
    """Text without the control characters that a terminal would obey."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "replace").decode() for c in text)


def _shown(message: Mapping[str, Any]) -> str:
    text = str(message["content"])
    if message.get("tool_calls"):
        calls = ", ".join(call["function"]["name"] for call in message["tool_calls"])
        text = f"{text} (calls {calls})".strip()
    return _safe(text if len(text) <= _LONGEST_TEXT else text[: _LONGEST_TEXT - 3] + "...")


def _runs(weighing: np.ndarray[Any, Any]) -> list[tuple[int, int]]:
    """Start and end of each run of equal values."""
    changes = (np.flatnonzero(weighing[1:] != weighing[:-1]) + 1).tolist()
    return list(itertools.pairwise([0, *changes, len(weighing)])) if len(weighing) else []


def _notice(text: str) -> None:
    print(f"notice: {text}", file=sys.stderr)
