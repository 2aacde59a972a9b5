"""Writes the example scripts of every family, ``examples/mcore/<family>/``, from one table.

The table is ``example_families.toml`` beside this file: what each family and each of its scripts says otherwise than
the flag tables in ``examples/mcore/tables/``. A script is those values, and one call.

    tools/make_examples.py            writes the scripts, and removes those that the table does not name
    tools/make_examples.py --check    writes nothing; status 1 and the names where committed files differ
"""

from __future__ import annotations

import argparse
import shlex
import sys
import textwrap
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TABLE = Path(__file__).with_name("example_families.toml")
EXAMPLES = Path(__file__).parents[1] / "examples" / "mcore"
WIDTH = 116


@dataclass(frozen=True)
class Kind:
    """What all scripts of one kind have in common."""

    table: str
    """File of ``tables/`` that is sourced."""
    function: str
    says: str
    """First sentence; ``{title}``, ``{what}`` and ``{layout}`` stand for the script's own."""
    usage: tuple[str, ...]
    """Lines of variables in the example of use; names in braces are the family's paths."""
    family_file: str | None = "model"


_BASE = "CKPT_LOAD_DIR={mg}"
_RUN = ("CKPT_LOAD_DIR={mg} LORA_LOAD={lora}", "TOKENIZER_PATH={hf}")
KINDS = {
    "data_convert": Kind(
        "data",
        "prepare",
        "Turns instruction rows into the indexed data set that {title} is trained on.",
        ("INPUT=./dataset/alpaca.parquet TOKENIZER_PATH={hf}", "OUTPUT_PREFIX=./finetune_dataset/alpaca"),
        None,
    ),
    "hf2mcore": Kind(
        "convert",
        "convert_hf2mcore",
        "Turns a Hugging Face folder of {title} into a Megatron checkpoint of {shards} shards{bits}.",
        ("HF_MODEL_PATH={hf} {cut}", "CKPT_SAVE_DIR={mg}"),
        "convert",
    ),
    "mcore2hf": Kind(
        "convert",
        "convert_mcore2hf",
        "Turns a Megatron checkpoint of {title}, of any layout, into a Hugging Face folder, <CKPT_SAVE_DIR>/mg2hf.",
        (f"{_BASE} CKPT_SAVE_DIR={{hf}}",),
        "convert",
    ),
    "mcore2hf_lora": Kind(
        "convert",
        "convert_mcore2hf_lora",
        "Merges a LoRA adapter into {title}: a complete Hugging Face folder in <CKPT_SAVE_DIR>/mg2hf/. Configuration "
        "and tokenizer come from HF_CFG_DIR, else from CKPT_SAVE_DIR where it is the model's original folder (nothing "
        "in it is touched), else from the Megatron checkpoint.",
        (f"{_BASE} LORA_LOAD={{lora}}", "CKPT_SAVE_DIR={hf}"),
        "convert",
    ),
    "mg2mg_lora": Kind(
        "convert",
        "convert_mg2mg_lora",
        "Merges a LoRA adapter into {title}: a Megatron checkpoint of any {shards}.",
        (f"{_BASE} LORA_LOAD={{lora}}", "CKPT_SAVE_DIR={merged}"),
        "convert",
    ),
    "lora2hf": Kind(
        "convert",
        "convert_lora2hf",
        "Writes the LoRA adapter of a run of {title} as a PEFT folder, <CKPT_SAVE_DIR>/mg2hf. (The run's own "
        "<save>/adapter is the same.)",
        ("CKPT_LOAD_DIR={lora} CKPT_SAVE_DIR={hf}",),
        "convert",
    ),
    "tune": Kind(
        "tune",
        "tune",
        "Fine-tunes {title} with {method} on attention and {mlp}, {layout}.",
        (
            "CKPT_LOAD_DIR={mg} DATA_PATH=./finetune_dataset/alpaca",
            "TOKENIZER_PATH={hf} CKPT_SAVE_DIR={lora}",
        ),
    ),
    "generate": Kind(
        "generate",
        "generate",
        "Generates text with {title}; LORA_LOAD adds an adapter, TASK is greedy, do_sample or chat.",
        (_RUN[0], f"{_RUN[1]} TASK=greedy"),
    ),
    "chat": Kind("generate", "generate", "Talks with {title}; LORA_LOAD adds an adapter.", _RUN),
    "evaluate": Kind(
        "evaluate",
        "evaluate",
        "Evaluates {title}; LORA_LOAD adds an adapter.",
        (_RUN[0], f"{_RUN[1]} TASK=mmlu DATA_PATH=./mmlu/test/"),
    ),
}
CONVERSIONS = ("hf2mcore", "mcore2hf", "mcore2hf_lora", "mg2mg_lora", "lora2hf")
QUANTISED = (
    "CKPT_LOAD_DIR is what ckpt_convert_{family}_hf2mcore_qlora.sh wrote, or any other checkpoint: a plain one is "
    "quantised while it is read."
)


