"""Generation."""

from __future__ import annotations

from dataclasses import dataclass

from mindspeed_lora.config.flags import AT_LEAST_ONE, NOT_NEGATIVE, POSITIVE, Check, Section, flag

TASKS = {
    "greedy": "greedy",
    "greedy_search": "greedy",
    "do_sample": "do_sample",
    "do_sample_search": "do_sample",
    "sampling": "do_sample",
    "chat": "chat",
}
"""What ``--task`` takes → the task that it names."""

BEAM_SEARCH = ("beam_search", "beam_search_with_sampling")

_UP_TO_ONE = Check("a number above 0, at most 1", lambda value: 0 < value <= 1)


@dataclass(frozen=True, kw_only=True)
class InferenceConfig(Section):
    """What is generated from which prompts, and how tokens are chosen."""

    task: tuple[str, ...] = flag(
        "greedy, do_sample or chat; several run in turn",
        ("greedy",),
        choices=(*TASKS, *BEAM_SEARCH),
        metavar="TASK",
    )
    prompt: tuple[str, ...] | None = flag("the prompt; several are answered in turn", metavar="TEXT")
    prompt_file: str | None = flag("file of prompts: one a line, or JSONL with a key prompt", metavar="FILE")
    output_file: str | None = flag("write JSONL with prompt, text and token_ids here", metavar="FILE")
    micro_batch_size: int = flag("prompts that are answered at once", 1, check=AT_LEAST_ONE)
    max_new_tokens: int = flag("most tokens to generate", 128, check=AT_LEAST_ONE)
    max_length: int | None = flag("most tokens of prompt and answer together", check=AT_LEAST_ONE)
    top_k: int = flag(
        "do_sample, chat: choose among this many likeliest tokens; 0: all", 50, check=NOT_NEGATIVE
    )
    top_p: float = flag(
        "do_sample, chat: choose among the likeliest tokens of this mass", 0.95, check=_UP_TO_ONE
    )
    temperature: float = flag("do_sample, chat: divides the logits", 0.7, check=POSITIVE)
    add_eos_token: bool = flag("end the prompt with the end token", False)
    history_turns: int = flag("chat: earlier turns that are kept", 3, check=NOT_NEGATIVE)
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
