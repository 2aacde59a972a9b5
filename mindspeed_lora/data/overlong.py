"""What is kept of a row that is longer than the sequence length.

``truncate`` cuts the end; ``proportional`` shares the cut between prompt and answer, turn by turn; ``drop``
keeps nothing. The turns of a row are read off its labels: a run without loss (prompt), then a run with loss
(answer).
"""

from __future__ import annotations

from typing import Any

import numpy as np

from mindspeed_lora.data.sample import IGNORE_INDEX, number_trained


def kept_positions(
    labels: np.ndarray[Any, Any], seq_length: int, overlong: str
) -> np.ndarray[Any, Any] | None:
    """The positions of a row that stay, in order, at most ``seq_length``; None when the row is dropped.

    ``labels`` ``[n]`` are unshifted. A row that is left without a loss-carrying token is dropped too.
    """
    if len(labels) <= seq_length:
        return np.arange(len(labels))
    if overlong == "drop":
        return None
    if overlong == "proportional":
        kept = _proportional(labels, seq_length)
    else:
        kept = np.arange(seq_length)
    return kept if number_trained(labels[kept]) else None


def _proportional(labels: np.ndarray[Any, Any], seq_length: int) -> np.ndarray[Any, Any]:
    """Cut prompt and answer of each turn from their ends, within what the turns before left over."""
    kept: list[np.ndarray[Any, Any]] = []
    room = seq_length
    for start, answer, end in _turns(labels):
        if room <= 0:
            break
        prompt_length, answer_length = _shares(answer - start, end - answer, room)
        kept.append(np.arange(start, start + prompt_length))
        kept.append(np.arange(answer, answer + answer_length))
        room -= prompt_length + answer_length
    return np.concatenate(kept)


def _turns(labels: np.ndarray[Any, Any]) -> list[tuple[int, int, int]]:
    """``(start, first trained token, end)`` of each turn."""
    trained = labels != IGNORE_INDEX
    changes = [0, *(np.flatnonzero(trained[1:] != trained[:-1]) + 1).tolist(), len(labels)]
    if trained[0]:
        changes.insert(0, 0)
    if len(changes) % 2 == 0:
        changes.append(len(labels))
    return [(changes[i], changes[i + 1], changes[i + 2]) for i in range(0, len(changes) - 2, 2)]


def _shares(prompt_length: int, answer_length: int, room: int) -> tuple[int, int]:
    """How many tokens of a prompt and of its answer fit into ``room``.

    A part shorter than half of the room is kept whole; if both are longer they are cut in the same
    proportion.
    """
    if answer_length * 2 < room:
        answer_limit = room
    elif prompt_length * 2 < room:
        answer_limit = room - prompt_length
    else:
        answer_limit = int(room * (answer_length / (prompt_length + answer_length)))
    answer_kept = min(answer_limit, answer_length)
    return min(max(room - answer_kept, 0), prompt_length), answer_kept
