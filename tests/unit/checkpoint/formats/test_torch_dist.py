"""Distributed checkpoints as written here and by torch itself: reading, bytes read, and what is refused."""

from __future__ import annotations

import argparse
import os
import pickle
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, TensorStorageMetadata

from mindspeed_lora.checkpoint.canonical import padded_vocab_size, shard_ranges, tensor_rule
from mindspeed_lora.checkpoint.engine import execute
from mindspeed_lora.checkpoint.formats.megatron_args import args_from_shape
from mindspeed_lora.checkpoint.formats.torch_dist import TorchDistSource
from mindspeed_lora.checkpoint.formats.torch_dist_names import Naming
from mindspeed_lora.checkpoint.formats.torch_dist_writer import plan_torch_dist
from mindspeed_lora.checkpoint.source import Source, open_source
from mindspeed_lora.config.parallel import ParallelConfig
from mindspeed_lora.config.stages import LayerPlacement
from mindspeed_lora.errors import Failed, Refused

FC1 = "decoder.layers.2.mlp.linear_fc1.weight"
PROJ = "decoder.layers.1.self_attention.linear_proj.weight"
STACKED_FC1 = "decoder.layers.mlp.linear_fc1.weight"

PLACEMENTS: dict[str, dict[str, Any]] = {
    "one rank": {},
    "TP2": {"tp": 2},
    "TP2 PP2": {"tp": 2, "pipeline_model_parallel_size": 2},
    "uneven": {"pipeline_model_parallel_size": 3, "num_layer_list": "1,2,1"},
    "VPP": {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1},
    "no-op": {"pipeline_model_parallel_size": 2, "noop_layers": "0,5"},
}


def written(source: Source, folder: Path, tp: int = 1, **stages: Any) -> Path:
    """A source written by the engine, with the vocabulary padded to TP."""
    placement = LayerPlacement.of(source.shape.num_layers, ParallelConfig(**stages))
    folder.mkdir(exist_ok=True)
    execute(plan_torch_dist(source, placement, tp, padded_vocab_size(source.shape, 1, tp)), folder)
    return folder


def naming(source: Source) -> Naming:
    """The keys of a model without no-op layers."""
    return Naming(source.shape, {layer: layer for layer in range(source.shape.num_layers)})


def assert_same(found: Source, expected: Source) -> None:
    assert isinstance(found, TorchDistSource)
    assert found.names() == expected.names()
    for name in expected.names():
        assert found.dtype(name) == expected.dtype(name)
        assert torch.equal(found.read(name), expected.read(name)), name


def edit_metadata(folder: Path, edit: Callable[[Metadata], None]) -> None:
    path = folder / "iter_0000001" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    edit(metadata)
    path.write_bytes(pickle.dumps(metadata))


def remove_manifest(folder: Path) -> None:
    (folder / "checksums.json").unlink()


def refusal(folder: Path) -> str:
    with pytest.raises(Refused) as error:
        open_source(folder)
    message = str(error.value)
    assert str(folder) in message
    assert message.count("\n") == 0
    return message


@pytest.fixture
def source(models: Callable[[str], Any]) -> Source:
    return open_source(models("llama").path)


@pytest.mark.parametrize("layout", PLACEMENTS.values(), ids=PLACEMENTS)
def test_any_layout_reads_back_bit_for_bit(source: Source, tmp_path: Path, layout: dict[str, Any]) -> None:
    found = open_source(written(source, tmp_path, **layout))
    assert_same(found, source)
    assert found.shape == source.shape
    assert found.hf_origin == source.hf_origin


def test_every_kind_of_model_reads_back_bit_for_bit(model: Any, tmp_path: Path) -> None:
    source = open_source(model.path)
    folder = written(source, tmp_path, tp=2, pipeline_model_parallel_size=2)
    assert_same(open_source(folder), source)
    shutil.rmtree(folder / "hf_config")
    assert_same(open_source(folder, config_dir=model.path), source)


