from __future__ import annotations

import pytest

from mindspeed_lora.config.training import TrainingConfig
from mindspeed_lora.errors import Refused


def test_the_length_of_a_run() -> None:
    assert TrainingConfig(train_iters=7).num_steps(1000) == 7
    assert TrainingConfig(train_samples=33, global_batch_size=16).num_steps(1000) == 3
    assert TrainingConfig(epochs=3.0, global_batch_size=16).num_steps(999) == 188
    assert TrainingConfig(epochs=0.5, global_batch_size=10).num_steps(101) == 6
    with pytest.raises(ValueError, match="not resolved"):
        TrainingConfig().num_steps(10)


def test_the_warm_up_is_a_share_of_the_decay() -> None:
    training = TrainingConfig(lr_warmup_fraction=0.03, lr_decay_iters=50)
    assert training.decay_steps(100) == 50
    assert training.warmup_steps(100) == pytest.approx(1.5)
    assert TrainingConfig(lr_warmup_fraction=0.03).warmup_steps(100) == pytest.approx(3.0)
    assert TrainingConfig(lr_warmup_iters=4).warmup_steps(100) == 4.0
    assert TrainingConfig().warmup_steps(100) == 0.0


def test_a_warm_up_as_long_as_the_decay_is_refused() -> None:
    with pytest.raises(Refused, match="--lr-warmup-iters 5 must be below the 5 steps"):
        TrainingConfig(lr_warmup_iters=5).warmup_steps(5)


def test_the_compute_dtype() -> None:
    assert TrainingConfig().params_dtype == "float32"
    assert TrainingConfig(bf16=True).params_dtype == "bfloat16"
    assert TrainingConfig(fp16=True).params_dtype == "float16"
