"""Masks by token, factor and feature: their statistics, and that nothing but these decides."""

from __future__ import annotations

import pytest
import torch

from mindspeed_lora.adapters.dropout import keep_mask, kept_share, stream_of, token_keys

TOKENS, FEATURES = 1432, 576
SAMPLES = torch.arange(TOKENS) // 179
POSITIONS = torch.arange(TOKENS) % 179
KEYS = token_keys(1234, 3, SAMPLES, POSITIONS)
STREAM = stream_of("decoder.layers.0.self_attention.linear_qkv.lora_a")


def signs(keys: torch.Tensor, stream: int) -> torch.Tensor:
    """±1 with equal probability, ``[T, features]``."""
    return keep_mask(keys, stream, (0, FEATURES), 0.5).float() * 2 - 1


@pytest.mark.parametrize("p", [0.0, 0.05, 0.1, 0.5, 0.9])
def test_the_share_that_stays(p: float) -> None:
    mask = keep_mask(KEYS, STREAM, (0, FEATURES), p)
    assert kept_share(p) == pytest.approx(1 - p, abs=2**-16)
    # Six standard deviations of the mean of that many independent draws.
    allowed = 6 * (p * (1 - p) / mask.numel()) ** 0.5
    assert mask.float().mean().item() == pytest.approx(kept_share(p), abs=allowed + 1e-9)


def test_features_tokens_streams_and_steps_are_uncorrelated() -> None:
    mask = signs(KEYS, STREAM)
    for rows, count in ((mask.t(), TOKENS), (mask, FEATURES)):
        correlations = rows @ rows.t() / count
        correlations.fill_diagonal_(0)
        assert correlations.abs().max().item() < 6 * count**-0.5
        assert correlations.std().item() == pytest.approx(count**-0.5, rel=0.1)
    others = signs(KEYS, stream_of("another")), signs(token_keys(1234, 4, SAMPLES, POSITIONS), STREAM)
    for other in (*others, signs(token_keys(1235, 3, SAMPLES, POSITIONS), STREAM)):
        assert abs((mask * other).mean().item()) < 6 * mask.numel() ** -0.5


def test_a_shard_of_tokens_or_features_is_cut_from_the_whole() -> None:
    whole = keep_mask(KEYS, STREAM, (0, FEATURES), 0.3)
    for start, stop in ((0, 288), (288, 576), (101, 334), (7, 8)):
        assert torch.equal(keep_mask(KEYS, STREAM, (start, stop), 0.3), whole[:, start:stop])
    assert torch.equal(keep_mask(KEYS[200:300], STREAM, (0, FEATURES), 0.3), whole[200:300])


def test_neither_the_batch_nor_the_packing_decides() -> None:
    """A token is its sample and the position in it, wherever it stands."""
    order = torch.randperm(TOKENS, generator=torch.Generator().manual_seed(0))
    assert torch.equal(token_keys(1234, 3, SAMPLES[order], POSITIONS[order]), KEYS[order])
    assert KEYS.unique().numel() == TOKENS
    assert not torch.equal(token_keys(1234, 3, POSITIONS, SAMPLES), KEYS)


def test_the_bits_stay_what_they_are() -> None:
    """A resumed run goes on with the masks of an older version."""
    mask = keep_mask(token_keys(1, 2, torch.tensor([3]), torch.tensor([4])), 5, (0, 16), 0.5)
    assert "".join(str(int(bit)) for bit in mask[0]) == "1000111010010011"
