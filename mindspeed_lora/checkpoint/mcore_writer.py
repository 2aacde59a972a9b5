"""Writing Megatron checkpoints: each canonical tensor is read once, cut, and appended to its ranks' files."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import torch

from mindspeed_lora.checkpoint.canonical import (
    EMBEDDING,
    FINAL_LAYERNORM,
    OUTPUT_LAYER,
    VOCABULARY_TENSORS,
    layer_tensors,
    padded_vocab_size,
    shard_ranges,
    tensor_rule,
    to_local,
)
from mindspeed_lora.checkpoint.iteration import LATEST_FILE, iteration_folder
from mindspeed_lora.checkpoint.mcore import RANK_FILE
from mindspeed_lora.checkpoint.megatron_args import args_from_shape
from mindspeed_lora.checkpoint.model_files import keep_hf_config
from mindspeed_lora.checkpoint.pt_writer import PtWriter
from mindspeed_lora.checkpoint.safetensors_writer import TensorSpec
from mindspeed_lora.checkpoint.source import Source
from mindspeed_lora.config.shape import ModelShape
from mindspeed_lora.config.stages import LayerPlacement, ModelChunk

CHECKPOINT_VERSION = 3.0


def rank_folder(iteration: Path, tp_rank: int, pp_rank: int, pp_size: int) -> Path:
    """The folder of one rank: ``mp_rank_XX``, and ``_YYY`` where there are several stages."""
    return iteration / (f"mp_rank_{tp_rank:02d}" + (f"_{pp_rank:03d}" if pp_size > 1 else ""))


def open_rank_file(
    folder: Path, args: Namespace, iteration: int, chunks: Sequence[Mapping[str, TensorSpec]]
) -> PtWriter:
    """Start the file of one rank; each chunk has its tensors by local name, in the order of writing."""
    folder.mkdir(parents=True)
    content = {"args": args, "checkpoint_version": CHECKPOINT_VERSION, "iteration": iteration}
    keys = ["model"] if len(chunks) == 1 else [f"model{number}" for number in range(len(chunks))]
    return PtWriter(folder / RANK_FILE, content, dict(zip(keys, chunks, strict=True)))


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


def write_mcore(
    source: Source,
    target: Path,
    tp_size: int,
    pp_size: int,
    vocab_divisible_by: int = 1,
    observe: Callable[[str, torch.Tensor], None] | None = None,
) -> None:
    """Write a source as a Megatron checkpoint folder of one iteration, numbered 1.

    ``observe`` sees each canonical tensor as it is read. The caller makes ``target`` a temporary folder.
    """
    shape = source.shape
    padded = padded_vocab_size(shape, vocab_divisible_by, tp_size)
    placement = LayerPlacement.even(shape.num_layers, pp_size)
    args = args_from_shape(shape, tp_size, placement, padded)
    for pp_rank in range(pp_size):
        tensors = list(chunk_tensors(shape, placement.chunk(pp_rank)))
        specs = _local_specs(source, tensors, padded, tp_size)
        with ExitStack() as stack:
            writers = [
                stack.enter_context(
                    open_rank_file(
                        rank_folder(iteration_folder(target, 1), tp_rank, pp_rank, pp_size), args, 1, [specs]
                    )
                )
                for tp_rank in range(tp_size)
            ]
            for local_name, name, _ in tensors:
                whole = _read_padded(source, name, padded)
                if observe is not None:
                    observe(name, whole)
                for tp_rank, writer in enumerate(writers):
                    writer.write(local_name, _cut(name, whole, tp_rank, tp_size))
    if source.config_dir is not None:
        keep_hf_config(source.config_dir, source.origin, target, shape)
    (target / LATEST_FILE).write_text("1", encoding="utf-8")


def _local_specs(
    source: Source, tensors: list[tuple[str, str, tuple[int, ...]]], padded: int, tp_size: int
) -> dict[str, TensorSpec]:
    """Dtype and shape of one rank's tensors; all ranks of a stage have the same."""
    specs: dict[str, TensorSpec] = {}
    for local_name, name, full in tensors:
        size, rule = list(full), tensor_rule(name)
        if name in VOCABULARY_TENSORS:
            size[0] = padded
        if rule.axis is not None:
            size[rule.axis] //= tp_size
        specs[local_name] = (source.dtype(name), tuple(size))
    return specs


def _read_padded(source: Source, name: str, padded: int) -> torch.Tensor:
    """A whole canonical tensor, the vocabulary's with its padding rows."""
    if name in VOCABULARY_TENSORS:
        return source.read(name, 0, [(0, padded)])
    return source.read(name)


def _cut(name: str, whole: torch.Tensor, tp_rank: int, tp_size: int) -> torch.Tensor:
    """One rank's shard of a whole tensor."""
    rule = tensor_rule(name)
    if rule.axis is None or tp_size == 1:
        return whole
    ranges = shard_ranges(rule, whole.shape[rule.axis], tp_rank, tp_size)
    shards = [whole.narrow(rule.axis, start, stop - start) for start, stop in ranges]
    return shards[0] if len(shards) == 1 else torch.cat(shards, dim=rule.axis)
