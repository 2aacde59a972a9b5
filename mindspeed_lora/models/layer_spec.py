"""The layer specification: which modules a layer of a model shape is built of."""

from __future__ import annotations

import math
from functools import partial
from types import SimpleNamespace
from typing import Any

from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from mindspeed_lora.config.shape import ModelShape
from mindspeed_lora.config.stages import Slots
from mindspeed_lora.models.attention import CoreAttention
from mindspeed_lora.models.layer import MLP, BiasedMLP, NoopLayer, SelfAttention, TransformerLayer
from mindspeed_lora.models.linear import (
    ColumnParallelLinear,
    RowParallelLinear,
    UnbiasedColumnParallelLinear,
    UnbiasedRowParallelLinear,
)
from mindspeed_lora.models.mla import MLASelfAttention
from mindspeed_lora.models.moe.layer import MoELayer
from mindspeed_lora.models.moe.settings import MoESettings
from mindspeed_lora.models.norm import HeadRMSNorm, OffsetRMSNorm, RMSNorm
from mindspeed_lora.parallel.context import ContextParallel
from mindspeed_lora.parallel.groups import ParallelGroups


def block_spec(
    shape: ModelShape, slots: Slots, groups: ParallelGroups, experts: MoESettings
) -> TransformerBlockSubmodules:
    """The layers of one model chunk, and the final norm (built for the last chunk only).

    megatron-core knows one switch for the biases of ``linear_proj``, ``linear_fc1`` and ``linear_fc2``;
    checkpoints set them apart, so each linear is given with or without.
    """
    noop = ModuleSpec(module=NoopLayer)
    dense: Any = BiasedMLP if shape.add_mlp_bias else MLP
    # megatron-core warns of a ModuleSpec for an MLP that is not its own, and takes what looks like one.
    mixture = SimpleNamespace(
        module=MoELayer, params={"moe": shape.moe, "groups": groups, "settings": experts}
    )
    layers = [
        noop
        if number is None
        else _layer_spec(shape, groups.context, number, mixture if shape.has_experts(number) else dense)
        for number in slots
    ]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=norm_of(shape))


def norm_of(shape: ModelShape) -> type[RMSNorm]:
    """The norm over hidden states."""
    from_1 = shape.feature("add_rmsnorm_offset") or shape.feature("apply_layernorm_1p")
    return OffsetRMSNorm if from_1 else RMSNorm


def _layer_spec(shape: ModelShape, context: ContextParallel, number: int, mlp: Any) -> ModuleSpec:
    norm, depth = norm_of(shape), shape.feature("scale_depth")
    return ModuleSpec(
        module=TransformerLayer,
        params={
            "post_norm": norm if shape.post_norm else None,
            "residual_scale": 1.0 if depth is None else depth / math.sqrt(shape.num_layers),
        },
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=_attention_spec(shape, context, number),
            pre_mlp_layernorm=norm,
            mlp=mlp,
        ),
    )


def _attention_spec(shape: ModelShape, context: ContextParallel, number: int) -> ModuleSpec:
    if shape.mla is not None:
        return ModuleSpec(module=MLASelfAttention, params={"shape": shape, "context_parallel": context})
    column: dict[bool, type] = {True: ColumnParallelLinear, False: UnbiasedColumnParallelLinear}
    row: dict[bool, type] = {True: RowParallelLinear, False: UnbiasedRowParallelLinear}
    head_norm = HeadRMSNorm if shape.qk_layernorm else None
    return ModuleSpec(
        module=SelfAttention,
        params={
            "attn_mask_type": AttnMaskType.causal,
            "rotary_interleaved": bool(shape.feature("rotary_interleaved")),
        },
        submodules=SelfAttentionSubmodules(
            linear_qkv=column[shape.add_qkv_bias],
            core_attention=partial(
                CoreAttention,
                softcap=shape.feature("attn_logit_softcapping"),
                sliding_window=shape.window_of(number),
                context_parallel=context,
            ),
            linear_proj=row[shape.add_proj_bias],
            q_layernorm=head_norm,
            k_layernorm=head_norm,
        ),
    )
