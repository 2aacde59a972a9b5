"""Multi-latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1.2 and 2.1.3), without transformer-engine.

=========================  ====================================  ==================
linear                     from, to                              over TP
=========================  ====================================  ==================
``linear_q_down_proj``     h → q's latent                        every rank has all
``linear_q_up_proj``       its norm → n heads of d + e           heads are cut
``linear_q_proj``          h → n heads, where q has no latent    heads are cut
``linear_kv_down_proj``    h → kv's latent, and e shared         every rank has all
``linear_kv_up_proj``      the latent's norm → n heads of d + v  heads are cut
``linear_proj``            n heads of v → h                      heads are cut
=========================  ====================================  ==================

Under SP the down projections run on this rank's part of the sequence, so that the narrow latent vectors are gathered
and not the hidden states. Without SP every rank computes the same latent vectors; what the heads of all ranks send
back to them is summed in the backward pass of the linear that cuts the heads. The e shared features of the key go to
heads directly: their gradient on one rank is that of its own heads, and is summed here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnMaskType

from mindspeed_lora.config.shape import MLAShape, ModelShape
from mindspeed_lora.models.attention import CoreAttention
from mindspeed_lora.models.forward_context import ForwardContext
from mindspeed_lora.models.layer import AttentionSteps
from mindspeed_lora.models.linear import (
    ReplicatedLinear,
    UnbiasedColumnParallelLinear,
    UnbiasedRowParallelLinear,
)
from mindspeed_lora.models.mla_heads import keys_and_values, rotate_query
from mindspeed_lora.models.norm import RMSNorm
from mindspeed_lora.models.rope import yarn_magnitude
from mindspeed_lora.models.turns import Steps
from mindspeed_lora.parallel.context import ContextParallel

Tensor = torch.Tensor
LATENT_NORM_EPSILON = 1e-6
"""Of the norms of the latent vectors, whatever the others have: DeepSeek's own code and transformers' leave it so."""


def mla_softmax_scale(shape: ModelShape) -> float:
    """``1/√(d + e)``; with YaRN times the square of ``mscale_all_dim``'s magnitude, as in DeepSeek-V2's own code."""
    assert shape.mla is not None
    scale, scaling = shape.mla.head_size**-0.5, shape.rope_scaling
    if scaling is None or not scaling.mscale_all_dim:
        return scale
    return scale * yarn_magnitude(scaling.factor, scaling.mscale_all_dim) ** 2


class MLASelfAttention(AttentionSteps, torch.nn.Module):
    """Latent vectors, heads out of them, core attention, projection."""

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        shape: ModelShape,
        context_parallel: ContextParallel | None = None,
        **_of_megatron: Any,
    ) -> None:
        super().__init__()
        assert shape.mla is not None
        mla = self.mla = shape.mla
        self.config = config
        self.num_heads = shape.num_attention_heads // config.tensor_model_parallel_size
        self.checkpoint_core_attention = (
            config.recompute_granularity == "selective" and "core_attn" in config.recompute_modules
        )
        self.core_attention = CoreAttention(
            config,
            layer_number,
            AttnMaskType.causal,
            "self",
            softmax_scale=mla_softmax_scale(shape),
            context_parallel=context_parallel,
        )
        self._add_projections(shape, mla)
        self.linear_proj = UnbiasedRowParallelLinear(
            shape.proj_input_size,
            shape.hidden_size,
            config=config,
            init_method=config.output_layer_init_method,
            input_is_parallel=True,
            skip_bias_add=True,
        )

    def _add_projections(self, shape: ModelShape, mla: MLAShape) -> None:
        """In the order of the forward pass, which is that of the canonical names."""
        config, hidden, heads = self.config, shape.hidden_size, shape.num_attention_heads
        if mla.q_lora_rank is None:
            self.linear_q_proj = _cut_over_heads(hidden, heads * mla.head_size, config)
        else:
            self.linear_q_down_proj = ReplicatedLinear(hidden, mla.q_lora_rank, config)
            self.q_layernorm = RMSNorm(config, mla.q_lora_rank, LATENT_NORM_EPSILON)
            self.linear_q_up_proj = _cut_over_heads(mla.q_lora_rank, heads * mla.head_size, config)
        self.linear_kv_down_proj = ReplicatedLinear(
            hidden, mla.kv_lora_rank + mla.qk_pos_emb_head_dim, config
        )
        self.kv_layernorm = RMSNorm(config, mla.kv_lora_rank, LATENT_NORM_EPSILON)
        self.linear_kv_up_proj = _cut_over_heads(
            mla.kv_lora_rank, heads * (mla.qk_head_dim + mla.v_head_dim), config
        )

    def attend_steps(
        self, hidden_states: Tensor, rotary_pos_emb: Tensor | None, context: ForwardContext | None
    ) -> Steps[Tensor]:
        """What attention gives, ``[s, b, n · v]`` of this rank's heads, with a pause while the latents travel."""
        assert rotary_pos_emb is not None, "positions are rotary"
        cos, sin = rotary_pos_emb.unbind(0)
        mla = self.mla
        finish_query = self._begin_query(hidden_states, context)
        compressed, _ = self.linear_kv_down_proj(hidden_states, context)
        latent, shared = compressed.split([mla.kv_lora_rank, mla.qk_pos_emb_head_dim], dim=-1)
        finish_key_value = self.linear_kv_up_proj.begin(self.kv_layernorm(latent), context)
        shared = self._to_all_heads(shared)
        yield None
        query, _ = finish_query()
        key_value, _ = finish_key_value()
        query = rotate_query(self._heads(query), cos, sin, mla.rope_interleave)
        key, value = keys_and_values(
            self._heads(key_value), shared, mla.qk_head_dim, cos, sin, mla.rope_interleave
        )
        return self.attend(query, key, value, context)

    def _begin_query(
        self, hidden_states: Tensor, context: ForwardContext | None
    ) -> Callable[[], tuple[Tensor, Tensor | None]]:
        """Starts the queries of this rank's heads, ``[s, b, n · (d + e)]``, which what is returned ends."""
        if self.mla.q_lora_rank is None:
            return self.linear_q_proj.begin(hidden_states, context)
        latent, _ = self.linear_q_down_proj(hidden_states, context)
        return self.linear_q_up_proj.begin(self.q_layernorm(latent), context)

    def _to_all_heads(self, shared: Tensor) -> Tensor:
        """``[s, b, e]`` of the whole sequence, out of ``[s/t, b, e]`` under SP.

        Backward the sum over the ranks, whose heads each give a part of the gradient.
        """
        if self.config.tensor_model_parallel_size == 1:
            return shared
        spread = (
            gather_from_sequence_parallel_region
            if self.config.sequence_parallel
            else copy_to_tensor_model_parallel_region
        )
        whole: Tensor = spread(shared)
        return whole

    def _heads(self, projected: Tensor) -> Tensor:
        """``[s, b, n · w]`` as ``[s, b, n, w]``."""
        return projected.unflatten(-1, (self.num_heads, -1))


def _cut_over_heads(
    in_features: int, out_features: int, config: TransformerConfig
) -> UnbiasedColumnParallelLinear:
    return UnbiasedColumnParallelLinear(
        in_features,
        out_features,
        config=config,
        init_method=config.init_method,
        gather_output=False,
        skip_bias_add=False,
    )
