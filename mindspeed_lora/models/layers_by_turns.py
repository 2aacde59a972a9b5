"""All layers of a chunk, two halves of the rows by turns, joined behind the last one alone.

Where halves are joined behind every layer, the second one waits there for its experts' outputs, a quarter of all that
travels, with nothing left to compute. Here it waits behind the last layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from mindspeed_lora.models.forward_context import ForwardContext
from mindspeed_lora.models.layer import TransformerLayer
from mindspeed_lora.models.turns import Steps, rows_by_turns

Tensor = torch.Tensor


def goes_by_turns(decoder: Any, rows: int) -> bool:
    """Whether the layers of megatron-core's block take halves of a micro-batch of so many rows all the way.

    Not where each layer is computed again in the backward pass, which must then join them, nor where linears' inputs
    travel too (the turns of those are a layer's own), nor where a layer must see all rows at once.
    """
    recomputed = decoder.training and decoder.config.recompute_granularity == "full"
    layers = [layer for layer in decoder.layers if isinstance(layer, TransformerLayer)]
    return (
        rows > 1
        and not recomputed
        and len(layers) > 1
        and all(layer.takes_rows_by_turns and layer.only_experts_travel for layer in layers)
    )


def decode_by_turns(
    decoder: Any, hidden_states: Tensor, rotary_pos_emb: Tensor | None, context: ForwardContext | None
) -> Tensor:
    """The forward pass of megatron-core's block on ``hidden_states [s, b, h]``, its final norm included."""
    through = partial(_through, list(decoder.layers))
    hidden_states = rows_by_turns(through, hidden_states, rotary_pos_emb, context, only_experts=True)
    if decoder.final_layernorm is not None:
        hidden_states = decoder.final_layernorm(hidden_states)
    return hidden_states


def _through(
    layers: Sequence[Any],
    hidden_states: Tensor,
    rotary_pos_emb: Tensor | None,
    context: ForwardContext | None,
) -> Steps[Tensor]:
    for layer in layers:
        hidden_states = yield from layer.steps(hidden_states, rotary_pos_emb, context)
    return hidden_states
