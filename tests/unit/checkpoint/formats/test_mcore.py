"""Megatron files as written here and as others write them: reading, and refusing what does not fit."""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mindspeed_lora.checkpoint.canonical import padded_vocab_size, to_canonical
from mindspeed_lora.checkpoint.engine import execute
from mindspeed_lora.checkpoint.formats.mcore import McoreSource
from mindspeed_lora.checkpoint.formats.mcore_writer import plan_mcore
from mindspeed_lora.checkpoint.source import Source, open_source
from mindspeed_lora.checkpoint.storage.manifest import MANIFEST_FILE
from mindspeed_lora.config.stages import LayerPlacement
from mindspeed_lora.errors import Refused

Edit = Callable[[dict[str, Any]], None]


def load(path: Path) -> dict[str, Any]:
    with torch.serialization.safe_globals([argparse.Namespace]):
        loaded: dict[str, Any] = torch.load(path, weights_only=True)
    return loaded


def rank_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("iter_*/mp_rank_*/model_optim_rng.pt"))


def edit_all(folder: Path, edit: Edit) -> None:
    """Change every rank's file, and save it with torch.save as Megatron does."""
    for path in rank_files(folder):
        content = load(path)
        edit(content)
        torch.save(content, path)
    (folder / MANIFEST_FILE).unlink(missing_ok=True)


def written(source: Source, folder: Path, tp_size: int = 2, pp_size: int = 1) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    placement = LayerPlacement.even(source.shape.num_layers, pp_size)
    execute(plan_mcore(source, placement, tp_size, padded_vocab_size(source.shape, 1, tp_size)), folder)
    return folder


def assert_same(folder: Path, source: Source) -> None:
    found = open_source(folder)
    assert found.names() == source.names()
    for name in source.names():
        assert found.dtype(name) == source.dtype(name)
        assert torch.equal(found.read(name), source.read(name)), name


def refusal(folder: Path) -> str:
    with pytest.raises(Refused) as error:
        open_source(folder)
    assert str(folder) in str(error.value)
    return str(error.value)


@pytest.fixture
def source(models) -> Source:
    return open_source(models("llama").path)


@pytest.mark.parametrize(("tp_size", "pp_size"), [(1, 1), (2, 1), (1, 2), (2, 2), (4, 4)])
def test_any_layout_reads_back_bit_for_bit(model, tmp_path: Path, tp_size: int, pp_size: int):
    source = open_source(model.path)
    folder = written(source, tmp_path / "mg", tp_size, pp_size)
    assert_same(folder, source)
    found = open_source(folder)
    assert isinstance(found, McoreSource)
    assert (found.tp_size, found.pp_size) == (tp_size, pp_size)
    assert found.shape == source.shape
    assert found.hf_origin == source.hf_origin


def test_layout_of_the_files(models, tmp_path: Path):
    source = open_source(models("llama-tied").path)
    folder = written(source, tmp_path / "mg", tp_size=2, pp_size=2)
    assert (folder / "latest_checkpointed_iteration.txt").read_text() == "1"
    assert [path.parent.name for path in rank_files(folder)] == [
        "mp_rank_00_000",
        "mp_rank_00_001",
        "mp_rank_01_000",
        "mp_rank_01_001",
    ]
    first, last = (load(folder / "iter_0000001" / f"mp_rank_01_00{pp}/model_optim_rng.pt") for pp in (0, 1))
    assert list(first) == ["args", "checkpoint_version", "iteration", "model"]
    assert (first["checkpoint_version"], first["iteration"]) == (3.0, 1)
    args = first["args"]
    assert (args.tensor_model_parallel_size, args.pipeline_model_parallel_size) == (2, 2)
    assert (args.num_layers, args.num_query_groups, args.vocab_size) == (4, 4, 101)
    assert (args.padded_vocab_size, args.params_dtype) == (102, torch.bfloat16)
    assert args.untie_embeddings_and_output_weights is False
    assert first["model"]["embedding.word_embeddings.weight"].shape == (51, 32)
    assert first["model"]["decoder.layers.0.mlp.linear_fc1.weight"].shape == (48, 32)
    names = set(last["model"])
    assert {"decoder.layers.1.mlp.linear_fc2.weight", "decoder.final_layernorm.weight"} <= names
    assert not {"decoder.layers.2.mlp.linear_fc2.weight", "embedding.word_embeddings.weight"} & names
    embedding = source.read("embedding.word_embeddings.weight")
    assert torch.equal(last["model"]["output_layer.weight"][:50], embedding[51:])
    assert not last["model"]["output_layer.weight"][50:].any()


