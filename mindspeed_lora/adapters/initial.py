"""Starting values of adapters, the same bits in every parallel layout."""

from __future__ import annotations

import hashlib
import math

import torch


def generator_for(seed: int, name: str) -> torch.Generator:
    """A CPU generator that depends on the seed and a canonical parameter name alone."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") >> 1)


def initial_lora_a(seed: int, name: str, rank: int, in_features: int) -> torch.Tensor:
    """The whole ``lora_a [r, in]`` of a canonical name, float32.

    Kaiming-uniform with a = √5 as in PEFT (He et al. 2015, arXiv 1502.01852): U(−1/√in, 1/√in), where ``in`` is
    the width of the whole matrix, never of a shard.
    """
    bound = 1.0 / math.sqrt(in_features)
    drawn = torch.rand(rank, in_features, generator=generator_for(seed, name), dtype=torch.float32)
    return drawn.mul_(2 * bound).sub_(bound)
