"""Every family goes from Hugging Face to Megatron and back, bit by bit; packed rows lie where Megatron has them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mindspeed_lora.checkpoint.conversion.convert import open_conversion
from mindspeed_lora.checkpoint.source import open_source
from mindspeed_lora.config.checks import check_layout
from mindspeed_lora.config.commands import parse
from mindspeed_lora.config.parallel import ParallelConfig
from mindspeed_lora.errors import Refused
from mindspeed_lora.models.gpt import GPTModel
from tests.support.family_models import FFN, GROUPS, HEAD, HEADS, HIDDEN, KINDS, family_model

Convert = Callable[..., None]
CUT = {"target_tensor_parallel_size": 2, "target_pipeline_parallel_size": 2}
HIDDEN_STATE = "inv_freq"
"""Tables that are not kept."""


@pytest.fixture(scope="module", params=KINDS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of each kind in turn."""
    return family_model(request.param, tmp_path_factory.mktemp("families") / request.param)


def to_mg(run_convert: Convert, source: Path, target: Path) -> Path:
    run_convert(load_dir=source, save_dir=target, save_model_type="mg", **CUT)
    return target


def weights(folder: Path) -> dict[str, torch.Tensor]:
    tensors = load_file(folder / "model.safetensors")
    return {name: tensor for name, tensor in tensors.items() if not name.endswith(HIDDEN_STATE)}


def assert_same_bits(found: Path, expected: Path) -> None:
    one, two = weights(found), weights(expected)
    assert set(one) == set(two)
    for name, tensor in two.items():
        assert one[name].dtype == tensor.dtype and torch.equal(one[name], tensor), name


def test_hf_to_mg_to_hf(folder: Path, tmp_path: Path, run_convert: Convert):
    mg = to_mg(run_convert, folder, tmp_path / "mg")
    run_convert(load_dir=mg, save_dir=tmp_path / "out", save_model_type="hf")
    assert_same_bits(tmp_path / "out" / "mg2hf", folder)
    kept, given = (
        json.loads((path / "config.json").read_text()) for path in (tmp_path / "out/mg2hf", folder)
    )
    assert {**kept, "dtype": None, "torch_dtype": None} == {**given, "dtype": None, "torch_dtype": None}


def test_args_alone_tell_the_model(folder: Path, tmp_path: Path, run_convert: Convert):
    """Without hf_config: resharded by ``args``, then back with the configuration given."""
    mg, one = to_mg(run_convert, folder, tmp_path / "mg"), tmp_path / "one"
    shutil.rmtree(mg / "hf_config")
    from_args, from_config = open_source(mg).shape, open_source(folder).shape
    assert from_args == from_config
    run_convert(load_dir=mg, save_dir=one, save_model_type="mg")
    run_convert(load_dir=one, save_dir=tmp_path / "out", save_model_type="hf", hf_cfg_dir=folder)
    assert_same_bits(tmp_path / "out" / "mg2hf", folder)


PACKED = {
    "phi3": ("model.layers.1.self_attn.qkv_proj.weight", "model.layers.1.mlp.gate_up_proj.weight", GROUPS),
    "baichuan2-7b": ("model.layers.1.self_attn.W_pack.weight", None, HEADS),
    "chatglm3": (
        "transformer.encoder.layers.1.self_attention.query_key_value.weight",
        "transformer.encoder.layers.1.mlp.dense_h_to_4h.weight",
        GROUPS,
    ),
}


