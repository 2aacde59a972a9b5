"""Starting values: from seed and name alone, with the bound of the whole fan-in."""

from __future__ import annotations

import math

import pytest
import torch

from mindspeed_lora.adapters.initial import generator_for, initial_lora_a

NAME = "decoder.layers.3.mlp.linear_fc2.lora_a"


def test_the_bound_is_that_of_the_whole_fan_in() -> None:
    value = initial_lora_a(1, NAME, rank=16, in_features=1536)
    bound = 1 / math.sqrt(1536)
    assert value.shape == (16, 1536) and value.dtype is torch.float32
    assert value.abs().max() <= bound
    assert value.max() > 0.999 * bound and value.min() < -0.999 * bound
    assert value.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02)
    assert value.mean().item() == pytest.approx(0, abs=0.01 * bound)


def test_it_is_peft_s_distribution() -> None:
    """kaiming_uniform_(a=√5), by which PEFT resets ``lora_A``."""
    theirs = torch.empty(64, 500)
    torch.nn.init.kaiming_uniform_(theirs, a=math.sqrt(5), generator=torch.Generator().manual_seed(0))
    ours = initial_lora_a(1, NAME, 64, 500)
    quantiles = torch.linspace(0, 1, 11)
    torch.testing.assert_close(ours.quantile(quantiles), theirs.quantile(quantiles), rtol=0.05, atol=1e-3)


def test_seed_and_name_alone_decide() -> None:
    first = initial_lora_a(1, NAME, 4, 10)
    torch.manual_seed(77)
    torch.rand(3)
    assert torch.equal(initial_lora_a(1, NAME, 4, 10), first)
    assert not torch.equal(initial_lora_a(2, NAME, 4, 10), first)
    assert not torch.equal(initial_lora_a(1, NAME.replace("3", "4"), 4, 10), first)


def test_the_random_streams_of_the_process_are_left_alone() -> None:
    before = torch.get_rng_state()
    initial_lora_a(1, NAME, 4, 10)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_values_stay_what_they_are() -> None:
    """A run that is started again with a later version starts from the same adapter."""
    found = initial_lora_a(1234, "decoder.layers.0.self_attention.linear_qkv.lora_a", 2, 3)
    expected = torch.tensor([[-0.37897813, -0.49912503, 0.2013526], [-0.42162347, 0.43395448, -0.00742292]])
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-7)


def test_large_seeds_are_no_trouble() -> None:
    draws = {
        torch.rand(1, generator=generator_for(seed, NAME)).item() for seed in (0, 2**31, 2**63, 2**64 - 1)
    }
    assert len(draws) == 4
