"""Where a loss comes from that is not a number."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from mindspeed_lora.checkpoint.loading.local_parameters import LocalParameter
from mindspeed_lora.parallel.collectives import all_gather_objects
from mindspeed_lora.parallel.groups import ParallelGroups


def broken_weight(parameters: Iterable[LocalParameter], groups: ParallelGroups) -> str:
    """Canonical name of a frozen tensor of any rank that holds NaN or infinite values; empty where none does.

    Every rank calls it; what is trained is not looked at, since a step may have spoilt it.
    """
    frozen = (one for one in parameters if not one.param.requires_grad)
    mine = next((one.name for one in frozen if not _is_finite(one.param)), "")
    return next(filter(None, all_gather_objects(mine, groups)), "")


def _is_finite(param: torch.nn.Parameter) -> bool:
    """Without a copy of its size; quantised weights cannot hold anything else."""
    if not isinstance(param, torch.Tensor) or not param.is_floating_point() or not param.numel():
        return True
    return all(math.isfinite(value) for value in torch.aminmax(param.detach()))
