"""Layouts that fit, the fastest first: memory as ``--dry-run`` predicts it, time as :mod:`.cost` has it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from mindspeed_lora.adapters.spec import AdapterSpec
from mindspeed_lora.checkpoint.canonical import padded_vocab_size
from mindspeed_lora.checkpoint.formats.hf import shape_of
from mindspeed_lora.checkpoint.loading.quantization import QuantPlan, plan_quantization
from mindspeed_lora.checkpoint.loading.random_weights import RandomSource
from mindspeed_lora.checkpoint.peft.plan import plan_adapter
from mindspeed_lora.config.conversion import parse_size
from mindspeed_lora.config.jobs import LayoutPlanJob
from mindspeed_lora.config.shape import ModelShape
from mindspeed_lora.errors import Refused
from mindspeed_lora.planning.cost import StepTime, step_time
from mindspeed_lora.planning.layouts import Candidate, Layout, candidates, layouts
from mindspeed_lora.training.layer_memory import MemoryQuestion
from mindspeed_lora.training.memory import RankMemory, RankParameters, predict_memory, rank_parameters
from mindspeed_lora.training.reporting.model_flops import ModelFlops

_BF16 = 2


@dataclass(frozen=True)
class Planned:
    """A candidate with what is predicted of it."""

    candidate: Candidate
    memory: int
    """Bytes of the rank that holds most."""
    time: StepTime

    def tokens_per_second(self, seq_length: int, gpus: int) -> float:
        """Of one GPU."""
        return self.candidate.training.global_batch_size * seq_length / self.time.total / gpus


@dataclass(frozen=True)
class Model:
    """What is trained."""

    shape: ModelShape
    adapter: AdapterSpec | None
    quantization: QuantPlan | None
    flops: ModelFlops

    @classmethod
    def of(cls, job: LayoutPlanJob) -> Model:
        """As config.json and the flags have it."""
        path = Path(job.plan.model or "")
        if not (path / "config.json").is_file():
            raise Refused(f"--model {path}: no config.json there; name a Hugging Face folder")
        shape = shape_of(path)
        planned = None if job.plan.full else plan_adapter(job.lora, shape, seed=0)
        adapter = planned.spec if planned is not None else None
        shape = planned.shape if planned is not None else shape
        quantization = plan_quantization(job.quantization, RandomSource(shape, 0, 0.0), shape, adapter)
        return cls(shape, adapter, quantization, ModelFlops.of(shape, adapter))

    def question(self, candidate: Candidate, seq_length: int) -> MemoryQuestion:
        """What memory depends on."""
        layout, parallel = candidate.layout, candidate.layout.parallel
        return MemoryQuestion(
            shape=self.shape,
            placement=layout.placement,
            adapter=self.adapter,
            quantization=self.quantization,
            training=candidate.training,
            tp=layout.tp,
            cp=layout.cp,
            dp=layout.dp,
            ep=parallel.expert_parallel_size,
            etp=parallel.expert_tensor_size,
            sequence_parallel=parallel.sequence_parallel,
            distributed_optimizer=parallel.use_distributed_optimizer,
            seq_length=seq_length,
            vocab_size=padded_vocab_size(self.shape, 1, layout.tp),
            itemsize=_BF16,
            on_cpu=False,
        )


class Chooser:
    """Looks through the layouts of a job; what ranks hold is counted once for all that hold the same."""

    def __init__(self, job: LayoutPlanJob) -> None:
        self.job = job
        self.model = Model.of(job)
        self.limit = parse_size(job.machine.gpu_memory) - parse_size(job.machine.reserve)
        self._held: dict[tuple[object, ...], RankParameters] = {}
        self._layers: dict[tuple[int, int, int], dict[object, RankParameters]] = {}
        self._least: tuple[int, Candidate] | None = None

    def choose(self) -> list[Planned]:
        """The fastest way of each layout that fits, the fastest layout first.

        Raises:
            Refused: none fits; the smallest memory that was found is named.
        """
        best = [
            min(found, key=lambda planned: (round(planned.time.total, 6), planned.memory))
            for layout in layouts(self.job, self.model.shape)
            if (found := list(self._fitting(layout)))
        ]
        if not best:
            raise Refused(self._nothing_fits())
        return sorted(best, key=lambda planned: (round(planned.time.total, 4), planned.memory))

    def _fitting(self, layout: Layout) -> Iterator[Planned]:
        for ways in candidates(self.job, layout):
            any_fits = False
            for candidate in ways:
                planned = self._planned(candidate)
                if planned is not None:
                    any_fits = True
                    yield planned
            if not any_fits:
                # Larger micro-batches hold more.
                return

    def _planned(self, candidate: Candidate) -> Planned | None:
        question = self.model.question(candidate, self.job.plan.seq_length)
        stages = [self._stage(question, rank) for rank in self._stages(candidate.layout)]
        largest = max(stages, key=lambda stage: stage.total)
        if self._least is None or largest.total < self._least[0]:
            self._least = largest.total, candidate
        if largest.total > self.limit:
            return None
        slowest = max(stages, key=lambda stage: stage.weights)
        time = step_time(question, slowest, self.model.flops, self.job.machine, self.job.machine.gpus or 1)
        return Planned(candidate, largest.total, time)

    @staticmethod
    def _stages(layout: Layout) -> list[int]:
        """The first stages have the most micro-batches under way, the last one the logits."""
        return sorted({0, min(1, layout.pp - 1), layout.pp - 1})

    def _stage(self, question: MemoryQuestion, rank: int) -> RankMemory:
        cuts = question.tp, question.ep, question.etp
        key = *cuts, question.placement, rank
        if key not in self._held:
            self._held[key] = rank_parameters(question, rank, self._layers.setdefault(cuts, {}))
        return predict_memory(question, rank, self._held[key])

    def _nothing_fits(self) -> str:
        machine, batch = self.job.machine, self.job.plan.global_batch_size
        if self._least is None:
            return f"no layout of {machine.gpus} GPUs divides the model and --global-batch-size {batch}; change one"
        size, candidate = self._least
        layout = candidate.layout
        advice = "" if self.job.quantization.quantises else "give --qlora, or "
        return (
            f"no layout of {machine.gpus} GPUs fits into --gpu-memory {machine.gpu_memory} less {machine.reserve} of "
            f"--reserve: the smallest needs {size / 1e9:.1f} GB (TP {layout.tp}, PP {layout.pp}, CP {layout.cp}, "
            f"micro-batch {candidate.training.micro_batch_size}, recomputation {candidate.recompute}); {advice}take "
            "more GPUs or a shorter --seq-length"
        )
