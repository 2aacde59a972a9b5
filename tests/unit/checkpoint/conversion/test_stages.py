"""Every way to cut layers into pipeline stages, written and read back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mindspeed_lora.checkpoint.formats.mcore import McoreSource
from mindspeed_lora.checkpoint.storage.pt_file import PtFile
from mindspeed_lora.errors import Refused

Convert = Callable[..., None]
TO_MG = {"load_model_type": "hf", "save_model_type": "mg"}
TO_HF = {"load_model_type": "mg", "save_model_type": "hf"}

STAGES: list[tuple[dict[str, Any], list[list[list[int]]]]] = [
    # Flags, and for each pipeline rank the global layers of each of its chunks.
    ({"target_pipeline_parallel_size": 2}, [[[0, 1]], [[2, 3]]]),
    (
        {"target_pipeline_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1},
        [[[0], [2]], [[1], [3]]],
    ),
    (
        {"target_pipeline_parallel_size": 2, "num_virtual_stages_per_pipeline_rank": 2},
        [[[0], [2]], [[1], [3]]],
    ),
    ({"target_pipeline_parallel_size": 3, "num_layer_list": "1,2,1"}, [[[0]], [[1, 2]], [[3]]]),
    ({"target_pipeline_parallel_size": 3, "noop_layers": "1,5"}, [[[0]], [[1, 2]], [[3]]]),
    (
        {
            "target_pipeline_parallel_size": 3,
            "noop_layers": "4,5",
            "num_layers_per_virtual_pipeline_stage": 1,
        },
        [[[0], [3]], [[1], []], [[2], []]],
    ),
    ({"target_pipeline_parallel_size": 2, "decoder_first_pipeline_num_layers": 1}, [[[0]], [[1, 2, 3]]]),
    ({"target_pipeline_parallel_size": 2, "decoder_last_pipeline_num_layers": 1}, [[[0, 1, 2]], [[3]]]),
]


@pytest.mark.parametrize(("flags", "ranks"), STAGES, ids=lambda value: "-".join(map(str, value))[:60])
@pytest.mark.parametrize("name", ["llama", "llama-tied"])
def test_stages_round_trip(
    models,
    tmp_path: Path,
    run_convert: Convert,
    name: str,
    flags: dict[str, Any],
    ranks: list[list[list[int]]],
):
    model, mg, out = models(name), tmp_path / "mg", tmp_path / "out"
    run_convert(load_dir=model.path, save_dir=mg, target_tensor_parallel_size=2, **flags, **TO_MG)
    for rank, chunks in enumerate(ranks):
        content = PtFile(mg / f"iter_0000001/mp_rank_01_{rank:03d}/model_optim_rng.pt").content
        keys = ["model"] if len(chunks) == 1 else [f"model{number}" for number in range(len(chunks))]
        assert [key for key in content if key.startswith("model")] == keys
        for key, layers in zip(keys, chunks, strict=True):
            norms = [one for one in content[key] if one.endswith("input_layernorm.weight")]
            assert len(norms) == len(layers)
    run_convert(load_dir=mg, save_dir=out, **TO_HF)
    found, expected = type(model)("", out / "mg2hf").tensors, model.tensors
    assert set(found) == set(expected)
    assert all(torch.equal(found[one], tensor) for one, tensor in expected.items())
    # From stages to other stages, and every tensor read by ranges.
    again = tmp_path / "again"
    run_convert(load_dir=mg, save_dir=again, load_model_type="mg", save_model_type="mg")
    one, two = McoreSource(mg), McoreSource(again)
    assert all(torch.equal(one.read(tensor), two.read(tensor)) for tensor in one.names())


def test_stages_that_cannot_be_are_named_as_this_command_names_them(
    models, tmp_path: Path, run_convert: Convert
):
    def refusal(**flags: Any) -> str:
        with pytest.raises(Refused) as error:
            run_convert(load_dir=models("llama").path, save_dir=tmp_path / "mg", **flags, **TO_MG)
        assert not (tmp_path / "mg").exists()
        return str(error.value)

    assert "--target-pipeline-parallel-size 3 does not divide the model's 4 layers" in refusal(
        target_pipeline_parallel_size=3
    )
    assert "adds up to 3, but the model has 4 layers" in refusal(
        target_pipeline_parallel_size=2, num_layer_list="1,2"
    )
    assert "needs --target-pipeline-parallel-size of at least 2" in refusal(
        num_layers_per_virtual_pipeline_stage=1
    )


def test_names_of_transformer_engine(models, tmp_path: Path, run_convert: Convert):
    model, mg, out = models("qwen3-tied"), tmp_path / "mg", tmp_path / "out"
    run_convert(load_dir=model.path, save_dir=mg, transformer_impl="transformer_engine", **TO_MG)
    content = PtFile(mg / "iter_0000001/mp_rank_00/model_optim_rng.pt").content
    assert content["args"].transformer_impl == "transformer_engine"
    names = {name.split(".", 3)[3] for name in content["model"] if name.startswith("decoder.layers.2.")}
    assert names == {
        "self_attention.linear_qkv.layer_norm_weight",
        "self_attention.linear_qkv.weight",
        "self_attention.q_layernorm.weight",
        "self_attention.k_layernorm.weight",
        "self_attention.linear_proj.weight",
        "mlp.linear_fc1.layer_norm_weight",
        "mlp.linear_fc1.weight",
        "mlp.linear_fc2.weight",
    }
    run_convert(load_dir=mg, save_dir=out, **TO_HF)
    found = type(model)("", out / "mg2hf").tensors
    assert all(torch.equal(found[one], tensor) for one, tensor in model.tensors.items())
