"""Chat templates of published model families, written down from their formats, to compare prompt templates with.

Each is what such a model's tokenizer renders with; where MindSpeed-LLM's template of the family departs from it, the
entry says which part is compared.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """A chat template, and how far the prompt template agrees with it."""

    jinja: str
    prompts_only: bool = False
    """Only what stands before the first answer is the same."""
    with_system: bool = True
    """Whether system texts are rendered in the same way."""
    several_turns: bool = True


def _each(system: str, user: str, assistant: str, before: str = "", asked: str = "") -> str:
    """A template that prints one text a role; ``C`` in it is the content."""

    def show(text: str) -> str:
        return (
            "{{ "
            + " + ".join(repr(part) for part in text.split("C")).replace(" + ", " + m.content + ")
            + " }}"
        )

    return (
        before
        + "{% for m in messages %}{% if m.role == 'system' %}"
        + show(system)
        + "{% elif m.role == 'user' %}"
        + show(user)
        + "{% else %}"
        + show(assistant)
        + "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ "
        + repr(asked)
        + " }}{% endif %}"
    )


_BOS = "{{ bos_token }}"
_IM = ("<|im_start|>system\nC<|im_end|>\n", "<|im_start|>user\nC<|im_end|>\n")
_IM_ANSWER, _IM_ASKED = "<|im_start|>assistant\nC<|im_end|>\n", "<|im_start|>assistant\n"
_QWEN_SYSTEM = "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nSAYS<|im_end|>\n' }}{% endif %}"
_HEADER = "<|start_header_id|>{}<|end_header_id|>\n\n"
_LLAMA2 = (
    "{% set ns = namespace(system='') %}{% for m in messages %}{% if m.role == 'system' %}"
    "{% set ns.system = '<<SYS>>\n' + m.content + '\n<</SYS>>\n\n' %}{% elif m.role == 'user' %}"
    "{{ bos_token + '[INST] ' + ns.system + m.content + ' [/INST]' }}{% set ns.system = '' %}"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
_END = "{{ eos_token }}"
_QWEN3 = (
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{{ '<|im_start|>assistant\n' }}{% if loop.last and '</think>' not in m.content %}"
    "{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m.content + '<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n<think>\n\n</think>\n\n' }}{% endif %}"
)

FAMILIES: dict[str, Family] = {
    "baichuan2": Family(
        _each("C", "<reserved_106>C", "<reserved_107>C", asked="<reserved_107>"), prompts_only=True
    ),
    "bailing_mini": Family(
        _each(
            "<role>SYSTEM</role>C<|role_end|>",
            "<role>HUMAN</role>C<|role_end|>",
            "<role>ASSISTANT</role>C<|role_end|>",
            asked="<role>ASSISTANT</role>",
        ),
        prompts_only=True,
    ),
    "chatml": Family(_each(*_IM, _IM_ANSWER, asked=_IM_ASKED)),
    "cpm": Family(_each("C", "<用户>C", "<AI>C", _BOS, "<AI>"), prompts_only=True),
    # The published template writes a blank behind "Assistant:", which goes with the answer there.
    "deepseek2": Family(_each("C\n\n", "User: C\n\n", "Assistant: C", _BOS, "Assistant:"), prompts_only=True),
    "deepseek3": Family(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}"
        "{{ '<｜Assistant｜>' + m.content + eos_token }}{% elif m.role == 'user' %}{{ '<｜User｜>' + m.content }}"
        "{% else %}{{ m.content }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<｜Assistant｜>' }}{% endif %}"
    ),
    # The published template has no system role, and closes every turn alike.
    "gemma": Family(
        _each(
            "",
            "<start_of_turn>user\nC<end_of_turn>\n",
            "<start_of_turn>model\nC<end_of_turn>\n",
            _BOS,
            "<start_of_turn>model\n",
        ),
        prompts_only=True,
        with_system=False,
    ),
    "glm4": Family(
        _each("<|system|>\nC", "<|user|>\nC", "<|assistant|>\nC", "{{ '[gMASK]<sop>' }}", "<|assistant|>"),
        prompts_only=True,
    ),
    "intern2": Family(_each(*_IM, _IM_ANSWER, _BOS, _IM_ASKED)),
    "llama2": Family(_LLAMA2, prompts_only=True),
    "llama3": Family(
        _each(
            _HEADER.format("system") + "C<|eot_id|>",
            _HEADER.format("user") + "C<|eot_id|>",
            _HEADER.format("assistant") + "C<|eot_id|>",
            _BOS,
            _HEADER.format("assistant"),
        )
    ),
    "magistral": Family(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}"
        "{{ '[SYSTEM_PROMPT]' + m.content + '[/SYSTEM_PROMPT]' }}{% elif m.role == 'user' %}"
        "{{ '[INST]' + m.content + '[/INST]' }}{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<think>\n\n</think>\n\n' }}{% endif %}",
        prompts_only=True,
    ),
    # The published templates put the system text into the first question.
    "mistral": Family(
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
        "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}",
        with_system=False,
    ),
    "qwen": Family(
        _each(*_IM, _IM_ANSWER, _QWEN_SYSTEM.replace("SAYS", "You are a helpful assistant."), _IM_ASKED)
    ),
    # The published template writes the empty thought before the last answer alone.
    "qwen3": Family(_QWEN3, several_turns=False),
    "qwen_lf": Family(
        _each(
            *_IM,
            _IM_ANSWER,
            _QWEN_SYSTEM.replace(
                "SAYS", "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
            ),
            _IM_ASKED,
        )
    ),
}