@dataclass(frozen=True)
class Script:
    """One script: its name without ``.sh``, and what the table says of it."""

    family: str
    name: str
    of_family: Mapping[str, Any]
    own: Mapping[str, Any]

    @property
    def kind(self) -> Kind:
        """What it does, by its name."""
        if "kind" in self.own:
            return KINDS[self.own["kind"]]
        return KINDS["data_convert" if self.name.startswith("data_") else self.name.partition("_")[0]]

    @property
    def values(self) -> dict[str, Any]:
        """The variables that it says."""
        return {name: value for name, value in self.own.items() if name.isupper()}

    def text(self) -> str:
        """The file."""
        return "\n".join([*self._header(), "", *self._body(), ""])

    def _header(self) -> Iterator[str]:
        yield "#!/usr/bin/env bash"
        yield from _comment(self._filled(self.kind.says))
        yield "#"
        *first, last = [f"{self._filled(line)} \\" for line in self.kind.usage]
        yield from [f"#   {line}" for line in (*first, last)]
        yield f"#       examples/mcore/{self.family}/{self.name}.sh [more flags]"
        yield "#"
        yield from _comment(" ".join([*self._about(), self._where_flags_are()]))

    def _about(self) -> Iterator[str]:
        if "about" in self.own:
            yield self.own["about"]
        if "QLORA" in self.own:
            yield QUANTISED.format(family=self.family)

    def _where_flags_are(self) -> str:
        files = ["../tables/model.sh"] if self.kind.family_file == "model" else []
        files += [f"../tables/{self.kind.table}.sh"]
        before = [f"{name}.sh" for name in self._family_files()]
        said = f"; what is said here{' and in ' if before else ''}{' and '.join(before)} comes before"
        return f"Flags, their variables and values: {', '.join(files)}{said}; the rules: ../job.sh."

    def _family_files(self) -> list[str]:
        size = [f"model-{self.own['size']}"] if "size" in self.own else []
        return [*size, self.kind.family_file] if self.kind.family_file else []

    def _filled(self, text: str) -> str:
        layout = {name: self.own.get(name, 1) for name in ("TP", "PP", "EP")}
        experts = self.of_family.get("experts", False)
        paths = {name: self.own.get(name, self.of_family[name]) for name in ("hf", "mg", "lora", "merged")}
        own = {"hf": "HF_MODEL_PATH", "mg": "MG_MODEL_PATH"}
        paths |= {name: self.own[variable] for name, variable in own.items() if variable in self.own}
        cut = {name: size for name, size in layout.items() if name != "EP" or experts}
        return text.format(
            title=self.own.get("title", self.of_family["title"]),
            shards=" x ".join(cut),
            bits=" whose linears hold 4 bits a weight" if "QLORA_NF4" in self.own else "",
            method="QLoRA" if "QLORA" in self.own else "LoRA",
            mlp="all experts" if experts else "MLP",
            cut=" ".join(f"{name}={size}" for name, size in cut.items()),
            layout=self._layout(layout),
            **paths,
        )

    def _layout(self, sizes: Mapping[str, int]) -> str:
        told = " x ".join(f"{name} {size}" for name, size in sizes.items() if size != 1) or "data parallel"
        devices, machines = self.own.get("devices", sizes["TP"] * sizes["PP"]), self.own.get("NNODES", 1)
        if machines > 1:
            return f"{told} on {machines} machines of {devices} devices"
        return f"{told} on {devices} devices" if devices > 1 else f"{told} on one device"

    def _body(self) -> Iterator[str]:
        yield from _source(f"../tables/{self.kind.table}.sh")
        if self.values or "devices" in self.own:
            yield ""
        if "devices" in self.own:
            yield f'own NPROC "${{NPUS_PER_NODE:-{self.own["devices"]}}}"'
        yield from _owned(self.values, self.own.get("notes", {}))
        if self._family_files():
            yield ""
        for name in self._family_files():
            yield from _source(f"{name}.sh")
        yield ""
        port = f" {self.own['port']}" if "port" in self.own else ""
        yield f'{self.kind.function}{port} "$@"'


def _comment(text: str) -> Iterator[str]:
    yield from (
        f"# {line}" for line in textwrap.wrap(text, WIDTH - 2, break_on_hyphens=False, break_long_words=False)
    )


