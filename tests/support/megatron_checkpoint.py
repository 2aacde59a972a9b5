"""megatron-core's own model and distributed checkpoints, as other trainers use them: nothing of ours in between.

The functions run on the ranks of a :class:`~tests.support.pool.WorkerPool`.
"""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import queue
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from mindspeed_lora.checkpoint.canonical import (
    VOCABULARY_TENSORS,
    expert_number,
    padded_vocab_size,
    shard_ranges,
    tensor_rule,
    to_canonical,
)
from mindspeed_lora.checkpoint.formats.megatron_args import args_from_shape
from mindspeed_lora.checkpoint.source import Source, open_source
from mindspeed_lora.config.parallel import ParallelConfig
from mindspeed_lora.config.shape import ModelShape
from mindspeed_lora.config.stages import LayerPlacement


@dataclass(frozen=True)
class Layout:
    """How a live model is cut, and in which of megatron-core's forms it is saved and loaded."""

    tp: int = 1
    pp: int = 1
    first_stage: int | None = None
    """Layers of the first of two stages, where they are uneven."""
    ep: int = 1
    etp: int | None = None
    """Ranks that share each expert's matrices; None: as many as ``tp``."""
    grouped: bool = False
    """Whether the experts are megatron-core's ``GroupedMLP``."""
    metadata: dict[str, Any] = field(default_factory=dict)
    """What ``sharded_state_dict`` is told: ``non_homogeneous_layers``, ``singleton_local_shards``."""


def save_live(folder: Path, hf: Path, layout: Layout) -> torch.Tensor | None:
    """Saves the live model of a Hugging Face folder by ``dist_checkpointing``; its logits where it has one stage."""
    from megatron.core import dist_checkpointing

    with _live_model(hf, layout) as (model, source):
        for name, parameter in _weights(model):
            parameter.data.copy_(_shard(model, source, name, layout))
        placement = LayerPlacement.even(source.shape.num_layers, 1)
        state = {
            "model": model.sharded_state_dict(metadata=layout.metadata or None),
            "args": args_from_shape(source.shape, layout.tp, placement, _padded(source.shape, layout)),
            "iteration": 7,
            "checkpoint_version": 3.0,
        }
        if torch.distributed.get_rank() == 0:
            (folder / "iter_0000007").mkdir(parents=True)
            (folder / "latest_checkpointed_iteration.txt").write_text("7")
        torch.distributed.barrier()
        dist_checkpointing.save(state, str(folder / "iter_0000007"))
        return _logits(model, source, layout)


def load_live(folder: Path, hf: Path, layout: Layout) -> tuple[torch.Tensor | None, set[str], set[str]]:
    """Loads an iteration by ``dist_checkpointing`` into a live model of a Hugging Face folder's shape.

    Returns its logits where it has one stage, the keys that the checkpoint lacks, and those that nobody asked for.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.validation import StrictHandling

    with _live_model(hf, layout) as (model, source):
        for _, parameter in _weights(model):
            parameter.data.fill_(float("nan"))
        # As megatron-core means it, the model misses a key that it does not ask for.
        state, unused, lacking = dist_checkpointing.load(
            {"model": model.sharded_state_dict(metadata=layout.metadata or None)},
            str(folder),
            strict=StrictHandling.RETURN_ALL,
        )
        model.load_state_dict(state["model"], strict=True)
        for name, parameter in _weights(model):
            expected = _shard(model, source, name, layout)
            assert torch.equal(parameter.data, expected), name
        assert isinstance(state["args"], argparse.Namespace)
        return _logits(model, source, layout), lacking, unused


TOKENS = torch.arange(20).view(2, 10)


@contextlib.contextmanager
def _live_model(hf: Path, layout: Layout) -> Iterator[tuple[Any, Source]]:
    """megatron-core's GPTModel with its own layers, of the shape of a Hugging Face folder."""
    from mindspeed_lora.device.megatron_import import import_megatron

    import_megatron()
    from megatron.core.models.gpt import GPTModel

    from mindspeed_lora.parallel.groups import destroy_groups, initialize_groups

    parallel = ParallelConfig(
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        expert_model_parallel_size=layout.ep,
        expert_tensor_parallel_size=layout.etp,
        distributed_timeout_minutes=3.0,
    )
    source = open_source(hf)
    shape = source.shape
    groups, _ = initialize_groups(parallel, seed=1)
    try:
        with _without_cuda():
            yield (
                # As megatron-core's Float16Module has it: the norms too.
                GPTModel(
                    _config(shape, layout),
                    _spec(shape, layout),
                    vocab_size=_padded(shape, layout),
                    max_sequence_length=shape.max_position_embeddings,
                    pre_process=groups.is_first_stage,
                    post_process=groups.is_last_stage,
                    parallel_output=False,
                    share_embeddings_and_output_weights=not shape.untie_embeddings_and_output_weights,
                    position_embedding_type="rope",
                    rotary_base=int(shape.rotary_base),
                )
                .eval()
                .to(getattr(torch, shape.params_dtype)),
                source,
            )
    finally:
        destroy_groups()


