"""Single rows of the vocabulary that are trained while the others stay frozen: those of added tokens.

The rows are a parameter of their own, ``[n, h]``, whole on every TP rank: they stand in the place of the rows that the
frozen tensor has for these tokens. A rank looks up, and multiplies with, only those that lie in its part of the
vocabulary; the gradient is a partial sum over TP.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.layers import VocabParallelEmbedding
from megatron.core.tensor_parallel.mappings import (
    reduce_from_tensor_model_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)

Tensor = torch.Tensor


class TokenRows(torch.nn.Module):
    """The trained rows of one vocabulary tensor, or of a tied embedding and output layer.

    Args:
        tokens: the token of each row.
        vocab_range: the tokens of this TP rank's part of the vocabulary.
        like: the frozen tensor, for width, dtype and device.
    """

    def __init__(self, tokens: Sequence[int], vocab_range: tuple[int, int], like: Tensor) -> None:
        super().__init__()
        self.token_rows = torch.nn.Parameter(
            torch.empty(len(tokens), like.size(1), dtype=like.dtype, device=like.device)
        )
        first, end = vocab_range
        with torch.device("cpu"):
            self._tokens, self._order = torch.tensor(tokens).sort()
            mine = [(row, token - first) for row, token in enumerate(tokens) if first <= token < end]
            self._mine = torch.tensor([row for row, _ in mine], dtype=torch.int64)
            self._columns = torch.tensor([column for _, column in mine], dtype=torch.int64)

    def find(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """For ``tokens [b, s]`` the row of each, 0 where it has none, and whether it has one."""
        self._move_to(tokens.device)
        place = torch.searchsorted(self._tokens, tokens).clamp_(max=self._tokens.numel() - 1)
        found = self._tokens[place] == tokens
        return torch.where(found, self._order[place], 0), found

    def in_output(self) -> tuple[Tensor, Tensor]:
        """The rows ``[m, h]`` of this rank's part of the vocabulary, and their places ``[m]`` in it."""
        self._move_to(self.token_rows.device)
        return self.token_rows.index_select(0, self._mine), self._columns

    def _move_to(self, device: torch.device) -> None:
        """Keeps the tables where they are used: modules are made without a device, and copying makes the host wait."""
        if self._tokens.device != device:
            for name in ("_tokens", "_order", "_mine", "_columns"):
                setattr(self, name, getattr(self, name).to(device))


class TokenRowsEmbedding(torch.nn.Module):
    """A frozen vocabulary-parallel embedding in which some tokens have trained rows."""

    def __init__(self, base_layer: VocabParallelEmbedding, rows: TokenRows) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.rows = rows

    @property
    def weight(self) -> torch.nn.Parameter:
        """The frozen rows ``[v/t, h]``, which a tied output layer asks for."""
        return self.base_layer.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """``[b, s]`` to ``[b, s, h]``, under sequence parallelism ``[s/t, b, h]``."""
        base = self.base_layer
        here = (tokens >= base.vocab_start_index) & (tokens < base.vocab_end_index)
        frozen = F.embedding(torch.where(here, tokens - base.vocab_start_index, 0), base.weight)
        index, found = self.rows.find(tokens)
        rows = F.embedding(index, self.rows.token_rows)
        output = torch.where(found.unsqueeze(-1), rows, frozen) * here.unsqueeze(-1)
        if base.reduce_scatter_embeddings:
            output = output.transpose(0, 1).contiguous()
            return reduce_scatter_to_sequence_parallel_region(output, group=base.tp_group)
        return reduce_from_tensor_model_parallel_region(output, group=base.tp_group)