@pytest.mark.parametrize("kind", PACKED)
def test_stacked_rows_become_query_groups(kind: str, tmp_path: Path):
    folder = family_model(kind, tmp_path / "model")
    qkv_name, fc1_name, groups = PACKED[kind]
    source, tensors = open_source(folder), weights(folder)
    q, k, v = tensors[qkv_name].split([HEADS * HEAD, groups * HEAD, groups * HEAD])
    heads = [part.view(groups, -1, HIDDEN) for part in (q, k, v)]
    name = "decoder.layers.1.self_attention.linear_qkv.weight"
    assert torch.equal(source.read(name), torch.cat(heads, dim=1).flatten(0, 1))
    half = source.read(name, 0, [((HEADS + 2 * groups) * HEAD // 2, (HEADS + 2 * groups) * HEAD)])
    assert torch.equal(half, torch.cat([part[groups // 2 :] for part in heads], dim=1).flatten(0, 1))
    if fc1_name is not None:
        gate, up = tensors[fc1_name].view(2, FFN, HIDDEN)
        assert torch.equal(source.read("decoder.layers.1.mlp.linear_fc1.weight"), torch.cat([gate, up]))


def test_wqkv_lies_in_megatrons_order(tmp_path: Path):
    folder = family_model("internlm2", tmp_path / "model")
    found = open_source(folder).read("decoder.layers.0.self_attention.linear_qkv.weight")
    assert torch.equal(found, weights(folder)["model.layers.0.attention.wqkv.weight"])


def test_norms_of_gemma2_and_glm4_keep_their_places(tmp_path: Path):
    places = {
        "gemma2": {
            "post_attn_norm": "post_attention_layernorm",
            "pre_mlp_layernorm": "pre_feedforward_layernorm",
            "post_mlp_layernorm": "post_feedforward_layernorm",
        },
        "glm4": {
            "post_attn_norm": "post_self_attn_layernorm",
            "pre_mlp_layernorm": "post_attention_layernorm",
            "post_mlp_layernorm": "post_mlp_layernorm",
        },
    }
    for kind, norms in places.items():
        folder = family_model(kind, tmp_path / kind)
        source, tensors = open_source(folder), weights(folder)
        for ours, theirs in norms.items():
            found = source.read(f"decoder.layers.1.{ours}.weight")
            assert torch.equal(found, tensors[f"model.layers.1.{theirs}.weight"])


UNUSED: Any = (None, None)
"""Configuration and groups of a model that is refused before it looks at them."""
BUILT = (
    *(
        "llama3.2",
        "phi3",
        "phi3-longrope",
        "phi4-mini",
        "internlm2",
        "baichuan-7b",
        "gemma",
        "gemma2",
        "glm",
        "glm4",
        "chatglm3",
    ),
    *("granite", "minicpm"),
)
FEATURES = {
    "gemma3": ("gemma3_text", "window_layers 4096"),
    "baichuan2-7b": ("baichuan", "norm_head true"),
    "baichuan2-13b": ("baichuan", "norm_head true", "position_embedding_type alibi"),
}


def test_what_is_not_built_is_refused_by_name(folder: Path):
    shape = open_source(folder).shape
    parallel = ParallelConfig()
    if folder.name in BUILT:
        assert check_layout(shape, parallel).num_slots == shape.num_layers
        return
    with pytest.raises(Refused, match="can be converted, but neither trained nor run") as error:
        check_layout(shape, parallel)
    with pytest.raises(Refused, match="neither trained nor run"):
        GPTModel(shape, *UNUSED, shape.vocab_size)
    family, *features = FEATURES[folder.name]
    assert str(error.value).startswith(f"{family}: ")
    for feature in features:
        assert f"({feature})" in str(error.value)


@pytest.mark.parametrize(
    ("kind", "flags", "contradiction"),
    [
        ("glm4", ["--post-norm"], None),
        ("gemma2", ["--post-norm", "--add-rmsnorm-offset", "--model-type-hf", "gemma2"], None),
        ("gemma", ["--apply-layernorm-1p", "--model-type-hf", "gemma"], None),
        ("chatglm3", ["--add-qkv-bias", "--w-pack", "--model-type-hf", "chatglm3"], None),
        ("baichuan2-7b", ["--w-pack", "--model-type-hf", "baichuan2"], None),
        ("gemma3", ["--add-qkv-bias", "--add-dense-bias"], None),
        ("gemma2", ["--gelu-tanh", "--attn-logit-softcapping", "50", "--query-pre-attn-scalar", "256"], None),
        ("gemma2", ["--interleave-sliding-window", "4096", "--input-embeds-norm"], None),
        ("gemma2", ["--attn-logit-softcapping", "3"], r"--attn-logit-softcapping 3.0 \(checkpoint: 50.0\)"),
        ("gemma2", ["--swiglu"], r"--swiglu \(checkpoint: off\)"),
        ("minicpm", ["--scale-emb", "12", "--dim-model-base", "16", "--scale-depth", "1.4"], None),
        ("phi3", ["--scale-emb", "12"], r"--scale-emb 12.0 \(checkpoint: none\)"),
        ("chatglm3", ["--use-glm-rope"], None),
        ("phi3", ["--post-norm"], r"--post-norm \(checkpoint: off\)"),
        ("phi3", ["--add-dense-bias"], r"--add-dense-bias \(checkpoint: off\)"),
        ("phi3", ["--apply-layernorm-1p"], r"--add-rmsnorm-offset \(checkpoint: off\)"),
        ("glm4", ["--w-pack"], "--w-pack contradicts the checkpoint, which is a glm4 model"),
        ("glm4", ["--model-type-hf", "chatglm3"], "--model-type-hf chatglm3 contradicts .* a glm4 model"),
    ],
)
def test_family_flags_of_published_scripts(
    kind: str, flags: list[str], contradiction: str | None, tmp_path: Path
):
    words = ["--load-dir", str(family_model(kind, tmp_path / "model")), "--save-dir", str(tmp_path / "mg")]
    job = parse("convert", [*words, "--save-model-type", "mg", *flags])
    if contradiction is None:
        assert open_conversion(job).source.shape == open_source(tmp_path / "model").shape
        return
    with pytest.raises(Refused, match=contradiction):
        open_conversion(job)
