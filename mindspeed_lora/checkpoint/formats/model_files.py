"""The files beside a model's weights: configuration, tokenizer, and the note on where a model comes from."""

from __future__ import annotations

import dataclasses
import json
import shutil
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from mindspeed_lora.checkpoint.formats.hf import read_json
from mindspeed_lora.checkpoint.source import Origin
from mindspeed_lora.config.shape import ModelShape
from mindspeed_lora.models.families import family_for, shape_from_config

HF_CONFIG_FOLDER = "hf_config"
SOURCE_FILE = "source.json"

TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
)
_OTHER_FILES = ("config.json", "generation_config.json", "*.py", "LICENSE*", "NOTICE*", "*POLICY*")
_WEIGHTS = ("*.safetensors", "pytorch_model*.bin")
_TEMPLATE_FOLDER = "additional_chat_templates"


def is_without_weights(folder: Path) -> bool:
    """Whether a Hugging Face folder has a config.json and no weights: what a dry run may plan from."""
    if not (folder / "config.json").is_file():
        return False
    return not any(True for pattern in _WEIGHTS for _ in folder.glob(pattern))


def model_files(source: Path) -> list[Path]:
    """The files of a folder that :func:`copy_model_files` copies."""
    patterns = (*TOKENIZER_FILES, *_OTHER_FILES)
    return [file for file in sorted(source.iterdir()) if file.is_file() and _is_one_of(file, patterns)]


def copy_model_files(source: Path, target: Path) -> None:
    """Copy configuration, tokenizer, chat templates, code and licence, not the weights."""
    _copy(source, target, (*TOKENIZER_FILES, *_OTHER_FILES))


def copy_tokenizer_files(source: Path, target: Path) -> None:
    """Copy the tokenizer's files and chat templates."""
    _copy(source, target, TOKENIZER_FILES)


def replace_tokenizer_files(source: Path, target: Path) -> None:
    """Replace a folder's tokenizer by that of another one; a mere chat template replaces the template."""
    patterns = TOKENIZER_FILES if (source / "tokenizer_config.json").is_file() else ("chat_template*",)
    if not any(file.is_file() and _is_one_of(file, patterns) for file in source.iterdir()):
        return
    for file in list(target.iterdir()):
        if file.is_file() and _is_one_of(file, patterns):
            file.unlink()
    _copy(source, target, patterns)


def _is_one_of(file: Path, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(file.name, pattern) for pattern in patterns)


def _copy(source: Path, target: Path, patterns: tuple[str, ...]) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(source.iterdir()):
        if file.is_file() and _is_one_of(file, patterns):
            shutil.copyfile(file, target / file.name)
    if (source / _TEMPLATE_FOLDER).is_dir():
        shutil.copytree(source / _TEMPLATE_FOLDER, target / _TEMPLATE_FOLDER, dirs_exist_ok=True)


def config_of(config: dict[str, Any], shape: ModelShape) -> dict[str, Any]:
    """A config.json for a model that an adapter changed: with another vocabulary, or embeddings that are not tied."""
    before = shape_from_config(config)
    changes: dict[str, Any] = {}
    if before.vocab_size != shape.vocab_size:
        own = family_for(config).config_keys.get("vocab_size", "vocab_size")
        keys = {own, "vocab_size"} if "vocab_size" in config else {own}
        changes.update(dict.fromkeys(sorted(keys), shape.vocab_size))
    if before.untie_embeddings_and_output_weights != shape.untie_embeddings_and_output_weights:
        changes["tie_word_embeddings"] = not shape.untie_embeddings_and_output_weights
    return {**config, **changes}


def write_json(path: Path, config: dict[str, Any]) -> None:
    """Write a configuration as transformers does."""
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def keep_hf_config(config_dir: Path, origin: Origin | None, checkpoint: Path, shape: ModelShape) -> None:
    """Keep the configuration and tokenizer files of a model of this shape, and its origin, in a checkpoint's folder.

    How the Hugging Face folder was quantised is left out: the checkpoint's own files tell how it is.
    """
    folder = checkpoint / HF_CONFIG_FOLDER
    copy_model_files(config_dir, folder)
    config = read_json(config_dir / "config.json")
    kept = {key: value for key, value in config_of(config, shape).items() if key != "quantization_config"}
    if kept != config:
        write_json(folder / "config.json", kept)
    if origin is not None:
        note = json.dumps(dataclasses.asdict(origin), indent=2)
        (folder / SOURCE_FILE).write_text(note + "\n", encoding="utf-8")


def kept_hf_config(checkpoint: Path) -> Path | None:
    """The ``hf_config`` folder of a Megatron checkpoint, given the checkpoint or one of its iterations."""
    for folder in (checkpoint / HF_CONFIG_FOLDER, checkpoint.parent / HF_CONFIG_FOLDER):
        if (folder / "config.json").is_file():
            return folder
    return None


def kept_origin(config_dir: Path) -> Origin | None:
    """The origin noted in an ``hf_config`` folder."""
    file = config_dir / SOURCE_FILE
    if not file.is_file():
        return None
    note = read_json(file)
    return Origin(str(note.get("path")), note.get("hub_id"), note.get("revision"))