def test_contents_of_a_rank_are_megatrons(models, tmp_path: Path):
    """Against the Hugging Face tensors themselves, so that no error of ours cancels out."""
    model = models("llama-biased")
    folder = written(open_source(model.path), tmp_path / "mg", tp_size=2, pp_size=2)
    rank = load(folder / "iter_0000001" / "mp_rank_01_001" / "model_optim_rng.pt")["model"]
    hf = {
        name.removeprefix("model.layers.3."): tensor
        for name, tensor in model.tensors.items()
        if name.startswith("model.layers.3.")
    }
    for kind in ("weight", "bias"):
        q, k, v = (hf[f"self_attn.{name}_proj.{kind}"] for name in "qkv")
        rows = [part for g in (2, 3) for part in (q[8 * g :][:8], k[4 * g :][:4], v[4 * g :][:4])]
        assert torch.equal(rank[f"decoder.layers.1.self_attention.linear_qkv.{kind}"], torch.cat(rows))
        gate, up = (hf[f"mlp.{name}_proj.{kind}"] for name in ("gate", "up"))
        assert torch.equal(rank[f"decoder.layers.1.mlp.linear_fc1.{kind}"], torch.cat([gate[24:], up[24:]]))
    proj, down = (hf[f"{name}.weight"] for name in ("self_attn.o_proj", "mlp.down_proj"))
    assert torch.equal(rank["decoder.layers.1.self_attention.linear_proj.weight"], proj[:, 16:])
    assert torch.equal(rank["decoder.layers.1.mlp.linear_fc2.weight"], down[:, 24:])
    assert torch.equal(rank["decoder.layers.1.mlp.linear_fc2.bias"], hf["mlp.down_proj.bias"])
    norm = hf["post_attention_layernorm.weight"]
    assert torch.equal(rank["decoder.layers.1.pre_mlp_layernorm.weight"], norm)


def test_tied_embeddings_on_one_stage_have_no_output_layer(models, tmp_path: Path):
    folder = written(open_source(models("llama-tied").path), tmp_path / "mg")
    assert "output_layer.weight" not in load(rank_files(folder)[0])["model"]


def test_one_iteration_can_be_named(source, tmp_path: Path):
    folder = written(source, tmp_path / "mg")
    assert_same(folder / "iter_0000001", source)
    (folder / "latest_checkpointed_iteration.txt").unlink()
    assert_same(folder, source)


def test_release_folder(source, tmp_path: Path):
    folder = written(source, tmp_path / "mg")
    (folder / "iter_0000001").rename(folder / "release")
    (folder / "latest_checkpointed_iteration.txt").write_text("release\n")
    assert_same(folder, source)


def test_files_without_kept_configuration(model, tmp_path: Path):
    source = open_source(model.path)
    folder = written(source, tmp_path / "mg", tp_size=2, pp_size=2)
    shutil.rmtree(folder / "hf_config")
    assert_same(folder, source)
    found = open_source(folder)
    assert found.config_dir is None and found.hf_origin is None
    assert found.shape.family == source.shape.family
    assert found.shape == source.shape


