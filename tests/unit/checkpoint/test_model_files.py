from __future__ import annotations

from pathlib import Path

from mindspeed_lora.checkpoint.model_files import (
    copy_model_files,
    keep_hf_config,
    kept_hf_config,
    kept_origin,
    replace_tokenizer_files,
)
from mindspeed_lora.checkpoint.source import Origin

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
    origin = Origin("/models/x", "org/x", "abc")
    keep_hf_config(source, origin, tmp_path / "mg")
    kept = kept_hf_config(tmp_path / "mg" / "iter_0000001")
    assert kept == tmp_path / "mg" / "hf_config"
    assert kept is not None and kept_origin(kept) == origin
    assert kept_origin(source) is None
    assert kept_hf_config(tmp_path / "model") is None


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
