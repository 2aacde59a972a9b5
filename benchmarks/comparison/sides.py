"""The sides of a comparison: each trains the setting in a process of its own and tells what it measured."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from comparison.process import KEPT_MEMORY, Ended, run_child
from comparison.setting import Inputs, Setting
from mindspeed_lora.errors import Failed, Refused

EXPERTS = ("eager", "grouped_mm", "batched_mm")
"""How transformers can compute experts."""
NF4 = ("--qlora", "--quant-double")
"""Of ours: frozen linears in 4-bit NormalFloat with nested statistics."""


@dataclass(frozen=True)
class Step:
    """One optimizer step of a side."""

    loss: float
    """Mean over the loss-carrying tokens of the global batch, before the update."""
    elapsed_ms: float
    tokens: int
    """Real tokens, without padding."""
    loss_tokens: int


@dataclass(frozen=True)
class SideRun:
    """One repetition of a side."""

    steps: tuple[Step, ...]
    """All steps, those of the warm-up too."""
    peak_memory_bytes: int
    """Largest resident size of the process, from its start to its end; on CUDA largest allocation of the device."""
    seconds: float
    """Of the whole process."""


class Side(Protocol):
    """What can be compared."""

    @property
    def name(self) -> str:
        """Heading of its column."""
        ...

    @property
    def rows_at_once(self) -> int | None:
        """Rows of a micro-batch; None where rows are packed."""
        ...

    @property
    def same_rows(self) -> bool:
        """Whether its steps take the rows of everyone's steps, so that losses can be compared."""
        ...

    def run(self, setting: Setting, inputs: Inputs, folder: Path) -> SideRun:
        """Train once; ``folder`` is this repetition's own."""
        ...


@dataclass(frozen=True)
class Ours:
    """``posttrain_gpt.py``."""

    rows_at_once: int | None
    same_rows: bool = True
    quantised: bool = False

    @property
    def name(self) -> str:
        """Heading of its column."""
        rows = "packed" if self.rows_at_once is None else f"batch {self.rows_at_once}"
        return f"ours, {rows}" + (", 4 bits" if self.quantised else "")

    def run(self, setting: Setting, inputs: Inputs, folder: Path) -> SideRun:
        """Train once; what each step did is in the run's ``metrics.jsonl``."""
        save = folder / "run"
        command = ["posttrain_gpt.py", *ours_flags(setting, inputs, self.rows_at_once)]
        command += ["--save", str(save), *(NF4 if self.quantised else ())]
        ended = run_child(command, setting.threads, folder / "log", setting.environment)
        if setting.cuda:
            last = (save / "metrics.jsonl").read_text().splitlines()[-1]
            ended = replace(ended, peak_memory_bytes=json.loads(last)["peak_memory_bytes"])
        return checked(self, setting, inputs, steps_of(save), ended)


@dataclass(frozen=True)
class Trl:
    """TRL's ``SFTTrainer`` on a PEFT model, as it comes but for what :mod:`comparison.trl_child` tells."""

    rows_at_once: int | None
    """Its per-device batch; None: packed by TRL."""
    kept_memory: bool = False
    """Whether freed memory stays in the process, as it does in ours: the same setting, from the environment."""
    experts: str | None = None
    """transformers' ``experts_implementation``; None: as it chooses."""
    quantised: bool = False
    """By bitsandbytes, as ours with :data:`NF4`."""

    @property
    def name(self) -> str:
        """Heading of its column."""
        rows = "packed" if self.rows_at_once is None else f"batch {self.rows_at_once}"
        experts = "" if self.experts is None else f", {self.experts} experts"
        bits = ", 4 bits" if self.quantised else ""
        return f"TRL, {rows}{experts}{bits}" + (", memory kept" if self.kept_memory else "")

    @property
    def same_rows(self) -> bool:
        """TRL packs the whole data set, so that a step's rows are others."""
        return self.rows_at_once is not None

    def run(self, setting: Setting, inputs: Inputs, folder: Path) -> SideRun:
        """Train once; the child writes losses and times."""
        request, result = folder / "request.json", folder / "result.json"
        wanted = {
            "setting": asdict(setting),
            "rows_file": inputs.rows_file,
            "tokenizer": inputs.tokenizer,
            "start_adapter": inputs.start_adapter,
            "per_device_batch": self.rows_at_once,
            "experts": self.experts,
            "quantised": self.quantised,
            "output_dir": str(folder / "run"),
            "result": str(result),
        }
        request.write_text(json.dumps(wanted))
        command = ["-m", "comparison.trl_child", str(request)]
        environment = {**setting.environment, **(KEPT_MEMORY if self.kept_memory else {})}
        ended = run_child(command, setting.threads, folder / "log", environment)
        measured: dict[str, Any] = json.loads(result.read_text())
        if measured["peak_memory_bytes"] is not None:
            ended = replace(ended, peak_memory_bytes=measured["peak_memory_bytes"])
        counts = measured["tokens"] or [
            _tokens_of_step(setting, inputs, number) for number in range(setting.num_steps)
        ]
        told = zip(measured["losses"], measured["elapsed_ms"], counts, strict=True)
        return checked(self, setting, inputs, [Step(loss, ms, *count) for loss, ms, count in told], ended)


