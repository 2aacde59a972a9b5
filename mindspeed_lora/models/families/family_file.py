"""``--family-file FILE``: a model family described in JSON or YAML, which is data alone.

=================  =====================================================================================
key                meaning
=================  =====================================================================================
``name``           of the family (required)
``model_type``     of config.json; left out: ``name``
``architectures``  classes of config.json whose weights the table describes (required)
``base``           the family that config.json is read as and whose rows hold where ``table`` has none; ``llama``
``aliases``        further values of ``--model-type-hf``
``config_keys``    the base's key of config.json → this family's
``shape``          switches of the shape, true or false (``add_qkv_bias``, ``post_norm`` …)
``features``       what it computes beyond its base, by the names of ``config/model_features.py``
``table``          rows: ``canonical``, ``hf`` (a name or a list) and ``kind``
``ignored``        regular expressions of tensors that hold nothing learned
=================  =====================================================================================

A row of a linear's weight also stands for its bias, unless that has a row of its own.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from mindspeed_lora.config.model_features import FEATURES
from mindspeed_lora.errors import Refused
from mindspeed_lora.models.families import FAMILIES, Family
from mindspeed_lora.models.families import mapping as rows
from mindspeed_lora.models.families.mapping import QKV, Direct, GateUp

KINDS: dict[str, tuple[type[rows.Mapping], int]] = {
    "direct": (Direct, 1),
    "gate_up": (GateUp, 2),
    "packed_gate_up": (GateUp, 1),
    "qkv": (QKV, 3),
    "packed_qkv": (QKV, 1),
    "grouped_qkv": (Direct, 1),
}
"""Kind of a row → its mapping and the number of its Hugging Face tensors."""
SWITCHES = ("add_qkv_bias", "add_proj_bias", "add_mlp_bias", "qk_layernorm", "post_norm")
_TYPES: dict[str, type] = {
    "name": str,
    "model_type": str,
    "architectures": list,
    "base": str,
    "aliases": list,
    "config_keys": dict,
    "shape": dict,
    "features": dict,
    "table": list,
    "ignored": list,
}
_WORDS = {str: "text", list: "a list", dict: "an object", bool: "true or false"}


@contextmanager
def custom_family(path: str | Path | None) -> Iterator[None]:
    """The family of a file is one of ``FAMILIES`` within this block; None adds nothing."""
    if path is None:
        yield
        return
    family = read_family(Path(path))
    FAMILIES[family.name] = family
    try:
        yield
    finally:
        del FAMILIES[family.name]


def read_family(path: Path) -> Family:
    """The family that a file describes.

    Raises:
        Refused: the file is no such description; says which key, what was found and what was expected.
    """
    file = _File(path)
    base = FAMILIES[file.one_of("base", file.values.get("base", "llama"), FAMILIES)]
    name = file.text("name")
    model_type = str(file.values.get("model_type", name))
    for taken in FAMILIES.values():
        if name == taken.name or model_type == taken.model_type:
            raise file.wrong("name", f"{name} (model_type {model_type})", "a family that is not there yet")
    table = {row.canonical: row for row in base.table}
    table.update(_rows(file))
    return Family(
        name=name,
        model_type=model_type,
        architectures=file.names("architectures", required=True),
        aliases=(name, *file.names("aliases")),
        fields=_reader(file, base),
        table=tuple(table.values()),
        config_keys={**base.config_keys, **file.table_of("config_keys", str)},
        ignored=(*base.ignored, *_expressions(file)),
    )


class _File:
    """The content of a family file, with errors that name it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.values = _parse(path)
        for key, value in self.values.items():
            if key not in _TYPES:
                raise self.wrong(str(key), "an unknown key", ", ".join(_TYPES))
            if not isinstance(value, _TYPES[key]):
                raise self.wrong(key, repr(value), _WORDS[_TYPES[key]])

    def wrong(self, key: str, found: str, expected: str) -> Refused:
        """The error of one key."""
        return Refused(f"--family-file {self.path}: {key}: found {found}; expected {expected}.")

    def text(self, key: str) -> str:
        """A text that must be there."""
        value = self.values.get(key)
        if not value:
            raise self.wrong(key, "nothing", "text")
        return str(value)

    def one_of(self, key: str, value: Any, known: Mapping[str, Any]) -> str:
        """A value that must be one of the known ones."""
        if not isinstance(value, str) or value not in known:
            raise self.wrong(key, repr(value), f"one of {', '.join(known)}")
        return value

    def names(self, key: str, required: bool = False) -> tuple[str, ...]:
        """A list of texts."""
        values = self.values.get(key, [])
        if not all(isinstance(value, str) for value in values) or (required and not values):
            raise self.wrong(key, repr(values), "a list of names")
        return tuple(values)

    def table_of(self, key: str, kind: type) -> dict[str, Any]:
        """An object whose values are of one type."""
        values: dict[str, Any] = self.values.get(key, {})
        for name, value in values.items():
            if not isinstance(name, str) or not isinstance(value, kind):
                raise self.wrong(f"{key}.{name}", repr(value), _WORDS[kind])
        return values


