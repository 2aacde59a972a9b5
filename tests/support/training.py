"""A training job on one rank of the pool, run as the command runs it, with what parity needs written down."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from tests.support.shards import Shard

Breakage = Callable[[Any], None]
"""Gets the training session before the first step, to break it on purpose; importable by name."""


@dataclass
class RankRecord:
    """What one rank tells of a job."""

    status: int = 0
    losses: list[float] = field(default_factory=list)
    grad_norms: list[float] = field(default_factory=list)
    loss_tokens: list[int] = field(default_factory=list)
    skipped: list[bool] = field(default_factory=list)
    eval_losses: list[float] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)
    gradients: list[Shard] = field(default_factory=list)
    """Of the first step, complete, before clipping; only what this rank's optimizer owns."""
    start: list[Shard] = field(default_factory=list)
    """Trained parameters before the first step."""
    end: list[Shard] = field(default_factory=list)
    """Trained parameters after the last step."""
    start_logits: torch.Tensor | None = None
    """``[s, b, v]`` of the probe tokens before the first step, on the last stage."""
    end_logits: torch.Tensor | None = None


class Recorder:
    """In the place of the reporter."""

    def __init__(self, record: RankRecord) -> None:
        self.record = record

    def step(self, step: Any) -> None:
        """Notes a step."""
        self.record.losses.append(step.lm_loss)
        self.record.grad_norms.append(step.grad_norm)
        self.record.loss_tokens.append(step.loss_tokens)
        self.record.skipped.append(step.skipped)

    def notice(self, text: str) -> None:
        """Notes a notice."""
        self.record.notices.append(text)

    def evaluation(self, evaluation: Any) -> None:
        """Notes an evaluation."""
        self.record.eval_losses.append(evaluation.eval_loss)

    def saved(self, folder: Path, seconds: float) -> None:
        """Nothing to note: tests look at the folder."""


def train_recorded(
    argv: Sequence[str], probe: torch.Tensor | None = None, breakage: Breakage | None = None
) -> RankRecord:
    """Trains as ``posttrain_gpt.py`` with these words does, on this rank.

    ``probe`` are tokens ``[b, s]`` whose logits are wanted before and after.
    """
    from mindspeed_lora.config.commands import parse
    from mindspeed_lora.parallel.groups import destroy_groups, initialize_groups
    from mindspeed_lora.training.loop import TrainingLoop
    from mindspeed_lora.training.plan import plan_training
    from mindspeed_lora.training.session import TrainingSession
    from mindspeed_lora.training.signals import StopRequest

    job = parse("posttrain", argv)
    plan = plan_training(job)
    record = RankRecord(notices=list(plan.notices))
    with StopRequest() as stop:
        groups, _ = initialize_groups(job.parallel, job.training.seed)
        try:
            session = TrainingSession(plan, groups)
            if breakage is not None:
                breakage(session)
            record.start = parameter_shards(session)
            record.start_logits = logits(session, probe)
            _record_first_gradients(session, record)
            record.status = TrainingLoop(session, Recorder(record), stop).run()  # type: ignore[arg-type]
            record.end = parameter_shards(session)
            record.end_logits = logits(session, probe)
        finally:
            destroy_groups()
    return record


def train(argv: Sequence[str]) -> int:
    """``posttrain_gpt.py`` on this rank, as it is; returns the exit status."""
    from mindspeed_lora.config.commands import parse
    from mindspeed_lora.training.main import train

    return train(parse("posttrain", argv))


def parameter_shards(session: Any) -> list[Shard]:
    """Every trained parameter of this rank, replicas included."""
    return [
        shard for p in session.trained for shard in shards(p, 0, p.param.numel(), p.param.detach().view(-1))
    ]


def _record_first_gradients(session: Any, record: RankRecord) -> None:
    original = session.optimizer.step

    def step(lr: float) -> Any:
        if not record.gradients:
            record.gradients = [
                shard
                for owned in session.optimizer.slices
                for shard in shards(owned.parameter, owned.start, owned.stop, owned.gradient)
            ]
        return original(lr)

    session.optimizer.step = step


def shards(parameter: Any, start: int, stop: int, values: torch.Tensor) -> list[Shard]:
    """Elements ``start`` to ``stop`` of a local parameter, as elements of the canonical tensors that it is made of."""
    from mindspeed_lora.training.shard_slice import ShardSlice

    values = values.detach().float().cpu()
    return [
        Shard(piece.name, piece.shape, piece.index(), values[first:last].clone())
        for piece, first, last in ShardSlice.all_of(parameter, start, stop)
    ]


def logits(session: Any, tokens: torch.Tensor | None) -> torch.Tensor | None:
    """Logits ``[s, b, v]`` of the tokens ``[b, s]`` on the last stage, through the pipeline; None elsewhere."""
    from mindspeed_lora.device import current_device

    if tokens is None:
        return None
    for chunk in session.model:
        chunk.eval()
    positions = session.groups.context.positions(tokens.size(1))
    device = current_device()
    lengths = (tokens != 0).sum(1, keepdim=True).to(device)
    with torch.no_grad():
        outputs = session.runner.pipeline.run(
            lambda batches, chunk: (
                chunk(next(batches).to(device), positions=positions, lengths=lengths),
                lambda output, non_loss_data: output,
            ),
            [tokens[:, positions]],
            [(len(positions), tokens.size(0))],
            forward_only=True,
            collect_non_loss_data=True,
        )
    return _of_all_positions(outputs[0].float().cpu(), positions) if outputs else None


def _of_all_positions(local: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Logits ``[s, b, v]`` of all positions, from those that each context-parallel rank holds."""
    from megatron.core import parallel_state

    every: list[Any] = [None] * parallel_state.get_context_parallel_world_size()
    torch.distributed.all_gather_object(
        every, (positions, local), group=parallel_state.get_context_parallel_group()
    )
    order = torch.cat([positions for positions, _ in every]).argsort()
    return torch.cat([part for _, part in every])[order]
