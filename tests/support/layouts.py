"""Parallel layouts of a training job, all that up to four ranks allow, and a subset that covers every pair."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from mindspeed_lora.config.parallel import ParallelConfig
from mindspeed_lora.config.stages import LayerPlacement

RECOMPUTE = {
    "none": "",
    "selective": "--recompute-granularity selective",
    "uniform": "--recompute-granularity full --recompute-method uniform --recompute-num-layers",
    "block": "--recompute-granularity full --recompute-method block --recompute-num-layers",
}
"""What is recomputed → its flags, where a number of layers is left to add."""
OVERLAP = {
    "none": "",
    "reduce": "--overlap-grad-reduce --ddp-bucket-size 500",
    "gather": "--overlap-grad-reduce --overlap-param-gather --ddp-bucket-size 500",
}
"""Which data-parallel communication overlaps → its flags; buckets small enough for several."""
CONTEXT = {
    "whole": "",
    "ring": "--context-parallel-algo megatron_cp_algo",
    "ulysses": "--context-parallel-algo ulysses_cp_algo",
    "hybrid": "--context-parallel-algo hybrid_cp_algo --ulysses-degree-in-cp 2",
}
"""How attention sees rows that context parallelism cuts → its flags."""
UNFUSED = "unfused"
FUSION = {
    UNFUSED: "",
    "fused": "--lora-fusion",
    "chunks": "--lora-fusion --lora-fusion-plan one-collective split --lora-fusion-chunks 2 --lora-fusion-interleave",
    "merged": "--lora-fusion --lora-fusion-plan one-collective merge --lora-fusion-chunks 3",
    "published": "--lora-fusion --lora-fusion-plan overlapped split",
    "published-merged": "--lora-fusion --lora-fusion-plan overlapped merge",
}
"""Schedule of the linears → its flags."""
LAYERS = 4
"""Of the models that are trained in these layouts."""


@dataclass(frozen=True, order=True)
class Layout:
    """How a job is cut over processes, and what it recomputes."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    sequence_parallel: bool = False
    distributed_optimizer: bool = False
    recompute: str = "none"
    vpp: int = 1
    """Model chunks of each pipeline rank."""
    stages: str = "even"
    """``uneven`` sizes, or ``noops``: layers that do nothing, with four chunks two chunks of nothing else."""
    overlap: str = "none"
    cp: int = 1
    attention: str = "whole"
    """How it sees rows that CP cuts: ``ring``, ``ulysses`` or ``hybrid``."""
    fusion: str = UNFUSED

    @property
    def world_size(self) -> int:
        """Ranks of the job."""
        return self.tp * self.pp * self.dp * self.cp

    @property
    def flags(self) -> list[str]:
        """The command-line flags."""
        words = ["--tensor-model-parallel-size", str(self.tp), "--pipeline-model-parallel-size", str(self.pp)]
        words += CONTEXT[self.attention].split()
        words += ["--context-parallel-size", str(self.cp)] if self.cp > 1 else []
        words += ["--sequence-parallel"] if self.sequence_parallel else []
        words += ["--use-distributed-optimizer"] if self.distributed_optimizer else []
        words += self._stage_flags
        words += OVERLAP[self.overlap].split()
        words += FUSION[self.fusion].split()
        words += RECOMPUTE[self.recompute].split()
        if self.recompute in ("uniform", "block"):
            # A group of several layers where a stage has them; a block that leaves a layer out.
            sizes = [len(chunk) for chunk in self.placement.chunks]
            words.append(str(math.gcd(*sizes) if self.recompute == "uniform" else max(1, max(sizes) - 1)))
        return words

    @property
    def placement(self) -> LayerPlacement:
        """Where the layers are."""
        return LayerPlacement.of(
            LAYERS,
            ParallelConfig(
                pipeline_model_parallel_size=self.pp,
                num_virtual_stages_per_pipeline_rank=self.vpp,
                num_layer_list="3,1" if self.stages == "uneven" else None,
                noop_layers=self._noops,
            ),
        )

    @property
    def _noops(self) -> str | None:
        if self.stages != "noops":
            return None
        return "2,3,6,7" if self.pp * self.vpp >= 4 else "1,4"

    @property
    def _stage_flags(self) -> list[str]:
        words = ["--num-layer-list", "3,1"] if self.stages == "uneven" else []
        words += ["--noop-layers", str(self._noops)] if self._noops else []
        if self.vpp > 1 and self.stages == "even":
            return [*words, "--num-layers-per-virtual-pipeline-stage", str(LAYERS // (self.pp * self.vpp))]
        return [*words, *(["--num-virtual-stages-per-pipeline-rank", str(self.vpp)] if self.vpp > 1 else [])]

    def __str__(self) -> str:
        parts = [f"tp{self.tp}" + ("sp" if self.sequence_parallel else "")]
        parts.append(f"pp{self.pp}" + (f"x{self.vpp}" if self.vpp > 1 else ""))
        parts.append(f"dp{self.dp}" + ("zero1" if self.distributed_optimizer else ""))
        parts += [f"cp{self.cp}{self.attention}"] if self.cp > 1 else []
        parts += [
            part
            for part, usual in ((self.stages, "even"), (self.overlap, "none"), (self.fusion, UNFUSED))
            if part != usual
        ]
        return "-".join([*parts, self.recompute])


def all_layouts(max_ranks: int = 4, schedules: Sequence[str] = tuple(FUSION)) -> list[Layout]:
    """Every layout that ``max_ranks`` ranks allow, in each of these schedules.

    SP needs TP > 1, the distributed optimizer and overlap DP or CP > 1, overlapping gathers the distributed
    optimizer.
    """
    sizes = [1, 2, 4]
    return [
        Layout(
            tp, pp, dp, sequence_parallel, distributed, recompute, vpp, stages, overlap, cp, attention, fusion
        )
        for tp, pp, dp, cp in itertools.product(sizes, sizes, sizes, sizes)
        if tp * pp * dp * cp <= max_ranks
        for sequence_parallel in ([False, True] if tp > 1 else [False])
        for distributed in ([False, True] if dp * cp > 1 else [False])
        for recompute in RECOMPUTE
        for vpp in ([1, 2] if pp > 1 else [1])
        for stages in _stages(pp, vpp)
        for overlap in _overlaps(dp * cp > 1, distributed)
        for attention in _attentions(cp)
        for fusion in fusions(tp)
        if fusion in schedules
    ]


def _overlaps(several: bool, distributed: bool) -> list[str]:
    return ["none", *(["reduce"] if several else []), *(["gather"] if distributed else [])]


def fusions(tp: int) -> list[str]:
    """The schedules that differ: one rank has nothing to hide, but may merge."""
    return [*FUSION] if tp > 1 else [UNFUSED, "fused", "merged"]


def _attentions(cp: int) -> list[str]:
    if cp == 1:
        return ["whole"]
    return ["ring", "ulysses", *(["hybrid"] if cp > 2 else [])]


def _stages(pp: int, vpp: int) -> list[str]:
    if pp == 1:
        return ["even"]
    even = ["even"] if pp * vpp <= LAYERS else []
    return [*even, "noops", *(["uneven"] if pp == 2 and vpp == 1 else [])]


def covering(layouts: Sequence[Layout]) -> list[Layout]:
    """A small subset in which every pair of values that occurs in ``layouts`` occurs too.

    Greedy: the layout with most new pairs is taken, the first of equals.
    """
    missing = set().union(*map(pairs, layouts))
    chosen: list[Layout] = []
    while missing:
        best = max(layouts, key=lambda layout: len(pairs(layout) & missing))
        missing -= pairs(best)
        chosen.append(best)
    return sorted(chosen)


def pairs(layout: Layout) -> set[frozenset[tuple[str, object]]]:
    """Every pair of two different values of a layout; of a degree it counts whether it is above one.

    Overlap with recomputation has a test of its own, ``test_data_parallel_distributed.py``.
    """
    degrees, apart = ("tp", "pp", "dp", "cp"), {"overlap", "recompute"}
    values = [(name, value > 1 if name in degrees else value) for name, value in vars(layout).items()]
    return {
        frozenset(pair) for pair in itertools.combinations(values, 2) if {name for name, _ in pair} != apart
    }
