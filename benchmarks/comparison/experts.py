"""What the comparison of experts adds to one of dense models: two models of one function, and rates in operations."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from comparison.inputs import make_inputs
from comparison.process import run_child
from comparison.setting import Inputs, Setting
from comparison.sides import Ours, SideRun
from comparison.summary import Summary

BARS = {
    "times_as_it_comes": 2.5,
    "times_at_its_best": 1.25,
    "memory_share": 0.7,
    "dense_rate_share": 0.75,
}
"""Speed at least so many times the peer's, memory at most this share of the peer's, rate at least this of a dense
model's."""
DENSE = "ours, dense of the same active size"
AS_IT_COMES = "TRL, batch 8"


@dataclass(frozen=True, kw_only=True)
class Job:
    """One of the models, with what is read to train it."""

    setting: Setting
    inputs: Inputs
    flop_per_token: float
    flop_per_token_and_length: float

    def gflop_per_second(self, summary: Summary) -> float:
        """What a side's tokens a second are in operations of the model."""
        measured = range(self.setting.warmup * self.setting.global_batch_size, self.setting.num_samples)
        length = sum(self.inputs.sample(number)[0] for number in measured) / len(measured)
        per_token = self.flop_per_token + self.flop_per_token_and_length * length
        return summary.tokens_per_second.median * per_token / 1e9


@dataclass(frozen=True)
class Dense:
    """Ours on the dense model, whatever the others train."""

    job: Job
    rows_at_once: int | None = None
    same_rows: bool = False
    """The rows are the same, but its adapter, another one, changes the losses."""

    @property
    def name(self) -> str:
        """Heading of its column."""
        return DENSE

    def run(self, _setting: Setting, _inputs: Inputs, folder: Path) -> SideRun:
        """Train once."""
        return Ours(self.rows_at_once).run(self.job.setting, self.job.inputs, folder)


def make_jobs(setting: Setting, num_experts: int, topk: int, folder: Path) -> tuple[Job, Job]:
    """The up-cycled model of ``setting.model`` and the dense one of the same active parameters, in ``folder``."""
    folders = {name: folder / f"{Path(setting.model).name}-{name}" for name in ("upcycled", "widened")}
    upcycled, widened = folders.values()
    command = ["tools/upcycle.py", "--load-dir", setting.model, "--save-dir", str(upcycled)]
    command += ["--num-experts", str(num_experts), "--moe-router-topk", str(topk)]
    run_child(command, setting.threads, folder / "upcycle.log")
    request = {"model": setting.model, "times": topk, "widened": widened}
    _child("comparison.widened_child", setting, folder, request)
    settings = [replace(setting, model=str(made)) for made in folders.values()]
    inputs = []
    for one in settings:
        place = folder / f"inputs-{Path(one.model).name}"
        place.mkdir()
        inputs.append(make_inputs(one, place))
    result = folder / "flops.json"
    models = {one.model: made.start_adapter for one, made in zip(settings, inputs, strict=True)}
    _child("comparison.model_flops_child", setting, folder, {"models": models, "result": result})
    flops = json.loads(result.read_text())
    mixture, dense = (
        Job(
            setting=one,
            inputs=made,
            flop_per_token=flops[one.model]["per_token"],
            flop_per_token_and_length=flops[one.model]["per_token_and_length"],
        )
        for one, made in zip(settings, inputs, strict=True)
    )
    return mixture, dense


def _child(module: str, setting: Setting, folder: Path, request: Mapping[str, Any]) -> None:
    name = module.rpartition(".")[2]
    asked = folder / f"{name}.json"
    asked.write_text(json.dumps(request, default=str))
    run_child(["-m", module, str(asked)], setting.threads, folder / f"{name}.log")


def reached(summaries: Sequence[Summary], mixture: Job, dense: Job) -> dict[str, float]:
    """The figures of :data:`BARS` that the sides which took part allow; the first of them is ours.

    As it comes is the peer with eight rows padded together and nothing else set, at its best the fastest that keeps
    freed memory as its allocator does; memory is that of the latter. Our allocator's setting given to the peer too is a
    figure without a bar.
    """
    ours = summaries[0]
    peers = [summary for summary in summaries[1:] if summary.name != DENSE]
    found: dict[str, float] = {}
    for peer in peers:
        if peer.name == AS_IT_COMES:
            found["times_as_it_comes"] = ours.tokens_per_second.median / peer.tokens_per_second.median
    of_their_own = [peer for peer in peers if "memory kept" not in peer.name]
    if of_their_own:
        peer = max(of_their_own, key=lambda summary: summary.tokens_per_second.median)
        found["times_at_its_best"] = ours.tokens_per_second.median / peer.tokens_per_second.median
        found["memory_share"] = ours.peak_memory_bytes / peer.peak_memory_bytes
    if peers:
        fastest = max(summary.tokens_per_second.median for summary in peers)
        found["times_of_all"] = ours.tokens_per_second.median / fastest
    for summary in summaries:
        if summary.name == DENSE:
            found["dense_rate_share"] = mixture.gflop_per_second(ours) / dense.gflop_per_second(summary)
    return found


def told(found: Mapping[str, float]) -> str:
    """The figures beside their bars, a line each."""
    words = {
        "times_as_it_comes": "times as fast as the peer as it comes",
        "times_at_its_best": "times as fast as the peer at its best",
        "memory_share": "of the memory of the latter",
        "times_of_all": "times as fast as the fastest peer, those with our allocator's setting too",
        "dense_rate_share": "of the dense model's rate in operations",
    }
    bars = {name: f"; at {_bound(name)} {bar:g}" for name, bar in BARS.items()}
    return "\n".join(f"{value:.2f} {words[name]}{bars.get(name, '')}" for name, value in found.items())


def is_reached(name: str, value: float) -> bool:
    """Whether a figure passes its bar; one without a bar does."""
    bar = BARS.get(name, value)
    return value <= bar if _bound(name) == "most" else value >= bar


def _bound(name: str) -> str:
    return "most" if name == "memory_share" else "least"
