"""Multi-latent attention on one rank against transformers: logits, generation from the cache, recomputation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mindspeed_lora.checkpoint.formats.hf import shape_of
from mindspeed_lora.checkpoint.loading.local_parameters import local_parameters
from mindspeed_lora.models.forward_context import ForwardContext
from mindspeed_lora.models.mla import MLASelfAttention, mla_softmax_scale
from tests.support.models import VOCAB_SIZE, make_model
from tests.unit.models.conftest import BuildGpt

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "v3, yarn": ("deepseek-v3", {}),
    "v3, halves rotated": ("deepseek-v3", {"rope_interleave": False}),
    "v3, wide values": ("deepseek-v3", {"v_head_dim": 18}),
    "v3, another norm epsilon": ("deepseek-v3", {"rms_norm_eps": 1e-3}),
    "v2 lite": ("deepseek-v2", {}),
    "v2, a latent of queries": ("deepseek-v2", {"q_lora_rank": 12}),
}


def tokens(length: int) -> torch.Tensor:
    return torch.randint(0, VOCAB_SIZE, (2, length), generator=torch.Generator().manual_seed(length))


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_logits_are_those_of_transformers(kind: str, build_gpt: BuildGpt, tmp_path: Path) -> None:
    """Of short rows and of rows that are computed by blocks of queries, beyond the original positions of YaRN."""
    from transformers import AutoModelForCausalLM

    name, changes = KINDS[kind]
    folder = make_model(name, tmp_path / "model", **changes)
    theirs = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    model = build_gpt(folder).eval()
    assert sum(isinstance(module, MLASelfAttention) for module in model.modules()) == 4
    for length in (9, 128):
        rows = tokens(length)
        torch.testing.assert_close(
            model(rows).transpose(0, 1), theirs(rows).logits, rtol=1e-4, atol=1e-4, msg=f"{kind}, {length}"
        )


def test_scale_with_yarn(tmp_path: Path) -> None:
    """``mscale_all_dim`` sharpens the softmax, ``mscale`` by it the rotated features."""
    shape = shape_of(make_model("deepseek-v3", tmp_path / "model"))
    magnitude = 0.1 * 0.9 * 1.3862943611198906 + 1
    assert mla_softmax_scale(shape) == pytest.approx(14**-0.5 * magnitude**2)
    assert mla_softmax_scale(shape_of(make_model("deepseek-v2", tmp_path / "v2"))) == 14**-0.5


@torch.no_grad()
def test_sub_rows_are_the_rows_alone(build_gpt: BuildGpt, tmp_path: Path) -> None:
    model = build_gpt(make_model("deepseek-v3", tmp_path / "model")).eval()
    rows = tokens(24)
    lengths = ((5, 12, 7), (24,))
    positions = torch.cat([torch.arange(length) for length in lengths[0]])
    packed = model(
        rows, positions=torch.stack((positions, torch.arange(24))), context=ForwardContext(sub_rows=lengths)
    )
    start = 0
    for length in lengths[0]:
        alone = model(rows[:1, start : start + length])
        torch.testing.assert_close(packed[start : start + length, :1], alone, rtol=1e-5, atol=2e-5)
        start += length


def test_parameters_have_canonical_names(build_gpt: BuildGpt, tmp_path: Path) -> None:
    for name in ("deepseek-v2", "deepseek-v3"):
        model = build_gpt(make_model(name, tmp_path / name))
        found = {parameter.name: parameter.shape for parameter in local_parameters(model)}
        from mindspeed_lora.checkpoint.canonical import canonical_tensors

        assert found == canonical_tensors(model.shape)
