"""One transformer layer: megatron-core's modules and names, its forward passes written for what we train.

``h + attention(norm(h))``, then ``h + mlp(norm(h))``. megatron-core's own forwards ask at every step for features
that are not here (cross attention, CUDA graphs, offloading), and cut, rotate and join by operations that copy.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.attention import SelfAttention as MegatronSelfAttention
from megatron.core.transformer.mlp import MLP as MegatronMLP
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer as MegatronTransformerLayer

from mindspeed_lora.models.forward_context import ForwardContext
from mindspeed_lora.models.linear import (
    ColumnParallelLinear,
    RowParallelLinear,
    UnbiasedColumnParallelLinear,
    UnbiasedRowParallelLinear,
)
from mindspeed_lora.models.rotation import rotate, split_and_rotate
from mindspeed_lora.models.swiglu import swiglu

Tensor = torch.Tensor


class TransformerLayer(MegatronTransformerLayer):
    """Norm, attention, norm, MLP, with residuals and hidden dropout."""

    def forward(
        self,
        hidden_states: Tensor,
        rotary_pos_emb: Tensor | None = None,
        packed_seq_params: ForwardContext | None = None,
        **_unused: Any,
    ) -> tuple[Tensor, None]:
        """One micro-batch through the layer.

        Args:
            hidden_states: ``[s, b, h]``, under SP ``[s/t, b, h]``.
            rotary_pos_emb: cosine and sine of the positions, ``[2, s, b or 1, 1, d/2]``.
            packed_seq_params: the context of the micro-batch.
        """
        attended, bias = self.self_attention(
            self.input_layernorm(hidden_states),
            rotary_pos_emb=rotary_pos_emb,
            packed_seq_params=packed_seq_params,
        )
        hidden_states = self._add(attended, bias, hidden_states)
        output, bias = self.mlp(self.pre_mlp_layernorm(hidden_states), packed_seq_params=packed_seq_params)
        return self._add(output, bias, hidden_states), None

    def _add(self, x: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
        if bias is not None:
            x = x + bias
        if self.training and self.hidden_dropout > 0.0:
            x = F.dropout(x, self.hidden_dropout)
        return x + residual


class NoopLayer(torch.nn.Module):
    """A layer that does nothing, which fills up a pipeline stage."""

    def __init__(self, **_of_a_layer: Any) -> None:
        super().__init__()

    def forward(self, hidden_states: Tensor, **_of_a_layer: Any) -> tuple[Tensor, None]:
        """Returns ``hidden_states [s, b, h]`` as they are."""
        return hidden_states, None


class SelfAttention(MegatronSelfAttention):
    """Fused projection, rotation, core attention, projection."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        rotary_pos_emb: Tensor | None = None,
        packed_seq_params: ForwardContext | None = None,
        **_unused: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """``[s, b, h]`` (under SP ``[s/t, b, h]``) to the same shape, and the bias that is left to the caller."""
        assert rotary_pos_emb is not None, "positions are rotary"
        qkv, _ = self.linear_qkv(hidden_states, packed_seq_params)
        query, key, value = self._split(qkv, *rotary_pos_emb.unbind(0))
        attend = (
            self._recomputed_attention if self.checkpoint_core_attention and self.training else self._attend
        )
        output: tuple[Tensor, Tensor | None] = self.linear_proj(
            attend(query, key, value, packed_seq_params), packed_seq_params
        )
        return output

    def _split(self, qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query ``[s, b, n, d]``, key and value ``[s, b, g, d]`` of ``qkv [s, b, (n + 2 g) · d]``, rotated."""
        groups, width = self.num_query_groups_per_partition, self.hidden_size_per_attention_head
        qkv = qkv.view(*qkv.shape[:2], groups, -1, width)
        if self.q_layernorm is None:
            return split_and_rotate(qkv, cos, sin)
        query = qkv[:, :, :, :-2].reshape(*qkv.shape[:2], -1, width)
        query, key = self.q_layernorm(query), self.k_layernorm(qkv[:, :, :, -2])
        return rotate(query, cos, sin), rotate(key, cos, sin), qkv[:, :, :, -1]

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, context: ForwardContext | None) -> Tensor:
        attended: Tensor = self.core_attention(query, key, value, None, packed_seq_params=context)
        return attended

    def _recomputed_attention(
        self, query: Tensor, key: Tensor, value: Tensor, context: ForwardContext | None
    ) -> Tensor:
        attended: Tensor = tensor_parallel.checkpoint(
            lambda q, k, v: self._attend(q, k, v, context), False, query, key, value
        )
        return attended


class MLP(MegatronMLP):
    """``linear_fc1``, SwiGLU, ``linear_fc2``, none with a bias.

    The linears are named here and not in a specification: megatron-core warns of one for a class not its own.
    """

    linears = MLPSubmodules(linear_fc1=UnbiasedColumnParallelLinear, linear_fc2=UnbiasedRowParallelLinear)

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config, submodules=self.linears, ffn_hidden_size=config.ffn_hidden_size)

    def forward(
        self, hidden_states: Tensor, packed_seq_params: ForwardContext | None = None, **_unused: Any
    ) -> tuple[Tensor, Tensor | None]:
        """``[s, b, h]`` (under SP ``[s/t, b, h]``) to the same shape, and the bias that is left to the caller."""
        gate_up, bias = self.linear_fc1(hidden_states, packed_seq_params)
        if bias is not None:
            gate_up = gate_up + bias
        output: tuple[Tensor, Tensor | None] = self.linear_fc2(swiglu(gate_up), packed_seq_params)
        return output


class BiasedMLP(MLP):
    """With biases (Llama's ``mlp_bias``)."""

    linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
