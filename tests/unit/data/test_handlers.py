import json
from typing import Any

import pytest

from mindspeed_lora.data.conversation import UnusableRow
from mindspeed_lora.data.handlers import (
    ALPACA,
    ALPACA_PAIRS,
    ALPACA_PRETRAIN,
    OPENAI,
    PRETRAIN,
    SHAREGPT,
    SHAREGPT_PAIRS,
    InstructionHandler,
    PairHandler,
    TextHandler,
    guess_handler,
    make_handler,
)
from mindspeed_lora.data.readers import Row
from mindspeed_lora.errors import Refused


def messages(
    name: str, values: dict[str, Any], map_keys: dict[str, Any] | None = None
) -> list[tuple[str, str]]:
    handler = make_handler(name, None if map_keys is None else json.dumps(map_keys))
    assert not isinstance(handler, TextHandler)
    found = handler.messages(row(values))
    return [(message["role"], message["content"]) for message in found]


def row(values: dict[str, Any]) -> Row:
    return Row("data.json, row 7", values, 0.5)


def texts(name: str, values: dict[str, Any], **options: Any) -> tuple[str, ...]:
    handler = make_handler(name, **options)
    assert isinstance(handler, TextHandler)
    return handler.texts(row(values))


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"instruction": "I", "input": "J", "output": "O"}, [("user", "I\nJ"), ("assistant", "O")]),
        ({"instruction": "I", "input": "", "output": "O"}, [("user", "I"), ("assistant", "O")]),
        ({"instruction": "I", "input": None, "output": ""}, [("user", "I"), ("assistant", "")]),
        ({"instruction": "", "input": "J", "output": "O"}, [("user", "J"), ("assistant", "O")]),
        ({"instruction": None, "input": "J", "output": "O"}, [("user", "J"), ("assistant", "O")]),
        (
            {"instruction": "I", "input": float("nan"), "output": "O"},
            [("user", "I"), ("assistant", "O")],
        ),
        (
            {"instruction": "I", "output": "O", "system": "S", "history": [["a", "b"], ["c", "d"]]},
            [
                ("system", "S"),
                ("user", "a"),
                ("assistant", "b"),
                ("user", "c"),
                ("assistant", "d"),
                ("user", "I"),
                ("assistant", "O"),
            ],
        ),
        (
            {"instruction": "I", "output": "O", "history": '[["a", "b"]]', "system": None, "more": 3},
            [("user", "a"), ("assistant", "b"), ("user", "I"), ("assistant", "O")],
        ),
    ],
)
def test_alpaca(values: dict[str, Any], expected: list[tuple[str, str]]) -> None:
    assert messages(ALPACA, values) == expected


def test_alpaca_by_other_names() -> None:
    keys = {"prompt": "q", "query": "more", "response": "a", "system": "s", "history": "h"}
    values = {"q": "Q", "more": "M", "a": "A", "s": "S", "h": [["x", "y"]], "instruction": "other"}
    expected = [("system", "S"), ("user", "x"), ("assistant", "y"), ("user", "Q\nM"), ("assistant", "A")]
    assert messages(ALPACA, values, keys) == expected


def test_an_alpaca_row_whose_query_says_everything() -> None:
    values = {"input": "J", "output": "O", "instruction": "not read"}
    assert messages(ALPACA, values, {"prompt": None}) == [("user", "J"), ("assistant", "O")]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"instruction": None, "output": "O"}, "instruction is null; expected text"),
        ({"input": "J", "output": "O"}, "instruction is missing; found input, output"),
        ({"instruction": "I"}, "output is missing; found instruction"),
        ({"instruction": 3, "output": "O"}, "instruction is the number 3; expected text"),
        ({"instruction": "I", "output": None}, "output is null; expected text"),
        ({"instruction": "I", "input": ["J"], "output": "O"}, r'input is a list \["J"\]; expected text'),
        ({"instruction": "I", "output": "O", "history": "no"}, "history is text .*expected a list"),
        ({"instruction": "I", "output": "O", "history": {}}, "history is an object .*list of pairs"),
        ({"instruction": "I", "output": "O", "history": [["a"]]}, "history holds a list .*pairs of texts"),
        ({"instruction": "I", "output": "O", "history": [["a", 1]]}, "history holds a list"),
        ({"instruction": "I", "output": "x" * 99, "system": True}, "system is true; expected text"),
    ],
)
def test_malformed_alpaca_rows(values: dict[str, Any], message: str) -> None:
    with pytest.raises(Refused, match=f"^data.json, row 7: {message}"):
        messages(ALPACA, values)