def test_prefixes_of_wrappers_and_unmerged_adapters(source, tmp_path: Path):
    folder = written(source, tmp_path / "mg")

    def wrap(content: dict[str, Any]) -> None:
        model = content["model"]
        content["model"] = {
            "module."
            + (name.replace(".weight", ".base_layer.weight") if ".linear_" in name else name): tensor
            for name, tensor in model.items()
        }
        content["model"]["module.decoder.layers.0.mlp.linear_fc1.lora_A.default.weight"] = torch.ones(2, 32)
        content["model"]["decoder.layers.0.mlp.linear_fc1._extra_state"] = None

    edit_all(folder, wrap)
    assert_same(folder, source)
    found = open_source(folder)
    assert isinstance(found, McoreSource) and found.has_unmerged_adapter


def test_vocabulary_padded_by_its_last_row_is_cut(source, tmp_path: Path):
    folder = written(source, tmp_path / "mg", tp_size=1)

    def pad(content: dict[str, Any]) -> None:
        for name in ("embedding.word_embeddings.weight", "output_layer.weight"):
            rows = content["model"][name]
            content["model"][name] = torch.cat([rows, rows[-1:].expand(27, -1)])
        content["args"].padded_vocab_size = 128
        content["args"].vocab_size = None

    edit_all(folder, pad)
    assert_same(folder, source)
    shutil.rmtree(folder / "hf_config")
    assert open_source(folder).shape.vocab_size == 128


def test_virtual_pipeline_and_uneven_stages(source, tmp_path: Path):
    folder = written(source, tmp_path / "mg", tp_size=1, pp_size=1)
    whole = load(rank_files(folder)[0])
    shutil.rmtree(folder / "iter_0000001")
    # Chunks in the order of the forward pass: (stage 0, model0) (stage 1, model0) (stage 0, model1) (…)
    stages: list[dict[str, Any]] = [{}, {}]
    first = 0
    for number, count in enumerate([1, 2, 0, 1]):
        layers = range(first, first + count)
        chunk = {
            # Local numbers leave places for no-op layers.
            to_canonical(name, {layer: 2 * (layer - first) + 1 for layer in layers}): tensor
            for name, tensor in whole["model"].items()
            if any(name.startswith(f"decoder.layers.{layer}.") for layer in layers)
        }
        stages[number % 2][f"model{number // 2}"] = chunk
        first += count
    stages[0]["model0"]["embedding.word_embeddings.weight"] = whole["model"][
        "embedding.word_embeddings.weight"
    ]
    for name in ("decoder.final_layernorm.weight", "output_layer.weight"):
        stages[1]["model1"][name] = whole["model"][name]
    whole["args"].pipeline_model_parallel_size = 2
    whole["args"].num_layers, whole["args"].noop_layers = 6, "0,2"
    for rank, stage in enumerate(stages):
        path = folder / "iter_0000001" / f"mp_rank_00_00{rank}" / "model_optim_rng.pt"
        path.parent.mkdir(parents=True)
        torch.save({"args": whole["args"], "checkpoint_version": 3.0, **stage}, path)
    assert_same(folder, source)


def test_args_may_be_absent_where_the_configuration_is_kept(source, tmp_path: Path):
    folder = written(source, tmp_path / "mg")
    edit_all(folder, lambda content: content.pop("args"))
    assert_same(folder, source)
    shutil.rmtree(folder / "hf_config")
    assert "holds no args, and there is no hf_config" in refusal(folder)


def test_no_checkpoint(tmp_path: Path, source):
    folder = written(source, tmp_path / "mg")
    (folder / "latest_checkpointed_iteration.txt").write_text("7")
    assert "names iteration 7, but iter_0000007 is not there" in refusal(folder)
    (folder / "latest_checkpointed_iteration.txt").write_text("seven")
    assert "found 'seven'; expected an iteration number" in refusal(folder)


