"""Which messages and rows carry loss, and how much: the keys ``loss`` and ``weight`` of the data.

``loss`` is true or false, ``weight`` a number from 0 on; false is the weight 0, and what says nothing has the weight
1. They count for the assistant's messages; a row's own ``weight`` is multiplied with those of its messages.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mindspeed_lora.data.conversation import Message
from mindspeed_lora.errors import Refused

KEYS = ("loss", "weight")
"""The keys of a message that are not for chat templates."""


def message_weights(conversation: Sequence[Message], loss_on: str) -> tuple[float, ...] | None:
    """The weights of the assistant's messages, in order; None where nothing has another weight than 1.

    Raises:
        Refused: a value is none of those above, or another's message asks for what it cannot have.
    """
    if not any(key in message for message in conversation for key in KEYS):
        return None
    weights = []
    for number, message in enumerate(conversation, 1):
        where = f"message {number}"
        weight = _weight(message, where)
        if message.get("role") == "assistant":
            weights.append(1.0 if weight is None else weight)
        elif weight is not None and weight != (1.0 if loss_on == "all" else 0.0):
            raise Refused(
                f"{where} of role {message.get('role')} has the loss weight {weight:g}, but with --loss-on {loss_on} "
                f"only the assistant's messages have weights of their own; remove its loss and weight"
            )
    return None if all(weight == 1 for weight in weights) else tuple(weights)


def row_weight(values: Mapping[str, Any], where: str) -> float:
    """The weight of a whole row, 1 where it has none.

    Raises:
        Refused: it is no number from 0 on.
    """
    weight = values.get("weight")
    # Columns of CSV files are text.
    return 1.0 if weight is None or weight == "" else _number(weight, f"{where}: weight")


def token_weights(
    answers: np.ndarray[Any, Any], weights: Sequence[float], loss_on: str
) -> np.ndarray[Any, Any]:
    """The weights of a row's tokens, float32 ``[n]``.

    ``answers`` ``[n]`` holds the number of the answer that each token belongs to, negative for none. What follows an
    answer (an end token) has its weight, unless it carries loss of its own.
    """
    owners = answers if loss_on == "all" else np.maximum.accumulate(answers)
    return np.where(owners >= 0, np.asarray(weights, dtype=np.float32)[np.maximum(owners, 0)], np.float32(1))


def _weight(message: Message, where: str) -> float | None:
    loss, weight = message.get("loss"), message.get("weight")
    if loss is not None and loss not in (True, False):
        raise Refused(f"{where}: loss is {loss!r}; expected true or false")
    if weight is not None:
        weight = _number(weight, f"{where}: weight")
    if loss is None:
        return weight
    return (1.0 if weight is None else weight) if loss else 0.0


def _number(value: Any, what: str) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not (math.isfinite(number) and number >= 0):
        raise Refused(f"{what} is {value!r}; expected a number of at least 0")
    return number
