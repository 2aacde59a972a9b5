"""The keys and values of earlier tokens: preallocated, so that a decode step computes its own token only.

Letters: b rows of the batch, s new tokens, t tokens so far, g local key/value heads, d width of a head.
Rows of unequal length are padded on the left; slot j of a row with p padding slots holds its position j − p. Rows that
begin alike may share what is computed of that beginning (:meth:`KeyValueCache.branch`): it takes the first slots, and
the padding follows it.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from mindspeed_lora.models.attention import CoreAttention
from mindspeed_lora.models.gpt import GPTModel

Tensor = torch.Tensor


class KeyValueCache:
    """The cache of one batch on this rank: its layers, how far it is filled, and what may be attended.

    Args:
        padding: number of padding slots before each row, ``[b]`` int64 on the model's device.
        capacity: most slots that a row will need, padding included.
        shared: slots that are filled already; the padding is behind them.
    """

    def __init__(self, padding: Tensor, capacity: int, shared: int = 0) -> None:
        self.padding = padding
        self.padded = bool(padding.any())
        self.capacity = capacity
        self.shared = shared
        self.start = shared
        self.stop = shared
        self.mask: Tensor | None = None
        self.layers: list[LayerCache] = []

    def advance(self, new: int) -> Tensor:
        """Makes room for ``new`` tokens per row; returns their positions, ``[s]`` or ``[b, s]`` int64."""
        self.start, self.stop = self.stop, self.stop + new
        assert self.stop <= self.capacity, f"{self.stop} tokens for a cache of {self.capacity}"
        slots = torch.arange(self.start, self.stop, device=self.padding.device)
        # One token sees all that is there; tokens without anything before them are what plain causal attention means.
        self.mask = self._mask(slots) if self.padded or (new > 1 and self.start > 0) else None
        if not self.padded:
            return slots
        # Padding slots take the position behind what is shared; nothing attends to them.
        behind = (slots - self.padding.unsqueeze(1)).clamp(min=self.shared)
        return torch.where(slots < self.shared, slots, behind)

    def restart(self) -> None:
        """Forgets all tokens, which come again: what was computed of them no longer holds."""
        assert self.shared == 0, "what is shared is not computed here"
        self.start = self.stop = 0

    def select(self, rows: Tensor) -> None:
        """Row i goes on as what was row ``rows[i]``; ``rows [n]`` int64 may name rows twice, or not at all."""
        self.padding = self.padding[rows]
        for layer in self.layers:
            layer.select(rows)

    def branch(self, padding: Tensor, capacity: int) -> KeyValueCache:
        """A cache of ``[b]`` rows that all begin as this one's only row does; this one stays as it is.

        Args:
            padding: of each row, behind the shared beginning.
            capacity: most slots of a row, the shared ones included.
        """
        assert not self.padded and self.padding.size(0) == 1, (
            "rows share the beginning of one row without padding"
        )
        branched = KeyValueCache(padding, capacity, shared=self.stop)
        branched.layers = [layer.branch(branched) for layer in self.layers]
        return branched

    def _mask(self, slots: Tensor) -> Tensor:
        """``[b, 1, s, t]``: earlier slots of the row that hold a token.

        A padding slot attends to itself: a softmax over nothing would be NaN, and NaN times the weight 0 that
        others give it is NaN.
        """
        queries, keys = slots.unsqueeze(1), torch.arange(self.stop, device=slots.device).unsqueeze(0)
        is_token = (keys < self.shared) | (keys >= self.shared + self.padding.view(-1, 1, 1))
        return ((keys <= queries) & (is_token | (keys == queries))).unsqueeze(1)

    @contextmanager
    def attached(self, model: GPTModel) -> Iterator[None]:
        """The model's attention reads and fills this cache inside of the block."""
        attentions = [module for module in model.modules() if isinstance(module, CoreAttention)]
        if not self.layers:
            self.layers = [LayerCache(self, attention.sliding_window) for attention in attentions]
        for attention, layer in zip(attentions, self.layers, strict=True):
            attention.cache = layer
        try:
            yield
        finally:
            for attention in attentions:
                attention.cache = None


class LayerCache:
    """The keys ``[b, g, capacity, d]`` and values ``[b, g, capacity, v]`` of one layer.

    Of multi-latent attention these are the heads' own, not the latent vector: a decode step expands one token only.
    """

    def __init__(self, batch: KeyValueCache, sliding_window: int | None) -> None:
        # Were it held from here too, the memory of a batch would wait for the collector of cycles.
        self._batch = weakref.ref(batch)
        self.sliding_window = sliding_window
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    @property
    def batch(self) -> KeyValueCache:
        """What this is a layer of."""
        batch = self._batch()
        assert batch is not None, "a layer is used while its cache is there"
        return batch

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Adds keys and values; see :class:`mindspeed_lora.models.attention.KeyValueCache`.

        One new token of a layer with a window of w gets the last w slots only.
        """
        batch = self.batch
        if self.keys is None or self.values is None:
            size = (key.size(1), key.size(2), batch.capacity)
            self.keys, self.values = (tensor.new_empty(*size, tensor.size(3)) for tensor in (key, value))
        new = slice(batch.start, batch.stop)
        self.keys[:, :, new] = key.permute(1, 2, 0, 3)
        self.values[:, :, new] = value.permute(1, 2, 0, 3)
        windowed = self.sliding_window is not None and key.size(0) == 1
        first = max(0, batch.stop - self.sliding_window) if windowed and self.sliding_window else 0
        seen = slice(first, batch.stop)
        mask = None if batch.mask is None else batch.mask[..., first:]
        return self.keys[:, :, seen].permute(2, 0, 1, 3), self.values[:, :, seen].permute(2, 0, 1, 3), mask

    def select(self, rows: Tensor) -> None:
        """See :meth:`KeyValueCache.select`."""
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self._selected(self.keys, rows), self._selected(self.values, rows)

    def _selected(self, tensor: Tensor, rows: Tensor) -> Tensor:
        """What is filled of these rows; in place where there are as many as before, as in every step of a search."""
        filled = tensor[rows, :, : self.batch.stop]
        if len(rows) != tensor.size(0):
            tensor = tensor.new_empty(len(rows), *tensor.shape[1:])
        tensor[:, :, : self.batch.stop] = filled
        return tensor

    def branch(self, batch: KeyValueCache) -> LayerCache:
        """The layer of a branched cache, with a copy of the shared slots."""
        branched = LayerCache(batch, self.sliding_window)
        if self.keys is not None and self.values is not None:
            branched.keys, branched.values = (
                self._spread(tensor, batch) for tensor in (self.keys, self.values)
            )
        return branched

    @staticmethod
    def _spread(tensor: Tensor, batch: KeyValueCache) -> Tensor:
        """``[1, g, t, d]`` in the first slots of ``[b, g, capacity, d]``."""
        spread = tensor.new_empty(batch.padding.size(0), tensor.size(1), batch.capacity, tensor.size(3))
        spread[:, :, : batch.shared] = tensor[:, :, : batch.shared]
        return spread
