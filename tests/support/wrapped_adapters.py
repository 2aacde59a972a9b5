"""Adapters as MindSpeed-LLM trains and saves them: PEFT around Megatron's linears.

q/k/v have one A, and gate/up have one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.support.megatron_files import Layout, Tensors, write_ranks

LORA_ARGS = {"lora_r": 4, "lora_alpha": 12, "lora_target_modules": ["linear_qkv"]}
TOKENS = torch.arange(12).view(2, 6)


class Trained:
    """A PEFT adapter on a small model, q/k/v and gate/up each with one A."""

    def __init__(self, model: Any) -> None:
        from peft import LoraConfig as PeftConfig
        from peft import get_peft_model, get_peft_model_state_dict

        self.model = model
        self._merged: Tensors | None = None
        self.base = model.tensors
        config = PeftConfig(
            r=4,
            lora_alpha=12,
            target_modules=[f"{n}_proj" for n in ("q", "k", "v", "o", "gate", "up", "down")],
        )
        torch.manual_seed(3)
        self.peft = get_peft_model(model.load(), config).eval()
        for name, parameter in self.peft.named_parameters():
            if "lora_" in name:
                parameter.data.normal_(std=0.2)
        own = dict(self.peft.named_parameters())
        for name, parameter in own.items():
            for other, first in (("k_proj", "q_proj"), ("v_proj", "q_proj"), ("up_proj", "gate_proj")):
                if f"{other}.lora_A" in name:
                    parameter.data.copy_(own[name.replace(other, first)].data)
        self.factors: Tensors = {
            name: tensor.clone() for name, tensor in get_peft_model_state_dict(self.peft).items()
        }
        with torch.no_grad():
            self.logits = self.peft(TOKENS).logits
        self.hf_config = self.peft.config

    def merged(self) -> Tensors:
        """The state dict of PEFT's merged model."""
        if self._merged is None:
            self._merged = self.peft.merge_and_unload().state_dict()
        return self._merged

    def write(self, folder: Path, layout: Layout, with_base: bool = False, **more: Any) -> Path:
        base = self.base if with_base else None
        options = {"args": LORA_ARGS, **more}
        return write_ranks(folder, self.hf_config, layout, base, self.factors, **options)


def wrapped(content: dict[str, Any]) -> None:
    """As MindSpeed-LLM saves base and adapter together: the base's linears under ``base_layer``."""
    for key in [key for key in content if key.startswith("model")]:
        content[key] = {
            name.replace(".weight", ".base_layer.weight")
            if ".linear_" in name and "lora" not in name
            else name: value
            for name, value in content[key].items()
        }
