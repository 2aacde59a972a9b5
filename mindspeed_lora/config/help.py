"""``--help``: every flag of a command by section, with its default, generated from the fields."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Collection, Iterable

from mindspeed_lora.config.accepted import NO_EFFECT
from mindspeed_lora.config.commands import COMMANDS, grammar, sections
from mindspeed_lora.config.features import NOT_BUILT
from mindspeed_lora.config.flags import Option, options

_WIDTH = 110
_TEXT_COLUMN = 44


def help_text(command: str) -> str:
    """The whole help of a command."""
    described = COMMANDS[command]
    blocks = [f"{_usage(command)}\n\n{described.summary}"]
    for name, section in sections(described.job_type).items():
        summary = (inspect.getdoc(section) or "").splitlines()[0].replace("``", "")
        lines = [f"{name}: {summary}", *(_describe(option) for option in options(section))]
        blocks.append("\n".join(lines))
    known = grammar(command).options.keys()
    blocks.append("-h, --help: print this and leave")
    blocks.append(f"accepted without effect, as published scripts give them:\n{_listed(NO_EFFECT, known)}")
    blocks.append(f"known, and refused with the reason, since not built:\n{_listed(NOT_BUILT, known)}")
    return "\n\n".join(blocks)


def _listed(names: Iterable[str], known: Collection[str]) -> str:
    """The names that the command has not for itself."""
    return textwrap.fill(
        " ".join(sorted(set(names) - set(known))),
        _WIDTH,
        initial_indent="  ",
        subsequent_indent="  ",
        break_on_hyphens=False,
    )


def _usage(command: str) -> str:
    """How the command is called, and the further commands of its script."""
    described = COMMANDS[command]
    words = [
        option.flag.metavar
        for section in sections(described.job_type).values()
        for option in options(section)
        if option.flag.is_word
    ]
    lines = ["usage: " + " ".join([described.script, *words, "[flags]"])]
    for name in described.subcommands:
        called = COMMANDS[name].script
        lines.append(f"       {called} --help".ljust(_TEXT_COLUMN) + COMMANDS[name].summary)
    return "\n".join(lines)


def _describe(option: Option) -> str:
    left = "  " + ", ".join(option.names)
    if option.flag.is_word:
        left = f"  {option.flag.metavar}, or {option.name}"
    if option.arity != "0":
        left += " " + _value_name(option)
    text = option.flag.help
    if option.default is not None and option.default is not False:
        text += f" (default: {_default(option)})"
    lines = textwrap.wrap(text, _WIDTH - _TEXT_COLUMN, break_on_hyphens=False)
    indent = " " * _TEXT_COLUMN
    if len(left) >= _TEXT_COLUMN:
        return "\n".join([left, *(indent + line for line in lines)])
    return "\n".join([left.ljust(_TEXT_COLUMN) + lines[0], *(indent + line for line in lines[1:])])


def _value_name(option: Option) -> str:
    kinds = {int: "N", float: "X", str: "TEXT"}
    name = option.flag.metavar or "|".join(option.flag.choices) or kinds[option.item_type]
    return f"{name} …" if option.arity in ("+", "*") else name


def _default(option: Option) -> str:
    value = option.default
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
