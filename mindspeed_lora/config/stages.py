"""Which layers each pipeline rank holds: even and uneven stages, interleaved chunks, layers that are identities.

A *slot* is a layer of the model as it is built, no-ops included; slots are what the flags count. A *layer* is one
of the checkpoint: layer numbers skip the no-ops. A *chunk* is what one virtual stage of one pipeline rank holds,
a run of slots; with V virtual stages the forward pass visits rank 0 … P − 1 with their first chunks, then again
with their second ones, so that chunk (p, v) is number v · P + p.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from mindspeed_lora.config.parallel import ParallelConfig
from mindspeed_lora.errors import Refused

Slots = tuple[int | None, ...]
"""For each slot the number of its layer, or None where it is a no-op."""


@dataclass(frozen=True)
class ModelChunk:
    """The part of the model that one virtual stage of one pipeline rank holds."""

    slots: Slots
    vp_stage: int = 0
    is_first: bool = True
    """Holds the embedding."""
    is_last: bool = True
    """Holds the final norm and the output layer."""

    @classmethod
    def whole(cls, num_layers: int) -> ModelChunk:
        """A model that is not cut."""
        return cls(tuple(range(num_layers)))

    @cached_property
    def layers(self) -> tuple[int, ...]:
        """The layers, without the no-ops."""
        return tuple(layer for layer in self.slots if layer is not None)


@dataclass(frozen=True)
class LayerPlacement:
    """The layers of every chunk of every pipeline rank."""

    chunks: tuple[Slots, ...]
    """In the order of the forward pass."""
    pp_size: int

    @property
    def micro_batch_multiple(self) -> int:
        """A step's micro-batches on each rank are a multiple of this: the interleaved schedule wants whole rounds."""
        return self.pp_size if self.vp_size > 1 else 1

    @classmethod
    def even(cls, num_layers: int, pp_size: int) -> LayerPlacement:
        """Stages of the same size."""
        return cls.of(num_layers, ParallelConfig(pipeline_model_parallel_size=pp_size))

    @classmethod
    def of(cls, num_layers: int, parallel: ParallelConfig) -> LayerPlacement:
        """The placement that the flags ask for, of a model with so many layers.

        Raises:
            Refused: the flags contradict each other or do not fit the number of layers.
        """
        slots = _slots(num_layers, parallel)
        sizes = _chunk_sizes(len(slots), parallel)
        ends = list(accumulate(sizes))
        chunks = tuple(slots[end - size : end] for end, size in zip(ends, sizes, strict=True))
        return cls(chunks, parallel.pipeline_model_parallel_size)

    @property
    def vp_size(self) -> int:
        """Virtual stages of each pipeline rank."""
        return len(self.chunks) // self.pp_size

    @property
    def num_slots(self) -> int:
        """Layers of the model as it is built, no-ops included."""
        return sum(map(len, self.chunks))

    @property
    def noop_slots(self) -> tuple[int, ...]:
        """Which slots are no-ops."""
        slots = [layer for chunk in self.chunks for layer in chunk]
        return tuple(number for number, layer in enumerate(slots) if layer is None)

    @property
    def is_even(self) -> bool:
        """Whether all chunks have the same number of slots."""
        return len(set(map(len, self.chunks))) == 1

    def chunk(self, pp_rank: int, vp_stage: int = 0) -> ModelChunk:
        """What a virtual stage of a pipeline rank holds."""
        number = vp_stage * self.pp_size + pp_rank
        return ModelChunk(self.chunks[number], vp_stage, number == 0, number == len(self.chunks) - 1)

    def rank_chunks(self, pp_rank: int) -> tuple[ModelChunk, ...]:
        """What a pipeline rank holds, by virtual stage."""
        return self._chunks_by_rank[pp_rank]

    @cached_property
    def _chunks_by_rank(self) -> tuple[tuple[ModelChunk, ...], ...]:
        return tuple(
            tuple(self.chunk(pp_rank, vp_stage) for vp_stage in range(self.vp_size))
            for pp_rank in range(self.pp_size)
        )

    def describe(self) -> str:
        """The layers of each pipeline rank: ``0-2 and 6-7, 3-5 and 8-9``."""
        ranks = [
            " and ".join(_described(chunk) for chunk in self.rank_chunks(pp_rank))
            for pp_rank in range(self.pp_size)
        ]
        return ", ".join(ranks)


def _described(chunk: ModelChunk) -> str:
    layers, noops = chunk.layers, len(chunk.slots) - len(chunk.layers)
    if not layers:
        return f"{noops} no-op"
    numbers = f"{layers[0]}-{layers[-1]}" if len(layers) > 1 else str(layers[0])
    return f"{numbers} + {noops} no-op" if noops else numbers


def _slots(num_layers: int, parallel: ParallelConfig) -> Slots:
    """The layers with the no-ops at their places."""
    noops = parallel.noop_slots
    total = num_layers + len(noops)
    if noops and max(noops) >= total:
        raise Refused(
            f"--noop-layers {parallel.noop_layers}: the model has {num_layers} layers and {len(noops)} no-ops, "
            f"so places go from 0 to {total - 1}"
        )
    layers = iter(range(num_layers))
    return tuple(None if place in noops else next(layers) for place in range(total))


