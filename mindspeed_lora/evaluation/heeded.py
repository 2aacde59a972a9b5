"""Which flags a task heeds: what has no effect on it is told once, and refused where numbers would look like others."""

from __future__ import annotations

from collections.abc import Sequence

from mindspeed_lora.config.evaluation import BENCHMARKS, EvaluationConfig
from mindspeed_lora.config.flags import options
from mindspeed_lora.config.jobs import EvaluationJob
from mindspeed_lora.config.resolve_evaluation import is_placeholder
from mindspeed_lora.errors import Refused
from mindspeed_lora.evaluation.benchmark import EXAMPLES, SPECIFIC
from mindspeed_lora.evaluation.benchmarks import benchmark

_ALL_OWN = {"instruction_template"}
"""What every benchmark of ours heeds, and lm_eval does not."""
_HARNESS = {"num_fewshot", "fewshot_as_multiturn", "allow_code_execution"}


def without_effect(job: EvaluationJob, tasks: Sequence[str]) -> list[str]:
    """One notice that names the flags which have no effect on some of the tasks; none where there are no such.

    Raises:
        Refused: solved examples are asked for on a benchmark that has none: its numbers would not be what they seem.
    """
    evaluation = job.evaluation
    given = {
        option.dest: option.name
        for option in options(EvaluationConfig)
        if option.dest in job.given and getattr(evaluation, option.dest) != option.default
    }
    told = []
    for name in tasks:
        if is_placeholder(name):
            continue
        heeded = benchmark(name).takes | _ALL_OWN if name in BENCHMARKS else _HARNESS
        idle = [dest for dest in (*SPECIFIC, *_ALL_OWN) if dest in given if dest not in heeded]
        examples = [given[dest] for dest in idle if dest in EXAMPLES and getattr(evaluation, dest) != 0]
        if examples and name in BENCHMARKS:
            raise Refused(f"{name} is asked without examples; leave out {' and '.join(examples)}")
        if idle:
            told.append(f"on {name}: {', '.join(given[dest] for dest in idle)}")
    return [f"no effect {'; '.join(told)}"] if told else []
