"""Megatron files as other programs write them, built from Hugging Face tensors by code of the tests' own."""

from __future__ import annotations

import io
import random
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mindspeed_lora.checkpoint.source import open_source
from mindspeed_lora.errors import Refused
from tests.support.megatron_files import Layout, Tensors, write_ranks

Content = dict[str, Any]
Change = Callable[[Content], Any]
TP2 = Layout(tp=2)
LAYER = "decoder.layers.0."


class Foreign:
    """A model and a writer of its Megatron files."""

    def __init__(self, model: Any, tmp_path: Path) -> None:
        self.model, self.tmp_path = model, tmp_path
        self.tensors: Tensors = model.tensors
        self.config = model.load().config

    def write(self, layout: Layout = TP2, change: Change = lambda content: None, **more: Any) -> Path:
        return write_ranks(self.tmp_path / "mg", self.config, layout, self.tensors, change=change, **more)

    def assert_read(self, folder: Path, config_dir: Path | None = None) -> None:
        """The checkpoint has the very bits of the Hugging Face folder."""
        found, expected = open_source(folder, config_dir=config_dir), open_source(self.model.path)
        assert found.names() == expected.names()
        for name in expected.names():
            assert torch.equal(found.read(name), expected.read(name)), name


@pytest.fixture
def llama(models: Any, tmp_path: Path) -> Foreign:
    """With grouped queries."""
    return Foreign(models("llama"), tmp_path)


@pytest.fixture
def qwen(models: Any, tmp_path: Path) -> Foreign:
    """With as many KV heads as heads, and biases on q, k and v."""
    return Foreign(models("qwen2"), tmp_path)


def refusal(folder: Path) -> str:
    with pytest.raises(Refused) as error:
        open_source(folder)
    assert str(folder) in str(error.value)
    return str(error.value)


def renamed(model: Tensors, *pairs: tuple[str, str]) -> Tensors:
    for old, new in pairs:
        model = {name.replace(old, new): value for name, value in model.items()}
    return model


def before_mcore(model: Tensors, encoder: str = "encoder", norm: str = "layernorm") -> Tensors:
    """Megatron-LM's names before megatron-core."""
    return renamed(
        model,
        ("embedding.word", "language_model.embedding.word"),
        ("output_layer", "language_model.output_layer"),
        ("decoder.final_layernorm", f"language_model.{encoder}.final_{norm}"),
        ("decoder.", f"language_model.{encoder}."),
        ("input_layernorm", f"input_{norm}"),
        ("pre_mlp_layernorm", f"post_attention_{norm}"),
        ("linear_qkv", "query_key_value"),
        ("linear_proj", "dense"),
        ("linear_fc1", "dense_h_to_4h"),
        ("linear_fc2", "dense_4h_to_h"),
    )


def nested(model: Tensors) -> Content:
    """Dictionaries within dictionaries, as Megatron-LM's modules saved themselves."""
    found: Content = {"language_model": {"embedding": {"word_embeddings": {}}, "output_layer": {}}}
    inner = found["language_model"]
    for name, value in model.items():
        path = name.split(".")
        if path[1] == "embedding":
            inner["embedding"]["word_embeddings"][path[-1]] = value
        elif path[1] == "output_layer":
            inner["output_layer"][path[-1]] = value
        else:
            inner.setdefault(path[1], {})[".".join(path[2:])] = value
    return found


def reorder(model: Tensors, version: float, head: int = 4) -> Tensors:
    """q, k and v of each rank in the order of an old version, from today's ``[n, 3, d]``."""
    for name, value in model.items():
        if ".query_key_value." in name:
            rows = value.reshape(-1, 3, head, *value.shape[1:])
            old = rows.transpose(0, 1) if version == 0 else rows.transpose(1, 2)
            model[name] = old.reshape(value.shape).clone()
    return model


@pytest.mark.parametrize("layout", [Layout(tp=2), Layout(tp=2, pp=2, vp=2)], ids=str)
@pytest.mark.parametrize("version", [0, None, 1.0, 2.0, 3.0])
def test_names_and_orders_from_before_megatron_core(qwen: Foreign, layout: Layout, version: float | None):
    def change(content: Content) -> None:
        for key in [key for key in content if key.startswith("model")]:
            model = before_mcore(content[key], "transformer" if version == 0 else "encoder")
            content[key] = nested(reorder(model, version or 0) if (version or 0) < 2 else model)
        content["checkpoint_version"] = version
        if version is None:
            content.pop("checkpoint_version")

    qwen.assert_read(qwen.write(layout, change))