def _source(path: str) -> Iterator[str]:
    yield f"# shellcheck source={path}"
    yield f'source "$(dirname "${{BASH_SOURCE[0]}}")/{path}"'


def _owned(values: Mapping[str, Any], notes: Mapping[str, str]) -> Iterator[str]:
    for name, value in values.items():
        if name in notes:
            yield from _comment(notes[name])
        yield f"own {name} {_word(value)}"


def _word(value: Any) -> str:
    if isinstance(value, bool):
        return "1" if value else "0"
    text = str(value)
    return f'"{text}"' if text == "" or shlex.quote(text) != text else text


def scripts_of(family: str, said: Mapping[str, Any]) -> Iterator[Script]:
    """A family's scripts: those that every family has, then those that the table names."""
    convert = said.get("convert_name", f"ckpt_convert_{family}")
    names = {what: f"{convert}_{what}" for what in CONVERSIONS} | said.get("conversion_names", {})
    cut = said.get("cut", {})
    usual: dict[str, dict[str, Any]] = {
        f"data_convert_{family}_instruction": {
            "TOKENIZER_PATH": said["hf"],
            "PROMPT_TYPE": said.get("prompt", ""),
        }
    }
    for what, name in names.items():
        usual[name] = {"kind": what, **(cut if what in ("hf2mcore", "mg2mg_lora") else {})}
    for name in {**usual, **said["scripts"]}:
        own = {**usual.get(name, {}), **said["scripts"].get(name, {})}
        yield Script(family, name, said, own)


def family_files(family: str, said: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Name and text of what a family's scripts source."""
    title = said["title"]
    model = [f"# Sourced after a table: what {title} says of its own.", ""]
    model += _owned(said["model"], said.get("notes", {}))
    if said.get("experts"):
        model += ["", *_source("../tables/experts.sh")]
    yield "model.sh", "\n".join([*model, ""])
    for size, values in said.get("sizes", {}).items():
        words = f"# Sourced before model.sh: what {values['title']} has otherwise than {title}."
        own = {name: value for name, value in values.items() if name.isupper()}
        yield f"model-{size}.sh", "\n".join([words, "", *_owned(own, values.get("notes", {})), ""])
    paths = {"HF_MODEL_PATH": "hf", "MG_MODEL_PATH": "mg", "LORA_PATH": "lora", "MERGED_PATH": "merged"}
    convert = {name: said[key] for name, key in paths.items()} | said["convert"]
    lines = [f"# Sourced after ../tables/convert.sh: what the conversions of {title} say of their own.", ""]
    lines += _owned(convert, {})
    if said.get("experts"):
        lines += ["", *_source("../tables/experts.sh")]
    yield "convert.sh", "\n".join([*lines, ""])


def _sized(said: dict[str, Any]) -> dict[str, Any]:
    """A script of a size has the size's title."""
    sizes = said.get("sizes", {})
    scripts = {
        name: {"title": sizes[own["size"]]["title"], **own} if "size" in own else own
        for name, own in said.get("scripts", {}).items()
    }
    return {**said, "scripts": scripts}


def examples() -> dict[str, str]:
    """Path below ``examples/mcore`` → text, of everything that the table makes."""
    made: dict[str, str] = {}
    for family, said in tomllib.loads(TABLE.read_text(encoding="utf-8")).items():
        said = _sized(said)
        made |= {f"{family}/{name}": text for name, text in family_files(family, said)}
        made |= {f"{family}/{script.name}.sh": script.text() for script in scripts_of(family, said)}
    return made


def committed() -> dict[str, str]:
    """The same of what lies there."""
    return {
        str(path.relative_to(EXAMPLES)): path.read_text(encoding="utf-8")
        for path in EXAMPLES.glob("*/*.sh")
        if path.parent.name != "tables"
    }


def main() -> int:
    """Write or check; returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="write nothing, tell what differs")
    made, there = examples(), committed()
    differing = sorted(name for name in made.keys() | there.keys() if made.get(name) != there.get(name))
    if parser.parse_args().check:
        print("\n".join(differing))
        return 1 if differing else 0
    for name in differing:
        path = EXAMPLES / name
        if name not in made:
            path.unlink()
            continue
        path.parent.mkdir(exist_ok=True)
        path.write_text(made[name], encoding="utf-8")
        if made[name].startswith("#!"):
            path.chmod(0o755)
    print(f"{len(differing)} of {len(made)} files written")
    return 0


if __name__ == "__main__":
    sys.exit(main())
