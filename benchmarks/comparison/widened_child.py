"""Child process: the dense model with as many active parameters as one up-cycled from the same model.

It has the MLP as often as a token has experts, side by side, each with its share of the output, and computes the same
function as the model that it is made of, and as the up-cycled one.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

_KEPT = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "rope_parameters",
    "max_position_embeddings",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
)
"""Of the configuration, the same in both."""


def main() -> None:
    """Read the request, write the folder."""
    request: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    source, folder = Path(request["model"]), Path(request["widened"])
    dense = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    fields = {name: getattr(dense.config, name) for name in _KEPT}
    fields["intermediate_size"] *= request["times"]
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **fields), dtype=torch.float32)
    model.load_state_dict(_widened(dense.state_dict(), request["times"]))
    model.save_pretrained(folder)
    for file in source.iterdir():
        if "token" in file.name or file.suffix == ".jinja":
            shutil.copy(file, folder / file.name)


def _widened(tensors: dict[str, torch.Tensor], times: int) -> dict[str, torch.Tensor]:
    """``gate_proj`` and ``up_proj`` ``[times · f, h]``, ``down_proj [h, times · f]``."""

    def wide(name: str, tensor: torch.Tensor) -> torch.Tensor:
        if name.endswith("mlp.down_proj.weight"):
            return tensor.repeat(1, times) / times
        return tensor.repeat(times, 1) if ".mlp." in name else tensor

    return {name: wide(name, tensor) for name, tensor in tensors.items()}


if __name__ == "__main__":
    main()
