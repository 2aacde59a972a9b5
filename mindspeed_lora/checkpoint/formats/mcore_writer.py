"""Writing Megatron checkpoints: each canonical tensor is read once and cut into its ranks' files."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch

from mindspeed_lora.checkpoint.canonical import (
    EMBEDDING,
    FINAL_LAYERNORM,
    OUTPUT_LAYER,
    VOCABULARY_TENSORS,
    expert_number,
    layer_tensors,
    shard_ranges,
    tensor_rule,
    to_local,
)
from mindspeed_lora.checkpoint.engine import Part, PlannedTensor, Shard, WritePlan
from mindspeed_lora.checkpoint.formats.iteration import LATEST_FILE, iteration_folder
from mindspeed_lora.checkpoint.formats.mcore_experts import (
    GROUPED,
    SEQUENTIAL,
    TE_GROUPED,
    ExpertRanks,
    in_file,
    stacked_shape,
)
from mindspeed_lora.checkpoint.formats.mcore_files import RANK_FILE
from mindspeed_lora.checkpoint.formats.mcore_names import with_fused_norm
from mindspeed_lora.checkpoint.formats.mcore_quantized import Specs, plan_quantized, weight_cut
from mindspeed_lora.checkpoint.formats.megatron_args import args_from_shape
from mindspeed_lora.checkpoint.formats.model_files import keep_hf_config
from mindspeed_lora.checkpoint.source import Source
from mindspeed_lora.checkpoint.storage.pt_writer import PtLayout
from mindspeed_lora.checkpoint.storage.tensor_writer import TensorSpec
from mindspeed_lora.config.shape import ModelShape
from mindspeed_lora.config.stages import LayerPlacement, ModelChunk

CHECKPOINT_VERSION = 3.0


def rank_folder(
    iteration: Path, tp_rank: int, pp_rank: int, pp_size: int, ep_rank: int = 0, ep_size: int = 1
) -> Path:
    """The folder of a rank: ``mp_rank_XX``, ``_YYY`` where there are several stages, ``_ZZZ`` where experts are cut."""
    stage = f"_{pp_rank:03d}" if pp_size > 1 else ""
    expert = f"_{ep_rank:03d}" if ep_size > 1 else ""
    return iteration / f"mp_rank_{tp_rank:02d}{stage}{expert}"


def model_keys(num_chunks: int) -> list[str]:
    """Under which keys a rank's file holds its chunks: ``model``, or ``model0``, ``model1`` …."""
    return ["model"] if num_chunks == 1 else [f"model{number}" for number in range(num_chunks)]


def rank_layout(args: Namespace, iteration: int, models: Mapping[str, Mapping[str, TensorSpec]]) -> PtLayout:
    """The file of one rank; each model has its tensors by local name."""
    content = {"args": args, "checkpoint_version": CHECKPOINT_VERSION, "iteration": iteration}
    return PtLayout(Path(RANK_FILE).stem, content, models)


def chunk_tensors(shape: ModelShape, chunk: ModelChunk) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """Local name, canonical name and full shape of the tensors of one chunk.

    With tied embeddings the last of several chunks holds the embedding once more, as ``output_layer.weight``.
    """
    vocabulary = (shape.vocab_size, shape.hidden_size)
    if chunk.is_first:
        yield EMBEDDING, EMBEDDING, vocabulary
    for layer in chunk.layers:
        for name, size in layer_tensors(shape, layer).items():
            yield to_local(name, chunk.slots), name, size
    if chunk.is_last:
        yield FINAL_LAYERNORM, FINAL_LAYERNORM, (shape.hidden_size,)
        if shape.untie_embeddings_and_output_weights:
            yield OUTPUT_LAYER, OUTPUT_LAYER, vocabulary
        elif not chunk.is_first:
            yield OUTPUT_LAYER, EMBEDDING, vocabulary


def plan_mcore(
    source: Source,
    placement: LayerPlacement,
    tp_size: int,
    padded_vocab_size: int,
    transformer_engine: bool = False,
    experts: ExpertRanks | None = None,
    grouped: bool = False,
) -> WritePlan:
    """The files of a source as a Megatron checkpoint of one iteration, numbered 1; a shard is a pipeline rank.

    ``transformer_engine`` names norms as its layers do, within the linear that follows. ``experts`` are cut over the
    files so, and with ``grouped`` stacked in them, or with ``transformer_engine`` parameters of one module.
    """
    experts = experts or ExpertRanks(tp_size=tp_size, etp_size=tp_size)
    form = (TE_GROUPED if transformer_engine else GROUPED) if grouped else SEQUENTIAL
    args = args_from_shape(source.shape, tp_size, placement, padded_vocab_size, experts=experts, form=form)
    if transformer_engine:
        args.transformer_impl = "transformer_engine"
    stages = [
        _Stage(source, args, placement, pp_rank, padded_vocab_size, experts, form).plan()
        for pp_rank in range(placement.pp_size)
    ]
    return WritePlan(stages, lambda folder: finish_folder(source, folder))


def finish_folder(source: Source, folder: Path) -> None:
    """Write what a checkpoint folder of one iteration holds beside it."""
    if source.config_dir is not None:
        keep_hf_config(source.config_dir, source.origin, folder, source.shape)
    (folder / LATEST_FILE).write_text("1", encoding="utf-8")


def read_padded(source: Source, name: str, padded_vocab_size: int) -> torch.Tensor:
    """A whole canonical tensor, the vocabulary's with its padding rows."""
    if name in VOCABULARY_TENSORS:
        return source.read(name, 0, [(0, padded_vocab_size)])
    return source.read(name)


