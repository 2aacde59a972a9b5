"""Expert parallelism: which experts a rank holds, which part of each, and with whom it exchanges tokens.

The ranks of a pipeline stage are arranged anew for the experts, as megatron-core does: expert-tensor-parallel (ETP)
ranks are neighbours, then come the expert-parallel (EP) ones, then those that hold the same part of the same experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist


@dataclass(frozen=True, kw_only=True)
class ExpertParallel:
    """A rank's place among the experts."""

    ep_rank: int = 0
    ep_size: int = 1
    etp_rank: int = 0
    etp_size: int = 1
    edp_rank: int = 0
    edp_size: int = 1
    ep_group: dist.ProcessGroup | None = None
    """The ranks that hold the other experts, at the same place in them; None at size 1."""
    etp_group: dist.ProcessGroup | None = None
    """The ranks that hold the other parts of the same experts; None at size 1."""
    edp_group: dist.ProcessGroup | None = None
    """The ranks that hold the same part of the same experts, with other tokens; None at size 1."""
    group: dist.ProcessGroup | None = None
    """All ranks that hold parts of a layer's experts, EP × ETP, those of one expert side by side; None at size 1."""

    @property
    def size(self) -> int:
        """Ranks among which a layer's experts are cut."""
        return self.ep_size * self.etp_size

    def experts(self, num_experts: int) -> range:
        """Global numbers of the experts that this rank holds."""
        count = num_experts // self.ep_size
        return range(self.ep_rank * count, (self.ep_rank + 1) * count)

    def names(self, num_experts: int, stack: str) -> tuple[str, ...]:
        """Canonical names of what a stack (``….mlp.experts.linear_fc1…``) holds, one for each expert of this rank."""
        return tuple(
            stack.replace(".experts.", f".experts.local_experts.{expert}.", 1)
            for expert in self.experts(num_experts)
        )


def expert_parallel() -> ExpertParallel:
    """This rank's place, of megatron-core's groups."""
    from megatron.core import parallel_state

    groups = (
        parallel_state.get_expert_model_parallel_group(),
        parallel_state.get_expert_tensor_parallel_group(),
        parallel_state.get_expert_data_parallel_group(),
        parallel_state.get_expert_tensor_and_model_parallel_group(),
    )
    ep, etp, edp, every = (group if dist.get_world_size(group) > 1 else None for group in groups)
    (ep_rank, ep_size), (etp_rank, etp_size), (edp_rank, edp_size) = (
        (dist.get_rank(group), dist.get_world_size(group)) for group in groups[:3]
    )
    return ExpertParallel(
        ep_rank=ep_rank,
        ep_size=ep_size,
        etp_rank=etp_rank,
        etp_size=etp_size,
        edp_rank=edp_rank,
        edp_size=edp_size,
        ep_group=ep,
        etp_group=etp,
        edp_group=edp,
        group=every,
    )
