"""What ``tools/plan.py`` prints: a table of layouts, and the command of the fastest."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from typing import Any

from mindspeed_lora.config.flags import Section, options
from mindspeed_lora.config.jobs import LayoutPlanJob
from mindspeed_lora.planning.choose import Planned

_HEADING = (
    *("TP", "PP", "VPP", "CP", "EP", "ETP", "DP", "micro", "recompute"),
    *("memory, GB", "step, s", "tokens/s/GPU", "products", "most of the rest"),
)
_PER_LINE = 110


def table_lines(job: LayoutPlanJob, found: Sequence[Planned]) -> list[str]:
    """The fastest layouts, a line each."""
    rows = [_HEADING, *(_cells(job, planned) for planned in found[: job.plan.top])]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]


def _cells(job: LayoutPlanJob, planned: Planned) -> tuple[str, ...]:
    layout, training, time = planned.candidate.layout, planned.candidate.training, planned.time
    rate = planned.tokens_per_second(job.plan.seq_length, job.machine.gpus or 1)
    degrees = (
        *(layout.tp, layout.pp, layout.placement.vp_size, layout.cp),
        *(layout.parallel.expert_parallel_size, layout.parallel.expert_tensor_size, layout.dp),
    )
    return (
        *map(str, degrees),
        str(training.micro_batch_size),
        planned.candidate.recompute,
        f"{planned.memory / 1e9:.1f}",
        f"{time.total:.2f}",
        f"{rate:,.0f}",
        f"{100 * time.products / time.total:.0f}%",
        time.largest_wait.replace("_", "-"),
    )


def launcher_words(job: LayoutPlanJob) -> list[str]:
    """How the processes are started."""
    gpus, per_node = job.machine.gpus or 1, job.machine.gpus_per_node
    nodes, each = -(-gpus // per_node), min(gpus, per_node)
    several = ["--node-rank", "$RANK_OF_NODE", "--master-addr", "$FIRST_NODE"] if nodes > 1 else []
    return ["torchrun", "--nnodes", str(nodes), "--nproc-per-node", str(each), *several]


def training_words(job: LayoutPlanJob, planned: Planned) -> list[str]:
    """The flags of ``posttrain_gpt.py``."""
    plan, training = job.plan, planned.candidate.training
    words = ["--stage", "sft", "--load", plan.model or "", "--data-path", plan.data_path, "--save", plan.save]
    words += ["--seq-length", str(plan.seq_length), "--bf16"]
    words += ["--micro-batch-size", str(training.micro_batch_size)]
    words += ["--global-batch-size", str(training.global_batch_size)]
    again = ("recompute_granularity", "recompute_method", "recompute_num_layers")
    words += _words(training, only=again) + _words(planned.candidate.layout.parallel)
    return words + ([] if plan.full else _words(job.lora)) + _words(job.quantization)


def _words(section: Section, only: Sequence[str] | None = None) -> list[str]:
    """The flags of a section whose values are not the defaults."""
    words: list[str] = []
    for option in options(type(section)):
        value: Any = getattr(section, option.dest)
        if value == option.default or (only is not None and option.dest not in only):
            continue
        words.append(option.name)
        if isinstance(value, dict):
            words.append(json.dumps(value))
        elif value is not True:
            words += map(str, value if isinstance(value, tuple) else (value,))
    return words


def command_lines(job: LayoutPlanJob, planned: Planned) -> list[str]:
    """The whole command, for a shell."""
    launcher = " ".join(launcher_words(job))
    lines = [f"{launcher} posttrain_gpt.py"]
    flags: list[list[str]] = []
    for word in training_words(job, planned):
        if word.startswith("--"):
            flags.append([])
        flags[-1].append(shlex.quote(word))
    for flag in (" ".join(words) for words in flags):
        if len(lines) == 1 or len(lines[-1]) + len(flag) + 1 > _PER_LINE:
            lines.append("    " + flag)
        else:
            lines[-1] += " " + flag
    return [" \\\n".join(lines)]


def as_json(job: LayoutPlanJob, found: Sequence[Planned]) -> str:
    """The same as one object."""
    machine = job.machine
    entries = [
        {
            "tp": (layout := planned.candidate.layout).tp,
            "pp": layout.pp,
            "vpp": layout.placement.vp_size,
            "cp": layout.cp,
            "ep": layout.parallel.expert_parallel_size,
            "etp": layout.parallel.expert_tensor_size,
            "dp": layout.dp,
            "micro_batch_size": planned.candidate.training.micro_batch_size,
            "recompute": planned.candidate.recompute,
            "memory_bytes": planned.memory,
            "step_seconds": planned.time.total,
            "seconds": vars(planned.time),
            "tokens_per_second_per_gpu": planned.tokens_per_second(job.plan.seq_length, machine.gpus or 1),
            "command": [*launcher_words(job), "posttrain_gpt.py", *training_words(job, planned)],
        }
        for planned in found[: job.plan.top]
    ]
    return json.dumps({"gpus": machine.gpus, "gpu_memory": machine.gpu_memory, "layouts": entries}, indent=2)
