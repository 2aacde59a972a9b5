"""Judging a model on benchmarks."""

from __future__ import annotations

from dataclasses import dataclass

from mindspeed_lora.config.flags import AT_LEAST_ONE, NOT_NEGATIVE, POSITIVE, Check, flag
from mindspeed_lora.config.inference import ComputeFlags

BENCHMARKS = (
    "mmlu",
    "mmlu_ppl",
    "cmmlu",
    "ceval",
    "gsm8k",
    "boolq",
    "bbh",
    "agieval",
    "human_eval",
    "hellaswag",
    "needlebench",
)
"""The benchmarks that are built in; other names of ``--task`` are lm-evaluation-harness's."""

_DEPTH = Check("a share of the text in percent, from 0 to 100", lambda value: 0 <= value <= 100)


@dataclass(frozen=True, kw_only=True)
class EvaluationConfig(ComputeFlags):
    """Which benchmarks, where their files lie, and how questions are asked (docs/evaluation.md)."""

    task: tuple[str, ...] | None = flag(
        f"benchmark: {', '.join(BENCHMARKS)}, or a name that lm-evaluation-harness knows (needs lm_eval); several run "
        "in turn",
        metavar="TASK",
    )
    task_data_path: tuple[str, ...] | None = flag(
        "folder (or file) of the benchmark's questions, one for each task; for lm-evaluation-harness a folder of task "
        "files (YAML), where they are one's own",
        names=("--task-data-path", "--include-path"),
        metavar="PATH",
    )
    fewshot_path: str | None = flag(
        "folder (or file) of solved examples, laid out as the questions are; left out: the benchmark's own dev "
        "files, where it has such",
        metavar="PATH",
    )
    num_fewshot: int | None = flag(
        "solved examples in front of each question; left out: as the benchmark is used to (5, 3 …), none where there "
        "are no files of examples",
        check=NOT_NEGATIVE,
    )
    fewshot_as_multiturn: str = flag(
        "lm-evaluation-harness, in a conversation: solved examples are turns of their own (true), or one turn with the "
        "question (false)",
        "true",
        choices=("true", "false"),
    )
    output_dir: str | None = flag("write results.json and records.jsonl here", metavar="DIR")
    evaluation_batch_size: int = flag("questions that go through the model at once", 1, check=AT_LEAST_ONE)
    max_new_tokens: int | None = flag(
        "most tokens of a generated answer; left out: as the benchmark needs", check=AT_LEAST_ONE
    )
    max_eval_samples: int | None = flag("only the first questions of each subject", check=AT_LEAST_ONE)
    eval_language: str | None = flag(
        "language of the instructions, and of needlebench's texts; left out: the benchmark's own",
        choices=("en", "zh"),
    )
    no_chat_template: bool = flag("ask without the tokenizer's chat template (the default here)", False)
    alternative_prompt: bool = flag(
        "the benchmark's other form of question: boolq as A or B, human_eval with an instruction, mmlu, cmmlu and "
        "ceval with an instruction in front of every question, agieval without headings",
        False,
    )
    origin_postprocess: bool = flag(
        "multiple choice: generate an answer and take its first letter, in place of comparing the choices' "
        "log-likelihoods",
        False,
    )
    chain_of_thought: bool = flag("gsm8k, bbh: let the model reason before it answers", False)
    instruction_template: str | None = flag(
        "text around examples and question, with the words {subject}, {examples} and {question} in it; left out: "
        "instruction, examples, question",
        metavar="TEXT",
    )
    choice_score: str | None = flag(
        "what is compared among choices: the sum of the log-likelihoods of their tokens, or this by tokens or by "
        "characters (left out: sum; mmlu_ppl: by tokens)",
        choices=("sum", "tokens", "characters"),
    )
    greedy: bool = flag("human_eval: the likeliest tokens, in place of a search with 4 beams", False)
    broadcast: bool = flag("accepted: questions always reach the ranks of all experts", False)
    allow_code_execution: bool = flag(
        "human_eval: run what the model has written, confined to a process without network", False
    )
    code_timeout: float = flag("human_eval: seconds that one program may run", 10.0, check=POSITIVE)
    context_lengths: tuple[int, ...] | None = flag(
        "needlebench: tokens of the texts; left out: half and all of what the model can read",
        check=AT_LEAST_ONE,
        metavar="TOKENS",
    )
    needle_depths: tuple[float, ...] = flag(
        "needlebench: places of the needle in percent of the text",
        (0.0, 25.0, 50.0, 75.0, 100.0),
        check=_DEPTH,
        metavar="PERCENT",
    )
    needle_task: str = flag(
        "needlebench: one needle, several that are asked for at once, one at each of --needle-depths, or several that "
        "must be combined",
        "single",
        choices=("single", "retrieval", "reasoning"),
    )
    num_needles: int = flag("needlebench, reasoning: needles that must be combined", 2, check=AT_LEAST_ONE)