def test_old_order_that_cannot_be_told(llama: Foreign):
    def change(content: Content) -> None:
        content["model"] = before_mcore(content["model"], norm="norm")
        content["checkpoint_version"] = 1.0

    folder = llama.write(change=change)
    assert (
        "checkpoint_version 1 has its own order of q, k and v, which is not defined for grouped"
        in refusal(folder)
    )


def test_grouped_queries_without_a_version_have_todays_order(llama: Foreign):
    def change(content: Content) -> None:
        content["model"] = before_mcore(content["model"], norm="norm")
        content.pop("checkpoint_version")

    llama.assert_read(llama.write(change=change))


@pytest.mark.parametrize("version", [0, 1.0, "three", True])
def test_versions_that_do_not_go_with_the_names(llama: Foreign, version: Any):
    folder = llama.write(change=lambda content: content.update(checkpoint_version=version))
    assert "checkpoint_version" in refusal(folder) and "expected" in refusal(folder)


def test_ranks_of_different_versions(qwen: Foreign):
    versions = iter([1.0, 3.0])

    def change(content: Content) -> None:
        content["model"] = before_mcore(content["model"])
        content["checkpoint_version"] = next(versions)

    assert "its ranks have different checkpoint_versions: [1.0, 3.0]" in refusal(qwen.write(change=change))


TE_NAMES = (
    ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"),
    ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"),
)


def test_transformer_engine(llama: Foreign):
    """Norms within the linears, and ``_extra_state`` as tensor, bytes and nothing."""

    def change(content: Content) -> None:
        model = renamed(content["model"], *TE_NAMES)
        extra = {
            "linear_qkv": io.BytesIO(b"state"),
            "linear_proj": torch.zeros(3, dtype=torch.uint8),
            "core": None,
        }
        model.update({f"{LAYER}self_attention.{name}._extra_state": value for name, value in extra.items()})
        content["model"] = model

    llama.assert_read(llama.write(Layout(tp=2, pp=2), change))


def test_layer_norm_with_a_bias(llama: Foreign):
    name = f"{LAYER}self_attention.linear_qkv.layer_norm_bias"
    folder = llama.write(change=lambda content: content["model"].update({name: torch.ones(32)}))
    assert f"{name}: a layer norm with a bias is not supported" in refusal(folder)


@pytest.mark.parametrize(
    "prefix", ["module.", "module.module.", "base_model.model.", "module.base_model.model."]
)
def test_wrappers(llama: Foreign, prefix: str):
    def change(content: Content) -> None:
        content["model"] = {f"{prefix}{name}": value for name, value in content["model"].items()}
        content["model"] = renamed(content["model"], ("linear_fc1.weight", "linear_fc1.base_layer.weight"))

    llama.assert_read(llama.write(change=change))


def test_one_tensor_under_two_names(llama: Foreign):
    name = "decoder.final_layernorm.weight"
    folder = llama.write(change=lambda content: content["model"].update({f"module.{name}": torch.ones(32)}))
    assert "is there twice, under another name too" in refusal(folder)


def test_release_and_what_lies_beside(llama: Foreign):
    folder = llama.write(name="release")
    for rank in (folder / "release").iterdir():
        (rank / "distrib_optim.pt").write_bytes(b"not to be opened")
        (rank / "model_optim_rng.pt").rename(rank / "model_rng.pt")
    llama.assert_read(folder)
    llama.assert_read(folder / "release")


def test_optimizer_state_and_random_states(llama: Foreign):
    def change(content: Content) -> None:
        state = {0: {"exp_avg": torch.zeros(4), "step": 3}}
        content["optimizer"] = {"optimizer": {"state": state, "param_groups": [{"lr": 1e-4}]}}
        content["opt_param_scheduler"] = {"max_lr": 1e-4}
        content["num_floating_point_operations_so_far"] = 1.5
        content["rng_state"] = [
            {
                "random_rng_state": random.getstate(),
                "np_rng_state": np.random.get_state(),
                "torch_rng_state": torch.get_rng_state(),
                "rng_tracker_states": {"model-parallel-rng": torch.get_rng_state()},
            }
        ]

    llama.assert_read(llama.write(change=change))


