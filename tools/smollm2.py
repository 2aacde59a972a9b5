"""SmolLM2-135M-Instruct as normal Hugging Face folders: from a GGUF file, and with padded attention heads.

The model has 9 query and 3 key/value heads, which no even tensor-parallel size divides. The padded variant
has one more key/value group (3 query heads, 1 key/value head) whose projections are zero: 12 and 4 heads, for
TP 1, 2 and 4. It computes the same function: the new heads attend to values of zero, and ``o_proj``
multiplies what they give by zero.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from mindspeed_lora.errors import Failed

PROMPT = "Write one sentence about the sea."
MAX_LOGIT_DIFFERENCE = 1e-3
"""Largest difference allowed between the two variants: summation order in fp32, of logits up to about 30."""


def write_model(gguf_file: Path, folder: Path) -> None:
    """Write the dequantised fp32 model of ``gguf_file``, its configuration and tokenizer into ``folder``."""
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    with _quiet_transformers():
        read = AutoModelForCausalLM.from_pretrained(
            gguf_file.parent, gguf_file=gguf_file.name, dtype=torch.float32
        )
        values = read.config.to_dict()
        # The first would make save_pretrained refuse; the second is the GGUF's internal title.
        for key in ("quantization_config", "_name_or_path", "_model_name_or_path"):
            values.pop(key, None)
        # GGUF stores the epsilon in single precision; the model was trained with 1e-05.
        values["rms_norm_eps"] = float(f"{values['rms_norm_eps']:.3g}")
        model = LlamaForCausalLM(LlamaConfig(**values))
        model.load_state_dict(read.state_dict())
        model.generation_config = read.generation_config
        model.save_pretrained(folder)
        _write_tokenizer(gguf_file, folder)


def _write_tokenizer(gguf_file: Path, folder: Path) -> None:
    from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(gguf_file.parent, gguf_file=gguf_file.name)
    # A GGUF file names its pre-tokenizer ("smollm") without describing it, and transformers' reader takes the
    # plain byte-level one; SmolLM2 splits single digits off first (two spaces before a digit are one token).
    tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
        [Digits(individual_digits=True), ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    tokenizer.model_max_length = 8192
    _save_tokenizer(tokenizer, folder)


def _save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Save it under the class name that transformers 4 knows too, without notes of how it was loaded."""
    tokenizer.save_pretrained(folder)
    path = folder / "tokenizer_config.json"
    values = json.loads(path.read_text())
    values["tokenizer_class"] = "PreTrainedTokenizerFast"
    for key in ("backend", "is_local", "local_files_only"):
        values.pop(key, None)
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def write_padded_model(source: Path, folder: Path) -> float:
    """Write the head-padded variant of ``source`` into ``folder``; the largest difference of their logits.

    Raises :class:`Failed` when the two do not compute the same function.
    """
    from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

    with _quiet_transformers():
        original = LlamaForCausalLM.from_pretrained(source, dtype=torch.float32)
        config = original.config
        values = config.to_dict()
        heads, groups = values["num_attention_heads"], values["num_key_value_heads"]
        values["num_attention_heads"] = heads + heads // groups
        values["num_key_value_heads"] = groups + 1
        # To be said now: hidden_size / num_attention_heads no longer gives it.
        values["head_dim"] = config.head_dim
        padded = LlamaForCausalLM(LlamaConfig(**values))
        padded.load_state_dict(_pad_heads(original.state_dict(), padded.state_dict()))
        padded.generation_config = GenerationConfig.from_pretrained(source)
        tokenizer = AutoTokenizer.from_pretrained(source)
        difference = _logit_difference(original, padded, tokenizer)
        if not difference <= MAX_LOGIT_DIFFERENCE:
            raise Failed(
                f"{folder.name}: its logits differ from those of {source.name} by {difference:.2e}, more "
                f"than {MAX_LOGIT_DIFFERENCE:.0e}; the installed transformers lays heads out differently"
            )
        padded.save_pretrained(folder)
        _save_tokenizer(tokenizer, folder)
    return difference


def _pad_heads(original: dict[str, torch.Tensor], padded: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Every tensor of ``original`` in the shape that it has in ``padded``, zero where it does not reach.

    ``q_proj``, ``k_proj``, ``v_proj`` [heads · d, h] grow by rows, ``o_proj`` [h, heads · d] by columns;
    heads are stacked group by group, so that the new group comes last in each.
    """
    result = {}
    for name, tensor in original.items():
        result[name] = torch.zeros_like(padded[name])
        result[name][tuple(slice(0, size) for size in tensor.shape)] = tensor
    return result


@torch.inference_mode()
def _logit_difference(original: Any, padded: Any, tokenizer: Any) -> float:
    """Largest absolute difference of the two models' logits [1, s, v] over a short chat."""
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": PROMPT}], tokenize=False, add_generation_prompt=True
    )
    tokens = tokenizer(text, return_tensors="pt").input_ids
    return float((original(tokens).logits - padded(tokens).logits).abs().max())


@contextlib.contextmanager
def _quiet_transformers() -> Iterator[None]:
    """No notes of transformers and no progress bars."""
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        logging.enable_progress_bar()