def test_an_alpaca_row_without_any_text() -> None:
    with pytest.raises(UnusableRow, match="empty"):
        messages(ALPACA, {"instruction": "", "output": ""})


CHAT = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"messages": CHAT}, [("user", "Q"), ("assistant", "A")]),
        ({"messages": json.dumps(CHAT)}, [("user", "Q"), ("assistant", "A")]),
        ({"messages": CHAT, "system": "S"}, [("system", "S"), ("user", "Q"), ("assistant", "A")]),
        (
            {"messages": [{"role": "developer", "content": "D"}, *CHAT], "system": "S"},
            [("system", "D"), *[("user", "Q"), ("assistant", "A")]],
        ),
        (
            {
                "messages": [
                    {
                        "role": "user",
                        "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}],
                    }
                ]
            },
            [("user", "ab")],
        ),
        (
            {
                "messages": [
                    {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}
                ]
            },
            [("assistant", "")],
        ),
        ({"messages": [{"role": "function", "content": "r"}]}, [("tool", "r")]),
    ],
)
def test_openai(values: dict[str, Any], expected: list[tuple[str, str]]) -> None:
    assert messages(OPENAI, values) == expected


def test_parts_of_a_message() -> None:
    call = '{"name": "f", "arguments": {"a": 1}}'
    values = {
        "messages": [
            {"role": "user", "content": [{"type": "text", "value": "Q"}], "loss_weight": 0.0},
            {
                "role": "assistant",
                "content": [
                    {"type": "reasoning", "value": "hm"},
                    {"type": "text", "value": "A"},
                    {"type": "tool_call", "value": call},
                ],
                "loss_weight": 0.5,
            },
        ]
    }
    handler = make_handler(OPENAI)
    assert not isinstance(handler, TextHandler)
    user, assistant = handler.messages(row(values))
    assert (user["content"], user["weight"]) == ("Q", 0.0)
    assert (assistant["content"], assistant["reasoning_content"], assistant["weight"]) == ("A", "hm", 0.5)
    assert [one["function"] for one in assistant["tool_calls"]] == [json.loads(call)]


@pytest.mark.parametrize("name", [OPENAI, SHAREGPT, ALPACA])
@pytest.mark.parametrize("column", ["images", "videos", "audios"])
def test_rows_with_pictures_films_and_sound_are_refused(name: str, column: str) -> None:
    said = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]
    values = {"messages": CHAT, "conversations": said, "instruction": "I", "output": "O"}
    assert len(messages(name, {**values, column: []})) == 2
    with pytest.raises(Refused, match=rf'row 7: {column} is a list \["1.jpg"\]; only text is trained here'):
        messages(name, {**values, column: ["1.jpg"]})


@pytest.mark.parametrize("column", ["kto_tag", "label"])
def test_rows_for_kto_are_not_taken_for_others(column: str) -> None:
    with pytest.raises(Refused, match=f"row 7: {column} is true or false, as in rows for KTO training"):
        guess_handler(row({"messages": CHAT, column: False}))
    assert guess_handler(row({"messages": CHAT, "label": "news"})) == OPENAI


def test_openai_by_another_name() -> None:
    assert messages(OPENAI, {"chat": CHAT}, {"messages": "chat"}) == [("user", "Q"), ("assistant", "A")]


