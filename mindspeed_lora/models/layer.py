"""One transformer layer: megatron-core's modules and names, its forward passes written for what we train.

``h + attention(norm(h))``, then ``h + mlp(norm(h))``, where what is added may have a norm and a factor of its own.
megatron-core's own forwards ask at every step for features that are not here (cross attention, CUDA graphs,
offloading), and cut, rotate and join by operations that copy.
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
from mindspeed_lora.models.norm import RMSNorm
from mindspeed_lora.models.rotation import rotate, split_and_rotate
from mindspeed_lora.models.swiglu import GATED
from mindspeed_lora.models.turns import Steps, by_turns, rows_by_turns, to_the_end

Tensor = torch.Tensor


def tokens_of_ranks(whole: Tensor, start: int, stop: int, ranks: int) -> Tensor:
    """Tokens ``start … stop`` of what each rank holds under SP, out of ``whole [s, …]``."""
    return whole.unflatten(0, (ranks, -1))[:, start:stop].flatten(0, 1)


def interleave_layers(model: torch.nn.Module, what: str | None) -> None:
    """Sets :attr:`TransformerLayer.interleave` of every layer of a model."""
    for module in model.modules():
        if isinstance(module, TransformerLayer):
            module.interleave = what


class TransformerLayer(MegatronTransformerLayer):
    """Norm, attention, norm, MLP, with residuals and hidden dropout.

    The passes are written as steps: a generator pauses where tokens travel, or where it lets those of another half
    micro-batch set out.
    """

    interleave: str | None = None
    """What goes through by turns, one half computed while the other travels: two halves of the rows (``rows``), or
    behind attention two halves of the tokens (``tokens``); None: nothing. A layer whose MLP
    ``needs_whole_micro_batch`` never does."""

    def __init__(
        self,
        config: TransformerConfig,
        *of_megatron: Any,
        post_norm: type[RMSNorm] | None = None,
        residual_scale: float = 1.0,
        **named: Any,
    ) -> None:
        super().__init__(config, *of_megatron, **named)
        sizes = config.hidden_size, config.layernorm_epsilon
        self.post_attn_norm = None if post_norm is None else post_norm(config, *sizes)
        self.post_mlp_layernorm = None if post_norm is None else post_norm(config, *sizes)
        self.residual_scale = residual_scale

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
        if self.takes_rows_by_turns and hidden_states.size(1) > 1:
            whole = hidden_states, rotary_pos_emb, packed_seq_params
            return rows_by_turns(self.steps, *whole, self.only_experts_travel), None
        attended = to_the_end(
            self.self_attention.attend_steps(
                self.input_layernorm(hidden_states), rotary_pos_emb, packed_seq_params
            )
        )
        if self._turns == "tokens" and hidden_states.size(0) > 1:
            return self._tokens_by_turns(attended, hidden_states, packed_seq_params), None
        return to_the_end(self._steps_behind_attention(attended, hidden_states, packed_seq_params)), None

    def _tokens_by_turns(
        self, attended: Tensor, hidden_states: Tensor, context: ForwardContext | None
    ) -> Tensor:
        """Behind attention no token looks at another one."""
        local, ranks = hidden_states.size(0), attended.size(0) // hidden_states.size(0)
        halves = []
        for start, stop in ((0, local // 2), (local // 2, local)):
            of_half = None if context is None else context.tokens(start, stop, ranks)
            halves.append(
                self._steps_behind_attention(
                    tokens_of_ranks(attended, start, stop, ranks), hidden_states[start:stop], of_half
                )
            )
        return torch.cat(by_turns(halves[0], halves[1], self.only_experts_travel))

    @property
    def _turns(self) -> str | None:
        return None if getattr(self.mlp, "needs_whole_micro_batch", False) else self.interleave

    @property
    def takes_rows_by_turns(self) -> bool:
        """Whether it takes two halves of the rows by turns."""
        return self._turns == "rows"

    @property
    def only_experts_travel(self) -> bool:
        """Whether nothing of a linear's travels, so that halves change at the pauses of experts alone."""
        return bool(self.config.tensor_model_parallel_size == 1)

    def steps(
        self, hidden_states: Tensor, rotary_pos_emb: Tensor | None, context: ForwardContext | None
    ) -> Steps[Tensor]:
        """:meth:`forward` of all tokens of its rows, with its pauses."""
        attended = yield from self.self_attention.attend_steps(
            self.input_layernorm(hidden_states), rotary_pos_emb, context
        )
        yield None
        return (yield from self._steps_behind_attention(attended, hidden_states, context))

    def _steps_behind_attention(
        self, attended: Tensor, hidden_states: Tensor, context: ForwardContext | None
    ) -> Steps[Tensor]:
        projected, bias = yield from self.self_attention.project_steps(attended, context)
        hidden_states = self._add(projected, bias, hidden_states, self.post_attn_norm)
        output, bias = yield from self.mlp.steps(self.pre_mlp_layernorm(hidden_states), context)
        return self._add(output, bias, hidden_states, self.post_mlp_layernorm)

    def _add(self, x: Tensor, bias: Tensor | None, residual: Tensor, norm: torch.nn.Module | None) -> Tensor:
        if bias is not None:
            x = x + bias
        if norm is not None:
            x = norm(x)
        if self.residual_scale != 1.0:
            x = x * self.residual_scale
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

    def steps(
        self, hidden_states: Tensor, _rotary_pos_emb: Tensor | None, _context: ForwardContext | None
    ) -> Steps[Tensor]:
        """As :meth:`TransformerLayer.steps`, without a pause."""
        yield from ()
        return hidden_states