def test_what_lies_in_the_folder(models: Callable[[str], Any], tmp_path: Path) -> None:
    source = open_source(models("llama-tied").path)
    folder = written(source, tmp_path, tp=2, pipeline_model_parallel_size=2)
    assert (folder / "latest_checkpointed_iteration.txt").read_text() == "1"
    assert (folder / "hf_config" / "config.json").is_file()
    iteration = folder / "iter_0000001"
    files = {path.name for path in iteration.iterdir()}
    assert files == {
        ".metadata",
        "common.pt",
        "metadata.json",
        *(f"__{rank}_0.distcp" for rank in range(4)),
    }
    with torch.serialization.safe_globals([argparse.Namespace]):
        common = torch.load(iteration / "common.pt", weights_only=True)
    assert (common["iteration"], common["checkpoint_version"]) == (1, 3.0)
    assert common["args"].padded_vocab_size == 102
    metadata = pickle.loads((iteration / ".metadata").read_bytes())
    fc1 = metadata.state_dict_metadata[STACKED_FC1]
    assert fc1.size == (4, 96, 32)
    # Gate and up of two TP ranks, of four layers.
    assert {tuple(chunk.sizes) for chunk in fc1.chunks} == {(1, 24, 32)}
    assert [tuple(chunk.offsets) for chunk in fc1.chunks][:4] == [
        (0, 0, 0),
        (0, 24, 0),
        (0, 48, 0),
        (0, 72, 0),
    ]
    assert "output_layer.weight" not in metadata.state_dict_metadata
    parts = open_source(folder).parts(FC1)
    assert [part.shape for part in parts] == [(24, 32)] * 4
    assert [part.path.name for part in parts] == ["__2_0.distcp", "__3_0.distcp"] * 2
    norm = "decoder.layers.mlp.linear_fc1.layer_norm_weight"
    assert len(metadata.state_dict_metadata[norm].chunks) == 4


def test_torchs_own_reader_finds_the_stacked_tensors(source: Source, tmp_path: Path) -> None:
    folder = written(source, tmp_path, tp=2, pipeline_model_parallel_size=2)
    metadata = dcp.FileSystemReader(folder / "iter_0000001").read_metadata()
    tensors = {
        key: torch.empty(value.size, dtype=value.properties.dtype)
        for key, value in metadata.state_dict_metadata.items()
        if isinstance(value, TensorStorageMetadata)
    }
    dcp.load(tensors, checkpoint_id=folder / "iter_0000001", no_dist=True)
    stacked: dict[str, list[torch.Tensor]] = {}
    for name in source.names():
        stacked.setdefault(naming(source).key(name)[0], []).append(source.read(name))
    assert set(tensors) == set(stacked)
    for key, layers in stacked.items():
        expected = torch.stack(layers) if "layers" in key else layers[0]
        found = tensors[key][: len(expected)]
        assert torch.equal(found, expected), key
        assert not tensors[key][len(expected) :].any()


def save_by_torch(source: Source, folder: Path, prefix: str = "", **others: Any) -> Path:
    """What torch.distributed.checkpoint itself writes of a model, one chunk a tensor, with other entries beside."""
    state: dict[str, Any] = {}
    for name in source.names():
        key, front = naming(source).key(name)
        state.setdefault(prefix + key, []).append(source.read(name))
        if not front:
            state[prefix + key] = state[prefix + key][0]
    state = {key: torch.stack(value) if isinstance(value, list) else value for key, value in state.items()}
    iteration = folder / "iter_0000005"
    dcp.save({**state, **others}, checkpoint_id=iteration, no_dist=True)
    placement = LayerPlacement.even(source.shape.num_layers, 1)
    args = args_from_shape(source.shape, 1, placement, source.shape.vocab_size)
    torch.save({"args": args, "iteration": 5, "checkpoint_version": 3.0}, iteration / "common.pt")
    (folder / "latest_checkpointed_iteration.txt").write_text("5")
    return folder


@pytest.mark.parametrize("prefix", ["", "module.", "model.module."])
def test_what_torch_itself_writes_is_read(source: Source, tmp_path: Path, prefix: str, models: Any) -> None:
    module = f"{prefix}decoder.layers.self_attention.linear_qkv"
    others = {
        f"{module}._extra_state": {"scale": 1.0},
        f"{module}.lora_a": torch.ones(4, 2, 32),
        f"{prefix}decoder.layers.mlp.linear_fc1.adapter.linear_in.weight": torch.ones(4, 2, 32),
        f"optimizer.state.exp_avg.{module}.weight": torch.ones(4, 3, 5),
        "chained_0.optimizer.state.exp_avg.output_layer.weight": torch.ones(3),
        "rng_state": torch.ones(3),
    }
    found = open_source(save_by_torch(source, tmp_path, prefix, **others), config_dir=models("llama").path)
    assert_same(found, source)
    assert isinstance(found, TorchDistSource)
    assert found.has_unmerged_adapter


