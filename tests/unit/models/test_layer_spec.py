"""Layers as checkpoints have them: every combination of biases, head norms, the sliding window."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from mindspeed_lora.checkpoint.formats.hf import shape_of
from mindspeed_lora.models.layer import NoopLayer
from mindspeed_lora.models.layer_spec import block_spec
from mindspeed_lora.models.moe.settings import MoESettings
from mindspeed_lora.models.norm import RMSNorm
from mindspeed_lora.parallel.groups import ParallelGroups
from tests.unit.models.conftest import BuildGpt

SIZES: dict[str, Any] = {
    "vocab_size": 31,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
}
TOKENS = torch.randint(0, 31, (2, 12), generator=torch.Generator().manual_seed(4))


def save(folder: Path, model_type: str, **own: Any) -> Any:
    """A model with large random weights, biases and norms, so that a lost one shows."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**SIZES, **own}))
        for name, parameter in model.named_parameters():
            parameter.data.normal_(std=0.3).add_(1.0 if "norm" in name else 0.0)
    model.save_pretrained(folder)
    return model.eval()


def compare(build_gpt: BuildGpt, folder: Path, theirs: Any) -> Any:
    ours = build_gpt(folder).eval()
    with torch.no_grad():
        found = ours(TOKENS).transpose(0, 1)
        expected = theirs(TOKENS).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    return ours


@pytest.mark.parametrize(("attention", "mlp"), list(itertools.product([False, True], repeat=2)))
def test_llama_biases(build_gpt: BuildGpt, tmp_path: Path, attention: bool, mlp: bool) -> None:
    theirs = save(tmp_path, "llama", attention_bias=attention, mlp_bias=mlp)
    ours = compare(build_gpt, tmp_path, theirs)
    for layer in ours.decoder.layers:
        assert (layer.self_attention.linear_qkv.bias is not None) is attention
        assert (layer.self_attention.linear_proj.bias is not None) is attention
        assert (layer.mlp.linear_fc1.bias is not None) is mlp
        assert (layer.mlp.linear_fc2.bias is not None) is mlp


def test_qwen2_has_a_bias_on_qkv_alone(build_gpt: BuildGpt, tmp_path: Path) -> None:
    ours = compare(build_gpt, tmp_path, save(tmp_path, "qwen2"))
    biased = {name.rsplit(".", 2)[1] for name, _ in ours.named_parameters() if name.endswith(".bias")}
    assert biased == {"linear_qkv"}


def test_qwen3_norms_each_head(build_gpt: BuildGpt, tmp_path: Path) -> None:
    ours = compare(build_gpt, tmp_path, save(tmp_path, "qwen3", head_dim=12))
    assert ours.decoder.layers[1].self_attention.q_layernorm.weight.shape == (12,)
    assert not [name for name, _ in ours.named_parameters() if name.endswith(".bias")]


@pytest.mark.parametrize("window", [1, 5, 40])
def test_mistral_s_window(build_gpt: BuildGpt, tmp_path: Path, window: int) -> None:
    compare(build_gpt, tmp_path, save(tmp_path, "mistral", sliding_window=window))


def test_the_epsilon_of_every_norm_is_the_model_s(build_gpt: BuildGpt, tmp_path: Path) -> None:
    ours = compare(build_gpt, tmp_path, save(tmp_path, "qwen3", rms_norm_eps=0.05))
    found = [module.eps for module in ours.modules() if isinstance(module, RMSNorm)]
    assert found == [0.05] * (2 * 4 + 1)


def test_no_op_layers_do_nothing(groups: ParallelGroups, tmp_path: Path) -> None:
    save(folder := tmp_path / "model", "llama")
    layers = block_spec(shape_of(folder), (None, 0, None), groups, MoESettings()).layer_specs
    assert [spec.module is NoopLayer for spec in layers] == [True, False, True]
    hidden = torch.randn(3, 2, 4)
    output, context = NoopLayer(config=None, layer_number=1)(hidden, rotary_pos_emb=None)
    assert output is hidden and context is None
