"""convert_ckpt.py from and to megatron-core's distributed checkpoints, and training on one."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mindspeed_lora.checkpoint.formats.hf import shape_of
from mindspeed_lora.checkpoint.formats.mcore import McoreSource
from mindspeed_lora.checkpoint.formats.torch_dist import TorchDistSource
from mindspeed_lora.checkpoint.source import open_source
from mindspeed_lora.config.parallel import ParallelConfig
from mindspeed_lora.errors import Refused
from mindspeed_lora.parallel.groups import ParallelGroups
from tests.support.adapters import ALL, new_adapter, write
from tests.unit.checkpoint.conftest import load_weights

Convert = Callable[..., None]
TP2_PP2 = {"target_tensor_parallel_size": 2, "target_pipeline_parallel_size": 2}


def assert_weights(folder: Path, expected: dict[str, torch.Tensor]) -> None:
    found = load_weights(folder)
    assert set(found) == set(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_hf_to_torch_dist_to_hf_is_bit_identical(model: Any, tmp_path: Path, run_convert: Convert) -> None:
    run_convert(load_dir=model.path, save_dir=tmp_path / "td", save_model_type="torch_dist", **TP2_PP2)
    assert isinstance(open_source(tmp_path / "td"), TorchDistSource)
    run_convert(
        load_dir=tmp_path / "td",
        save_dir=tmp_path / "out",
        load_model_type="torch_dist",
        save_model_type="hf",
    )
    assert_weights(tmp_path / "out" / "mg2hf", model.tensors)


@pytest.mark.parametrize("kind", ["qwen2", "qwen3-tied", "llama-biased"])
def test_mg_to_torch_dist_to_mg_is_bit_identical(
    models: Callable[[str], Any], tmp_path: Path, run_convert: Convert, kind: str
) -> None:
    mg, td, again = (tmp_path / name for name in ("mg", "td", "again"))
    run_convert(load_dir=models(kind).path, save_dir=mg, save_model_type="mg", **TP2_PP2)
    run_convert(
        load_dir=mg,
        save_dir=td,
        save_model_type="torch_dist",
        target_tensor_parallel_size=4,
        target_pipeline_parallel_size=3,
        num_layer_list="1,2,1",
    )
    run_convert(load_dir=td, save_dir=again, save_model_type="mg", **TP2_PP2)
    assert isinstance(open_source(again), McoreSource)
    assert tree(again) == tree(mg)


def test_ckpt_format_says_which_mg_is_meant(
    models: Callable[[str], Any], tmp_path: Path, run_convert: Convert
) -> None:
    model, mg, td = models("llama"), tmp_path / "mg", tmp_path / "td"
    run_convert(load_dir=model.path, save_dir=mg, save_model_type="mg", ckpt_format="torch")
    assert isinstance(open_source(mg), McoreSource)
    run_convert(
        load_dir=mg, save_dir=td, load_model_type="mg", save_model_type="mg", ckpt_format="torch_dist"
    )
    assert isinstance(open_source(td), TorchDistSource)
    to_hf = {"save_model_type": "hf", "load_model_type": "mg", "load_dir": td}
    run_convert(save_dir=tmp_path / "one", **to_hf)
    run_convert(save_dir=tmp_path / "two", ckpt_format="torch_dist", **to_hf)
    assert_weights(tmp_path / "two" / "mg2hf", model.tensors)
    with pytest.raises(Refused, match=r"--ckpt-format torch: .* is torch_dist"):
        run_convert(save_dir=tmp_path / "three", ckpt_format="torch", **to_hf)
    with pytest.raises(Refused, match="--ckpt-format zarr: expected one of torch, torch_dist"):
        run_convert(save_dir=tmp_path / "three", ckpt_format="zarr", **to_hf)
    with pytest.raises(Refused, match="torch_dist contradicts --ckpt-format torch"):
        run_convert(
            load_dir=mg, save_dir=tmp_path / "three", save_model_type="torch_dist", ckpt_format="torch"
        )
    with pytest.raises(Refused, match=r"no distributed checkpoint"):
        run_convert(
            load_dir=mg, save_dir=tmp_path / "three", load_model_type="torch_dist", save_model_type="hf"
        )
    with pytest.raises(Refused, match=r"--save-lora-to-hf writes .* --save-model-type is torch_dist"):
        run_convert("--save-lora-to-hf", load_dir=mg, save_dir=td, save_model_type="torch_dist")


def test_merged_and_cast_on_the_way(
    models: Callable[[str], Any], tmp_path: Path, run_convert: Convert
) -> None:
    from peft import PeftModel

    model, shape = models("llama"), shape_of(models("llama").path)
    write(tmp_path / "adapter", shape, new_adapter(shape), base_model_name=str(model.path))
    (tmp_path / "adapter" / "chat_template.jinja").write_text("trained")
    merged = PeftModel.from_pretrained(model.load(), tmp_path / "adapter").merge_and_unload().state_dict()
    lora = {"lora_load": tmp_path / "adapter", "lora_target_modules": ALL}
    td, out = tmp_path / "td", tmp_path / "out"
    run_convert(load_dir=model.path, save_dir=td, save_model_type="torch_dist", **TP2_PP2, **lora)
    run_convert(load_dir=td, save_dir=out, save_model_type="hf")
    assert_weights(out / "mg2hf", merged)
    assert (out / "mg2hf" / "chat_template.jinja").read_text() == "trained"
    shutil.rmtree(out)
    plain, half = tmp_path / "plain", tmp_path / "half"
    run_convert(load_dir=model.path, save_dir=plain, save_model_type="torch_dist", **TP2_PP2)
    run_convert(load_dir=plain, save_dir=out, save_model_type="hf", **lora)
    assert_weights(out / "mg2hf", merged)
    run_convert(load_dir=plain, save_dir=half, save_model_type="torch_dist", params_dtype="bf16")
    found = open_source(half)
    assert found.shape.params_dtype == "bfloat16"
    for name in found.names():
        assert torch.equal(found.read(name), open_source(plain).read(name).bfloat16())


def test_without_kept_configuration_the_padding_is_cut(
    models: Callable[[str], Any], tmp_path: Path, run_convert: Convert
) -> None:
    model, td = models("llama"), tmp_path / "td"
    run_convert(
        load_dir=model.path, save_dir=td, save_model_type="torch_dist", make_vocab_size_divisible_by=64
    )
    shutil.rmtree(td / "hf_config")
    assert open_source(td).shape.vocab_size == 101
    run_convert(load_dir=td, save_dir=tmp_path / "out", save_model_type="hf", hf_cfg_dir=model.path)
    assert_weights(tmp_path / "out" / "mg2hf", model.tensors)


@pytest.mark.parametrize("kind", ["llama", "qwen3-tied"])
def test_a_model_to_train_is_built_from_one(
    models: Callable[[str], Any], tmp_path: Path, run_convert: Convert, groups: ParallelGroups, kind: str
) -> None:
    from mindspeed_lora.checkpoint.loading.model import build_model
    from mindspeed_lora.models.transformer_config import transformer_config

    run_convert(load_dir=models(kind).path, save_dir=tmp_path, save_model_type="torch_dist", **TP2_PP2)

    def parameters(folder: Path) -> dict[str, torch.Tensor]:
        source = open_source(folder)
        config = transformer_config(source.shape, ParallelConfig(), groups, torch.float32)
        model, _ = build_model(source.shape, config, groups, source)
        return dict(model.named_parameters())

    expected, found = parameters(models(kind).path), parameters(tmp_path)
    assert set(found) == set(expected)
    for name, parameter in expected.items():
        assert torch.equal(found[name], parameter), name