@pytest.fixture
def bytes_read(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """Bytes of every file that were read through ``os``, by name."""
    counts: dict[str, int] = {}
    pread, preadv = os.pread, os.preadv

    def count(file: int, done: int) -> None:
        name = Path(os.readlink(f"/proc/self/fd/{file}")).name
        counts[name] = counts.get(name, 0) + done

    def counted_pread(file: int, size: int, offset: int) -> bytes:
        data = pread(file, size, offset)
        count(file, len(data))
        return data

    def counted_preadv(file: int, buffers: Any, offset: int) -> int:
        done = preadv(file, buffers, offset)
        count(file, done)
        return done

    monkeypatch.setattr(os, "pread", counted_pread)
    monkeypatch.setattr(os, "preadv", counted_preadv)
    yield counts


@pytest.mark.parametrize("name", [FC1, PROJ, "embedding.word_embeddings.weight"])
def test_a_shard_reads_its_own_file_and_its_own_bytes(
    source: Source, tmp_path: Path, bytes_read: dict[str, int], name: str
) -> None:
    folder = written(source, tmp_path, tp=2)
    found, rule = open_source(folder), tensor_rule(name)
    bytes_read.clear()
    assert rule.axis is not None
    size = {"embedding.word_embeddings.weight": 102}.get(name, source.read(name).shape[rule.axis])
    bytes_read.clear()
    ranges = shard_ranges(rule, size, 1, 2)
    shard = found.read(name, rule.axis, ranges)
    assert torch.equal(shard, source.read(name, rule.axis, ranges))
    chunks = len(ranges)
    # The archives' directories and pickles: some 1,100 bytes a chunk.
    assert shard.nbytes - shard[0].nbytes <= bytes_read["__1_0.distcp"] <= shard.nbytes + 1200 * chunks
    assert "__0_0.distcp" not in bytes_read
    bytes_read.clear()
    found.read(name, rule.axis, ranges)
    assert shard.nbytes - shard[0].nbytes <= bytes_read["__1_0.distcp"] <= shard.nbytes


def test_rows_of_another_layout_are_read_alone(
    source: Source, tmp_path: Path, bytes_read: dict[str, int]
) -> None:
    found = open_source(save_by_torch(source, tmp_path))
    found.read(FC1, 0, [(0, 1)])
    bytes_read.clear()
    assert torch.equal(found.read(FC1, 0, [(6, 12), (54, 60)]), source.read(FC1, 0, [(6, 12), (54, 60)]))
    assert bytes_read["__0_0.distcp"] == 12 * 32 * 4


class Malicious:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("place", [".metadata", "in .metadata", "common.pt", "chunk"])
def test_a_malicious_pickle_is_refused_by_name_and_not_run(
    source: Source, tmp_path: Path, place: str
) -> None:
    folder, made = written(source, tmp_path / "mg"), tmp_path / "made"
    iteration = folder / "iter_0000001"
    if place == ".metadata":
        (iteration / ".metadata").write_bytes(pickle.dumps(Malicious(made)))
    elif place == "in .metadata":
        edit_metadata(folder, lambda metadata: setattr(metadata, "planner_data", Malicious(made)))
    elif place == "common.pt":
        torch.save({"args": argparse.Namespace(), "x": Malicious(made)}, iteration / "common.pt")
    else:
        remove_manifest(folder)
        put_chunk(folder, FC1, Malicious(made))
    with pytest.raises((Refused, Failed), match=r"mkdir, which could run code") as error:
        open_source(folder).read(FC1)
    assert str(iteration) in str(error.value)
    assert not made.exists()


def put_chunk(folder: Path, name: str, value: Any) -> None:
    """Replaces the first chunk of a canonical tensor by something else that torch saved."""
    key, (layer,) = naming(open_source(folder)).key(name)
    iteration = folder / "iter_0000001"
    torch.save(value, iteration / "__9_0.distcp")

    def edit(metadata: Metadata) -> None:
        for index, info in metadata.storage_data.items():
            if index.fqn == key and index.offset is not None and index.offset[0] == layer:
                info.relative_path, info.offset = "__9_0.distcp", 0
                info.length = (iteration / "__9_0.distcp").stat().st_size
                break

    edit_metadata(folder, edit)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.ones(1, 48, 32, dtype=torch.float16), "has dtype torch.float16 and shape [1, 48, 32]"),
        (torch.ones(1, 32, 48), "has dtype torch.float32 and shape [1, 32, 48]"),
        (torch.ones(1, 32, 48).transpose(1, 2), "has strides"),
        ({"a": torch.ones(1, 48, 32)}, "it holds no tensor"),
        (3, "it holds no tensor"),
    ],
)
def test_a_chunk_that_is_something_else(source: Source, tmp_path: Path, value: Any, message: str) -> None:
    folder = written(source, tmp_path)
    put_chunk(folder, FC1, value)
    with pytest.raises(Failed) as error:
        open_source(folder).read(FC1)
    assert "__9_0.distcp: the chunk of decoder.layers.mlp.linear_fc1.weight at byte 0" in str(error.value)
    assert message in str(error.value)


