"""Toys for the example scripts: a model of each family's kind, and the variables that make its scripts small."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from pathlib import Path

from mindspeed_lora.checkpoint.source import open_source
from tests.support.adapters import new_adapter, write
from tests.support.family_models import family_model
from tests.support.models import MODELS, make_model
from tests.unit.data.made_tokenizers import make_tokenizer

FOLDER = Path(__file__).parents[2] / "examples" / "mcore"
TOYS: Mapping[str, str] = {
    **dict.fromkeys(("llama2", "llama3", "llama33", "codellama", "yi"), "llama"),
    **dict.fromkeys(("llama31", "llama32"), "llama3-rope"),
    **dict.fromkeys(("qwen15", "qwen2", "qwen25"), "qwen2"),
    "qwen3": "qwen3",
    "qwen2_moe": "qwen2-moe",
    "qwen3_moe": "qwen3-moe",
    "mixtral": "mixtral",
    "mistral": "mistral-window",
    "deepseek2_lite": "deepseek-v2-moe",
    "deepseek3": "deepseek-v3-moe",
    "gemma2": "gemma2",
    "glm4": "chatglm3",
    "internlm25": "internlm2",
    "phi35": "phi3-longrope",
    "minicpm": "minicpm",
}
"""Family of scripts → name of a toy of :mod:`tests.support.models` or :mod:`tests.support.family_models`."""
_KEPT = ("MOE_TOKEN_DISPATCHER_TYPE", "CP_TYPE")


def scripts_of(family: str) -> list[str]:
    """Paths below ``examples/mcore`` of a family's scripts."""
    return [f"{family}/{path.name}" for path in sorted((FOLDER / family).glob("*_*.sh"))]


def toy(family: str, folder: Path) -> Path:
    """The toy of a family as a Hugging Face folder, with a tokenizer where it has words enough for one."""
    name = TOYS[family]
    if name not in MODELS:
        model = family_model(name, folder)
        for stand_in in model.glob("tokenizer*.json"):
            stand_in.unlink()
        return model
    tokenizer = make_tokenizer("gpt2")
    model = make_model(name, folder, vocab_size=len(tokenizer))
    tokenizer.save_pretrained(model)
    return model


def as_the_checkpoint(family: str) -> dict[str, str]:
    """The variables by which a family's scripts tell the published model, empty: the checkpoint tells."""
    texts = [path.read_text() for path in (FOLDER / family).glob("model*.sh")]
    names = {name for text in texts for name in re.findall(r"^own (\w+) ", text, re.MULTILINE)}
    return dict.fromkeys(sorted(names - {*_KEPT}), "")


def own_words(arguments: Callable[..., list[str]], script: str, **variables: str) -> list[str]:
    """The words behind the entry file of a script's command line."""
    told = arguments(script, **variables)
    return told[next(place for place, word in enumerate(told) if word.endswith(".py")) + 1 :]


def random_adapter(model: Path, folder: Path) -> Path:
    """A PEFT folder for all linears of a Hugging Face folder, with random factors."""
    shape = open_source(model).shape
    write(folder, shape, new_adapter(shape, r=8, alpha=16))
    return folder
