"""How the experts of a job are computed, beside what the model's shape says."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class MoESettings:
    """What the job chooses; every layer of experts has the same."""

    aux_loss_coeff: float = 0.0
    """Of the load-balancing loss over all tokens of a micro-batch (``aux_loss``)."""
    seq_aux_loss_coeff: float = 0.0
    """Of the same loss by rows, averaged over them (``seq_aux_loss``)."""
    z_loss_coeff: float = 0.0
    router_fp32: bool = False
    """The router's product in float32, whatever its input's dtype; sigmoid scores always have it."""
    capacity_factor: float | None = None
    """Each rank sends an expert at most ``⌈tokens · topk / experts · factor⌉`` of its tokens; None: all of them."""
    drop_policy: str = "probs"
    """Which tokens stay within the capacity: those of the largest weights (``probs``) or the first (``position``)."""
    recompute_activation: bool = False
    """The experts' activation is computed again in the backward pass rather than kept (``moe_act``)."""

    @property
    def looks_at_all_tokens(self) -> bool:
        """Whether a token's result hangs on the other ones of its micro-batch, which must then not be cut in two."""
        return (
            self.aux_loss_coeff > 0
            or self.seq_aux_loss_coeff > 0
            or self.z_loss_coeff > 0
            or self.capacity_factor is not None
        )
