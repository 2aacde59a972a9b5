"""Nothing but what autograd saves is kept between forward and backward pass, and nothing after it.

megatron-core's schedule holds the loss of a micro-batch, and its graph with it, until the next one has gone forward:
what a node of ours holds beside what it has saved for the backward pass would lie there twice.
"""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from mindspeed_lora.config.commands import parse
from mindspeed_lora.parallel.groups import destroy_groups, initialize_groups
from mindspeed_lora.training.plan import plan_training
from mindspeed_lora.training.session import TrainingSession
from tests.support.models import make_model
from tests.support.pool import WorkerPool
from tests.support.tiny import Tiny


def kept_besides(jobs: dict[str, list[str]]) -> dict[str, tuple[int, int, int]]:
    """Of each command line, all of one layout, :func:`kept_by` it."""
    plans = {case: plan_training(parse("posttrain", words)) for case, words in jobs.items()}
    groups, _ = initialize_groups(next(iter(plans.values())).job.parallel, seed=1)
    found = {case: kept_by(TrainingSession(plan, groups)) for case, plan in plans.items()}
    destroy_groups()
    return found


def kept_by(session: TrainingSession) -> tuple[int, int, int]:
    """Bytes of one hidden state of the micro-batch; kept besides what is saved, before and after the backward pass."""
    batch = max(session.batches.step(1), key=lambda batch: batch.tokens.size(1))
    _forward(session, batch).backward()
    known = set(_storages())
    saved: set[int] = set()

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        saved.add(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = _forward(session, batch)
    before = sum(size for place, size in _storages().items() if place not in known | saved)
    loss.backward()
    after = sum(size for place, size in _storages().items() if place not in known)
    return batch.tokens.numel() * session.plan.shape.hidden_size * 4, before, after


def _forward(session: TrainingSession, batch: Any) -> torch.Tensor:
    (chunk,) = session.model
    chunk.train()
    loss: torch.Tensor = chunk(
        batch.tokens,
        labels=batch.labels,
        loss_weights=batch.loss_weights,
        positions=batch.position_ids,
        lengths=None,
        context=session.runner.context(batch, step=1),
    )
    return loss


def _storages() -> dict[int, int]:
    """Bytes of all memory that tensors in Python's hands have, by address."""
    gc.collect()
    return dict(_sizes())


def _sizes() -> Iterator[tuple[int, int]]:
    for found in gc.get_objects():
        if type(found) in (torch.Tensor, torch.nn.Parameter) and found.device.type == "cpu":
            storage = found.untyped_storage()
            yield storage.data_ptr(), storage.nbytes()


FUSED = {"lora_fusion": True, "lora_fusion_plan": ("one-collective", "split")}
EXPERTS_OF_TWO = {
    "expert_model_parallel_size": 2,
    "expert_tensor_parallel_size": 1,
    "sequence_parallel": True,
}
LAYOUTS: dict[str, tuple[int, dict[str, tuple[str, dict[str, Any]]]]] = {
    "one rank": (
        1,
        {
            "dropout": ("", {"lora_dropout": 0.1}),
            "everything trained": ("", {"lora_r": None}),
            "experts' activation computed again": ("qwen2-moe", {"moe_zero_memory": "level0"}),
            "latent attention": ("deepseek-v3", {}),
        },
    ),
    "tp2 sp": (
        2,
        {
            "unfused": ("", {"sequence_parallel": True}),
            "one collective": ("", {**FUSED, "sequence_parallel": True}),
            "overlapped": (
                "",
                {**FUSED, "lora_fusion_plan": ("overlapped", "merge"), "sequence_parallel": True},
            ),
        },
    ),
    "ep2": (2, {"experts": ("qwen2-moe", EXPERTS_OF_TWO)}),
}


@pytest.mark.parametrize(
    "layout",
    [pytest.param(name, marks=() if LAYOUTS[name][0] == 1 else pytest.mark.slow) for name in LAYOUTS],
)
def test_a_graph_holds_what_it_has_saved(
    layout: str, workers: WorkerPool, tiny: Tiny, tmp_path: Path
) -> None:
    tp, cases = LAYOUTS[layout]
    models = {"": tiny}
    jobs = {}
    for case, (name, flags) in cases.items():
        if name not in models:
            models[name] = dataclasses.replace(tiny, model=make_model(name, tmp_path / name))
        jobs[case] = models[name].words(tensor_model_parallel_size=tp, **flags)
    for found in workers.run(tp, kept_besides, jobs):
        for case, (hidden, before, after) in found.items():
            # A layer keeps many hidden states of a micro-batch; beside them only where its experts' rows go.
            assert before < 2 * hidden, case
            assert after < 2 * hidden, case
