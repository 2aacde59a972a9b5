"""Loss scaling against megatron-core's own scaler, over random histories of overflows."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mindspeed_lora.config.training import TrainingConfig
from mindspeed_lora.device import bind_device
from mindspeed_lora.training.loss_scale import LossScale


def megatron_scaler(training: TrainingConfig) -> Any:
    from megatron.core.optimizer import grad_scaler

    bind_device()
    return grad_scaler.DynamicGradScaler(
        initial_scale=training.initial_loss_scale,
        min_scale=training.min_loss_scale,
        growth_factor=2.0,
        backoff_factor=0.5,
        growth_interval=training.loss_scale_window,
        hysteresis=training.hysteresis,
    )


@pytest.mark.parametrize("hysteresis", [1, 2, 5])
@pytest.mark.parametrize("window", [1, 3, 10])
@pytest.mark.parametrize("share", [0.05, 0.5])
def test_dynamic_scale_is_megatron_s(hysteresis: int, window: int, share: float) -> None:
    training = TrainingConfig(
        fp16=True,
        initial_loss_scale=64.0,
        min_loss_scale=0.5,
        loss_scale_window=window,
        hysteresis=hysteresis,
    )
    ours, theirs = LossScale(training), megatron_scaler(training)
    overflows = torch.rand(100, generator=torch.Generator().manual_seed(window)) < share
    for overflow in overflows.tolist():
        ours.update(overflow)
        theirs.update(overflow)
        assert ours.scale == theirs.scale.item()


def test_it_goes_on_from_a_checkpoint() -> None:
    training = TrainingConfig(fp16=True, initial_loss_scale=2.0**16, loss_scale_window=4, hysteresis=2)
    whole, cut = LossScale(training), LossScale(training)
    history = [False, True, False, False, True, True, False, False, False, False, True]
    for overflow in history[:5]:
        whole.update(overflow)
        cut.update(overflow)
    resumed = LossScale(training)
    resumed.restore(cut.state())
    for overflow in history[5:]:
        whole.update(overflow)
        resumed.update(overflow)
        assert resumed.state() == whole.state()


def test_a_fixed_scale_stays() -> None:
    scale = LossScale(TrainingConfig(fp16=True, loss_scale=128.0, hysteresis=1))
    assert not scale.dynamic
    scale.update(True)
    assert scale.scale == 128.0
    scale.restore({"scale": 4.0, "good_steps": 0, "overflows_left": 1})
    assert scale.scale == 128.0


@pytest.mark.parametrize(
    "training", [TrainingConfig(), TrainingConfig(bf16=True), TrainingConfig(loss_scale=8.0)]
)
def test_outside_of_fp16_nothing_is_scaled(training: TrainingConfig) -> None:
    scale = LossScale(training)
    scale.update(True)
    assert scale.scale == 1.0 and not scale.dynamic