def test_missing_rank(source, tmp_path: Path):
    folder = written(source, tmp_path / "mg", tp_size=2, pp_size=2)
    shutil.rmtree(folder / "iter_0000001" / "mp_rank_00_001")
    assert "tensor-parallel rank 0, pipeline rank 1 is missing" in refusal(folder)
    shutil.rmtree(folder / "iter_0000001" / "mp_rank_01_001")
    assert "args.pipeline_model_parallel_size is 2, but the mp_rank_* folders" in refusal(folder)


def test_missing_file_of_a_rank(source, tmp_path: Path):
    folder = written(source, tmp_path / "mg")
    rank_files(folder)[1].unlink()
    assert "mp_rank_01/model_optim_rng.pt: the file is missing" in refusal(folder)


def test_truncated_file_of_a_rank(source, tmp_path: Path):
    folder = written(source, tmp_path / "mg")
    file = rank_files(folder)[1]
    file.write_bytes(file.read_bytes()[:-50])
    assert "mp_rank_01/model_optim_rng.pt" in refusal(folder)


def test_a_folder_named_for_another_expert_parallel_rank(source, tmp_path: Path):
    folder = written(source, tmp_path / "mg", tp_size=1)
    (folder / "iter_0000001/mp_rank_00").rename(folder / "iter_0000001/mp_rank_00_000_001")
    assert "args.expert_model_parallel_size is 1, but the mp_rank_* folders" in refusal(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_experts": 8}, "num_experts is 8 in args"),
        ({"normalization": "LayerNorm"}, "args.normalization is 'LayerNorm'"),
        ({"position_embedding_type": "learned_absolute"}, "args.position_embedding_type is"),
        ({"num_layers": 6}, "num_layers is 6 in args"),
        ({"num_query_groups": 2}, "num_query_groups is 2 in args"),
        ({"rotary_base": 1e4}, "rotary_base is 10000.0 in args"),
        ({"tensor_model_parallel_size": 4}, "args.tensor_model_parallel_size is 4"),
    ],
)
def test_args_that_contradict(source, tmp_path: Path, changes: dict[str, Any], message: str):
    folder = written(source, tmp_path / "mg")
    edit_all(folder, lambda content: vars(content["args"]).update(changes))
    assert message in refusal(folder)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c["model"].pop("decoder.final_layernorm.weight"), "tensors are missing: decoder.final_l"),
        (lambda c: c["model"].update(extra=torch.ones(1)), "not known in a model of this shape: extra"),
        (
            lambda c: c["model"].update({"decoder.final_layernorm.weight": torch.ones(31)}),
            r"decoder.final_layernorm.weight has shape [31]",
        ),
        (
            lambda c: c["model"].update({"decoder.final_layernorm.weight": torch.ones(32).int()}),
            "decoder.final_layernorm.weight has dtype torch.int32",
        ),
        (lambda c: c.pop("model"), "holds no model"),
        (lambda c: c.update(checkpoint_version=1.0), "checkpoint_version 1.0 is not supported"),
        (lambda c: c["model"].update({"module.output_layer.bias": torch.ones(1)}), "output_layer.bias"),
    ],
)
def test_contents_that_do_not_fit(source, tmp_path: Path, edit: Edit, message: str):
    folder = written(source, tmp_path / "mg")
    edit_all(folder, edit)
    assert message in refusal(folder)


def test_shards_of_one_rank_alone_differ(source, tmp_path: Path):
    folder = written(source, tmp_path / "mg")
    (folder / MANIFEST_FILE).unlink()
    path = rank_files(folder)[1]
    content = load(path)
    content["model"]["decoder.layers.0.mlp.linear_fc1.weight"] = torch.ones(46, 32)
    torch.save(content, path)
    assert "decoder.layers.0.mlp.linear_fc1.weight has shape" in refusal(folder)
    content["model"].pop("decoder.layers.0.mlp.linear_fc1.weight")
    torch.save(content, path)
    assert "is in 1 of 2 tensor-parallel ranks" in refusal(folder)
