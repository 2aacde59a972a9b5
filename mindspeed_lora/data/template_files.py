"""Where prompt templates come from: ``templates.json``, and files of the user (``--prompt-type-path``).

``templates.json`` is an object of templates by name, with the fields of :class:`PromptTemplate`. A user's file is
either of that kind, or a list in the layout of MindSpeed-LLM and LLaMA-Factory: objects with ``name``,
``format_user``, ``format_assistant``, ``format_system``, ``format_function``, ``format_observation``,
``format_tools``, ``format_separator``, ``format_prefix`` (each with ``slots``), ``default_system``,
``stop_words``, ``efficient_eos``, ``replace_eos``, ``force_system`` and ``template_class``.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

from mindspeed_lora.config.nearest import did_you_mean
from mindspeed_lora.config.tokenizer import TokenizerConfig
from mindspeed_lora.data.prompt_template import BOS, CONTENT, END, NUMBER, TOKEN, PromptTemplate
from mindspeed_lora.data.tools import tool_formats
from mindspeed_lora.errors import Refused

PUBLISHED_PATH = "configs/finetune/templates.json"
"""Where MindSpeed-LLM keeps the templates; scripts that name it mean the built-in ones where there is no such file."""
_CLASSES = ("Template", "LFDefaultTemplate", "Llama2Template", "ReasoningTemplate")
_THOUGHT_WORDS = ("<think>", "</think>")
_SLOT_KEYS = ("user", "assistant", "system", "function", "observation", "separator", "prefix")
_KEYS = (
    "name",
    *(f"format_{key}" for key in (*_SLOT_KEYS, "tools")),
    *("default_system", "stop_words", "efficient_eos", "replace_eos", "force_system", "template_class"),
    *("thought_words", "enable_thinking"),
)


@functools.cache
def prompt_templates() -> dict[str, PromptTemplate]:
    """The built-in templates by name."""
    text = resources.files("mindspeed_lora.data").joinpath("templates.json").read_text(encoding="utf-8")
    return {name: _own(name, fields) for name, fields in json.loads(text).items()}


def prompt_template(prompt_type: str, path: str | None = None) -> PromptTemplate:
    """The template of that name, of the file ``path`` or built-in.

    Raises:
        Refused: there is none, or the file is malformed.
    """
    in_file = path is not None and not (path.endswith(PUBLISHED_PATH) and not Path(path).exists())
    templates = read_templates(str(path)) if in_file else prompt_templates()
    if prompt_type not in templates:
        where = f" in --prompt-type-path {path}" if in_file else ""
        raise Refused(
            f"--prompt-type {prompt_type}: unknown{where}; expected one of {', '.join(sorted(templates))}"
            f"{did_you_mean(prompt_type, templates)}"
        )
    return templates[prompt_type]


def chosen_template(config: TokenizerConfig) -> PromptTemplate:
    """The template that the flags choose, thinking as they say.

    Raises:
        Refused: there is none, or ``--enable-thinking`` is given for one without thoughts.
    """
    assert config.prompt_type is not None
    template = prompt_template(config.prompt_type, config.prompt_type_path)
    if config.thinking is not None and template.thought_words is None:
        raise Refused(
            f"--enable-thinking {config.enable_thinking}: the template {template.name} knows no thoughts; leave it out"
        )
    return dataclasses.replace(template, thinking=config.thinking)


def read_templates(path: str) -> dict[str, PromptTemplate]:
    """The templates of a user's file by name.

    Raises:
        Refused: the file cannot be read or is malformed; the message names template and field.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise Refused(f"--prompt-type-path {path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise Refused(f"--prompt-type-path {path}: not valid JSON ({error})") from error
    where = f"--prompt-type-path {path}"
    if isinstance(content, dict):
        return {name: _checked_own(where, name, fields) for name, fields in content.items()}
    if not isinstance(content, list):
        raise Refused(f"{where}: expected a list of templates, or an object of templates by name")
    found = {}
    for number, fields in enumerate(content, 1):
        if not isinstance(fields, dict) or not isinstance(fields.get("name"), str):
            raise Refused(f"{where}, template {number}: expected an object with a name")
        found[fields["name"]] = _published(f"{where}, template {fields['name']}", fields)
    return found


def _own(name: str, fields: Mapping[str, Any]) -> PromptTemplate:
    values: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()
    }
    return PromptTemplate(name=name, **values)


def _checked_own(where: str, name: str, fields: Any) -> PromptTemplate:
    known = {field.name: field for field in dataclasses.fields(PromptTemplate) if field.name != "name"}
    where = f"{where}, template {name}"
    if not isinstance(fields, dict):
        raise Refused(f"{where}: expected an object")
    for key, value in fields.items():
        if key not in known:
            raise Refused(f"{where}: unknown field {key}; expected some of {', '.join(known)}")
        kind = str(known[key].type)
        fits = (
            _is_texts(value)
            if kind.startswith("tuple")
            else isinstance(value, bool if "bool" in kind else str)
        )
        if not fits:
            raise Refused(f"{where}: {key} is {json.dumps(value)[:60]}; expected {kind}")
    for key in ("system", "user", "assistant"):
        if not fields.get(key) or not any(CONTENT in slot for slot in fields[key]):
            raise Refused(f"{where}: {key} needs a slot with {CONTENT}")
    _check_tool_format(where, fields.get("tool_format", "default"))
    return _own(name, fields)


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def _check_tool_format(where: str, name: Any) -> None:
    if name not in tool_formats():
        raise Refused(f"{where}: tool format {name} is unknown; expected one of {', '.join(tool_formats())}")