def test_null_keys_of_messages_are_left_out() -> None:
    handler = make_handler(OPENAI)
    assert not isinstance(handler, TextHandler)
    (message,) = handler.messages(
        row({"messages": [{"role": "user", "content": "Q", "tool_calls": None, "name": "n"}]})
    )
    assert message == {"role": "user", "content": "Q", "name": "n"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"message": CHAT}, "messages is missing; found message"),
        ({"messages": None}, "messages is null; expected a list of messages"),
        ({"messages": {"role": "user"}}, "messages is an object"),
        ({"messages": ["hi"]}, "message 1: expected an object with role and content, found text"),
        ({"messages": [*CHAT, {"content": "x"}]}, "message 3: expected an object with role and content"),
        (
            {"messages": [{"role": "usr", "content": "x"}]},
            'message 1: role is text "usr"; expected system, user',
        ),
        ({"messages": [{"role": "user"}]}, "message 1: expected text as content, found no content"),
        ({"messages": [{"role": "user", "content": 5}]}, "message 1: .*found the number 5"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "value": "x"}]}]},
            'message 1: expected text as content, found an object .*"image_url".* in a list; parts of the types',
        ),
        ({"messages": [{"role": "user", "content": [{"image": "x"}]}]}, "message 1: .*found an object"),
        ({"messages": [{"role": "user", "content": ["x"]}]}, 'message 1: .*found text "x" in a list'),
        (
            {"messages": [{"role": "assistant", "content": [{"type": "tool_call", "value": "f("}]}]},
            'message 1: a tool_call is text "f\\("; expected JSON',
        ),
        (
            {"messages": [{"role": "assistant", "content": "A", "reasoning_content": 1}]},
            "message 1: reasoning_content is the number 1",
        ),
        (
            {"messages": [{"role": "user", "content": "a\ud800"}]},
            "message 1: content: half of a surrogate pair",
        ),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "message 1: tool_calls holds an object"),
        ({"messages": [{"role": "function_call", "content": "f("}]}, "message 1: a function call is text"),
        ({"messages": CHAT, "tools": "[1]"}, "tools holds the number 1; expected a function with a name"),
        (
            {"messages": CHAT, "tools": [{"name": "f", "parameters": []}]},
            "tools: the parameters of f are a list",
        ),
    ],
)
def test_malformed_openai_rows(values: dict[str, Any], message: str) -> None:
    with pytest.raises(Refused, match=f"^data.json, row 7(, |: ){message}"):
        messages(OPENAI, values)


def test_plain_text() -> None:
    assert texts(PRETRAIN, {"text": "hello"}) == ("hello",)
    assert texts(PRETRAIN, {"content": "hello"}, map_keys='{"text": "content"}') == ("hello",)
    assert texts(PRETRAIN, {"a": "x", "b": "y"}, json_keys=("a", "b")) == ("x", "y")
    with pytest.raises(Refused, match="row 7: text is missing; found content"):
        texts(PRETRAIN, {"content": "hello"})


def test_alpaca_rows_as_plain_text() -> None:
    (text,) = texts(
        ALPACA_PRETRAIN,
        {"instruction": "I", "input": "J", "output": "O", "system": "S\n", "history": [["a", "b"]]},
    )
    assert text == (
        "S\n### Instruction:\na\n\n### Response:\nb\n\n### Instruction:\nI\nJ\n\n### Response:\nO"
    )


SAID = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"conversations": SAID}, [("user", "Q"), ("assistant", "A")]),
        (
            {"conversations": json.dumps(SAID), "system": "S"},
            [("system", "S"), ("user", "Q"), ("assistant", "A")],
        ),
        (
            {"conversations": [{"from": "system", "value": "T"}, *SAID], "system": "S", "id": 3},
            [("system", "T"), ("user", "Q"), ("assistant", "A")],
        ),
        (
            {
                "conversations": [
                    {"from": "human", "value": "Q"},
                    {
                        "from": "function_call",
                        "value": '<think>hm</think>{"name": "f", "arguments": {"a": 1}}',
                    },
                    {"from": "observation", "value": "r"},
                    {"from": "gpt", "value": "A"},
                ]
            },
            [("user", "Q"), ("assistant", "<think>hm</think>"), ("tool", "r"), ("assistant", "A")],
        ),
    ],
)
def test_sharegpt(values: dict[str, Any], expected: list[tuple[str, str]]) -> None:
    assert messages(SHAREGPT, values) == expected


def test_sharegpt_calls_and_tools() -> None:
    handler = make_handler(SHAREGPT)
    calls = '[{"name": "f", "arguments": {"a": 1}}, {"name": "g", "arguments": "{}"}]'
    said = [{"from": "human", "value": "Q", "weight": 0.5}, {"from": "function_call", "value": calls}]
    found = handler.messages(row({"conversations": said, "tools": '[{"name": "f"}, {"name": "g"}]'}))
    assert found[0] == {"role": "system", "content": "", "tools": [{"name": "f"}, {"name": "g"}]}
    assert found[1] == {"role": "user", "content": "Q", "weight": 0.5}
    assert [call["function"]["name"] for call in found[2]["tool_calls"]] == ["f", "g"]