class _Stage:
    """The files of one pipeline rank, one for each tensor- and expert-parallel rank; all hold tensors of one size."""

    def __init__(
        self,
        source: Source,
        args: Namespace,
        placement: LayerPlacement,
        pp_rank: int,
        padded: int,
        experts: ExpertRanks,
        form: str,
    ) -> None:
        self.source, self.args, self.placement, self.pp_rank = source, args, placement, pp_rank
        self.padded, self.experts, self.form = padded, experts, form
        self.files = experts.files()
        moe = source.shape.moe
        self.num_local = 0 if moe is None else experts.num_local(moe.num_experts)

    def plan(self) -> Shard:
        """The files, and what goes into them."""
        models: list[dict[str, dict[str, TensorSpec]]] = [{} for _ in self.files]
        tensors: list[PlannedTensor] = []
        chunks = self.placement.rank_chunks(self.pp_rank)
        for key, chunk in zip(model_keys(len(chunks)), chunks, strict=True):
            for model in models:
                model[key] = {}
            for plain, name, full in chunk_tensors(self.source.shape, chunk):
                specs, planned = self._planned(key, plain, name, full)
                for model, own in zip(models, specs, strict=True):
                    model[key].update(own)
                tensors.append(planned)
        iteration, pp_size = iteration_folder(Path(), 1), self.placement.pp_size
        folders = [
            rank_folder(iteration, tp, self.pp_rank, pp_size, ep, self.experts.ep_size)
            for tp, ep in self.files
        ]
        layouts = {
            (folder / RANK_FILE).as_posix(): rank_layout(self.args, 1, model)
            for folder, model in zip(folders, models, strict=True)
        }
        return Shard(layouts, tensors)

    def _planned(self, key: str, plain: str, name: str, full: tuple[int, ...]) -> tuple[Specs, PlannedTensor]:
        """Names and sizes of a canonical tensor in each file, and how it gets there."""
        if self.source.is_quantized(name):
            return self._planned_quantized(key, plain, name, full)
        if expert_number(name) is not None:
            return self._planned_expert(key, plain, name, full)
        local_name = plain
        if self.args.transformer_impl == "transformer_engine":
            local_name = with_fused_norm(plain, name, self.source.shape)
        tp_size = self.experts.tp_size
        spec = _local_spec(self.source.dtype(name), name, full, self.padded, tp_size)

        def parts(whole: torch.Tensor) -> Iterator[Part]:
            for rank in range(tp_size):
                shard = _cut(name, whole, rank, tp_size)
                for file, (tp_rank, _) in enumerate(self.files):
                    if tp_rank == rank:
                        yield Part(file, f"{key}/{local_name}", shard)

        return [{local_name: spec}] * len(self.files), PlannedTensor(name, self._reader(name), parts)

    def _planned_expert(
        self, key: str, plain: str, name: str, full: tuple[int, ...]
    ) -> tuple[Specs, PlannedTensor]:
        etp_size, number = self.experts.etp_size, expert_number(name) or 0
        local_name, piece = in_file(plain, self.num_local, self.form)
        dtype, shape = _local_spec(self.source.dtype(name), name, full, self.padded, etp_size)
        if piece is not None:
            shape = stacked_shape(shape, self.num_local, name.split(".")[-2])

        def parts(whole: torch.Tensor) -> Iterator[Part]:
            for file, (tp_rank, ep_rank) in enumerate(self.files):
                rank, block = self.experts.place(tp_rank, ep_rank)
                if block == number // self.num_local:
                    shard = _cut(name, whole, rank, etp_size)
                    if piece is None:
                        yield Part(file, f"{key}/{local_name}", shard)
                    else:
                        yield Part(file, f"{key}/{local_name}", shard.t(), piece[0] * shard.numel())

        return [{local_name: (dtype, shape)}] * len(self.files), PlannedTensor(
            name, self._reader(name), parts
        )

    def _planned_quantized(
        self, key: str, plain: str, name: str, full: tuple[int, ...]
    ) -> tuple[Specs, PlannedTensor]:
        """A quantised weight, whose tensors have other sizes on other ranks."""
        number, experts = expert_number(name), self.experts
        local_name, size = plain, experts.tp_size
        ranks: list[int | None] = [tp_rank for tp_rank, _ in self.files]
        if number is not None:
            local_name, size = in_file(plain, self.num_local, self.form)[0], experts.etp_size
            places = [experts.place(*file) for file in self.files]
            ranks = [rank if block == number // self.num_local else None for rank, block in places]
        cut = weight_cut(self.source.shape, name, full, size)
        ranks = [rank if rank is None else rank % cut.size for rank in ranks]
        return plan_quantized(self.source, cut, name, f"{key}/", local_name, ranks)

    def _reader(self, name: str) -> Callable[[], torch.Tensor]:
        return lambda: read_padded(self.source, name, self.padded)


def _local_spec(
    dtype: torch.dtype, name: str, full: tuple[int, ...], padded: int, tp_size: int
) -> TensorSpec:
    """Dtype and shape of one rank's shard; all ranks of a stage have the same."""
    size, rule = list(full), tensor_rule(name)
    if name in VOCABULARY_TENSORS:
        size[0] = padded
    if rule.axis is not None:
        size[rule.axis] //= tp_size
    return dtype, tuple(size)


def _cut(name: str, whole: torch.Tensor, tp_rank: int, tp_size: int) -> torch.Tensor:
    """One rank's shard of a whole tensor."""
    rule = tensor_rule(name)
    if rule.axis is None or tp_size == 1:
        return whole
    ranges = shard_ranges(rule, whole.shape[rule.axis], tp_rank, tp_size)
    shards = [whole.narrow(rule.axis, start, stop - start) for start, stop in ranges]
    return shards[0] if len(shards) == 1 else torch.cat(shards, dim=rule.axis)
