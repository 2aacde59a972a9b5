from dataclasses import replace

import pytest
from transformers import PreTrainedTokenizerFast

from mindspeed_lora.data.conversation import Turns, to_turns
from mindspeed_lora.data.prompt_template import (
    PROMPT,
    SpecialTokens,
    missing_end_token,
    pieces,
    special_tokens,
)
from mindspeed_lora.data.template_files import prompt_template, prompt_templates
from mindspeed_lora.errors import Refused

BOS, END = 1, 2
ONE = Turns("", ("Q",), ("A",))
TWO = Turns("S", ("Q", "R"), ("A", "B"))
HELPFUL = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
ASK = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
TASK = (
    "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n"
)
HEADER = "<|start_header_id|>{}<|end_header_id|>\n\n"


@pytest.mark.parametrize(
    ("prompt_type", "turns", "expected"),
    [
        ("llama2", ONE, [(BOS, PROMPT), ("[INST] Q [/INST]", PROMPT), ("A", 0), (END, 0)]),
        (
            "llama2",
            TWO,
            [
                (BOS, PROMPT),
                ("[INST] <<SYS>>\nS\n<</SYS>>\n\nQ [/INST]", PROMPT),
                ("A", 0),
                (END, 0),
                (BOS, PROMPT),
                ("[INST] R [/INST]", PROMPT),
                ("B", 1),
                (END, 1),
            ],
        ),
        ("qwen", ONE, [(HELPFUL, PROMPT), (ASK.format("Q"), PROMPT), ("A", 0), (END, 0)]),
        (
            "chatml",
            TWO,
            [
                ("<|im_start|>system\nS<|im_end|>\n", PROMPT),
                (ASK.format("Q"), PROMPT),
                ("A", 0),
                (END, 0),
                ("\n", PROMPT),
                (ASK.format("R"), PROMPT),
                ("B", 1),
                (END, 1),
            ],
        ),
        (
            "alpaca",
            ONE,
            [
                (TASK, PROMPT),
                ("### Instruction:\nQ\n\n### Response:\n", PROMPT),
                ("A", 0),
                (END, 0),
            ],
        ),
        ("default", ONE, [("Human: Q\nAssistant:", PROMPT), ("A", 0), (END, 0)]),
        ("empty", TWO, [("S", PROMPT), ("Q", PROMPT), ("A", 0), ("R", PROMPT), ("B", 1)]),
        ("mistral", ONE, [(BOS, PROMPT), ("[INST] Q [/INST]", PROMPT), ("A", 0), (END, 0)]),
        (
            "llama3",
            ONE,
            [
                (BOS, PROMPT),
                (HEADER.format("user") + "Q<|eot_id|>" + HEADER.format("assistant"), PROMPT),
                ("A", 0),
                (END, 0),
            ],
        ),
        (
            "qwen3",
            Turns("", ("Q", "R"), ("A", "<think>\nhm\n</think>\n\nB")),
            [
                (ASK.format("Q"), PROMPT),
                ("<think>\n\n</think>\n\n", PROMPT),
                ("A<|im_end|>\n", 0),
                (ASK.format("R"), PROMPT),
                ("<think>\nhm\n</think>\n\nB<|im_end|>\n", 1),
            ],
        ),
    ],
)
def test_pieces(prompt_type: str, turns: Turns, expected: list[tuple[str | int, int]]) -> None:
    assert list(pieces(prompt_template(prompt_type), turns, SpecialTokens(BOS, END))) == expected


def test_a_trained_empty_thought_stands_where_the_untrained_does() -> None:
    found = {
        thinking: list(
            pieces(replace(prompt_template("glm4_moe"), thinking=thinking), ONE, SpecialTokens(BOS, END))
        )
        for thinking in (None, True)
    }
    assert [piece for piece, _ in found[True]] == [piece for piece, _ in found[None]]
    assert [answer for _, answer in found[True]] == [PROMPT, PROMPT, 0, 0, 0]
    assert [answer for _, answer in found[None]] == [PROMPT, PROMPT, PROMPT, 0, 0]


@pytest.mark.parametrize(
    ("prompt_type", "expected"),
    [
        ("qwen3", "<think>\nhm\n</think>\n\nA"),
        ("qwen", "<think>\nhm\n</think>\n\nA"),
        ("deepseek4", "<think>hm</think>A"),
        ("gpt_oss", "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>A"),
    ],
)
def test_thoughts_that_a_message_tells_apart_get_the_frame_of_the_template(
    prompt_type: str, expected: str
) -> None:
    said = {"role": "assistant", "content": "A", "reasoning_content": "hm"}
    frame = prompt_template(prompt_type).thought_frame
    assert to_turns([{"role": "user", "content": "Q"}, said], frame).answers == (expected,)
    both = {**said, "content": expected}
    assert to_turns([{"role": "user", "content": "Q"}, both], frame).answers == (expected,)
    mentions = {**said, "content": "</think> ends them"}
    (answer,) = to_turns([{"role": "user", "content": "Q"}, mentions], frame).answers
    assert answer == expected.removesuffix("A") + "</think> ends them"


def test_a_message_that_looks_like_a_slot_stays_text() -> None:
    turns = Turns("", ("{content}",), ("{end}",))
    found = list(pieces(prompt_template("empty"), turns, SpecialTokens(BOS, END)))
    assert found == [("{content}", PROMPT), ("{end}", 0)]


def test_without_special_tokens_nothing_stands_in_their_place() -> None:
    found = list(pieces(prompt_template("llama2"), ONE, SpecialTokens(None, None)))
    assert found == [("[INST] Q [/INST]", PROMPT), ("A", 0)]


def test_the_end_token_is_the_templates_own(tokenizers: dict[str, PreTrainedTokenizerFast]) -> None:
    tokenizer = tokenizers["gpt2"]
    vocabulary = tokenizer.get_vocab()
    assert special_tokens(prompt_template("qwen"), tokenizer).end == vocabulary["<|im_end|>"]
    assert special_tokens(prompt_template("llama3"), tokenizer).end == vocabulary["<|eot_id|>"]
    assert special_tokens(prompt_template("llama2"), tokenizer).end == vocabulary["</s>"]
    assert missing_end_token(prompt_template("qwen"), tokenizer) is None


def test_every_template_trains_each_answer_and_nothing_else() -> None:
    for template in prompt_templates().values():
        for content, answer in pieces(
            template, Turns("sys", ("q1", "q2"), ("a1", "a2")), SpecialTokens(BOS, END)
        ):
            if isinstance(content, str):
                assert ("a1" in content or "a2" in content) == (answer != PROMPT) or content == "\n"


def test_an_unknown_prompt_type_lists_the_known() -> None:
    with pytest.raises(
        Refused, match="--prompt-type lama2: unknown; expected one of alpaca, .*chatml, .*qwen"
    ):
        prompt_template("lama2")
