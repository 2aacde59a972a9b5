"""What the rows of a data set mean: each handler turns a row's columns into a conversation or into texts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from mindspeed_lora.config.nearest import did_you_mean
from mindspeed_lora.data.conversation import Message
from mindspeed_lora.data.handlers.alpaca import (
    ALPACA_COLUMNS,
    AlpacaHandler,
    AlpacaPairHandler,
    AlpacaPretrainHandler,
)
from mindspeed_lora.data.handlers.fields import columns, names, parse_map, text_of
from mindspeed_lora.data.handlers.openai import OPENAI_COLUMNS, OpenAIHandler
from mindspeed_lora.data.handlers.published_sets import (
    BELLE_COLUMNS,
    LEETCODE_COLUMNS,
    MOSS_COLUMNS,
    STACK_OVERFLOW_COLUMNS,
    BelleHandler,
    LeetcodeHandler,
    MossHandler,
    StackOverflowHandler,
)
from mindspeed_lora.data.handlers.sharegpt import (
    ShareGptHandler,
    ShareGptPairHandler,
    ShareGptPretrainHandler,
)
from mindspeed_lora.data.readers import Row
from mindspeed_lora.errors import Refused

ALPACA = "AlpacaStyleInstructionHandler"
SHAREGPT = "SharegptStyleInstructionHandler"
OPENAI = "OpenAIInstructionHandler"
LLAMA_FACTORY = "LlamaFactoryInstructionHandler"
HUNYUAN = "HunyuanInstructionHandler"
ALPACA_PAIRS = "AlpacaStylePairwiseHandler"
SHAREGPT_PAIRS = "SharegptStylePairwiseHandler"
PRETRAIN = "GeneralPretrainHandler"
ALPACA_PRETRAIN = "AlpacaPretrainHandler"
SHAREGPT_PRETRAIN = "SharegptPretrainHandler"

MapKeys = str | Mapping[str, Any] | None
"""The JSON text of ``--map-keys``, or what it says."""


class InstructionHandler(Protocol):
    """Rows that are conversations."""

    def messages(self, row: Row) -> list[Message]:
        """The conversation of a row.

        Raises:
            Refused: the row is malformed.
            UnusableRow: there is nothing to train in it.
        """
        ...


@runtime_checkable
class PairHandler(Protocol):
    """Rows that are conversations with two last answers, for preference training."""

    def pair(self, row: Row) -> tuple[list[Message], list[Message]]:
        """The conversation with the chosen answer, and with the rejected one; raises as ``messages`` does."""
        ...


@runtime_checkable
class TextHandler(Protocol):
    """Rows that are plain text, for next-token training."""

    @property
    def keys(self) -> tuple[str, ...]:
        """The names of the data sets that are written, one text each from every row."""
        ...

    def texts(self, row: Row) -> tuple[str, ...]:
        """The texts of a row, in the order of ``keys``."""
        ...


Handler = InstructionHandler | PairHandler | TextHandler


@dataclass(frozen=True)
class PretrainHandler:
    """Rows with one or more columns of plain text."""

    keys: tuple[str, ...]
    columns: Mapping[str, str | None]

    def texts(self, row: Row) -> tuple[str, ...]:
        """The texts of the columns."""
        return tuple(text_of(row, self.columns[key]) for key in self.keys)


@dataclass(frozen=True)
class EachItsOwn:
    """Conversations of several inputs, each read by a handler of its own."""

    handlers: tuple[InstructionHandler, ...]

    def messages(self, row: Row) -> list[Message]:
        """The conversation of a row, by the handler of its input."""
        return self.handlers[row.source].messages(row)


@dataclass(frozen=True)
class EachItsOwnPair:
    """The same for pairs."""

    handlers: tuple[PairHandler, ...]

    def pair(self, row: Row) -> tuple[list[Message], list[Message]]:
        """The pair of a row, by the handler of its input."""
        return self.handlers[row.source].pair(row)


_MAKERS: Mapping[str, Callable[[MapKeys], Handler]] = {
    ALPACA: lambda keys: AlpacaHandler(columns(ALPACA_COLUMNS, keys)),
    SHAREGPT: ShareGptHandler.of,
    OPENAI: lambda keys: OpenAIHandler(columns(OPENAI_COLUMNS, keys)),
    HUNYUAN: ShareGptHandler.of,
    ALPACA_PAIRS: lambda keys: AlpacaPairHandler(columns(ALPACA_COLUMNS, keys)),
    SHAREGPT_PAIRS: lambda keys: ShareGptPairHandler(ShareGptHandler.of(keys)),
    ALPACA_PRETRAIN: lambda keys: AlpacaPretrainHandler(columns(ALPACA_COLUMNS, keys)),
    SHAREGPT_PRETRAIN: lambda keys: ShareGptPretrainHandler(ShareGptHandler.of(keys)),
    "GeneralInstructionHandler": lambda keys: AlpacaHandler(columns(ALPACA_COLUMNS, keys)),
    "BelleMultiTurnInstructionHandler": lambda keys: BelleHandler(columns(BELLE_COLUMNS, keys)),
    "MOSSMultiTurnHandler": lambda keys: MossHandler(columns(MOSS_COLUMNS, keys)),
    "MOSSInstructionHandler": lambda keys: MossHandler(columns(MOSS_COLUMNS, keys)),
    "LeetcodePythonInstructionHandler": lambda keys: LeetcodeHandler(columns(LEETCODE_COLUMNS, keys)),
    "StackOverflowPythonPretrainHandler": lambda keys: StackOverflowHandler(
        columns(STACK_OVERFLOW_COLUMNS, keys)
    ),
}
HANDLER_NAMES = (*_MAKERS, PRETRAIN, LLAMA_FACTORY)
ALPACA_TEXT_BY_DEFAULT = tuple(
    name for name in _MAKERS if name.startswith(("General", "Belle", "MOSS", "Leetcode"))
)
"""Handlers whose rows are written by the template ``alpaca`` where no template is given."""
_REFUSED = {
    "PPOAlpacaStyleInstructionHandler": "prompts for reinforcement learning",
    "R1AlpacaStyleInstructionHandler": "prompts for reinforcement learning",
    "R1SharegptStyleInstructionHandler": "prompts for reinforcement learning",
    "AlpacaStyleProcessRewardHandler": "rows for process reward models",
}


def make_handler(name: str, map_keys: MapKeys = None, json_keys: Sequence[str] = ("text",)) -> Handler:
    """The handler of that name; ``map_keys`` is the JSON text of ``--map-keys``, or what it says."""
    if name in _MAKERS:
        return _MAKERS[name](map_keys)
    if name == PRETRAIN:
        return PretrainHandler(tuple(json_keys), columns({key: key for key in json_keys}, map_keys))
    if name in _REFUSED:
        raise Refused(
            f"--handler-name {name}: {_REFUSED[name]} are not prepared here, since nothing here trains on them"
        )
    raise Refused(
        f"--handler-name {name}: unknown; expected one of {', '.join(HANDLER_NAMES)}"
        f"{did_you_mean(name, HANDLER_NAMES)}"
    )


def guess_handler(row: Row, map_keys: MapKeys = None) -> str:
    """The name of the handler that fits the columns of a row."""
    mapped = parse_map(map_keys)
    liked = "kto_tag" if "kto_tag" in row.values else "label"
    if isinstance(row.values.get(liked), bool):
        raise Refused(
            f"{row.where}: {liked} is true or false, as in rows for KTO training, which is not done here; give "
            "--handler-name to train on every answer, whatever it says"
        )
    if {"chosen", "rejected"} <= set(row.values):
        pairs = SHAREGPT_PAIRS if mapped.get("messages", "conversations") in row.values else ALPACA_PAIRS
        return (
            pairs
            if pairs == SHAREGPT_PAIRS or mapped.get("prompt", "instruction") in row.values
            else _unknown(row)
        )
    if mapped.get("messages", "messages") in row.values and not mapped.get("tags"):
        return SHAREGPT if _says_from(row.values[mapped.get("messages", "messages")]) else OPENAI
    if mapped.get("messages", "conversations") in row.values:
        return SHAREGPT
    if mapped.get("response", "output") in row.values:
        return ALPACA
    if set(row.values) == {"text"}:
        return PRETRAIN
    return _unknown(row)


def _says_from(messages: Any) -> bool:
    """Whether messages are ShareGPT's by their keys."""
    first = messages[0] if isinstance(messages, list) and messages else None
    return isinstance(first, dict) and {"from", "value"} <= set(first)


def _unknown(row: Row) -> str:
    plain = f"; {PRETRAIN} reads the plain text in text" if isinstance(row.values.get("text"), str) else ""
    raise Refused(
        f"{row.where}: cannot tell what the columns {names(row.values)} mean; give --handler-name "
        f"({', '.join(HANDLER_NAMES)}), and --map-keys where columns have other names{plain}"
    )
