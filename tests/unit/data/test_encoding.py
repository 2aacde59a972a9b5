import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from mindspeed_lora.data.conversation import Call, Turns, UnusableRow, to_turns
from mindspeed_lora.data.encoding import TemplateEncoder, TokenRow, label, with_end
from mindspeed_lora.data.prompt_template import PROMPT
from mindspeed_lora.data.template_files import prompt_template

IDS = np.arange(10, 16, dtype=np.int32)
ANSWERS = np.array([PROMPT, PROMPT, 0, PROMPT, 1, 1], dtype=np.int32)


def message(role: str, content: str = "x", **others: object) -> dict[str, object]:
    return {"role": role, "content": content, **others}


@pytest.mark.parametrize(
    ("loss_on", "expected"),
    [
        ("assistant", [-100, -100, 12, -100, 14, 15]),
        ("last-assistant", [-100, -100, -100, -100, 14, 15]),
        ("all", [10, 11, 12, 13, 14, 15]),
    ],
)
def test_loss_on(loss_on: str, expected: list[int]) -> None:
    row = label(IDS, ANSWERS, loss_on)
    assert row.labels.tolist() == expected
    assert row.input_ids.dtype == row.labels.dtype == np.int32


def test_rows_and_reasons_come_in_order(tokenizers: dict[str, PreTrainedTokenizerFast]) -> None:
    tokenizer = tokenizers["gpt2"]
    encoder = TemplateEncoder(tokenizer, prompt_template("llama2"))
    good = [message("user", "Q"), message("assistant", "A")]
    rows = encoder.encode([good, [message("user")], good])
    assert isinstance(rows[1], UnusableRow)
    for row in (rows[0], rows[2]):
        assert isinstance(row, TokenRow)
        answer = tokenizer.encode("A", add_special_tokens=False) + [tokenizer.eos_token_id]
        prompt = [tokenizer.bos_token_id, *tokenizer.encode("[INST] Q [/INST]", add_special_tokens=False)]
        assert row.input_ids.tolist() == prompt + answer
        assert row.labels.tolist() == [-100] * len(prompt) + answer


def test_the_end_token_is_added_once() -> None:
    row = TokenRow(np.array([1, 2], dtype=np.int32), np.array([-100, 2], dtype=np.int32))
    ended = with_end(row, 9)
    assert (ended.input_ids.tolist(), ended.labels.tolist()) == ([1, 2, 9], [-100, 2, 9])
    assert with_end(ended, 9) is ended
    empty = TokenRow(np.array([], dtype=np.int32), np.array([], dtype=np.int32))
    assert with_end(empty, 9).input_ids.tolist() == [9]


def test_turns() -> None:
    turns = to_turns([message("system", "s"), message("user", "q"), message("assistant", "a")])
    assert (turns.system, turns.questions, turns.answers) == ("s", ("q",), ("a",))


@pytest.mark.parametrize(
    ("roles", "reason"),
    [
        (["user", "user", "assistant"], "do not alternate"),
        (["assistant", "user"], "do not alternate"),
        (["user", "assistant", "system", "assistant"], "do not alternate"),
        (["user", "assistant", "user"], "last message"),
        (["system"], "last message"),
        (["user", "tool"], "do not alternate"),
        (["user", "assistant", "user", "tool", "assistant"], "do not alternate"),
        (["user", "critic"], "role critic has no place"),
    ],
)
def test_conversations_that_no_prompt_template_has_slots_for(roles: list[str], reason: str) -> None:
    with pytest.raises(UnusableRow, match=reason):
        to_turns([message(role) for role in roles])


def call(name: str, arguments: object) -> dict[str, object]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def test_turns_with_tools() -> None:
    tools = [{"name": "f"}]
    turns = to_turns(
        [
            message("system", "", tools=tools),
            message("user", "q"),
            message("assistant", "let me see", tool_calls=[call("f", '{"a":1}'), call("g", {"b": "ä"})]),
            message("tool", "one"),
            message("tool", "two"),
            message("assistant", "a"),
        ]
    )
    assert turns == Turns(
        "",
        ("q", ""),
        ("let me see", "a"),
        tuple(tools),
        {1: ("one", "two")},
        {0: (Call("f", '{"a": 1}'), Call("g", '{"b": "ä"}'))},
    )


@pytest.mark.parametrize("loss_on", ["assistant", "last-assistant", "all"])
def test_the_end_of_an_answer_is_learnt_without_an_end_token_behind_it(
    family_tokenizers: dict[str, PreTrainedTokenizerFast], loss_on: str
) -> None:
    """``efficient_eos``: the label of what follows an answer is the end token, and the row ends with one."""
    tokenizer = family_tokenizers["gpt2"]
    encoder = TemplateEncoder(tokenizer, prompt_template("glm4"), loss_on)
    turns = [message("user", "q"), message("assistant", "a"), message("user", "r"), message("assistant", "b")]
    (row,) = encoder.encode([turns])
    assert isinstance(row, TokenRow)
    end = tokenizer.eos_token_id
    text = "[gMASK]<sop><|user|>\nq<|assistant|>", "\na", "<|user|>\nr<|assistant|>", "\nb"
    first, answer, second, last = (tokenizer.encode(part) for part in text)
    assert row.input_ids.tolist() == [*first, *answer, *second, *last, end]
    quiet = [-100] * len(second)
    expected = {
        "assistant": [*([-100] * len(first)), *answer, end, *quiet[1:], *last, end],
        "last-assistant": [*([-100] * len(first + answer)), *quiet, *last, end],
        "all": row.input_ids.tolist(),
    }
    assert row.labels.tolist() == expected[loss_on]