def _chunk_sizes(total: int, parallel: ParallelConfig) -> list[int]:
    """Slots of each chunk, in the order of the forward pass."""
    pp = parallel.pipeline_model_parallel_size
    _refuse_contradictions(parallel)
    if parallel.num_layer_list is not None:
        return _listed(total, parallel)
    ranks = _rank_sizes(total, parallel)
    per_chunk = parallel.num_layers_per_virtual_pipeline_stage
    vp = parallel.num_virtual_stages_per_pipeline_rank
    if per_chunk is not None:
        if ranks[0] % per_chunk:
            raise Refused(
                f"--num-layers-per-virtual-pipeline-stage {per_chunk} does not divide the {ranks[0]} layers of a "
                f"pipeline rank; use {divisors(ranks[0])}"
            )
        vp = ranks[0] // per_chunk
    for rank, size in enumerate(ranks):
        if size % vp:
            raise Refused(
                f"--num-virtual-stages-per-pipeline-rank {vp} does not divide the {size} layers of pipeline rank "
                f"{rank}; use {divisors(size)}"
            )
    return [ranks[rank] // vp for _ in range(vp) for rank in range(pp)]


def _refuse_contradictions(parallel: ParallelConfig) -> None:
    """Two flags that cannot be meant together, or one that needs several stages."""
    per_chunk, vp = (
        parallel.num_layers_per_virtual_pipeline_stage,
        parallel.num_virtual_stages_per_pipeline_rank,
    )
    given = {
        f"--num-layer-list {parallel.num_layer_list}": parallel.num_layer_list is not None,
        f"--num-layers-per-virtual-pipeline-stage {per_chunk}": per_chunk is not None,
        f"--num-virtual-stages-per-pipeline-rank {vp}": vp > 1,
    }
    both = [flag for flag, is_given in given.items() if is_given]
    ends = _ends(parallel)
    if ends and parallel.num_layer_list is not None:
        both.append(ends[0])
    if ends and per_chunk is not None:
        raise Refused(
            f"{ends[0]} and --num-layers-per-virtual-pipeline-stage {per_chunk} contradict each other, since "
            "stages then differ in size; give --num-virtual-stages-per-pipeline-rank instead"
        )
    if len(both) > 1:
        raise Refused(f"{' and '.join(both)} both say how layers fall into stages; give one of them")
    for flag in [*both, *ends]:
        if parallel.pipeline_model_parallel_size == 1 and not flag.startswith("--num-layer-list"):
            raise Refused(
                f"{flag} needs --pipeline-model-parallel-size of at least 2; raise it or drop the flag"
            )


def _ends(parallel: ParallelConfig) -> list[str]:
    """The flags that give the first or the last stage a size of its own."""
    first, last = parallel.decoder_first_pipeline_num_layers, parallel.decoder_last_pipeline_num_layers
    flags = [f"--decoder-first-pipeline-num-layers {first}"] if first is not None else []
    return flags + ([f"--decoder-last-pipeline-num-layers {last}"] if last is not None else [])


def _listed(total: int, parallel: ParallelConfig) -> list[int]:
    sizes, pp = list(parallel.stage_sizes), parallel.pipeline_model_parallel_size
    if len(sizes) != pp:
        raise Refused(
            f"--num-layer-list {parallel.num_layer_list} has {len(sizes)} stages, but "
            f"--pipeline-model-parallel-size is {pp}; give one number a stage"
        )
    if sum(sizes) != total:
        raise Refused(
            f"--num-layer-list {parallel.num_layer_list} adds up to {sum(sizes)}, but the model has "
            f"{_counted(total, parallel)}; make the sum {total}"
        )
    return sizes


def _rank_sizes(total: int, parallel: ParallelConfig) -> list[int]:
    """Slots of each pipeline rank; the first and the last one may have sizes of their own."""
    pp, ends = parallel.pipeline_model_parallel_size, _ends(parallel)
    first, last = parallel.decoder_first_pipeline_num_layers, parallel.decoder_last_pipeline_num_layers
    between = pp - len(ends)
    left = total - (first or 0) - (last or 0)
    if not ends and total % pp:
        raise Refused(
            f"--pipeline-model-parallel-size {pp} does not divide the model's {_counted(total, parallel)}; "
            f"use {divisors(total)}, or give --num-layer-list"
        )
    if left < between or (left and not between) or (between and left % between):
        raise Refused(
            f"{' and '.join(ends)} leave{'s' if len(ends) == 1 else ''} {left} of the model's "
            f"{_counted(total, parallel)} for {between} other stages, which cannot share them evenly; change "
            "the numbers, or give --num-layer-list"
        )
    sizes = [left // between] * between if between else []
    return [*([first] if first is not None else []), *sizes, *([last] if last is not None else [])]


def _counted(total: int, parallel: ParallelConfig) -> str:
    noops = len(parallel.noop_slots)
    return f"{total} layers" + (f" ({noops} of them no-ops)" if noops else "")


def divisors(number: int) -> str:
    """The divisors of a number, up to 64, in words: ``1, 2 or 4``."""
    found = [str(candidate) for candidate in range(1, min(number, 64) + 1) if number % candidate == 0]
    return found[0] if len(found) == 1 else f"{', '.join(found[:-1])} or {found[-1]}"
