"""How prompt templates write the tools that an assistant may call, and its calls (``tool_formats.json``).

A format is text with fields in braces: ``before``, ``tool`` for each tool, ``after``, and ``call`` for each call.
Fields of a tool: ``{name}``, ``{description}``, ``{parameters}`` (a list, one a line), ``{wrapped}`` (its JSON
inside of ``{"type": "function", "function": …}``) and ``{indented}`` (its JSON over several lines); of a call:
``{name}``, ``{quoted_name}``, ``{arguments}`` (JSON); ``after`` may hold ``{names}``. The same text is written
here and, as Jinja, for the chat template that goes with the trained model.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from mindspeed_lora.data.conversation import Call, Tool

CALL_JOINT = "\n"
"""Between several calls of one answer, and between its text and its calls."""
_FIELD = re.compile(r"\{(name|names|description|parameters|wrapped|indented|quoted_name|arguments)\}")


@dataclass(frozen=True, kw_only=True)
class ToolFormat:
    """One way to write tools and calls; the module's docstring tells the fields."""

    before: str
    tool: str
    after: str
    call: str

    def describe(self, tools: Sequence[Tool]) -> str:
        """The tools, as text behind the system text."""
        names = ", ".join(str(bare(tool)["name"]) for tool in tools)
        each = (_fill(self.tool, functools.partial(_tool_field, tool)) for tool in tools)
        return self.before + "".join(each) + _fill(self.after, lambda field: names)

    def write_calls(self, calls: Sequence[Call]) -> str:
        """The calls of one answer."""
        return CALL_JOINT.join(write_call(self.call, call) for call in calls)

    def jinja(self, quote: Callable[[str], str]) -> str:
        """Jinja statements that print what :meth:`describe` gives of the variable ``tools``."""
        loop = (
            "{%- set listed = namespace(names=[]) %}{%- for given in tools %}"
            "{%- set tool = given['function'] if given['function'] else given %}"
            "{%- set listed.names = listed.names + [tool['name']] %}"
        )
        return (
            _print(quote(self.before))
            + loop
            + "".join(_jinja_piece(piece, quote) for piece in _pieces(self.tool))
            + "{%- endfor %}"
            + "".join(_jinja_piece(piece, quote) for piece in _pieces(self.after))
        )


def write_call(text: str, call: Call) -> str:
    """One call by the text of its format."""
    values = {
        "name": call.name,
        "quoted_name": json.dumps(call.name, ensure_ascii=False),
        "arguments": call.arguments,
    }
    return _fill(text, values.__getitem__)


def jinja_calls(text: str, quote: Callable[[str], str]) -> str:
    """Jinja statements that print the calls of the variable ``message``."""
    fields = {
        "name": "call['function']['name']",
        "quoted_name": "call['function']['name'] | tojson",
        "arguments": "call['function']['arguments'] if call['function']['arguments'] is string "
        "else call['function']['arguments'] | tojson",
    }
    each = "".join(
        _print(fields[piece[1:-1]] if _FIELD.fullmatch(piece) else quote(piece)) for piece in _pieces(text)
    )
    joint = "{%- if not loop.first %}" + _print(quote(CALL_JOINT)) + "{%- endif %}"
    return "{%- for call in message['tool_calls'] %}" + joint + each + "{%- endfor %}"


@functools.cache
def tool_formats() -> Mapping[str, ToolFormat]:
    """All formats by name."""
    text = resources.files("mindspeed_lora.data").joinpath("tool_formats.json").read_text(encoding="utf-8")
    return {name: ToolFormat(**fields) for name, fields in json.loads(text).items()}


def bare(tool: Tool) -> Mapping[str, Any]:
    """The description of a function, without what it may be wrapped in."""
    return tool["function"] if isinstance(tool.get("function"), dict) else tool


def _fill(text: str, value: Callable[[str], str]) -> str:
    return _FIELD.sub(lambda match: value(match.group(1)), text)


def _pieces(text: str) -> list[str]:
    """Text and fields in turn, without what is empty."""
    cut = re.split(f"({_FIELD.pattern.replace('(', '(?:', 1)})", text)
    return [piece for piece in cut if piece]


def _tool_field(tool: Tool, field: str) -> str:
    function = bare(tool)
    if field == "parameters":
        return "".join(_parameter(function, name) for name in _properties(function))
    values = {
        "name": str(function["name"]),
        "description": str(function.get("description") or ""),
        "wrapped": json.dumps(
            tool if tool is not function else {"type": "function", "function": tool}, ensure_ascii=False
        ),
        "indented": json.dumps(function, indent=4, ensure_ascii=False),
    }
    return values[field]


def _properties(function: Mapping[str, Any]) -> Mapping[str, Any]:
    return (function.get("parameters") or {}).get("properties") or {}


def _parameter(function: Mapping[str, Any], name: str) -> str:
    """``  - name (type, required): description``, and what its values can be."""
    about = _properties(function)[name]
    required = ", required" if name in (function["parameters"].get("required") or ()) else ""
    text = f"  - {name} ({about.get('type') or ''}{required}): {about.get('description') or ''}"
    if about.get("enum"):
        text += f", should be one of [{', '.join(map(str, about['enum']))}]"
    if about.get("items") and isinstance(about["items"], dict):
        text += f", where each item should be {about['items'].get('type') or ''}"
    return text + "\n"


_JINJA_PARAMETERS = (
    "{%- for name, about in ((tool['parameters'] or {})['properties'] or {}).items() %}"
    "{{- '  - ' ~ name ~ ' (' ~ (about['type'] or '') }}"
    "{%- if name in (tool['parameters']['required'] or []) %}{{- ', required' }}{%- endif %}"
    "{{- '): ' ~ (about['description'] or '') }}"
    "{%- if about['enum'] %}{{- ', should be one of [' + about['enum'] | join(', ') + ']' }}{%- endif %}"
    "{%- if about['items'] is mapping and about['items'] %}"
    "{{- ', where each item should be ' ~ (about['items']['type'] or '') }}{%- endif %}"
    "{{- '\\n' }}{%- endfor %}"
)
_JINJA_FIELDS = {
    "name": "tool['name']",
    "names": "listed.names | join(', ')",
    "description": "tool['description'] or ''",
    "wrapped": "given | tojson if given['function'] else {'type': 'function', 'function': given} | tojson",
    "indented": "tool | tojson(indent=4)",
}


def _jinja_piece(piece: str, quote: Callable[[str], str]) -> str:
    if not _FIELD.fullmatch(piece):
        return _print(quote(piece))
    field = piece[1:-1]
    return _JINJA_PARAMETERS if field == "parameters" else _print(_JINJA_FIELDS[field])


def _print(expression: str) -> str:
    return "{{- " + expression + " }}"
