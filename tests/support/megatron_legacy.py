"""Rank files as Megatron-LM's checkpointing saves and loads them, around megatron-core's own live models."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from mindspeed_lora.checkpoint.formats.megatron_args import args_from_shape
from mindspeed_lora.config.stages import LayerPlacement
from tests.support.megatron_checkpoint import Layout, _live_model, _padded, _shard, _weights


def rank_file(iteration: Path) -> Path:
    """This rank's file: Megatron-LM's ``get_checkpoint_name``."""
    from megatron.core import parallel_state as ranks

    name = f"mp_rank_{ranks.get_tensor_model_parallel_rank():02d}"
    if ranks.get_pipeline_model_parallel_world_size() > 1:
        name += f"_{ranks.get_pipeline_model_parallel_rank():03d}"
    if ranks.get_expert_model_parallel_world_size() > 1:
        name += f"_{ranks.get_expert_model_parallel_rank():03d}"
    return iteration / name / "model_optim_rng.pt"


def save_legacy(folder: Path, hf: Path, layout: Layout) -> None:
    """Each rank that is the first with its experts saves its state."""
    from megatron.core import parallel_state

    with _live_model(hf, layout) as (model, source):
        for name, parameter in _weights(model):
            parameter.data.copy_(_shard(model, source, name, layout))
        placement = LayerPlacement.even(source.shape.num_layers, layout.pp)
        args = args_from_shape(source.shape, layout.tp, placement, _padded(source.shape, layout))
        args.expert_model_parallel_size = layout.ep
        args.expert_tensor_parallel_size = layout.etp or layout.tp
        if parallel_state.get_expert_data_parallel_rank() == 0:
            file = rank_file(folder / "iter_0000007")
            file.parent.mkdir(parents=True)
            content = {"model": model.state_dict(), "args": args, "checkpoint_version": 3.0, "iteration": 7}
            torch.save(content, file)
        torch.distributed.barrier()


def load_legacy(folder: Path, hf: Path, layout: Layout) -> None:
    """Every rank loads the file of its own numbers, and has what it should."""
    with _live_model(hf, layout) as (model, source):
        for _, parameter in _weights(model):
            parameter.data.fill_(float("nan"))
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(rank_file(folder / "iter_0000001"), weights_only=True)
        found = model.load_state_dict(content["model"], strict=False)
        assert not found.unexpected_keys, found
        assert all(key.endswith("_extra_state") for key in found.missing_keys), found
        for name, parameter in _weights(model):
            assert torch.equal(parameter.data, _shard(model, source, name, layout)), name
