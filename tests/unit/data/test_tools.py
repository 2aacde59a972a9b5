"""Tools and tool calls by prompt templates, and by the chat template that goes with the model."""

import json

import pytest
from transformers import PreTrainedTokenizerFast

from mindspeed_lora.data.chat_template import chat_template, render
from mindspeed_lora.data.conversation import Call, Turns, split_tools, to_turns
from mindspeed_lora.data.encoding import TemplateEncoder, TokenRow
from mindspeed_lora.data.handlers import SHAREGPT, TextHandler, make_handler
from mindspeed_lora.data.prompt_template import PROMPT, SpecialTokens, pieces
from mindspeed_lora.data.readers import Row
from mindspeed_lora.data.template_files import prompt_template, prompt_templates
from mindspeed_lora.data.tools import tool_formats

WEATHER = {
    "name": "weather",
    "description": "Tells the weather {name} of a place.",
    "parameters": {
        "type": "object",
        "properties": {
            "place": {"type": "string", "description": "Where"},
            "days": {"type": "array", "items": {"type": "integer"}},
            "unit": {"type": "string", "enum": ["C", "F"], "description": "Ä"},
        },
        "required": ["place"],
    },
}
BARE = {"name": "now", "parameters": {}}
TOOLS = (WEATHER, BARE)
WRAPPED = tuple({"type": "function", "function": tool} for tool in TOOLS)
CALLS = (Call("weather", '{"place": "Köln", "days": [1, 2]}'), Call("now", "{}"))
TURNS = Turns(
    "Be brief.",
    ("How warm is it?", "", "Thanks"),
    ("", "It is warm.", "Bye"),
    TOOLS,
    {1: ("21 C", "noon")},
    {0: CALLS},
)


def text_of(prompt_type: str, turns: Turns) -> list[str]:
    """What is trained and what is not, in turn."""
    runs: list[tuple[int, str]] = []
    for content, answer in pieces(prompt_template(prompt_type), turns, SpecialTokens(None, None)):
        owner = min(answer, 0) if answer == PROMPT else answer
        if runs and runs[-1][0] == owner:
            runs[-1] = owner, runs[-1][1] + str(content)
        else:
            runs.append((owner, str(content)))
    return [text for _, text in runs]


def test_qwen3_writes_tools_as_its_own_template_does() -> None:
    lines = "".join("\n" + json.dumps(tool, ensure_ascii=False) for tool in WRAPPED)
    system = (
        "<|im_start|>system\nBe brief.\n\n# Tools\n\nYou may call one or more functions to assist with the user query."
        f"\n\nYou are provided with function signatures within <tools></tools> XML tags:\n<tools>{lines}\n</tools>\n\n"
        "For each function call, return a json object with function name and arguments within "
        "<tool_call></tool_call> XML tags:\n<tool_call>\n"
        '{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call><|im_end|>\n'
    )
    ask = "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert text_of("qwen3", TURNS) == [
        system + "<|im_start|>user\nHow warm is it?<|im_end|>\n" + ask,
        '<tool_call>\n{"name": "weather", "arguments": {"place": "Köln", "days": [1, 2]}}\n</tool_call>\n'
        '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call><|im_end|>\n',
        "<|im_start|>user\n<tool_response>\n21 C\n</tool_response>\n<tool_response>\nnoon\n</tool_response><|im_end|>\n"
        + ask,
        "It is warm.<|im_end|>\n",
        "<|im_start|>user\nThanks<|im_end|>\n" + ask,
        "Bye<|im_end|>\n",
    ]


@pytest.mark.parametrize("behind", ["", "\n\n"])
def test_a_call_behind_thoughts_keeps_the_distance_that_the_row_has(behind: str) -> None:
    call = tool_formats()["qwen"].write_calls(CALLS[1:])
    handler = make_handler(SHAREGPT)
    said = [
        {"from": "human", "value": "Q"},
        {
            "from": "function_call",
            "value": f'<think>\nhm\n</think>{behind}{{"name": "now", "arguments": {{}}}}',
        },
    ]
    assert not isinstance(handler, TextHandler)
    turns = to_turns(handler.messages(Row("row", {"conversations": said}, 0)))
    _, answer = text_of("qwen3", turns)
    assert answer == f"<think>\nhm\n</think>{behind}{call}<|im_end|>\n"
    _, answer = text_of("qwen3", Turns("", ("Q",), ("Let me see.\n",), calls={0: CALLS[1:]}))
    assert answer == f"Let me see.\n\n{call}<|im_end|>\n"


def test_the_default_format() -> None:
    (system, *_) = text_of("default", TURNS)
    assert system.startswith(
        "Be brief.You have access to the following tools:\n> Tool Name: weather\n"
        "Tool Description: Tells the weather {name} of a place.\nTool Args:\n  - place (string, required): Where\n"
        "  - days (array): , where each item should be integer\n  - unit (string): Ä, should be one of [C, F]\n\n"
        "> Tool Name: now\nTool Description: \nTool Args:\n\nUse the following format if using a tool:\n"
    )
    assert "(one of [weather, now])" in system
    assert text_of("default", TURNS)[1] == (
        'Action: weather\nAction Input: {"place": "Köln", "days": [1, 2]}\nAction: now\nAction Input: {}'
    )
    assert tool_formats()["default"].describe(WRAPPED) == tool_formats()["default"].describe(TOOLS)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize(
    "prompt_type", ["qwen3", "qwen", "llama3", "glm4", "bailing_mini", "chatglm3", "default"]
)
def test_the_chat_template_renders_the_same_tokens(
    family_tokenizers: dict[str, PreTrainedTokenizerFast], prompt_type: str, wrapped: bool
) -> None:
    kind = "gpt2" if prompt_type not in ("llama3", "qwen3") else "llama3"
    tokenizer = family_tokenizers[kind]
    encoder = TemplateEncoder(tokenizer, prompt_template(prompt_type))
    turns = Turns(
        TURNS.system,
        TURNS.questions,
        TURNS.answers,
        WRAPPED if wrapped else TOOLS,
        TURNS.results,
        TURNS.calls,
    )
    (row,) = encoder.encode([conversation(turns)])
    assert isinstance(row, TokenRow)
    rendered = render(tokenizer, chat_template(prompt_type, tokenizer), turns)
    assert tokenizer.decode(rendered) == tokenizer.decode(row.input_ids)
    assert rendered == row.input_ids.tolist()
    if prompt_type == "qwen3":
        # Loss on the calls, and none on what the tools gave.
        trained = tokenizer.decode(row.labels[row.labels != -100])
        assert "Köln" in trained and "noon" not in trained


def conversation(turns: Turns) -> list[dict]:
    from mindspeed_lora.data.chat_template import to_messages

    first, *rest = to_messages(turns)
    messages = [{**first, "tools": list(turns.tools)}, *rest]
    assert split_tools(messages) == ([first, *rest], turns.tools)
    return messages


def test_every_tool_format_is_known() -> None:
    for template in prompt_templates().values():
        assert template.tools.describe(TOOLS)
        assert "weather" in template.call_text.replace("{name}", "weather").replace(
            "{quoted_name}", "weather"
        )
