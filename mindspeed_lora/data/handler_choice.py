"""Which handler reads the rows: by the flags, or by the columns of the first rows."""

from __future__ import annotations

import itertools
from collections.abc import Iterable

from mindspeed_lora.config.preprocess import PreprocessConfig
from mindspeed_lora.data.handlers import (
    EachItsOwn,
    EachItsOwnPair,
    Handler,
    PairHandler,
    TextHandler,
    guess_handler,
    make_handler,
)
from mindspeed_lora.data.handlers.fields import parse_map
from mindspeed_lora.data.readers import BadRow, Row
from mindspeed_lora.data.sources import Inputs, Notice, Source
from mindspeed_lora.errors import Refused

_ROWS_LOOKED_AT = 64


def choose_handler(config: PreprocessConfig, inputs: Inputs, notice: Notice) -> tuple[str, Handler]:
    """The handler and its name; inputs of several kinds have one each.

    Raises:
        Refused: an input's kind cannot be told, kinds do not go together, or no row has a mapped column.
    """
    sources = inputs.sources
    if config.handler_name is None:
        names = [guess_handler(_first_row(source), config.map_keys) for source in sources]
        handlers = [make_handler(name, config.map_keys, config.json_keys) for name in names]
        chosen = ", ".join(dict.fromkeys(names))
        notice(f"default taken: --handler-name {chosen}")
    elif all(source.handler is not None for source in sources):
        handlers = [source.handler for source in sources if source.handler is not None]
        chosen = config.handler_name
    else:
        chosen = config.handler_name
        handlers = [make_handler(chosen, config.map_keys, config.json_keys)]
    if config.map_keys is not None and config.handler_name is not None:
        _check_columns(config.map_keys, sources[0])
    return chosen, _together(chosen, handlers)


def _together(name: str, handlers: list[Handler]) -> Handler:
    if all(handler == handlers[0] for handler in handlers):
        return handlers[0]
    if all(isinstance(handler, PairHandler) for handler in handlers):
        return EachItsOwnPair(tuple(handler for handler in handlers if isinstance(handler, PairHandler)))
    conversations = tuple(
        handler for handler in handlers if not isinstance(handler, PairHandler | TextHandler)
    )
    if len(conversations) < len(handlers):
        raise Refused(
            f"{name}: conversations, pairs and plain text do not go into one data set; prepare each by itself"
        )
    return EachItsOwn(conversations)


def _first_row(source: Source) -> Row:
    for row in source.rows():
        if isinstance(row, Row):
            return row
        problem = row.problem
    raise Refused(f"--input {source.name}: no row can be read: {problem}")


def _check_columns(map_keys: str, source: Source) -> None:
    """A column that none of the first rows has is a mistake in ``--map-keys``."""
    rows: Iterable[Row | BadRow] = itertools.islice(source.rows(), _ROWS_LOOKED_AT)
    found = {column for row in rows if isinstance(row, Row) for column in row.values}
    for key, column in parse_map(map_keys).items():
        if isinstance(column, str) and column and found and column not in found:
            raise Refused(
                f"--map-keys: {key} is the column {column}, which the first rows of {source.name} have not; found "
                f"{', '.join(sorted(found))}"
            )
