"""The layer specification: which modules a layer of a model shape is built of."""

from __future__ import annotations

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
from mindspeed_lora.models.norm import HeadRMSNorm, RMSNorm
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
    dense = _layer_spec(shape, groups.context, BiasedMLP if shape.add_mlp_bias else MLP)
    sparse = dense
    if shape.moe is not None:
        # megatron-core warns of a ModuleSpec for an MLP that is not its own, and takes what looks like one.
        mixture = SimpleNamespace(
            module=MoELayer, params={"moe": shape.moe, "groups": groups, "settings": experts}
        )
        sparse = _layer_spec(shape, groups.context, mixture)
    layers = [noop if n is None else sparse if shape.has_experts(n) else dense for n in slots]
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=RMSNorm)


def _layer_spec(shape: ModelShape, context: ContextParallel, mlp: Any) -> ModuleSpec:
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=_attention_spec(shape, context),
            pre_mlp_layernorm=RMSNorm,
            mlp=mlp,
        ),
    )


def _attention_spec(shape: ModelShape, context: ContextParallel) -> ModuleSpec:
    if shape.mla is not None:
        return ModuleSpec(module=MLASelfAttention, params={"shape": shape, "context_parallel": context})
    column: dict[bool, type] = {True: ColumnParallelLinear, False: UnbiasedColumnParallelLinear}
    row: dict[bool, type] = {True: RowParallelLinear, False: UnbiasedRowParallelLinear}
    head_norm = HeadRMSNorm if shape.qk_layernorm else None
    return ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=column[shape.add_qkv_bias],
            core_attention=partial(
                CoreAttention, sliding_window=shape.sliding_window, context_parallel=context
            ),
            linear_proj=row[shape.add_proj_bias],
            q_layernorm=head_norm,
            k_layernorm=head_norm,
        ),
    )
