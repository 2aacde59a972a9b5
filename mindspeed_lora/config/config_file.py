"""``--config FILE.yaml``, ``--print-config`` and ``config.yaml``: the same keys, so that a run can be repeated."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from mindspeed_lora.atomic import atomic_text
from mindspeed_lora.config.flags import Section, options
from mindspeed_lora.config.jobs import Job
from mindspeed_lora.config.lora import LoraFlags
from mindspeed_lora.config.parser import Grammar, parse_words, unknown_flags
from mindspeed_lora.errors import Refused

CONFIG_FILE = "config.yaml"
"""Written by every run beside what it writes."""


def config_file_words(argv: Sequence[str], grammar: Grammar) -> list[str]:
    """The words that the ``--config`` file stands for; they go before the command line, which so wins."""
    paths = [argv[i + 1] for i, word in enumerate(argv[:-1]) if word == "--config"]
    paths += [word.partition("=")[2] for word in argv if word.startswith("--config=")]
    words: list[str] = []
    for path in paths:
        for key, value in _read(path).items():
            of_key = flag_words(key, value, grammar, f"--config {path}: ")
            try:
                parse_words(of_key, grammar)
            except Refused as error:
                raise Refused(f"--config {path}: {error}") from error
            words += of_key
    return words


class _UniqueKeys(yaml.SafeLoader):
    """YAML where a key that is there twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """As the base class, which would take the last of two values."""
        keys = [
            self.construct_object(key, deep=True)
            for key, _ in node.value
            if key.tag != "tag:yaml.org,2002:merge"
        ]
        twice = [key for key in keys if keys.count(key) > 1]
        if twice:
            raise Refused(f"--config {node.start_mark.name}: {twice[0]} is there twice; give it once")
        return super().construct_mapping(node, deep)


def _read(path: str) -> dict[Any, Any]:
    try:
        # As bytes: YAML may be UTF-16 too, and says where it is neither.
        with open(path, "rb") as file:
            content = yaml.load(file, _UniqueKeys)
    except OSError as error:
        raise Refused(f"--config {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise Refused(f"--config {path} is not YAML: {' '.join(str(error).split())}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise Refused(
            f"--config {path}: expected flags as keys (lora-r: 16), found a {type(content).__name__}"
        )
    return content


def flag_words(key: Any, value: Any, grammar: Grammar, where: str = "") -> list[str]:
    """The words of a flag that is told as a key and a value: true is a switch, null and false leave it out.

    Raises:
        Refused: there is no such flag, or its value cannot be one; the sentence begins with ``where``.
    """
    name = "--" + str(key).removeprefix("--")
    if name not in grammar.names():
        name = name.replace("_", "-")
    if name not in grammar.names():
        raise Refused(f"{where}{unknown_flags([name], grammar)}")
    if name == "--config" and where:
        raise Refused(f"{where}a configuration file cannot name another one")
    option = grammar.options.get(name)
    if isinstance(value, bool) and option is not None and {"true", "false"} <= set(option.flag.choices):
        return [f"{name}={str(value).lower()}"]
    if value is None or value is False or value in ([], ()):
        return []
    if value is True:
        return [name]
    if isinstance(value, dict) and option is not None and option.takes_object:
        return [f"{name}={json.dumps(value)}"]
    if isinstance(value, dict):
        raise Refused(f"{where}{key} has keys of its own, which this flag does not take")
    if isinstance(value, (list, tuple)) and len(value) > 1:
        arity = grammar.options[name].arity if name in grammar.options else "*"
        if arity in ("0", "1"):
            raise Refused(f"{where}{name} takes {'one' if arity == '1' else 'no'} value, not {len(value)}")
    items = list(value) if isinstance(value, (list, tuple)) else [value]
    for item in items:
        if item is None or isinstance(item, (bool, list, tuple, dict)):
            raise Refused(f"{where}{name} holds {_shown(item)}; expected texts or numbers")
    return [name, *map(str, items)] if len(items) != 1 else [f"{name}={items[0]}"]


def _shown(item: Any) -> str:
    """What an item of a list is, as YAML calls it."""
    if isinstance(item, dict):
        return "keys of its own"
    return "a list" if isinstance(item, (list, tuple)) else json.dumps(item)


def write_config(file: Path, job: Job, script: str, world_size: int = 1) -> None:
    """Write the configuration of a run, whole or not at all, with how it is repeated."""
    launched = f", {world_size} processes" if world_size > 1 else ""
    head = f"# {script}{launched}; again: {script} --config {file.name}, with another folder to write to\n\n"
    atomic_text(file, head + to_yaml(job))


def to_yaml(job: Job) -> str:
    """The job as YAML with flags as keys, by section; what is left out and has no default is ``null``.

    The folder of a hub's snapshot is told by its id, which means the same on another machine.
    """
    lines = []
    for field in dataclasses.fields(job):
        section = getattr(job, field.name)
        if not isinstance(section, Section):
            continue
        if isinstance(section, LoraFlags) and not section.enabled:
            # Its keys would switch LoRA on when the file is read again.
            lines.append("# lora: off\n")
            continue
        values = {
            option.name.removeprefix("--"): _plain(getattr(section, option.dest), job.hub_ids)
            for option in options(type(section))
            if option.dest not in ("config", "print_config")
        }
        lines.append(f"# {field.name}\n{yaml.safe_dump(values, sort_keys=False, allow_unicode=True)}")
    return "\n".join(lines)


def _plain(value: Any, hub_ids: Mapping[str, str]) -> Any:
    if isinstance(value, tuple):
        return [_plain(item, hub_ids) for item in value]
    return hub_ids.get(value, value) if isinstance(value, str) else value
