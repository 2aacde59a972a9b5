"""PEFT's rules of names (0.21): which modules a name, a suffix or a regular expression of a configuration means."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

Names = tuple[str, ...] | str
"""Module names and suffixes of them, or one regular expression over full names."""

ALL_LINEAR = "all-linear"


def is_all_linear(wanted: Names) -> bool:
    """Whether PEFT's word for every linear but the output layer is meant."""
    return isinstance(wanted, str) and wanted.lower() == ALL_LINEAR


def matches(wanted: Names, module: str) -> bool:
    """Whether a full module name is meant: by the whole expression, or by a name that it is or ends with."""
    if isinstance(wanted, str):
        return re.fullmatch(wanted, module) is not None
    return any(is_suffix(name, module) for name in wanted)


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


def faulty_expression(expressions: Iterable[str]) -> str | None:
    """What is wrong with the first of these that is no regular expression; None where all are."""
    for expression in expressions:
        try:
            re.compile(expression)
        except re.error as error:
            return f"{expression!r} is no regular expression ({error})"
    return None