def test_files_that_are_missing_or_short(source: Source, tmp_path: Path) -> None:
    folder = written(source, tmp_path, tp=2)
    remove_manifest(folder)
    file = folder / "iter_0000001" / "__1_0.distcp"
    content = file.read_bytes()
    file.write_bytes(content[:-10])
    assert "__1_0.distcp: has" in refusal(folder)
    assert "it is truncated" in refusal(folder)
    file.unlink()
    assert "__1_0.distcp: the file is missing; .metadata places embedding" in refusal(folder)
    (folder / "iter_0000001" / "common.pt").unlink()
    assert "common.pt: the file is missing" in refusal(folder)
    (folder / "iter_0000001" / ".metadata").unlink()
    assert "missing" in refusal(folder)


def test_bytes_of_another_tensor(source: Source, tmp_path: Path) -> None:
    """Places that are shifted by some bytes hit no archive."""
    folder = written(source, tmp_path)

    def shift(metadata: Metadata) -> None:
        for index, info in metadata.storage_data.items():
            if index.fqn == STACKED_FC1:
                info.offset -= 40

    edit_metadata(folder, shift)
    with pytest.raises(Failed, match=r"__0_0.distcp: the chunk of decoder.layers.mlp.linear_fc1.weight"):
        open_source(folder).read(FC1)


def test_a_flipped_byte_is_found_by_the_checksum(source: Source, tmp_path: Path) -> None:
    folder = written(source, tmp_path)
    file = folder / "iter_0000001" / "__0_0.distcp"
    found = open_source(folder)
    found.read(FC1)
    content = bytearray(file.read_bytes())
    bits = source.read(FC1)[:48].contiguous().view(torch.uint8).numpy().tobytes()
    content[content.index(bits) + 100] ^= 1
    file.write_bytes(content)
    with pytest.raises(Failed, match=r"linear_fc1.weight at 2, 0, 0 does not fit its checksum"):
        found.read(FC1)
    assert not torch.equal(open_source(folder, checking=False).read(FC1), source.read(FC1))


def _drop_chunk(metadata: Metadata) -> None:
    metadata.state_dict_metadata[STACKED_FC1].chunks.pop(3)


def _repeat_chunk(metadata: Metadata) -> None:
    chunks = metadata.state_dict_metadata[STACKED_FC1].chunks
    chunks.append(chunks[0])


def _huge_chunk(metadata: Metadata) -> None:
    chunks = metadata.state_dict_metadata[STACKED_FC1].chunks
    chunks[0] = ChunkStorageMetadata(chunks[0].offsets, torch.Size([1, 4800, 32]))


def _no_place(metadata: Metadata) -> None:
    metadata.storage_data = {
        index: info for index, info in metadata.storage_data.items() if index.fqn != STACKED_FC1
    }


def _elsewhere(metadata: Metadata) -> None:
    for index, info in metadata.storage_data.items():
        if index.fqn == STACKED_FC1:
            info.relative_path = "../../secret"


def _wrong_dtype(metadata: Metadata) -> None:
    metadata.state_dict_metadata[STACKED_FC1].properties.dtype = torch.int32


