"""The mixture of experts in place of a layer's MLP."""

from __future__ import annotations

import torch
from megatron.core.transformer import TransformerConfig

from mindspeed_lora.config.shape import MoEShape
from mindspeed_lora.models.forward_context import ForwardContext
from mindspeed_lora.models.moe.aux_losses import TokenPlace
from mindspeed_lora.models.moe.dispatch import Dispatch
from mindspeed_lora.models.moe.experts import Experts
from mindspeed_lora.models.moe.router import Router
from mindspeed_lora.models.moe.settings import MoESettings
from mindspeed_lora.models.moe.shared_experts import SharedExperts
from mindspeed_lora.models.moe.token_slices import join_slices, slice_bounds, take_slice
from mindspeed_lora.models.turns import EXPERTS, Steps, to_the_end
from mindspeed_lora.parallel.groups import ParallelGroups

Tensor = torch.Tensor


class MoELayer(torch.nn.Module):
    """Router, experts and shared experts; called and stepped through like an MLP.

    Each rank routes its own tokens: under SP its shard, otherwise its slice of those that all TP ranks have. While
    they travel the shared experts compute: their first half on the way to the experts, their second on the way back.
    """

    def __init__(
        self,
        config: TransformerConfig,
        moe: MoEShape,
        groups: ParallelGroups,
        settings: MoESettings | None = None,
    ) -> None:
        super().__init__()
        settings = settings or MoESettings()
        self.moe, self.groups, self.settings = moe, groups, settings
        self.sequence_parallel = config.sequence_parallel
        self.router = Router(config, moe, groups, settings)
        self.experts = Experts(config, moe, groups.experts, settings.recompute_activation)
        self.shared_experts = SharedExperts(config, moe) if moe.shared_ffn_hidden_size else None

    @property
    def needs_whole_micro_batch(self) -> bool:
        """Whether a micro-batch must not be computed in halves."""
        return self.settings.looks_at_all_tokens

    def forward(
        self, hidden_states: Tensor, packed_seq_params: ForwardContext | None = None
    ) -> tuple[Tensor, None]:
        """``[s, b, h]`` (under SP ``[s/t, b, h]``) to the same shape, and no bias."""
        return to_the_end(self.steps(hidden_states, packed_seq_params))

    def steps(self, hidden_states: Tensor, context: ForwardContext | None) -> Steps[tuple[Tensor, None]]:
        """:meth:`forward`, with a pause while tokens travel, before outputs do, and while they do."""
        tokens, place = self._own(hidden_states)
        routing = self.router(tokens, place, None if context is None else context.aux_loss_scale)
        keys = self._keys(context)
        dispatch = Dispatch(tokens, routing, self.moe.num_experts, self.groups.experts, keys)
        shared = _Shared(self.shared_experts, hidden_states, context)
        shared.advance()
        compute = self.experts.begin()
        yield EXPERTS
        shared.advance()
        outputs = compute(dispatch.arrive())
        yield None
        dispatch.send_back(outputs)
        shared.advance()
        yield EXPERTS
        shared.advance()
        output = self._whole(dispatch.combine(), hidden_states)
        return (output if shared.output is None else output + shared.output), None

    @property
    def _is_sliced(self) -> bool:
        return self.groups.tp_size > 1 and not self.sequence_parallel

    def _own(self, hidden_states: Tensor) -> tuple[Tensor, TokenPlace]:
        """The tokens ``[T, h]`` that this rank routes, and which they are of the micro-batch."""
        tokens, rows = hidden_states.reshape(-1, hidden_states.size(-1)), hidden_states.size(1)
        total, first = tokens.size(0) * self.groups.context.size, 0
        if self._is_sliced:
            first, _ = slice_bounds(tokens.size(0), self.groups.tp_group)
            tokens = take_slice(tokens, self.groups.tp_group)
        elif self.sequence_parallel:
            total *= self.groups.tp_size
        return tokens, TokenPlace(first, rows, total)

    def _whole(self, tokens: Tensor, like: Tensor) -> Tensor:
        """The inverse of :meth:`_own`, in the shape of ``like``."""
        if self._is_sliced:
            tokens = join_slices(tokens, like[..., 0].numel(), self.groups.tp_group)
        return tokens.view(like.shape)

    def _keys(self, context: ForwardContext | None) -> Tensor | None:
        """Dropout keys ``[T]`` of the tokens that this rank routes, where the experts' adapters drop."""
        drops = self.training and any(
            getattr(linear, "dropout", 0.0) > 0.0
            for linear in (self.experts.linear_fc1, self.experts.linear_fc2)
        )
        if not drops or context is None or context.token_keys is None:
            return None
        keys = context.token_keys.reshape(-1)  # of the whole rows, under SP too
        if self.sequence_parallel:
            return keys.chunk(self.groups.tp_size)[self.groups.tp_rank]
        if self._is_sliced:
            return keys[slice(*slice_bounds(keys.numel(), self.groups.tp_group))]
        return keys


class _Shared:
    """The shared experts' steps, or nothing where there are none."""

    def __init__(
        self, module: SharedExperts | None, hidden_states: Tensor, context: ForwardContext | None
    ) -> None:
        self.output: Tensor | None = None
        self._steps = None if module is None else module.steps(hidden_states, context)

    def advance(self) -> None:
        """Up to the next pause, or the end."""
        if self._steps is None:
            return
        try:
            next(self._steps)
        except StopIteration as ended:
            self.output, _ = ended.value
