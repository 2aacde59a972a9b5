"""PEFT's rules of names (0.21): which modules a name, a suffix or a regular expression of a configuration means."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence

Names = tuple[str, ...] | str
"""Module names and suffixes of them, or one regular expression over full names."""

ALL_LINEAR = "all-linear"


def is_all_linear(wanted: Names) -> bool:
    """Whether PEFT's word for every linear but the output layer is meant."""
    return isinstance(wanted, str) and wanted.lower() == ALL_LINEAR


def matches(wanted: Names, module: str) -> bool:
    """Whether a full module name is meant: by the whole expression, or by a name that it is or ends with."""
    return matcher(wanted)(module)


def matcher(wanted: Names) -> Callable[[str], bool]:
    """The same as a test of many modules, each at a cost that does not grow with the number of names."""
    if isinstance(wanted, str):
        expression = re.compile(wanted)
        return lambda module: expression.fullmatch(module) is not None
    names = frozenset(wanted)
    components = sorted({name.count(".") + 1 for name in names})
    return lambda module: any(_end(module, count) in names for count in components)


def _end(module: str, components: int) -> str:
    return ".".join(module.rsplit(".", components)[-components:])


def ends(module: str) -> Iterator[str]:
    """The names by which a module can be meant, the shortest first: its last component, its last two …"""
    at = len(module)
    while at > 0:
        at = module.rfind(".", 0, at)
        yield module[at + 1 :]


def is_suffix(name: str, module: str) -> bool:
    """Whether a full module name is ``name`` or ends with its components."""
    return module == name or module.endswith(f".{name}")


def is_saved(names: Iterable[str], module: str) -> bool:
    """Whether ``modules_to_save`` means a full module name, or a module that holds it.

    PEFT asks for the end of the name, whole components or not: ``norm`` also means ``input_layernorm``.
    """
    return any(holder.endswith(name) for name in names for holder in holders(module))


def holders(module: str) -> list[str]:
    """A full module name, and those of the modules that hold it, the outermost first."""
    components = module.split(".")
    return [".".join(components[:count]) for count in range(1, len(components) + 1)]


def is_kept_from_adapters(names: Iterable[str], module: str) -> bool:
    """Whether a module gets no factors because ``modules_to_save`` means it or what holds it."""
    return any(re.match(rf"(^|.*\.){name}($|\..*)", module) for name in names)


def layer_index(module: str, patterns: Sequence[str]) -> int | None:
    """The layer of a full module name: the first number in it, or the one after a list of a pattern's name."""
    expressions = [rf"(?:^|.*?\.){name}\.(?P<index>\d+)\." for name in patterns]
    expressions = expressions or [r".*?\.[^.]*\.(?P<index>\d+)\."]
    for expression in expressions:
        match = re.match(expression, module)
        if match:
            return int(match["index"])
    return None


def pattern_key(patterns: Iterable[str], module: str) -> str | None:
    """The first key of a rank or alpha pattern that means a module: an expression over the end of its name."""
    return next((key for key in patterns if re.match(rf"(.*\.)?({key})$", module)), None)


class Patterns:
    """The keys of one rank or alpha pattern, asked for many modules: what :func:`pattern_key` finds, faster.

    A pattern can name thousands of modules in full. Of a key of letters, digits and dots (a dot means any character)
    only those of the same length with the same places of the dots need be compared, which is one look-up.
    """

    def __init__(self, keys: Iterable[str]) -> None:
        self._keys = list(keys)
        self._plain: dict[tuple[int, ...], dict[str, int]] = {}
        """By length and places of the dots: the key without them → its number."""
        self._expressions: list[tuple[int, str]] = []
        for number, key in enumerate(self._keys):
            if re.fullmatch(r"[A-Za-z0-9_.]+", key):
                form = (len(key), *(at for at, letter in enumerate(key) if letter == "."))
                self._plain.setdefault(form, {}).setdefault(_without(key, form[1:]), number)
            else:
                self._expressions.append((number, key))

    def key(self, module: str) -> str | None:
        """The first key that means a module."""
        if not self._keys:
            return None
        found = [number for number, key in self._expressions if pattern_key([key], module) is not None][:1]
        for form, numbers in self._plain.items():
            start = len(module) - form[0]
            if start == 0 or (start > 0 and module[start - 1] == "."):
                number = numbers.get(_without(module[start:], form[1:]))
                found += [] if number is None else [number]
        return self._keys[min(found)] if found else None


def _without(text: str, places: Sequence[int]) -> str:
    """A text with a dot at these places."""
    letters = list(text)
    for place in places:
        letters[place] = "."
    return "".join(letters)


def faulty_expression(expressions: Iterable[str]) -> str | None:
    """What is wrong with the first of these that is no regular expression; None where all are."""
    for expression in expressions:
        try:
            re.compile(expression)
        except re.error as error:
            return f"{expression!r} is no regular expression ({error})"
    return None
