"""How a dataclass field becomes a command-line flag.

A field is declared with :func:`flag`, which carries the flag's names, help, choices and check; its type
tells how many words the flag takes (``bool``: none, ``tuple``: one or more, anything else: one). A ``dict`` of
numbers by name is one word, a JSON object.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from mindspeed_lora.errors import Refused

Arity = typing.Literal["0", "1", "+", "*"]
"""How many words follow a flag: none, one, one or more, any number."""


@dataclass(frozen=True)
class Check:
    """A condition on one value, and the words for it in an error."""

    expected: str
    test: Callable[[Any], bool]


def _is_json_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


POSITIVE = Check("a number above 0", lambda value: value > 0)
NOT_NEGATIVE = Check("a number of at least 0", lambda value: value >= 0)
AT_LEAST_ONE = Check("an integer of at least 1", lambda value: value >= 1)
JSON_OBJECT = Check("a JSON object", _is_json_object)
PROBABILITY = Check("a number from 0 to below 1", lambda value: 0 <= value < 1)


@dataclass(frozen=True)
class Flag:
    """What a field's metadata says about its flag."""

    help: str
    names: tuple[str, ...]
    choices: tuple[str, ...]
    check: Check | None
    nargs: Arity | None
    metavar: str
    is_word: bool = False
    """The flag's name may be left out: words without one fill such fields in their order."""
    not_built: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Values that other systems take → what they ask for, which this version does not have."""
    same_as: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Other systems' words for values → those of the choices."""


def flag(
    help: str,
    default: Any = None,
    *,
    names: tuple[str, ...] = (),
    choices: tuple[str, ...] = (),
    check: Check | None = None,
    nargs: Arity | None = None,
    metavar: str = "",
    is_word: bool = False,
    not_built: Mapping[str, str] | None = None,
    same_as: Mapping[str, str] | None = None,
) -> Any:
    """Declare a dataclass field that is set by a flag, or by a word of its own (``is_word``).

    ``names`` defaults to the field's name with dashes; ``nargs`` to what the field's type says.
    """
    described = Flag(help, names, choices, check, nargs, metavar, is_word, not_built or {}, same_as or {})
    return dataclasses.field(default=default, metadata={"flag": described})


@dataclass(frozen=True)
class Option:
    """A flag with everything resolved: what the parser and ``--help`` work with."""

    dest: str
    names: tuple[str, ...]
    arity: Arity
    item_type: type
    flag: Flag
    default: Any
    is_object: bool = False
    """The word is a JSON object whose values are of ``item_type``."""

    @property
    def takes_object(self) -> bool:
        """Whether the word is JSON of an object, of whatever kind."""
        return self.is_object or self.flag.check is JSON_OBJECT

    @property
    def name(self) -> str:
        """The flag's first name, the one used in messages."""
        return self.names[0]

    @property
    def label(self) -> str:
        """How a message names what is missing: the flag, or the word that stands without it."""
        return self.flag.metavar if self.flag.is_word else self.name


@dataclass(frozen=True, kw_only=True)
class Section:
    """Base of the configuration dataclasses: checks each field's value when an object is made."""

    def __post_init__(self) -> None:
        for option in options(type(self)):
            for item in items(getattr(self, option.dest)):
                check_value(option, item)


def items(value: Any) -> Iterable[Any]:
    """The single values of a field's value, which a check looks at."""
    if isinstance(value, dict):
        return value.values()
    return value if isinstance(value, tuple) else (value,)


def check_value(option: Option, value: object) -> None:
    """Refuse a value that is not among the choices or fails the check; ``None`` (not given) always passes."""
    if value is None:
        return
    if option.flag.choices and value not in option.flag.choices:
        what = option.flag.not_built.get(str(value))
        reason = f"{what} not supported by this version; " if what else ""
        raise Refused(f"{option.name} {value}: {reason}expected one of {', '.join(option.flag.choices)}")
    if option.flag.check is not None and not option.flag.check.test(value):
        raise Refused(f"{option.name} {value}: expected {option.flag.check.expected}")


def options(section: type[Section]) -> tuple[Option, ...]:
    """The flags of a section, in the order of its fields."""
    # Any, since mypy does not take a dataclass for something that has a hash.
    key: Any = section
    return _options(key)


@functools.cache
def _options(section: Any) -> tuple[Option, ...]:
    """Kept, since every object of a section asks for them when it is made."""
    hints = typing.get_type_hints(section)
    return tuple(_option(field, hints[field.name]) for field in dataclasses.fields(section))


def _option(field: dataclasses.Field[Any], hint: Any) -> Option:
    described: Flag = field.metadata["flag"]
    item_type, arity = _words(hint)
    is_object = dict in (typing.get_origin(part) for part in (hint, *typing.get_args(hint)))
    names = described.names or ("--" + field.name.replace("_", "-"),)
    return Option(field.name, names, described.nargs or arity, item_type, described, field.default, is_object)


def _words(hint: Any) -> tuple[type, Arity]:
    """The type of one word and the number of words for a field annotated with ``hint``."""
    if isinstance(hint, types.UnionType):
        (hint,) = (part for part in typing.get_args(hint) if part is not type(None))
    if typing.get_origin(hint) is tuple:
        return typing.get_args(hint)[0], "+"
    if typing.get_origin(hint) is dict:
        return typing.get_args(hint)[1], "1"
    return hint, "0" if hint is bool else "1"
