"""Rotary frequencies and angles against transformers."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, Phi3Config
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from mindspeed_lora.config.shape import ModelShape, RopeScaling
from mindspeed_lora.models.rope import (
    RotaryPositions,
    rotary_amplitude,
    rotary_frequencies,
    rotary_tables,
)

LLAMA_3_1 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
LLAMA_3_2 = {**LLAMA_3_1, "factor": 32.0}
YARN: list[dict[str, Any]] = [
    {"factor": 4.0, "original_max_position_embeddings": 32768},
    {"factor": 40.0, "original_max_position_embeddings": 4096, "mscale": 1.0, "mscale_all_dim": 1.0},
    {"factor": 40.0, "original_max_position_embeddings": 4096, "mscale": 0.707, "mscale_all_dim": 0.5},
    {"factor": 32.0, "original_max_position_embeddings": 4096, "truncate": False, "mscale": 0.7},
    {"factor": 8.0, "original_max_position_embeddings": 64, "beta_fast": 8.0, "beta_slow": 2.0},
    {"factor": 8.0, "original_max_position_embeddings": 2048, "attention_factor": 1.3},
    {"factor": 0.5, "original_max_position_embeddings": 2048},
]
"""Qwen2.5, DeepSeek-V3, DeepSeek-V2, gpt-oss, one of few turns, and what is seldom given."""
UNEVEN_BANDS = {**LLAMA_3_1, "low_freq_factor": 2.5, "high_freq_factor": 3.0}


LONGROPE = RopeScaling(
    rope_type="longrope",
    factor=8.0,
    original_max_position_embeddings=16,
    short_factor=(1.0, 1.1, 1.5, 2.0),
    long_factor=(1.0, 3.0, 20.0, 60.0),
)


def shape(kv_channels: int, base: float, scaling: RopeScaling | None = None) -> ModelShape:
    return ModelShape(
        family="llama",
        num_layers=1,
        hidden_size=4 * kv_channels,
        ffn_hidden_size=8,
        num_attention_heads=4,
        num_query_groups=4,
        kv_channels=kv_channels,
        vocab_size=8,
        max_position_embeddings=64,
        rotary_base=base,
        rope_scaling=scaling,
    )


def config(kv_channels: int, base: float, rope_type: str = "default", **scaling: Any) -> LlamaConfig:
    return LlamaConfig(
        hidden_size=4 * kv_channels,
        num_attention_heads=4,
        head_dim=kv_channels,
        max_position_embeddings=131072,
        rope_parameters={"rope_type": rope_type, "rope_theta": base, **scaling},
    )


@pytest.mark.parametrize("kv_channels", [6, 64, 128])
@pytest.mark.parametrize("base", [10000.0, 500000.0, 1e6])
def test_default_frequencies(kv_channels: int, base: float) -> None:
    expected = LlamaRotaryEmbedding(config(kv_channels, base)).inv_freq
    assert torch.equal(rotary_frequencies(shape(kv_channels, base)), expected)


@pytest.mark.parametrize("factor", [2.0, 3.7])
def test_linear_scaling(factor: float) -> None:
    expected, attention = ROPE_INIT_FUNCTIONS["linear"](config(64, 1e4, "linear", factor=factor), "cpu")
    found = rotary_frequencies(shape(64, 1e4, RopeScaling(rope_type="linear", factor=factor)))
    assert attention == 1.0
    assert torch.equal(found, expected)


@pytest.mark.parametrize("kv_channels", [64, 128])
@pytest.mark.parametrize("scaling", [LLAMA_3_1, LLAMA_3_2, UNEVEN_BANDS])
def test_llama3_scaling(kv_channels: int, scaling: dict[str, Any]) -> None:
    expected, attention = ROPE_INIT_FUNCTIONS["llama3"](config(kv_channels, 5e5, "llama3", **scaling), "cpu")
    found = rotary_frequencies(shape(kv_channels, 5e5, RopeScaling(rope_type="llama3", **scaling)))
    assert attention == 1.0
    torch.testing.assert_close(found, expected, rtol=2e-7, atol=0)
    plain = rotary_frequencies(shape(kv_channels, 5e5))
    assert torch.equal(found[0], plain[0]), "the fastest are kept"
    assert found[-1] == plain[-1] / scaling["factor"], "the slowest are stretched"


@pytest.mark.parametrize("kv_channels", [64, 128])
@pytest.mark.parametrize("scaling", YARN, ids=range(len(YARN)))
def test_yarn(kv_channels: int, scaling: dict[str, Any]) -> None:
    expected, attention = ROPE_INIT_FUNCTIONS["yarn"](config(kv_channels, 1e4, "yarn", **scaling), "cpu")
    ours = RopeScaling(rope_type="yarn", **scaling)
    found = rotary_frequencies(shape(kv_channels, 1e4, ours))
    assert torch.equal(found, expected)
    assert rotary_amplitude(ours) == pytest.approx(attention, rel=1e-15)
    plain = rotary_frequencies(shape(kv_channels, 1e4))
    assert torch.equal(found[0], plain[0]), "the fastest are kept"
    torch.testing.assert_close(found[-1], plain[-1] / scaling["factor"], rtol=2e-7, atol=0)


def test_yarn_enlarges_cosine_and_sine() -> None:
    ours = RopeScaling(rope_type="yarn", **YARN[0])
    given = config(16, 1e4, "yarn", **YARN[0])
    positions = torch.tensor([0, 3, 900])
    cos, sin = LlamaRotaryEmbedding(given)(torch.zeros(1), positions.unsqueeze(0))
    frequencies = rotary_frequencies(shape(16, 1e4, ours))
    tables = rotary_tables(frequencies, positions, torch.float32, rotary_amplitude(ours))
    torch.testing.assert_close(
        tables[:, :, 0, 0], torch.stack((cos[0, :, :8], sin[0, :, :8])), rtol=2e-7, atol=0
    )
    assert float(tables[0, 0].max()) == pytest.approx(0.1 * math.log(4) + 1)


def test_without_yarn_nothing_is_enlarged() -> None:
    assert rotary_amplitude(None) == rotary_amplitude(RopeScaling(rope_type="linear", factor=4.0)) == 1.0


def test_tables_are_those_of_transformers() -> None:
    embedding = LlamaRotaryEmbedding(config(16, 1e4))
    positions = torch.tensor([0, 1, 7, 63, 500])
    cos, sin = embedding(torch.zeros(1), positions.unsqueeze(0))
    tables = rotary_tables(rotary_frequencies(shape(16, 1e4)), positions, torch.float32)
    assert tables.shape == (2, 5, 1, 1, 8)
    assert tables.dtype is torch.float32
    assert torch.equal(tables[0, :, 0, 0], cos[0, :, :8])
    assert torch.equal(tables[1, :, 0, 0], sin[0, :, :8])


def test_rows_at_different_positions() -> None:
    frequencies = rotary_frequencies(shape(8, 1e4))
    rows = torch.tensor([[0, 1, 2], [5, 6, 7]])
    tables = rotary_tables(frequencies, rows, torch.float32)
    assert tables.shape == (2, 3, 2, 1, 4)
    for row in range(2):
        assert torch.equal(tables[:, :, row : row + 1], rotary_tables(frequencies, rows[row], torch.float32))


def test_far_positions_keep_their_precision() -> None:
    """Angles computed in bfloat16 would make position 4095 the position 4096."""
    frequencies = rotary_frequencies(shape(8, 1e4))
    exact = rotary_tables(frequencies.double(), torch.tensor([4095]), torch.float64)
    rounded = rotary_tables(frequencies, torch.tensor([4095]), torch.bfloat16)
    assert rounded.dtype is torch.bfloat16
    torch.testing.assert_close(rounded.double(), exact, rtol=0.005, atol=0.001)


class TestLongrope:
    """Phi-3.5's: the length of a document says by which factors its frequencies are divided."""

    def theirs(self, positions: torch.Tensor) -> torch.Tensor:
        """What transformers computes of positions ``[s]``: ``[2, s, d / 2]``."""
        given = Phi3Config(
            hidden_size=32,
            num_attention_heads=4,
            max_position_embeddings=128,
            original_max_position_embeddings=16,
            rope_parameters={
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "short_factor": list(LONGROPE.short_factor),
                "long_factor": list(LONGROPE.long_factor),
            },
        )
        cos, sin = Phi3RotaryEmbedding(given)(torch.zeros(1), positions.unsqueeze(0))
        return torch.stack((cos[0, :, :4], sin[0, :, :4]))

    @pytest.mark.parametrize("length", [1, 16, 17, 100])
    def test_a_row_alone(self, length: int) -> None:
        positions = torch.arange(length)
        tables = RotaryPositions(shape(8, 1e4, LONGROPE)).tables(positions, torch.float32)
        assert tables.shape == (2, length, 1, 1, 4)
        assert torch.equal(tables[:, :, 0, 0], self.theirs(positions))
        assert float(tables[0, 0].max()) == pytest.approx(math.sqrt(1 + math.log(8) / math.log(16)))

    def test_documents_of_one_batch_keep_what_they_have_alone(self) -> None:
        """A packed row of a short and a long document, and a short one with padding."""
        documents = ((3, 17), (12,))
        positions = torch.stack(
            (torch.cat([torch.arange(length) for length in documents[0]]), torch.arange(20))
        )
        lengths = torch.tensor([[3] * 3 + [17] * 17, [12] * 12 + [1] * 8])
        tables = RotaryPositions(shape(8, 1e4, LONGROPE)).tables(positions, torch.float32, lengths)
        assert tables.shape == (2, 20, 2, 1, 4)
        for row, parts in enumerate(documents):
            expected = torch.cat([self.theirs(torch.arange(length)) for length in parts], dim=1)
            assert torch.equal(tables[:, : sum(parts), row, 0], expected)
        assert not torch.equal(tables[:, 3:15, 0], tables[:, :12, 1]), "the two lists differ"

    def test_rows_of_one_length_by_shared_positions(self) -> None:
        rotary = RotaryPositions(shape(8, 1e4, LONGROPE))
        tables = rotary.tables(torch.arange(6), torch.float32, torch.tensor([[6], [99]]))
        far = self.theirs(torch.arange(99))[:, :6]
        assert torch.equal(tables[:, :, 0, 0], self.theirs(torch.arange(6)))
        assert torch.equal(tables[:, :, 1, 0], far)

    def test_magnitudes_of_their_own(self) -> None:
        scaling = dataclasses.replace(LONGROPE, short_mscale=1.25, long_mscale=2.0)
        rotary, plain = (RotaryPositions(shape(8, 1e4, one)) for one in (scaling, LONGROPE))
        lengths = torch.tensor([[5] * 5 + [17] * 17])
        positions = torch.cat([torch.arange(5), torch.arange(17)]).unsqueeze(0)
        found, usual = (one.tables(positions, torch.float64, lengths) for one in (rotary, plain))
        usual = usual / plain.amplitude
        torch.testing.assert_close(found[:, :5], usual[:, :5] * 1.25, rtol=1e-6, atol=0)
        torch.testing.assert_close(found[:, 5:], usual[:, 5:] * 2.0, rtol=1e-6, atol=0)
