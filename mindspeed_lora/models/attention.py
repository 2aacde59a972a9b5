"""Core attention on fused kernels: varlen on CUDA, tile by tile on the CPU, grouped queries without copies.

megatron-core's own ``DotProductAttention`` materialises the ``[b, n, s, s]`` scores and needs a mask tensor.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.transformer import TransformerConfig

from mindspeed_lora.device.attention import rows_at_once
from mindspeed_lora.device.capped_attention import capped_attention
from mindspeed_lora.models.attention_tiles import SubRows, attention_tiles
from mindspeed_lora.models.context_attention import (
    heads_for_positions,
    positions_for_heads,
    ring_attention,
)
from mindspeed_lora.models.forward_context import ForwardContext
from mindspeed_lora.models.tiled_attention import (
    dropped_attention,
    heads_first,
    positions_first,
    tiled_attention,
)
from mindspeed_lora.parallel.context import ContextParallel

Tensor = torch.Tensor


class KeyValueCache(Protocol):
    """What generation puts into :attr:`CoreAttention.cache` to keep the keys and values of earlier tokens."""

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Adds keys ``[s, b, g, d]`` and values ``[s, b, g, v]``.

        Returns the keys ``[t, b, g, d]`` and values ``[t, b, g, v]`` to attend to, and a boolean mask
        ``[b, 1, s, t]`` (True: may be attended), or None for plain causal attention over ``s == t``, or of one token
        over all ``t``.
        """
        ...


class CoreAttention(torch.nn.Module):
    """Causal softmax attention of queries over keys and values, ``softmax(q kᵀ / √d) v``.

    Rows are padded on the right only, so that the causal mask also keeps padding away from real tokens.
    Attention does not cross the sub-rows of a packed row. With ``sliding_window`` w, position i sees positions
    i − w + 1 … i. With ``softcap`` c, the scores z are ``c tanh(z / c)``.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: Any,
        attention_type: str,
        softmax_scale: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        context_parallel: ContextParallel | None = None,
        **_unused: Any,
    ) -> None:
        super().__init__()
        self.layer_number = layer_number
        self.dropout = config.attention_dropout
        self.sequence_parallel = config.sequence_parallel
        self.scale = config.kv_channels**-0.5 if softmax_scale is None else softmax_scale
        self.sliding_window = sliding_window
        self.softcap = softcap
        self.context = context_parallel or ContextParallel()
        self.cache: KeyValueCache | None = None

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        packed_seq_params: ForwardContext | None = None,
        **_unused: Any,
    ) -> Tensor:
        """Attention of ``query [s, b, n, d]`` over ``key [s, b, g, d]`` and ``value [s, b, g, v]``, n a multiple of g.

        Under context parallelism the positions are those that this rank holds of each row.

        Returns:
            ``[s, b, n · v]`` in the dtype of the query.
        """
        if self.cache is not None:
            return self._attend_to_cache(query, key, value, self.cache)
        sub_rows = None if packed_seq_params is None else packed_seq_params.sub_rows
        query, key, value = heads_for_positions(query, key, value, self.context)
        window = self._window(query.size(0) * self.context.ring_size)
        if self.context.ring_size > 1:
            out = ring_attention(query, key, value, self.context, sub_rows, window, self.scale, self.softcap)
        else:
            out = self._attend(query, key, value, sub_rows, window)
        return positions_for_heads(out, self.context)

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, sub_rows: SubRows | None, window: int | None
    ) -> Tensor:
        """:meth:`forward` over rows that are whole here."""
        chunks = ((0, query.size(0)),)
        tiles = attention_tiles(query.size(1), sub_rows, chunks, chunks, window)
        if self.dropout > 0.0 and self.training:
            with self._dropout_stream():
                return dropped_attention(query, key, value, tiles, self.scale, self.dropout, self.softcap)
        out = rows_at_once(query, key, value, sub_rows, window, self.scale, self.softcap)
        if out is not None:
            return out.flatten(2)
        return tiled_attention(query, key, value, tiles, self.scale, self.softcap)

    def _window(self, num_positions: int) -> int | None:
        """The sliding window where it hides anything."""
        window = self.sliding_window
        return None if window is None or window >= num_positions else window

    def _attend_to_cache(self, query: Tensor, key: Tensor, value: Tensor, cache: KeyValueCache) -> Tensor:
        key, value, mask = cache.extend(key, value)
        mask = self._window_mask(query, key, mask)
        q, k, v = map(heads_first, (query, key, value))
        if self.softcap is not None:
            causal = mask is None and query.size(0) > 1
            out = capped_attention(q, k, v, causal, mask, self.scale, self.softcap)
            return positions_first(out).flatten(2)
        out = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=mask,
            is_causal=mask is None and query.size(0) > 1,
            scale=self.scale,
            enable_gqa=query.size(2) != key.size(2),
        )
        return positions_first(out).flatten(2)

    def _dropout_stream(self) -> AbstractContextManager[None]:
        # Each TP rank has other heads and must drop other elements; under SP the whole block runs in that stream.
        if self.dropout == 0.0 or not self.training or self.sequence_parallel:
            return nullcontext()
        stream: AbstractContextManager[None] = get_cuda_rng_tracker().fork()
        return stream

    def _window_mask(self, query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor | None:
        """The given mask, or the causal one, cut to the window; None where plain causal attention is meant."""
        window, new, total = self.sliding_window, query.size(0), key.size(0)
        if window is None or total <= window:
            return mask
        last = torch.arange(total - new, total, device=query.device).unsqueeze(1)
        seen = torch.arange(total, device=query.device).unsqueeze(0)
        in_window = (seen > last - window) & (seen <= last)
        return in_window if mask is None else mask & in_window
