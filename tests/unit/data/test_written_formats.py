"""Templates without a chat template to compare with, beside their formats written out.

``<bos>`` and ``<end>`` stand for the tokenizer's special tokens. The first table has what the models' makers document;
the second what only MindSpeed-LLM defines, or defines otherwise than the makers, with the difference.
"""

from __future__ import annotations

import pytest

from mindspeed_lora.data.conversation import Turns
from mindspeed_lora.data.prompt_template import SpecialTokens, pieces
from mindspeed_lora.data.template_files import prompt_template, prompt_templates
from tests.unit.data.family_templates import FAMILIES

TURNS = Turns("S", ("Q", "R"), ("A", "B"))
SHORT = Turns("", ("Q",), ("A",))

CHATML = (
    "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nA<end>\n"
    "<|im_start|>user\nR<|im_end|>\n<|im_start|>assistant\nB<end>"
)
USER_ASSISTANT = "<bos>S\n\nUser: Q\n\nAssistant:A<end>User: R\n\nAssistant:B<end>"

DOCUMENTED: dict[str, str] = {
    # THUDM/ChatGLM3, PROMPT.md: the role's token, its metadata (none) and a line feed, the text.
    "chatglm3": "[gMASK]sop<|system|>\nS<|user|>\nQ<|assistant|>\nA<|user|>\nR<|assistant|>\nB<end>",
    "chatglm3_system": "[gMASK]sop<|system|>\nS<|user|>\nQ<|assistant|>\nA<|user|>\nR<|assistant|>\nB<end>",
    # OpenAI's ChatML, each message closed by its end token, which is the template's end token here.
    "chatml_de": CHATML,
    # The chat template of Qwen2.5-Math is ChatML.
    "qwen_math_r1": CHATML,
    # The chat template of Mixtral-8x7B-Instruct-v0.1 without a system text, which goes into a question there.
    "mixtral": "<bos>S[INST] Q [/INST]A<end>[INST] R [/INST]B<end>",
    # PLM-Team/PLM-1.8B-Instruct: ChatML with the end token of messages in the text.
    "plm": CHATML.replace("<end>", "<|im_end|>") + "\n",
    # deepseek-ai/DeepSeek-V3.1, whose answers without thoughts begin with the closing mark; V4 writes the same.
    "deepseek4": ("<bos>S<｜User｜>Q<｜Assistant｜></think>A<end><｜User｜>R<｜Assistant｜></think>B<end>"),
}

OF_MINDSPEED_LLM: dict[str, str] = {
    # tatsu-lab/stanford_alpaca has one question, and no line feed behind "### Response:".
    "alpaca": "S### Instruction:\nQ\n\n### Response:\nA<end>\n\n### Instruction:\nR\n\n### Response:\nB<end>",
    # THUDM/chatglm2-6b counts rounds from 1.
    "chatglm2": "[gMASK]sopS[Round 0]\n\n问：Q\n\n答：A\n\n[Round 1]\n\n问：R\n\n答：B<end>",
    # deepseek-ai/DeepSeek-V2-Lite-Chat has a blank behind "Assistant:".
    "deepseek2-lite": USER_ASSISTANT,
    # openbmb/MiniCPM3-4B is ChatML.
    "minicpm3": USER_ASSISTANT,
    # zai-org/GLM-4.5 closes an empty thought at once, behind the line feed of the role.
    "glm4_moe": (
        "[gMASK]<sop><|system|>\nS<|user|>\nQ<|assistant|><think>\n\n</think>\n\n\nA"
        "<|user|>\nR<|assistant|><think>\n\n</think>\n\n\nB<end>"
    ),
    # OpenAI's harmony format leaves an empty analysis out, and ends the last message by <|return|>.
    "gpt_oss": (
        "<|start|>system<|message|>S<|end|><|start|>user<|message|>Q<|end|><|start|>assistant<|channel|>analysis"
        "<|message|><|end|><|start|>assistant<|channel|>final<|message|>A<|end|><|start|>user<|message|>R<|end|>"
        "<|start|>assistant<|channel|>analysis<|message|><|end|><|start|>assistant<|channel|>final<|message|>B<|end|>"
        "<end>"
    ),
    # Of no family: texts one after the other, or with people's names for the roles.
    "default": "S\nHuman: Q\nAssistant:A<end>\nHuman: R\nAssistant:B<end>",
    "empty": "SQARB",
    "trl": "<bos>SQARB",
    "hunyuan": "SQARB",
}

DEFAULT_SYSTEM: dict[str, str] = {
    "alpaca": "Below is an instruction that describes a task. Write a response that appropriately completes the "
    "request.\n\n### Instruction:\nQ\n\n### Response:\nA<end>",
    "chatglm3_system": "[gMASK]sop<|system|>\nYou are ChatGLM3, a large language model trained by Zhipu.AI. Follow the "
    "user's instructions carefully. Respond using markdown.<|user|>\nQ<|assistant|>\nA<end>",
    "chatglm3": "[gMASK]sop<|user|>\nQ<|assistant|>\nA<end>",
    "qwen_math_r1": "<|im_start|>system\nPlease reason step by step, and put your final answer within \\boxed{}."
    "<|im_end|>\n<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\nA<end>",
    "mixtral": "<bos>[INST] Q [/INST]A<end>",
}


def written(prompt_type: str, turns: Turns) -> str:
    special = {1: "<bos>", 2: "<end>"}
    parts = pieces(prompt_template(prompt_type), turns, SpecialTokens(bos=1, end=2))
    return "".join(special[part] if isinstance(part, int) else part for part, _ in parts)


@pytest.mark.parametrize(("prompt_type", "expected"), (DOCUMENTED | OF_MINDSPEED_LLM).items())
def test_as_it_is_written_out(prompt_type: str, expected: str) -> None:
    assert written(prompt_type, TURNS) == expected


@pytest.mark.parametrize(("prompt_type", "expected"), DEFAULT_SYSTEM.items())
def test_without_a_system_text(prompt_type: str, expected: str) -> None:
    assert written(prompt_type, SHORT) == expected


def test_reasoning_asked_for_in_each_question() -> None:
    """The words of the DeepSeek-R1 report (arXiv 2501.12948, table 1) within ChatML, before each question."""
    text = written("qwen_r1", TURNS)
    before = text.partition("<|im_start|>user\n")[2].partition("Q<|im_end|>")[0]
    assert before.startswith(
        "A conversation between User and Assistant. The user asks a question, and the Assistant"
    )
    assert "<think> reasoning process here </think><answer> answer here </answer>" in before
    assert text.replace(before, "") == CHATML


def test_every_template_is_checked_somewhere() -> None:
    here = {*DOCUMENTED, *OF_MINDSPEED_LLM, "qwen_r1"}
    assert not here & set(FAMILIES)
    assert here | set(FAMILIES) == set(prompt_templates())
