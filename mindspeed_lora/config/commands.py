"""The commands, and how their command line becomes a job."""

from __future__ import annotations

import dataclasses
import functools
import os
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mindspeed_lora.config.accepted import GENERATION_ONLY
from mindspeed_lora.config.config_file import config_file_words
from mindspeed_lora.config.features import NOT_BUILT, TRAINING_ONLY
from mindspeed_lora.config.flags import Option, Section, options
from mindspeed_lora.config.jobs import (
    ConversionJob,
    EvaluationJob,
    InferenceJob,
    InspectJob,
    Job,
    LayoutPlanJob,
    PreprocessJob,
    TrainJob,
    VerifyJob,
)
from mindspeed_lora.config.lora import LORA_NAMES, OLD_NAMES, listed_names
from mindspeed_lora.config.operations import resolve_operations
from mindspeed_lora.config.parser import Grammar, Parsed, parse_words
from mindspeed_lora.config.resolve import (
    resolve_conversion,
    resolve_inference,
    resolve_inspection,
    resolve_preprocess,
    resolve_verification,
)
from mindspeed_lora.config.resolve_evaluation import resolve_evaluation
from mindspeed_lora.config.resolve_training import resolve_layout_plan, resolve_training


@dataclass(frozen=True)
class Command:
    """One entry file, or one of the further commands that its first word chooses."""

    script: str
    summary: str
    job_type: type[Job]
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Values that the command sets where the user says nothing."""
    shares_flags_with: type[Job] | None = None
    """A job whose flags are accepted without effect, since published scripts give them to both."""
    subcommands: tuple[str, ...] = ()
    """Commands that the script runs where their name is its first word."""


COMMANDS: dict[str, Command] = {
    "posttrain": Command("posttrain_gpt.py", "Fine-tune a model on instruction rows.", TrainJob),
    "pretrain": Command(
        "pretrain_gpt.py",
        "Train a model on plain text, next token by next token.",
        TrainJob,
        defaults={"stage": "pretrain"},
    ),
    "convert": Command(
        "convert_ckpt.py",
        "Convert, reshard and merge checkpoints.",
        ConversionJob,
        subcommands=("inspect", "verify"),
    ),
    "inspect": Command(
        "convert_ckpt.py inspect",
        "Tell what a folder is: format, layout, sizes, adapter or base.",
        InspectJob,
    ),
    "verify": Command(
        "convert_ckpt.py verify",
        "Compare two checkpoints: exit status 0 equal, 1 different.",
        VerifyJob,
    ),
    "preprocess": Command("preprocess_data.py", "Tokenise rows into an indexed dataset.", PreprocessJob),
    "inference": Command(
        "inference.py", "Generate text, with or without an adapter.", InferenceJob, shares_flags_with=TrainJob
    ),
    "evaluation": Command(
        "evaluation.py", "Judge a model on benchmarks.", EvaluationJob, shares_flags_with=TrainJob
    ),
    "plan": Command(
        "tools/plan.py", "Rank the layouts of a training by predicted memory and time.", LayoutPlanJob
    ),
}


def sections(job_type: type[Job]) -> dict[str, type[Section]]:
    """The sections of a job by field name, in the order of ``--help``."""
    hints = typing.get_type_hints(job_type)
    found = {
        name: hint for name, hint in hints.items() if isinstance(hint, type) and issubclass(hint, Section)
    }
    runtime = found.pop("runtime")
    return {**found, "runtime": runtime}


@functools.cache
def grammar(command: str) -> Grammar:
    """The flags that a command knows."""
    described = COMMANDS[command]
    own = _by_name(described.job_type)
    shared = _by_name(described.shares_flags_with) if described.shares_flags_with else {}
    ignored = {name: option.arity for name, option in shared.items() if name not in own}
    if shared:
        elsewhere = GENERATION_ONLY | {name: NOT_BUILT[name].arity for name in TRAINING_ONLY}
        ignored |= {name: arity for name, arity in elsewhere.items() if name not in own}
    return Grammar(own, ignored, {name: COMMANDS[name].script for name in described.subcommands})


def chosen_command(command: str, argv: Sequence[str]) -> tuple[str, Sequence[str]]:
    """The command that a script's first word chooses, and the words that are left for it."""
    if argv and argv[0] in COMMANDS[command].subcommands:
        return argv[0], argv[1:]
    return command, argv


def _by_name(job_type: type[Job]) -> dict[str, Option]:
    return {
        name: option
        for section in sections(job_type).values()
        for option in options(section)
        for name in option.names
    }


def parse(command: str, argv: Sequence[str], environ: Mapping[str, str] | None = None) -> Any:
    """The checked and resolved job of a command line, of the command's job type.

    ``environ`` (default: the process's) tells the world size. Raises Refused for an unknown flag or a
    configuration that cannot be.
    """
    known = grammar(command)
    from_file = config_file_words(argv, known)
    parsed = parse_words([*from_file, *argv], known)
    job = build_job(command, parsed)
    if from_file:
        job = dataclasses.replace(job, given=job.given - _defaults_of_the_file(parsed, argv, known))
    environ = os.environ if environ is None else environ
    if isinstance(job, TrainJob):
        return resolve_training(job, environ)
    if isinstance(job, InferenceJob):
        return resolve_inference(job, environ)
    if isinstance(job, EvaluationJob):
        return resolve_evaluation(job, environ)
    if isinstance(job, ConversionJob):
        return resolve_conversion(resolve_operations(job))
    if isinstance(job, InspectJob):
        return resolve_inspection(job)
    if isinstance(job, VerifyJob):
        return resolve_verification(job)
    if isinstance(job, PreprocessJob):
        return resolve_preprocess(job)
    if isinstance(job, LayoutPlanJob):
        return resolve_layout_plan(job)
    raise TypeError(f"no rules to resolve a {type(job).__name__}")


def _defaults_of_the_file(parsed: Parsed, argv: Sequence[str], known: Grammar) -> frozenset[str]:
    """Fields that ``--config`` alone names, with their defaults: a printed configuration names every field."""
    defaults = {option.dest: option.default for option in known.options.values()}
    given = parse_words(argv, known).values
    same = (name for name, value in parsed.values.items() if name not in given and value == defaults[name])
    return frozenset(same)


def build_job(command: str, parsed: Parsed) -> Job:
    """Put the values into the command's sections, without any rule that spans several of them."""
    described = COMMANDS[command]
    values = {**described.defaults, **parsed.values}
    values |= {name: tuple(listed_names(values[name])) for name in LORA_NAMES if name in values}
    renamed = [name for name in LORA_NAMES if name in values and set(values[name]) & OLD_NAMES.keys()]
    values |= {name: tuple(OLD_NAMES.get(word, word) for word in values[name]) for name in renamed}
    built = {
        name: section(**{o.dest: values[o.dest] for o in options(section) if o.dest in values})
        for name, section in sections(described.job_type).items()
    }
    notices = [f"no effect here: {', '.join(parsed.without_effect)}"] if parsed.without_effect else []
    for name in renamed:
        notices.append(
            f"--{name.replace('_', '-')} {' '.join(parsed.values[name])} means {' '.join(values[name])}"
        )
    job_type: Any = described.job_type
    return job_type(**built, given=frozenset(parsed.values), notices=tuple(notices))