class AttentionSteps:
    """The passes that every kind of self-attention has, beside what makes its query, key and value."""

    core_attention: Any
    linear_proj: Any
    checkpoint_core_attention: bool
    training: bool

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        rotary_pos_emb: Tensor | None = None,
        packed_seq_params: ForwardContext | None = None,
        **_unused: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """``[s, b, h]`` (under SP ``[s/t, b, h]``) to the same shape, and the bias that is left to the caller."""
        attended = to_the_end(self.attend_steps(hidden_states, rotary_pos_emb, packed_seq_params))
        return to_the_end(self.project_steps(attended, packed_seq_params))

    def attend_steps(
        self, hidden_states: Tensor, rotary_pos_emb: Tensor | None, context: ForwardContext | None
    ) -> Steps[Tensor]:
        """What attention gives, ``[s, b, n · d]`` of this rank's heads, with a pause while the input travels."""
        raise NotImplementedError

    def project_steps(
        self, attended: Tensor, context: ForwardContext | None
    ) -> Steps[tuple[Tensor, Tensor | None]]:
        """``linear_proj`` and the bias that is left to the caller, with a pause while its output travels."""
        finish = self.linear_proj.begin(attended, context)
        yield None
        output: tuple[Tensor, Tensor | None] = finish()
        return output

    def attend(self, query: Tensor, key: Tensor, value: Tensor, context: ForwardContext | None) -> Tensor:
        """Core attention, recomputed in backward where that is asked for; ``[s, b, n, d]`` to ``[s, b, n · d]``."""
        if not (self.checkpoint_core_attention and self.training):
            return self._attend(query, key, value, context)
        attended: Tensor = tensor_parallel.checkpoint(
            lambda q, k, v: self._attend(q, k, v, context), False, query, key, value
        )
        return attended

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, context: ForwardContext | None) -> Tensor:
        attended: Tensor = self.core_attention(query, key, value, None, packed_seq_params=context)
        return attended


class SelfAttention(AttentionSteps, MegatronSelfAttention):
    """Fused projection, rotation, core attention, projection."""

    def __init__(self, *of_megatron: Any, rotary_interleaved: bool = False, **named: Any) -> None:
        super().__init__(*of_megatron, **named)
        self.rotary_interleaved = rotary_interleaved

    def attend_steps(
        self, hidden_states: Tensor, rotary_pos_emb: Tensor | None, context: ForwardContext | None
    ) -> Steps[Tensor]:
        """What attention gives, ``[s, b, n · d]`` of this rank's heads, with a pause while the input travels."""
        assert rotary_pos_emb is not None, "positions are rotary"
        finish = self.linear_qkv.begin(hidden_states, context)
        yield None
        qkv, _ = finish()
        return self.attend(*self._split(qkv, *rotary_pos_emb.unbind(0)), context)

    def _split(self, qkv: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Query ``[s, b, n, d]``, key and value ``[s, b, g, d]`` of ``qkv [s, b, (n + 2 g) · d]``, rotated."""
        groups, width = self.num_query_groups_per_partition, self.hidden_size_per_attention_head
        qkv = qkv.view(*qkv.shape[:2], groups, -1, width)
        if self.q_layernorm is None:
            return split_and_rotate(qkv, cos, sin, self.rotary_interleaved)
        query = qkv[:, :, :, :-2].reshape(*qkv.shape[:2], -1, width)
        query, key = self.q_layernorm(query), self.k_layernorm(qkv[:, :, :, -2])
        pairs = self.rotary_interleaved
        return rotate(query, cos, sin, pairs), rotate(key, cos, sin, pairs), qkv[:, :, :, -1]


class MLP(MegatronMLP):
    """``linear_fc1``, the gated activation, ``linear_fc2``, none with a bias.

    The linears are named here and not in a specification: megatron-core warns of one for a class not its own.
    """

    linears = MLPSubmodules(linear_fc1=UnbiasedColumnParallelLinear, linear_fc2=UnbiasedRowParallelLinear)

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config, submodules=self.linears, ffn_hidden_size=config.ffn_hidden_size)
        self.gated = GATED[config.activation_func]

    def forward(
        self, hidden_states: Tensor, packed_seq_params: ForwardContext | None = None, **_unused: Any
    ) -> tuple[Tensor, Tensor | None]:
        """``[s, b, h]`` (under SP ``[s/t, b, h]``) to the same shape, and the bias that is left to the caller."""
        return to_the_end(self.steps(hidden_states, packed_seq_params))

    def steps(
        self, hidden_states: Tensor, context: ForwardContext | None
    ) -> Steps[tuple[Tensor, Tensor | None]]:
        """:meth:`forward`, with a pause while its input and while its output travels, and before its output does."""
        finish = self.linear_fc1.begin(hidden_states, context)
        yield None
        gate_up, bias = finish()
        if bias is not None:
            gate_up = gate_up + bias
        activated = self.gated(gate_up)
        yield None
        finish = self.linear_fc2.begin(activated, context)
        yield None
        output: tuple[Tensor, Tensor | None] = finish()
        return output


class BiasedMLP(MLP):
    """With biases (Llama's ``mlp_bias``)."""

    linears = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
