"""One forward pass through the pipeline stages of one replica, as generation and scoring need it.

Every rank of the replica calls with the same tokens. Replicas of a model whose experts are cut over more ranks than one
replica has (expert parallelism beyond TP) meet in every layer: all of them must take the same passes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mindspeed_lora.device import current_device
from mindspeed_lora.models.gpt import GPTModel
from mindspeed_lora.parallel.collectives import all_reduce_max, broadcast, receive, send
from mindspeed_lora.parallel.groups import ParallelGroups

Tensor = torch.Tensor


class StagedModel:
    """A model that is cut over the ranks of the groups."""

    def __init__(self, model: GPTModel, groups: ParallelGroups) -> None:
        self.model = model.eval()
        self.groups = groups
        # Expert ranks are neighbours, as tensor-parallel ones are.
        self.meets_others = groups.tp_size % groups.experts.size != 0
        """Whether replicas share experts, so that all must take the same passes."""

    @property
    def decides(self) -> bool:
        """True on the one rank of the replica that chooses for it: the first that has logits."""
        return self.groups.is_last_stage and self.groups.tp_rank == 0

    @property
    def switch(self) -> int | None:
        """The length beyond which a row has other rotary frequencies (longrope); None: there is none."""
        return self.model.rotary.switch

    def logits(self, tokens: Tensor, positions: Tensor, lengths: Tensor | None = None) -> Tensor | None:
        """Logits ``[b, v]`` after the last of ``tokens [b, s]`` on the last stage, None on the others.

        ``lengths``, ``[b, 1]`` or ``[1]`` int64, are those of the rows as far as their rotation depends on them; None:
        as the positions say.
        """
        output = self._forward(tokens, positions, lengths, last_only=True, hidden_only=False)
        return None if output is None else output.squeeze(0)

    def hidden(self, tokens: Tensor, positions: Tensor, lengths: Tensor | None = None) -> Tensor | None:
        """Hidden states ``[s, b, h]`` in front of the output layer on the last stage, None on the others."""
        return self._forward(tokens, positions, lengths, last_only=False, hidden_only=True)

    def from_decider(self, tensor: Tensor) -> Tensor:
        """The deciding rank's tensor on all ranks of the replica (in place)."""
        # Ranks of the replica are ordered by stage, within a stage by tensor-parallel rank.
        return broadcast(tensor, self.groups.model_group, (self.groups.pp_size - 1) * self.groups.tp_size)

    def most(self, value: int) -> int:
        """The value, or the largest among replicas that take the same passes."""
        if not self.meets_others:
            return value
        largest = torch.tensor([value], dtype=torch.int64, device=current_device())
        return int(all_reduce_max(largest, self.groups.dp_group))

    def _forward(
        self, tokens: Tensor, positions: Tensor, lengths: Tensor | None, *, last_only: bool, hidden_only: bool
    ) -> Tensor | None:
        groups, config = self.groups, self.model.config
        if not groups.is_first_stage:
            size = (tokens.size(1), tokens.size(0), config.hidden_size)
            hidden = torch.empty(size, dtype=config.params_dtype, device=tokens.device)
            self.model.set_input_tensor(receive(hidden, groups.pp_group, groups.pp_rank - 1))
        output: Tensor = self.model(
            tokens, positions=positions, last_only=last_only, hidden_only=hidden_only, lengths=lengths
        )
        if groups.is_last_stage:
            return output
        send(output, groups.pp_group, groups.pp_rank + 1)
        return None


def left_padded(rows: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    """Rows of tokens as ``[b, s]`` ending together, and the number of padding slots of each row ``[b]``."""
    longest = max(len(row) for row in rows)
    padding = [longest - len(row) for row in rows]
    # What stands in a padding slot is never attended to.
    tokens = [[0] * empty + list(row) for empty, row in zip(padding, rows, strict=True)]
    return (
        torch.tensor(tokens, dtype=torch.int64, device=current_device()),
        torch.tensor(padding, dtype=torch.int64, device=current_device()),
    )
