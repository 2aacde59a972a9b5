"""The learning rate of each step against megatron-core's own scheduler, which counts in samples."""

from __future__ import annotations

import itertools
from dataclasses import asdict

import pytest
import torch
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from mindspeed_lora.config.training import TrainingConfig
from mindspeed_lora.errors import Refused
from mindspeed_lora.training.schedule import LearningRate

STEPS, GLOBAL_BATCH = 23, 6


def megatron_rates(training: TrainingConfig, num_steps: int) -> list[float]:
    """As Megatron-LM's training loop sets it up and steps it: step k uses the rate of k − 1 finished steps."""
    decay_iters = training.lr_decay_iters or num_steps
    decay = decay_iters * GLOBAL_BATCH
    if training.lr_warmup_fraction is not None:
        warmup: float = training.lr_warmup_fraction * decay
    else:
        warmup = (training.lr_warmup_iters or 0) * GLOBAL_BATCH
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.0)
    scheduler = OptimizerParamScheduler(
        optimizer,  # type: ignore[arg-type]
        init_lr=0.0,
        max_lr=training.lr,
        min_lr=training.min_lr,
        lr_warmup_steps=warmup,  # type: ignore[arg-type]
        lr_decay_steps=decay,
        lr_decay_style=training.lr_decay_style,
        start_wd=0.0,
        end_wd=0.0,
        wd_incr_steps=1,
        wd_incr_style="constant",
    )
    rates = []
    for _ in range(num_steps):
        rates.append(optimizer.param_groups[0]["lr"])
        scheduler.step(GLOBAL_BATCH)
    return rates


WARMUPS: list[dict[str, float | int]] = [
    {},
    {"lr_warmup_iters": 0},
    {"lr_warmup_iters": 1},
    {"lr_warmup_iters": 7},
    {"lr_warmup_fraction": 0.03},
    {"lr_warmup_fraction": 0.1},
    {"lr_warmup_fraction": 0.5},
]


@pytest.mark.parametrize(
    ("style", "warmup", "decay_iters", "min_lr"),
    list(itertools.product(["cosine", "linear", "constant"], WARMUPS, [None, 12, 40], [0.0, 3e-5])),
    ids=str,
)
def test_every_step_of_a_run(
    style: str, warmup: dict[str, float], decay_iters: int | None, min_lr: float
) -> None:
    training = TrainingConfig(
        lr=2e-4, min_lr=min_lr, lr_decay_style=style, lr_decay_iters=decay_iters, **warmup
    )
    schedule = LearningRate.of(training, STEPS)
    found = [schedule.at(step - 1) for step in range(1, STEPS + 1)]
    assert found == pytest.approx(megatron_rates(training, STEPS), rel=1e-12, abs=1e-18)


def test_the_first_step_of_a_warm_up_has_rate_zero() -> None:
    schedule = LearningRate.of(TrainingConfig(lr=1.0, lr_warmup_iters=4), 10)
    assert [schedule.at(done) for done in range(5)] == [0.0, 0.25, 0.5, 0.75, 1.0]


def test_without_warm_up_the_first_step_has_the_whole_rate() -> None:
    assert LearningRate.of(TrainingConfig(lr=1.0), 10).at(0) == 1.0


def test_the_last_step_is_one_before_the_end_of_the_decay() -> None:
    schedule = LearningRate.of(TrainingConfig(lr=1.0, min_lr=0.1, lr_decay_style="linear"), 10)
    assert schedule.at(9) == pytest.approx(0.19)
    assert schedule.at(10) == pytest.approx(0.1)
    assert schedule.at(11) == 0.1


def test_what_a_checkpoint_kept_of_another_schedule_is_told() -> None:
    kept = asdict(LearningRate.of(TrainingConfig(lr=1.0), 10))
    assert LearningRate.of(TrainingConfig(lr=1.0), 10).changes(kept) == []
    assert LearningRate.of(TrainingConfig(lr=2.0), 20).changes(kept) == [
        "lr 1.0 → 2.0",
        "decay steps 10 → 20",
    ]
    assert LearningRate.of(TrainingConfig(lr=2.0), 20).changes({}) == [], "of an older checkpoint"


def test_a_run_shorter_than_its_warm_up_is_refused() -> None:
    with pytest.raises(Refused, match="--lr-warmup-iters 10 .* 8 steps"):
        LearningRate.of(TrainingConfig(lr_warmup_iters=10), 8)
