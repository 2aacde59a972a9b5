"""Small models of every family, built by transformers with a seed and saved as Hugging Face folders."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mindspeed_lora.checkpoint.conversion.convert import convert
from mindspeed_lora.config.commands import parse

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 101,
    "max_position_embeddings": 64,
}

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

KINDS: dict[str, tuple[str, dict[str, Any], torch.dtype]] = {
    "llama": ("Llama", {"rope_parameters": LLAMA3_ROPE}, torch.float32),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}, torch.bfloat16),
    "llama-biased": ("Llama", {"attention_bias": True, "mlp_bias": True}, torch.float32),
    "mistral": ("Mistral", {"head_dim": 16, "sliding_window": 16}, torch.float16),
    "qwen2": ("Qwen2", {"num_key_value_heads": 8}, torch.float32),
    "qwen3-tied": ("Qwen3", {"head_dim": 16, "tie_word_embeddings": True}, torch.float32),
}


class HfModel:
    """A saved model and, on demand, the transformers object again."""

    def __init__(self, kind: str, path: Path) -> None:
        self.kind = kind
        self.path = path

    def load(self) -> Any:
        """A fresh transformers model in evaluation mode."""
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(self.path, dtype="auto").eval()

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """The saved tensors, read by the safetensors library."""
        return load_weights(self.path)


def load_weights(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder, read by the safetensors library."""
    tensors: dict[str, torch.Tensor] = {}
    for file in sorted(folder.glob("model*.safetensors")):
        tensors.update(load_file(file))
    return tensors


def build(kind: str, path: Path, max_shard_size: str = "1GB") -> HfModel:
    """Build and save a model whose parameters, norms and biases too, are all random."""
    import transformers

    name, extra, dtype = KINDS[kind]
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **extra})
    model = getattr(transformers, f"{name}ForCausalLM")(config)
    for parameter in model.parameters():
        parameter.data.normal_(std=0.2)
    model.to(dtype).save_pretrained(path, max_shard_size=max_shard_size)
    (path / "tokenizer_config.json").write_text('{"model_max_length": 64}')
    (path / "tokenizer.json").write_text("{}")
    return HfModel(kind, path)


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], HfModel]:
    """The model of a kind, built once; tests must not change its folder."""
    built: dict[str, HfModel] = {}

    def get(kind: str) -> HfModel:
        if kind not in built:
            built[kind] = build(kind, tmp_path_factory.mktemp("models") / kind)
        return built[kind]

    return get


@pytest.fixture(params=list(KINDS))
def model(request: pytest.FixtureRequest, models: Callable[[str], HfModel]) -> HfModel:
    """Each kind of model in turn; tests must not change its folder."""
    return models(request.param)


@pytest.fixture
def own_model(tmp_path: Path) -> HfModel:
    """An untied Llama that the test may damage."""
    return build("llama", tmp_path / "own")


@pytest.fixture(scope="session")
def convert_words() -> Callable[..., None]:
    """Runs convert_ckpt.py's function on command-line words, flags as keywords."""

    def run(*words: object, **flags: object) -> None:
        argv = [str(word) for word in words]
        for name, value in flags.items():
            argv += [f"--{name.replace('_', '-')}"]
            argv += [str(part) for part in value] if isinstance(value, tuple) else [str(value)]
        convert(parse("convert", argv))

    return run


@pytest.fixture
def run_convert(convert_words: Callable[..., None]) -> Callable[..., None]:
    """The same, under the name that most tests know."""
    return convert_words
