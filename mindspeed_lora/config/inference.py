"""Generation."""

from __future__ import annotations

from dataclasses import dataclass

from mindspeed_lora.config.flags import AT_LEAST_ONE, NOT_NEGATIVE, Check, Section, flag

BEAM_SEARCH = ("beam_search", "beam_search_with_sampling")
ALL_TASKS = ("greedy", "do_sample", *BEAM_SEARCH, "chat")
TASKS = {
    **{name: name for name in ALL_TASKS},
    "greedy_search": "greedy",
    "do_sample_search": "do_sample",
    "sampling": "do_sample",
    "beam_search_sampling": "beam_search_with_sampling",
}
"""What ``--task`` takes → the task that it names."""

USED_BY: tuple[tuple[set[str], tuple[str, ...]], ...] = (
    ({"do_sample", "beam_search_with_sampling", "chat"}, ("temperature", "top_k", "top_p")),
    (set(BEAM_SEARCH), ("num_beams", "num_return_sequences", "length_penalty", "early_stopping")),
    ({"chat"}, ("history_turns", "hide_thinking")),
    (set(ALL_TASKS) - {"chat"}, ("micro_batch_size",)),
)
"""Tasks, and the fields that these alone heed."""

_UP_TO_ONE = Check("a number above 0, at most 1", lambda value: 0 < value <= 1)
_TEMPERATURE = Check(
    "a number from 1e-20 to 1e20 (--task greedy takes the likeliest tokens)",
    lambda value: 1e-20 <= value <= 1e20,
)
_EXPONENT = Check("a number from -50 to 50", lambda value: -50 <= value <= 50)


@dataclass(frozen=True, kw_only=True)
class ComputeFlags(Section):
    """What every command that runs a model without training it has."""

    seq_length: int | None = flag(
        "longest prompt and answer; left out: max_position_embeddings", check=AT_LEAST_ONE
    )
    seed: int = flag("seed of sampling", 1234, check=NOT_NEGATIVE)
    bf16: bool = flag("compute in bfloat16", False)
    fp16: bool = flag("compute in float16", False)

    @property
    def params_dtype(self) -> str:
        """Name of the compute dtype: ``bfloat16``, ``float16`` or ``float32``."""
        return "bfloat16" if self.bf16 else "float16" if self.fp16 else "float32"


@dataclass(frozen=True, kw_only=True)
class InferenceConfig(ComputeFlags):
    """What is generated from which prompts, and how tokens are chosen."""

    task: tuple[str, ...] = flag(
        "greedy, do_sample, beam_search, beam_search_with_sampling or chat; several run in turn (left out, with no "
        "prompt and no output file: all five, chat on a terminal only)",
        ("greedy",),
        choices=tuple(TASKS),
        metavar="TASK",
    )
    prompt: tuple[str, ...] | None = flag("the prompt; several are answered in turn", metavar="TEXT")
    prompt_file: str | None = flag("file of prompts: one a line, or JSONL with a key prompt", metavar="FILE")
    output_file: str | None = flag("write JSONL with prompt, text and token_ids here", metavar="FILE")
    micro_batch_size: int = flag("prompts that are answered at once", 1, check=AT_LEAST_ONE)
    max_new_tokens: int = flag("most tokens to generate", 128, check=AT_LEAST_ONE)
    max_length: int | None = flag("most tokens of prompt and answer together", check=AT_LEAST_ONE)
    top_k: int = flag(
        "sampling, chat: choose among this many likeliest tokens; 0: all", 50, check=NOT_NEGATIVE
    )
    top_p: float = flag(
        "sampling, chat: choose among the likeliest tokens of this mass", 0.95, check=_UP_TO_ONE
    )
    temperature: float = flag("sampling, chat: divides the logits", 0.7, check=_TEMPERATURE)
    num_beams: int = flag("beam search: answers that are followed at once", 4, check=AT_LEAST_ONE)
    num_return_sequences: int = flag(
        "beam search: best answers to a prompt that are told, at most --num-beams", 1, check=AT_LEAST_ONE
    )
    length_penalty: float = flag(
        "beam search: a finished answer's score is its log-probability / length ^ this; above 0 favours long ones",
        1.0,
        check=_EXPONENT,
    )
    early_stopping: str = flag(
        "beam search ends: when --num-beams answers are finished (true), when the others look worse (false), or when "
        "they cannot become better (never)",
        "false",
        choices=("true", "false", "never"),
    )
    stop_words: tuple[str, ...] | None = flag(
        "texts that end an answer, and are no part of it", metavar="TEXT"
    )
    add_eos_token: tuple[str, ...] | None = flag(
        "tokens that end an answer, beside the model's own; without one: end the prompt with the end token",
        nargs="*",
        metavar="TOKEN",
    )
    history_turns: int = flag("chat: earlier turns that are kept", 3, check=NOT_NEGATIVE)
    hide_thinking: bool = flag("chat: do not show what stands between <think> and </think>", False)