def _short_chunk(metadata: Metadata) -> None:
    tensor = metadata.state_dict_metadata["decoder.final_layernorm.weight"]
    tensor.chunks[0] = ChunkStorageMetadata(torch.Size([0]), torch.Size([31]))


def _wrong_size(metadata: Metadata) -> None:
    tensor = metadata.state_dict_metadata["decoder.final_layernorm.weight"]
    tensor.size = torch.Size([31])
    tensor.chunks[0] = ChunkStorageMetadata(torch.Size([0]), torch.Size([31]))


def _renamed(metadata: Metadata) -> None:
    tensors = metadata.state_dict_metadata
    tensors["decoder.layers.mlp.router.weight"] = tensors.pop(STACKED_FC1)
    for index in metadata.storage_data:
        if index.fqn == STACKED_FC1:
            object.__setattr__(index, "fqn", "decoder.layers.mlp.router.weight")


def _transformed(metadata: Metadata) -> None:
    for index, info in metadata.storage_data.items():
        if index.fqn == STACKED_FC1:
            info.transform_descriptors = ["zstd"]


def _negative(metadata: Metadata) -> None:
    for index, info in metadata.storage_data.items():
        if index.fqn == STACKED_FC1:
            info.offset = -4096


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (_drop_chunk, "the chunks of decoder.layers.1.mlp.linear_fc1.weight hold 1536 of its 3072 values"),
        (_repeat_chunk, "the chunks of decoder.layers.0.mlp.linear_fc1.weight at 0:48 × 0:32 and 0:48"),
        (_huge_chunk, f"a chunk of {STACKED_FC1} at [0, 0, 0] of shape [1, 4800, 32] reaches beyond"),
        (_no_place, f"tells no file for the chunk of {STACKED_FC1} at [0, 0, 0]"),
        (_elsewhere, f"{STACKED_FC1} lies in '../../secret', which is not the name of a file"),
        (_wrong_dtype, "linear_fc1.weight has dtype torch.int32"),
        (_short_chunk, "the chunks of decoder.final_layernorm.weight hold 31 of its 32 values"),
        (_wrong_size, "decoder.final_layernorm.weight has shape [31]; expected [32]"),
        (_renamed, "tensors are missing: decoder.layers.0.mlp.linear_fc1.weight"),
        (_transformed, f"{STACKED_FC1} is stored through ['zstd'], which is not supported"),
        (_negative, f"the place of a chunk of {STACKED_FC1} is damaged"),
        (
            lambda metadata: setattr(metadata, "storage_data", None),
            "lacks state_dict_metadata or storage_data",
        ),
        (lambda metadata: metadata.state_dict_metadata.update({STACKED_FC1: 3}), "tensors are missing"),
    ],
)
def test_metadata_that_lies(
    source: Source, tmp_path: Path, edit: Callable[[Metadata], None], message: str
) -> None:
    folder = written(source, tmp_path)
    edit_metadata(folder, edit)
    found = refusal(folder)
    assert message in found
    assert ".metadata: " in found


@pytest.mark.parametrize("cut", [0, 1, 100, -1])
def test_metadata_that_is_cut(source: Source, tmp_path: Path, cut: int) -> None:
    folder = written(source, tmp_path)
    path = folder / "iter_0000001" / ".metadata"
    path.write_bytes(path.read_bytes()[:cut])
    assert ".metadata: refused, since the pickle cannot be read" in refusal(folder)


def test_zarr_is_refused_by_name(source: Source, tmp_path: Path) -> None:
    folder = written(source, tmp_path)
    (folder / "iter_0000001" / "metadata.json").write_text('{"sharded_backend": "zarr"}')
    assert "the checkpoint's format is zarr, which is not supported" in refusal(folder)


def test_one_iteration_can_be_named(source: Source, tmp_path: Path) -> None:
    folder = written(source, tmp_path)
    assert_same(open_source(folder / "iter_0000001"), source)
    (folder / "latest_checkpointed_iteration.txt").unlink()
    assert_same(open_source(folder, kind="torch_dist"), source)
    assert_same(open_source(folder, kind="mg"), source)


def test_a_folder_of_another_format(models: Callable[[str], Any]) -> None:
    with pytest.raises(Refused, match="no distributed checkpoint; expected"):
        open_source(models("llama").path, kind="torch_dist")