def test_sharegpt_by_other_names_keeps_the_tags_that_are_not_named() -> None:
    keys = {
        "messages": "m",
        "system": "s",
        "tags": {"role_tag": "who", "content_tag": "what", "user_tag": "me"},
    }
    said = [{"who": "me", "what": "Q"}, {"who": "gpt", "what": "A"}]
    expected = [("system", "S"), ("user", "Q"), ("assistant", "A")]
    assert messages(SHAREGPT, {"m": said, "s": "S", "system": "not this"}, keys) == expected


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"messages": SAID}, "conversations is missing; found messages"),
        ({"conversations": 3}, "conversations is the number 3; expected a list of messages"),
        ({"conversations": [{"from": "human"}]}, "message 1: expected an object with from and value"),
        (
            {"conversations": [{"from": "you", "value": "Q"}]},
            'message 1: from is text "you"; expected human, gpt',
        ),
        ({"conversations": [{"from": ["human"], "value": "Q"}]}, "message 1: from is a list"),
        ({"conversations": [{"from": "human", "value": None}]}, "message 1: value is null; expected text"),
        (
            {"conversations": [{"from": "function_call", "value": "{}"}]},
            "message 1: tool_calls holds an object",
        ),
    ],
)
def test_malformed_sharegpt_rows(values: dict[str, Any], message: str) -> None:
    with pytest.raises(Refused, match=f"^data.json, row 7(, |: ){message}"):
        messages(SHAREGPT, values)


def test_conversations_without_messages_are_dropped() -> None:
    with pytest.raises(UnusableRow, match="no messages"):
        messages(SHAREGPT, {"conversations": []})


def pair(
    name: str, values: dict[str, Any], map_keys: dict[str, Any] | None = None
) -> list[list[tuple[str, str]]]:
    handler = make_handler(name, map_keys)
    assert isinstance(handler, PairHandler) and not isinstance(handler, TextHandler)
    return [[(one["role"], one["content"]) for one in side] for side in handler.pair(row(values))]


def test_pairs() -> None:
    expected = [[("user", "I\nJ"), ("assistant", "good")], [("user", "I\nJ"), ("assistant", "bad")]]
    given = {"instruction": "I", "input": "J"}
    assert pair(ALPACA_PAIRS, {**given, "chosen": "good", "rejected": "bad"}) == expected
    # Lists: of each its first text; where one column has both, the first and the second.
    assert pair(ALPACA_PAIRS, {**given, "chosen": ["good", "x"], "rejected": ["bad", "y"]}) == expected
    keys = {"chosen": "output", "rejected": "output"}
    assert pair(ALPACA_PAIRS, {**given, "output": ["good", "bad"]}, keys) == expected
    said = [{"from": "human", "value": "I\nJ"}]
    good, bad = {"from": "gpt", "value": "good"}, {"from": "gpt", "value": "bad"}
    assert pair(SHAREGPT_PAIRS, {"conversations": said, "chosen": good, "rejected": bad}) == expected
    assert pair(SHAREGPT_PAIRS, {"conversations": said, "chosen": "good", "rejected": "bad"}) == expected


@pytest.mark.parametrize(
    ("name", "values", "message"),
    [
        (ALPACA_PAIRS, {"instruction": "I", "chosen": "a"}, "rejected is missing"),
        (ALPACA_PAIRS, {"instruction": "I", "chosen": [], "rejected": "b"}, "chosen has 0 texts"),
        (
            ALPACA_PAIRS,
            {"instruction": "I", "chosen": 3, "rejected": "b"},
            "chosen is the number 3; expected text",
        ),
        (
            SHAREGPT_PAIRS,
            {"conversations": SAID[:1], "chosen": {"from": "human", "value": "x"}, "rejected": "b"},
            "chosen is a message of user; expected the assistant's",
        ),
    ],
)
def test_malformed_pairs(name: str, values: dict[str, Any], message: str) -> None:
    with pytest.raises(Refused, match=f"row 7: {message}"):
        pair(name, values)