def _weights(model: Any) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters, and the buffer that a router learns."""
    yield from model.named_parameters()
    yield from ((name, one) for name, one in model.named_buffers() if name.endswith("expert_bias"))


def _spec(shape: ModelShape, layout: Layout) -> Any:
    """The specification of the layers; of all of them where some have experts and some have not."""
    from megatron.core.models.gpt import gpt_layer_specs

    words: dict[str, Any] = {"qk_layernorm": shape.qk_layernorm, "normalization": "RMSNorm"}
    if shape.moe is None:
        return gpt_layer_specs.get_gpt_layer_local_spec(**words)
    if not shape.moe.dense_layers:
        return gpt_layer_specs.get_gpt_layer_local_spec(
            num_experts=shape.moe.num_experts, moe_grouped_gemm=layout.grouped, **words
        )
    return gpt_layer_specs.get_gpt_decoder_block_spec(
        _config(shape, layout), use_transformer_engine=False, normalization="RMSNorm"
    )


def _expert_config(shape: ModelShape, layout: Layout) -> dict[str, Any]:
    moe = shape.moe
    if moe is None:
        return {}
    return {
        "num_moe_experts": moe.num_experts,
        "moe_router_topk": moe.topk,
        "moe_ffn_hidden_size": moe.ffn_hidden_size,
        "moe_layer_freq": [int(shape.has_experts(layer)) for layer in range(shape.num_layers)]
        if moe.dense_layers
        else 1,
        "moe_shared_expert_intermediate_size": moe.shared_ffn_hidden_size or None,
        "moe_shared_expert_gate": moe.shared_expert_gate,
        "moe_router_score_function": moe.score_function,
        "moe_router_pre_softmax": moe.score_function == "softmax" and not moe.normalise,
        "moe_router_enable_expert_bias": moe.expert_bias,
        "moe_router_topk_scaling_factor": moe.scaling_factor,
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "alltoall",
        "expert_model_parallel_size": layout.ep,
        "expert_tensor_parallel_size": layout.etp or layout.tp,
    }


def _config(shape: ModelShape, layout: Layout) -> Any:
    from megatron.core.transformer import TransformerConfig

    dtype = getattr(torch, shape.params_dtype)
    return TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_query_groups,
        kv_channels=shape.kv_channels,
        layernorm_epsilon=shape.norm_epsilon,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=shape.add_mlp_bias,
        add_qkv_bias=shape.add_qkv_bias,
        qk_layernorm=shape.qk_layernorm,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=layout.tp,
        pipeline_model_parallel_size=layout.pp,
        num_layers_in_first_pipeline_stage=layout.first_stage,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        batch_p2p_comm=False,
        **_expert_config(shape, layout),
    )


def _padded(shape: ModelShape, layout: Layout) -> int:
    return padded_vocab_size(shape, 1, layout.tp)


def _shard(model: Any, source: Source, local_name: str, layout: Layout) -> torch.Tensor:
    """What a parameter of this rank is, of the Hugging Face weights."""
    from megatron.core import parallel_state

    layers = [layer.layer_number - 1 for layer in model.decoder.layers]
    name = to_canonical(local_name, layers)
    if name == "output_layer.weight" and not source.shape.untie_embeddings_and_output_weights:
        name = "embedding.word_embeddings.weight"
    number = expert_number(name)
    if number is not None and source.shape.moe is not None:
        first = parallel_state.get_expert_model_parallel_rank() * source.shape.moe.num_experts // layout.ep
        name = name.replace(f"local_experts.{number}.", f"local_experts.{first + number}.")
    if ".mlp.experts.weight" in name:
        return _stacked(source, name, layout)
    rule = tensor_rule(name)
    if rule.axis is None:
        return source.read(name)
    padded = name in VOCABULARY_TENSORS
    size = _padded(source.shape, layout) if padded else source.read(name).shape[rule.axis]
    rank = parallel_state.get_tensor_model_parallel_rank()
    tp = layout.tp
    if number is not None:
        rank, tp = parallel_state.get_expert_tensor_parallel_rank(), layout.etp or layout.tp
    return source.read(name, rule.axis, shard_ranges(rule, size, rank, tp))


def _stacked(source: Source, name: str, layout: Layout) -> torch.Tensor:
    """A parameter of ``GroupedMLP``: it multiplies tokens from the left, expert by expert of its view."""
    from megatron.core import parallel_state

    assert source.shape.moe is not None
    count = source.shape.moe.num_experts // layout.ep
    first = parallel_state.get_expert_model_parallel_rank() * count
    rank, size = parallel_state.get_expert_tensor_parallel_rank(), layout.etp or layout.tp
    place, _, number = name.rpartition("weight")
    matrices = []
    for expert in range(first, first + count):
        linear = f"{place}local_experts.{expert}.linear_fc{number}.weight"
        whole, rule = source.read(linear), tensor_rule(linear)
        ranges = shard_ranges(rule, whole.shape[rule.axis or 0], rank, size)
        matrices.append(source.read(linear, rule.axis, ranges).t())
    stack = torch.stack(matrices)
    hidden = source.shape.hidden_size
    return stack.reshape(hidden, -1) if number == "1" else stack.reshape(-1, hidden)


@torch.no_grad()
def _logits(model: Any, source: Source, layout: Layout) -> torch.Tensor | None:
    """``[b, s, v]`` of :data:`TOKENS`, over the padded vocabulary; None of a stage, and of a model with experts.

    megatron-core's own router needs a device, and its dispatcher other collectives than gloo has.
    """
    if layout.pp > 1 or source.shape.moe is not None:
        return None
    b, s = TOKENS.shape
    mask = torch.triu(torch.ones(1, 1, s, s, dtype=torch.bool), 1)
    logits: torch.Tensor = model(TOKENS, torch.arange(s).expand(b, s), mask)
    return logits.float()


@contextlib.contextmanager
def _without_cuda() -> Iterator[None]:
    """megatron-core saves by forked writers and asks CUDA for its device; here there is none."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    config = multiprocessing.current_process()._config  # type: ignore[attr-defined]
    daemon = config.get("daemon")
    # The pool's processes are daemons, which may otherwise have no children.
    config["daemon"] = False
    try:
        with (
            mock.patch.object(filesystem_async, "_results_queue", queue.Queue()),
            mock.patch.object(torch.cuda, "current_device", lambda: torch.device("cpu")),
            mock.patch.object(torch.cuda, "synchronize", lambda *_: None),
            mock.patch.object(torch.Tensor, "cuda", lambda tensor: tensor),
            # GroupedMLP computes by it; here it is only saved and loaded.
            mock.patch("megatron.core.transformer.moe.grouped_gemm_util.assert_grouped_gemm_is_available"),
        ):
            yield
    finally:
        config["daemon"] = daemon