def _published(where: str, fields: Mapping[str, Any]) -> PromptTemplate:
    """A template in the layout of MindSpeed-LLM, with the defaults that it has there."""
    for key in fields:
        if key not in _KEYS:
            raise Refused(f"{where}: unknown field {key}; expected some of {', '.join(_KEYS)}")
    slots = {key: _slots(where, f"format_{key}", fields.get(f"format_{key}")) for key in _SLOT_KEYS}
    for key in ("user", "assistant", "system", "observation"):
        if slots[key] and not any(CONTENT in slot for slot in slots[key]):
            raise Refused(f"{where}: format_{key} needs a slot with {{{{content}}}}")
    efficient = _switch(where, fields, "efficient_eos")
    end = () if efficient else (END,)
    template_class = fields.get("template_class") or "Template"
    if template_class not in _CLASSES:
        raise Refused(
            f"{where}: template_class {template_class} is unknown; expected one of {', '.join(_CLASSES)}"
        )
    stop_words = _texts(where, fields, "stop_words")
    replaces = _switch(where, fields, "replace_eos")
    if replaces and not stop_words:
        raise Refused(f"{where}: replace_eos needs stop_words, of which the first becomes the end token")
    call, function = _call(where, slots["function"])
    thoughts: dict[str, Any] = {}
    if template_class == "ReasoningTemplate":
        words = _texts(where, fields, "thought_words") or _THOUGHT_WORDS
        if len(words) != 2:
            raise Refused(f"{where}: thought_words needs two texts, the beginning and the end of thoughts")
        empty = "".join(words) if "thought_words" in fields else "\n\n".join((*words, ""))
        thoughts = {"thought_words": words, "empty_thought": empty}
    default_system = fields.get("default_system") or ""
    if _is_texts(default_system):
        default_system = "".join(default_system)
    if not isinstance(default_system, str):
        raise Refused(f"{where}: default_system is {json.dumps(default_system)[:60]}; expected text")
    return PromptTemplate(
        name=fields["name"],
        prefix=slots["prefix"],
        system=slots["system"] or (CONTENT,),
        user=slots["user"] or (CONTENT,),
        assistant=slots["assistant"] or (CONTENT, *end),
        # LLaMA-Factory has no separators any more; templates that follow it still carry them.
        separator=() if template_class == "LFDefaultTemplate" else slots["separator"],
        function=function or (CONTENT, *end),
        observation=slots["observation"],
        tool_format=_tool_format(where, fields),
        call=call,
        default_system=default_system,
        system_in_first_user=template_class == "Llama2Template",
        force_system=_switch(where, fields, "force_system"),
        end_token=stop_words[0] if replaces else None,
        stop_words=stop_words[1:] if replaces else stop_words,
        efficient_eos=efficient,
        **thoughts,
    )


def _slots(where: str, key: str, formatter: Any) -> tuple[str, ...]:
    """Slots as text: ``["bos_token"]``, ``["eos_token"]`` and ``{"token": …}`` are special tokens."""
    if formatter is None:
        return ()
    given = formatter.get("slots") if isinstance(formatter, dict) else None
    if given is None and isinstance(formatter, dict) and "tool_format" in formatter:
        return ()
    if not isinstance(given, list):
        raise Refused(
            f"{where}: {key} is {json.dumps(formatter)[:60]}; expected an object with a list of slots"
        )
    named = {"bos_token": BOS, "eos_token": END}
    slots = []
    for slot in given:
        if isinstance(slot, str):
            slots.append(slot.replace("{{content}}", CONTENT, 1).replace("{{idx}}", NUMBER))
        elif isinstance(slot, list) and len(slot) == 1 and slot[0] in named:
            slots.append(named[slot[0]])
        elif isinstance(slot, dict) and isinstance(slot.get("token"), str):
            slots.append(TOKEN + slot["token"] + "}")
        else:
            raise Refused(
                f"{where}: {key} has the slot {json.dumps(slot)[:60]}; expected text, "
                '["bos_token"], ["eos_token"] or {"token": …}'
            )
    return tuple(slots)


def _call(where: str, slots: tuple[str, ...]) -> tuple[str | None, tuple[str, ...]]:
    """The text of one call, where ``format_function`` gives it by name and arguments, and the slots around it."""
    named = [number for number, slot in enumerate(slots) if "{{name}}" in slot or "{{arguments}}" in slot]
    if not named:
        return None, slots
    if len(named) > 1 or not all(field in slots[named[0]] for field in ("{{name}}", "{{arguments}}")):
        raise Refused(
            f"{where}: format_function needs {{{{name}}}} and {{{{arguments}}}} in one slot, or {{{{content}}}}"
        )
    call = slots[named[0]].replace("{{name}}", "{name}").replace("{{arguments}}", "{arguments}")
    return call, tuple(CONTENT if number == named[0] else slot for number, slot in enumerate(slots))


def _tool_format(where: str, fields: Mapping[str, Any]) -> str:
    name = (fields.get("format_tools") or {}).get("tool_format") or "default"
    _check_tool_format(where, name)
    return str(name)


def _switch(where: str, fields: Mapping[str, Any], key: str) -> bool:
    value = fields.get(key, False)
    if not isinstance(value, bool):
        raise Refused(f"{where}: {key} is {json.dumps(value)[:60]}; expected true or false")
    return value


def _texts(where: str, fields: Mapping[str, Any], key: str) -> tuple[str, ...]:
    value = fields.get(key) or []
    if not _is_texts(value):
        raise Refused(f"{where}: {key} is {json.dumps(value)[:60]}; expected a list of texts")
    return tuple(value)