def steps_of(save: Path) -> list[Step]:
    """What each step of a run of ours did, from its ``metrics.jsonl``."""
    records = [json.loads(line) for line in (save / "metrics.jsonl").read_text().splitlines()]
    return [Step(r["lm_loss"], r["elapsed_ms"], r["tokens"], r["loss_tokens"]) for r in records]


def side_of(word: str) -> Side:
    """The side that a word of ``--sides`` means: ``ours:1``, ``ours:packed``, ``trl:8``, ``trl:8+kept`` …

    Raises:
        Refused: it means none.
    """
    name, _, rest = word.partition(":")
    rows, *settings = rest.split("+")
    batch = None if rows == "packed" else int(rows) if rows in ("1", "2", "4", "8") else 0
    experts = [setting for setting in settings if setting in EXPERTS]
    quantised = "nf4" in settings
    known = len(experts) < 2 and set(settings) <= {"kept", "nf4", *experts}
    if batch != 0 and name == "ours" and set(settings) <= {"nf4"}:
        return Ours(batch, quantised=quantised)
    if batch != 0 and name == "trl" and known:
        return Trl(batch, "kept" in settings, experts[0] if experts else None, quantised)
    raise Refused(
        f"--sides {word}: no such side; give ours:ROWS or trl:ROWS, ROWS being 1, 2, 4, 8 or packed, +nf4 for frozen "
        "linears in 4 bits, and for TRL +kept to keep freed memory in the process, and of a mixture of experts one of "
        f"+{', +'.join(EXPERTS)}"
    )


def ours_flags(setting: Setting, inputs: Inputs, rows_at_once: int | None) -> list[str]:
    """The flags of our trainer for a setting, without ``--save``; rows are packed where ``rows_at_once`` is None."""
    flags: dict[str, Any] = {
        "--stage": "sft",
        "--load": setting.model,
        "--data-path": inputs.data_prefix,
        "--lora-load": inputs.start_adapter,
        "--seq-length": setting.seq_length,
        "--pad-to-multiple-of": setting.pad_to_multiple_of,
        "--micro-batch-size": rows_at_once or 1,
        "--global-batch-size": setting.global_batch_size,
        "--train-iters": setting.num_steps,
        "--lr": setting.lr,
        "--lr-decay-style": "constant",
        "--lr-warmup-iters": 0,
        "--weight-decay": setting.weight_decay,
        "--clip-grad": setting.clip_grad,
        "--adam-beta1": setting.adam_beta1,
        "--adam-beta2": setting.adam_beta2,
        "--adam-eps": setting.adam_eps,
        "--seed": setting.seed,
    }
    words = [str(word) for pair in flags.items() for word in pair]
    switches = ["--packing"] if rows_at_once is None else []
    switches += ["--bf16"] if setting.bf16 else []
    return [*words, *switches, "--variable-seq-lengths", "--no-shuffle"]


def computed_positions(setting: Setting, inputs: Inputs, rows_at_once: int) -> int:
    """Positions, padding included, of the measured steps of a side that pads as the setting says."""
    multiple, positions = setting.pad_to_multiple_of, 0
    first = setting.warmup * setting.global_batch_size
    for start in range(first, setting.num_samples, rows_at_once):
        longest = max(inputs.sample(number)[0] for number in range(start, start + rows_at_once))
        positions += rows_at_once * -(-longest // multiple) * multiple
    return positions


def _tokens_of_step(setting: Setting, inputs: Inputs, step: int) -> tuple[int, int]:
    """Tokens and loss-carrying tokens of step ``step``, counted from 0."""
    first = step * setting.global_batch_size
    samples = [inputs.sample(number) for number in range(first, first + setting.global_batch_size)]
    return sum(tokens for tokens, _ in samples), sum(loss_tokens for _, loss_tokens in samples)


def checked(side: Side, setting: Setting, inputs: Inputs, steps: Sequence[Step], ended: Ended) -> SideRun:
    """The run, if it took the steps and the rows that were asked for."""
    name = side.name
    if len(steps) != setting.num_steps:
        raise Failed(f"{name}: made {len(steps)} steps, expected {setting.num_steps}")
    for number, step in enumerate(steps):
        expected = _tokens_of_step(setting, inputs, number)
        if side.same_rows and (step.tokens, step.loss_tokens) != expected:
            raise Failed(
                f"{name}: step {number + 1} had {step.tokens} tokens, {step.loss_tokens} with loss; the rows in "
                f"file order have {expected[0]} and {expected[1]}, so the sides would not train the same"
            )
    return SideRun(tuple(steps), ended.peak_memory_bytes, ended.seconds)