def test_published_sets() -> None:
    belle = {"instruction": "Human: a\nAssistant: b\nHuman: c\nAssistant:", "input": "", "output": " d"}
    expected = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    assert messages("BelleMultiTurnInstructionHandler", belle) == expected
    turn = {"Human": "<|Human|>: a<eoh>\n", "MOSS": "<|MOSS|>: b<eom>\n", "Inner Thoughts": "no"}
    moss = {"chat": {"turn_1": turn, "turn_2": None}}
    assert messages("MOSSMultiTurnHandler", moss) == [("user", "a"), ("assistant", "b")]
    leetcode = {"code_with_problem": "Add.\n```python\nx```", "code_only": "x", "explanation_only": "y"}
    assert messages("LeetcodePythonInstructionHandler", leetcode) == [("user", "Add."), ("assistant", "x\ny")]
    general = {"instruction": "I", "input": "J", "output": "O"}
    assert messages("GeneralInstructionHandler", general) == [("user", "I\nJ"), ("assistant", "O")]
    question = {"title": "T", "question_body": "Q", "answer_body": "A"}
    assert texts("StackOverflowPythonPretrainHandler", question) == (
        "In python, T\n### Question:\nQ\n### Response:\nA\n",
    )
    (text,) = texts("SharegptPretrainHandler", {"conversations": SAID, "system": "S\n"})
    assert text == "S\n### Instruction:\nQ\n\n### Response:\nA"


@pytest.mark.parametrize("name", ["PPOAlpacaStyleInstructionHandler", "AlpacaStyleProcessRewardHandler"])
def test_handlers_for_what_is_not_trained_here(name: str) -> None:
    with pytest.raises(Refused, match=f"--handler-name {name}: .* not prepared here"):
        make_handler(name)


def test_unset_columns_are_not_read() -> None:
    values = {"instruction": "I", "input": "J", "output": "O", "system": "S"}
    assert messages(ALPACA, values, {"query": None, "system": ""}) == [("user", "I"), ("assistant", "O")]


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"messages": CHAT}, OPENAI),
        ({"messages": SAID}, SHAREGPT),
        ({"conversations": SAID, "id": 1}, SHAREGPT),
        ({"conversations": SAID, "chosen": {}, "rejected": {}}, SHAREGPT_PAIRS),
        ({"instruction": "I", "chosen": "a", "rejected": "b"}, ALPACA_PAIRS),
        ({"instruction": "I", "output": "O"}, ALPACA),
        ({"text": "x"}, PRETRAIN),
    ],
)
def test_the_handler_is_found_by_the_columns(values: dict[str, Any], name: str) -> None:
    assert guess_handler(row(values)) == name


def test_the_handler_is_found_by_mapped_columns() -> None:
    assert guess_handler(row({"q": "", "a": ""}), '{"prompt": "q", "response": "a"}') == ALPACA
    with pytest.raises(Refused, match="cannot tell what the columns q, a mean; give --handler-name"):
        guess_handler(row({"q": "", "a": ""}))
    with pytest.raises(Refused, match="; GeneralPretrainHandler reads the plain text in text$"):
        guess_handler(row({"text": "x", "url": ""}))


@pytest.mark.parametrize(
    ("map_keys", "message"),
    [
        (
            '{"promt": "q"}',
            "--map-keys: unknown key promt; expected some of prompt, query, response, history, system",
        ),
        ('{"prompt": 1}', "--map-keys: prompt is the number 1"),
        ("[1]", "expected an object"),
        ('{"tags": {"role": "x"}}', "unknown key tags"),
        ("{", "not valid JSON"),
    ],
)
def test_wrong_maps(map_keys: str, message: str) -> None:
    with pytest.raises(Refused, match=message):
        make_handler(ALPACA, map_keys)


@pytest.mark.parametrize(
    ("map_keys", "message"),
    [
        ({"tags": {"role": "x"}}, "unknown tag role; expected some of role_tag, content_tag"),
        ({"tags": {"role_tag": None}}, "tag role_tag is null"),
        ({"tags": 3}, "tags is the number 3"),
        ({"kto_tag": "x"}, "kto_tag is for KTO training"),
        (
            {"prompt": "x"},
            "unknown key prompt; expected some of messages, system, tools, chosen, rejected, tags",
        ),
    ],
)
def test_wrong_tags(map_keys: dict[str, Any], message: str) -> None:
    with pytest.raises(Refused, match=f"--map-keys: {message}"):
        make_handler(SHAREGPT, map_keys)


def test_an_unknown_handler_lists_the_known() -> None:
    with pytest.raises(Refused, match="--handler-name AlpacaHandler: unknown; expected one of AlpacaStyle"):
        make_handler("AlpacaHandler")
    with pytest.raises(Refused, match=r"; did you mean OpenAIInstructionHandler or .*\?$"):
        make_handler("OpenAiInstructionHandler")


def test_instruction_handlers_are_no_text_handlers() -> None:
    handler: InstructionHandler | TextHandler = make_handler(ALPACA)
    assert not isinstance(handler, TextHandler)
    assert isinstance(make_handler(PRETRAIN), TextHandler)