def test_args_absent_and_a_folder_with_the_configuration(llama: Foreign):
    folder = llama.write(change=lambda content: content.pop("args"))
    assert "holds no args, and there is no hf_config" in refusal(folder)
    llama.assert_read(folder, llama.model.path)


@pytest.mark.parametrize("ending", ["_000_000", "_000"])
def test_expert_parallel_folders_of_size_one(llama: Foreign, ending: str):
    folder = llama.write(Layout())
    (folder / "iter_0000001" / "mp_rank_00").rename(folder / "iter_0000001" / f"mp_rank_00{ending}")
    llama.assert_read(folder)


def test_expert_parallel_ranks_that_look_like_stages(llama: Foreign):
    folder = llama.write(
        Layout(pp=2), args={"expert_model_parallel_size": 2, "pipeline_model_parallel_size": 1}
    )
    assert "holds 2 layers, its args or config.json mean" in refusal(folder)


def resave(folder: Path, change: Callable[[Content, Path], None]) -> None:
    """Load each rank's file, trusted as it is ours, and save it in another way."""
    for path in folder.glob("*/*/*.pt"):
        change(torch.load(path, weights_only=False), path)


def test_older_form_of_torch_save_is_read_by_ranges(llama: Foreign):
    folder = llama.write(Layout(tp=2, pp=2))
    resave(folder, lambda content, path: torch.save(content, path, _use_new_zipfile_serialization=False))
    assert not any(zipfile.is_zipfile(path) for path in folder.glob("*/*/*.pt"))
    llama.assert_read(folder)


@pytest.mark.parametrize("zipped", [True, False])
def test_tensors_that_share_a_storage(llama: Foreign, zipped: bool):
    """All of a rank's weights as views of one buffer, as a contiguous parameter buffer is saved."""

    def change(content: Content, path: Path) -> None:
        flat, at = torch.cat([value.flatten() for value in content["model"].values()]), 0
        for name, value in content["model"].items():
            content["model"][name] = flat[at : at + value.numel()].view(value.shape)
            at += value.numel()
        torch.save(content, path, _use_new_zipfile_serialization=zipped)

    folder = llama.write()
    resave(folder, change)
    llama.assert_read(folder)


def test_tensors_that_are_not_row_major(llama: Foreign):
    name = f"{LAYER}mlp.linear_fc2.weight"

    def change(content: Content) -> None:
        content["model"][name] = content["model"][name].t().contiguous().t()

    assert f"{name} is stored with strides (1, 32); expected row-major" in refusal(llama.write(change=change))


def test_files_of_an_ascend_machine(llama: Foreign):
    """torch_npu saves tensors through a function of its own."""
    folder = llama.write()
    for path in folder.glob("*/*/*.pt"):
        with zipfile.ZipFile(path) as archive:
            records = {info.filename: archive.read(info) for info in archive.infolist()}
        with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
            for name, data in records.items():
                if name.endswith((".format_version", ".storage_alignment")):
                    # They promise places of the records that this archive does not keep.
                    continue
                archive.writestr(
                    name,
                    data.replace(
                        b"ctorch._utils\n_rebuild_tensor_v2\n",
                        b"ctorch_npu.utils.storage\n_rebuild_npu_tensor\n",
                    ),
                )
        assert b"_rebuild_npu_tensor" in path.read_bytes()
    llama.assert_read(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_layers": "four"}, "args.num_layers is 'four'; expected a positive whole number"),
        ({"hidden_size": -32}, "args.hidden_size is -32; expected"),
        ({"num_query_groups": [4]}, "args.num_query_groups is [4]; expected"),
        ({"norm_epsilon": "small"}, "args.norm_epsilon is 'small'; expected a number"),
    ],
)
def test_args_of_the_wrong_kind(llama: Foreign, changes: Content, message: str):
    assert message in refusal(llama.write(args=changes))


def test_entries_that_are_no_tensors(llama: Foreign):
    folder = llama.write(change=lambda content: content["model"].update({"decoder.extra": "text"}))
    assert "decoder.extra is no tensor (str)" in refusal(folder)