def _parse(path: Path) -> dict[Any, Any]:
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except OSError as error:
        raise Refused(f"--family-file {path}: cannot be read ({error.strerror}).") from error
    except (ValueError, yaml.YAMLError) as error:
        kind = "JSON" if path.suffix == ".json" else "YAML"
        where = " ".join(str(error).split())
        raise Refused(f"--family-file {path}: not valid {kind} ({where}).") from error
    if not isinstance(content, dict):
        raise Refused(f"--family-file {path}: found {type(content).__name__}; expected an object.")
    return content


def _reader(file: _File, base: Family) -> Any:
    """Reads config.json as the base does, with the file's switches and features."""
    switches, own = file.table_of("shape", bool), file.values.get("features", {})
    for name in switches:
        file.one_of(f"shape.{name}", name, dict.fromkeys(SWITCHES))
    for name in own:
        file.one_of(f"features.{name}", name, dict.fromkeys(FEATURES))

    def fields(config: Mapping[str, Any]) -> dict[str, Any]:
        found = base.fields(config)
        features = {**dict(found["features"]), **own}
        ordered = tuple((name, features[name]) for name in FEATURES if name in features)
        return {**found, **switches, "features": ordered}

    return fields


def _rows(file: _File) -> dict[str, rows.Mapping]:
    """The file's rows by canonical name, those of biases after their weights'."""
    known = {row.canonical for family in FAMILIES.values() for row in family.table}
    found: dict[str, rows.Mapping] = {}
    for number, row in enumerate(file.values.get("table", [])):
        mapping = _row(file, f"table[{number}]", row, known)
        if mapping.canonical in found:
            raise file.wrong(f"table[{number}].canonical", f"{mapping.canonical} again", "one row each")
        found[mapping.canonical] = mapping
    biases = {}
    for row in found.values():
        canonical = _bias(row.canonical)
        if ".linear_" in row.canonical and canonical in known and canonical not in found:
            biases[canonical] = type(row)(canonical, tuple(_bias(name) for name in row.hf))
    return {**found, **biases}


def _bias(name: str) -> str:
    return f"{name.removesuffix('.weight')}.bias"


def _row(file: _File, key: str, row: Any, known: set[str]) -> rows.Mapping:
    if not isinstance(row, dict) or not {"canonical", "hf"} <= row.keys() <= {"canonical", "hf", "kind"}:
        raise file.wrong(key, repr(row), "an object with canonical, hf and kind")
    canonical, kind = row["canonical"], row.get("kind", "direct")
    if canonical not in known:
        raise file.wrong(f"{key}.canonical", repr(canonical), f"one of {', '.join(sorted(known))}")
    file.one_of(f"{key}.kind", kind, KINDS)
    mapping, count = KINDS[kind]
    names = [row["hf"]] if isinstance(row["hf"], str) else row["hf"]
    if not isinstance(names, list) or len(names) != count or not all(isinstance(n, str) for n in names):
        raise file.wrong(f"{key}.hf", repr(row["hf"]), f"{count} tensor name(s) for kind {kind}")
    for name in names:
        if set(re.findall(r"{.*?}", name)) != set(re.findall(r"{.*?}", canonical)):
            raise file.wrong(
                f"{key}.hf", name, f"the placeholders of {canonical}, {{layer}} where it has one"
            )
    return mapping(canonical, tuple(names))


def _expressions(file: _File) -> tuple[str, ...]:
    for expression in file.names("ignored"):
        try:
            re.compile(expression)
        except re.error as error:
            raise file.wrong("ignored", repr(expression), f"a regular expression ({error})") from error
    return file.names("ignored")
