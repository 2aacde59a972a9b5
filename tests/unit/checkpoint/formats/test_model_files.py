from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from mindspeed_lora.checkpoint.formats.model_files import (
    copy_model_files,
    keep_hf_config,
    kept_hf_config,
    kept_origin,
    replace_tokenizer_files,
)
from mindspeed_lora.checkpoint.source import Origin
from mindspeed_lora.models.families import shape_from_config

CONFIG = {
    "model_type": "llama",
    "hidden_size": 8,
    "num_attention_heads": 2,
    "num_hidden_layers": 1,
    "intermediate_size": 4,
    "vocab_size": 5,
    "max_position_embeddings": 6,
    "tie_word_embeddings": True,
}

FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "chat_template.jinja",
    "merges.txt",
    "vocab.json",
    "LICENSE.txt",
    "modeling_own.py",
)
OTHERS = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "adapter_config.json",
    "notes.md",
)


def folder_with(folder: Path, names: tuple[str, ...], text: str = "x") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_text(text)
    return folder


def test_configuration_and_tokenizer_are_copied_and_weights_are_not(tmp_path: Path):
    source = folder_with(tmp_path / "model", FILES + OTHERS)
    folder_with(source / "additional_chat_templates", ("tool_use.jinja",))
    copy_model_files(source, tmp_path / "out")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {*FILES, "additional_chat_templates"}
    assert (tmp_path / "out" / "additional_chat_templates" / "tool_use.jinja").exists()


def test_origin_is_kept(tmp_path: Path):
    source = folder_with(tmp_path / "model", FILES)
    (source / "config.json").write_text(json.dumps(CONFIG))
    origin = Origin("/models/x", "org/x", "abc")
    keep_hf_config(source, origin, tmp_path / "mg", shape_from_config(CONFIG))
    kept = kept_hf_config(tmp_path / "mg" / "iter_0000001")
    assert kept == tmp_path / "mg" / "hf_config"
    assert kept is not None and kept_origin(kept) == origin
    assert kept_origin(source) is None
    assert kept_hf_config(tmp_path / "model") is None
    assert (kept / "config.json").read_text() == (source / "config.json").read_text()


def test_configuration_of_a_model_that_an_adapter_changed(tmp_path: Path):
    source = folder_with(tmp_path / "model", FILES)
    (source / "config.json").write_text(json.dumps(CONFIG))
    changed = dataclasses.replace(
        shape_from_config(CONFIG), vocab_size=7, untie_embeddings_and_output_weights=True
    )
    keep_hf_config(source, None, tmp_path / "mg", changed)
    kept = json.loads((tmp_path / "mg" / "hf_config" / "config.json").read_text())
    assert kept == {**CONFIG, "vocab_size": 7, "tie_word_embeddings": False}
    assert shape_from_config(kept) == changed


def test_a_whole_tokenizer_replaces_a_whole_tokenizer(tmp_path: Path):
    target = folder_with(tmp_path / "merged", FILES, "base")
    adapter = folder_with(
        tmp_path / "adapter", ("tokenizer.json", "tokenizer_config.json", *OTHERS), "trained"
    )
    replace_tokenizer_files(adapter, target)
    assert (target / "tokenizer.json").read_text() == "trained"
    assert not (target / "chat_template.jinja").exists() and not (target / "merges.txt").exists()
    assert (target / "config.json").read_text() == "base"
    assert not (target / "adapter_config.json").exists()


def test_a_mere_template_replaces_the_template(tmp_path: Path):
    target = folder_with(tmp_path / "merged", FILES, "base")
    replace_tokenizer_files(folder_with(tmp_path / "none", OTHERS), target)
    assert (target / "chat_template.jinja").read_text() == "base"
    replace_tokenizer_files(folder_with(tmp_path / "one", ("chat_template.jinja",), "trained"), target)
    assert (target / "chat_template.jinja").read_text() == "trained"
    assert (target / "tokenizer.json").read_text() == "base"
