"""What the layers must know of the micro-batch that they compute, beside its hidden states.

It travels as an argument, in the place of megatron-core's ``packed_seq_params``, and is never kept on a module:
recomputation and interleaved stages run a layer for one micro-batch while others are under way.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class ForwardContext:
    """One micro-batch ``[b, s]``."""

    sub_rows: tuple[tuple[int, ...], ...] | None = None
    """For each of the b rows the lengths of its sub-rows, in order, summing to s: attention does not cross
    them. None: every row is one."""
    token_keys: torch.Tensor | None = None
    """``[s, b]`` int64, what names a token in any layout (sample of the run and position in it): the counter of
    the adapters' dropout. None: nothing is dropped."""
    aux_loss_scale: torch.Tensor | float | None = None
    """On the gradients of the routers' auxiliary losses of this micro-batch; None: they are not computed."""
    qkv_format: str = "sbhd"
    """megatron-core asks this: rows are a dimension of their own, packed or not."""

    def rows(self, start: int, stop: int) -> ForwardContext:
        """That of rows ``start … stop`` of the micro-batch alone."""
        return replace(
            self,
            sub_rows=None if self.sub_rows is None else self.sub_rows[start:stop],
            token_keys=None if self.token_keys is None else self.token_keys[:, start:stop],
        )

    def tokens(self, start: int, stop: int, ranks: int) -> ForwardContext:
        """That of tokens ``start … stop`` of each rank's share of the rows, for what looks at single tokens only."""
        keys = self.token_keys
        if keys is not None:
            keys = keys.unflatten(0, (ranks, -1))[:, start:stop].flatten(0, 1)
        return replace(self, sub_rows=None, token_keys=keys)
