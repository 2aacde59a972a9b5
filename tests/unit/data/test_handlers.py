import json
from typing import Any

import pytest

from mindspeed_lora.data.conversation import UnusableRow
from mindspeed_lora.data.handlers import (
    ALPACA,
    ALPACA_PRETRAIN,
    OPENAI,
    PRETRAIN,
    InstructionHandler,
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


@pytest.mark.parametrize(
    ("values", "message"),
    [
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
        ({"messages": [{"role": "assistant", "content": None, "tool_calls": [{}]}]}, [("assistant", "")]),
    ],
)
def test_openai(values: dict[str, Any], expected: list[tuple[str, str]]) -> None:
    assert messages(OPENAI, values) == expected


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
        ({"messages": [{"role": "user", "content": [{"image": "x"}]}]}, "message 1: .*found a list"),
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


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"messages": CHAT}, OPENAI),
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


@pytest.mark.parametrize(
    ("map_keys", "message"),
    [
        (
            '{"promt": "q"}',
            "--map-keys: unknown key promt; expected some of prompt, query, response, history, system",
        ),
        ('{"prompt": 1}', "--map-keys: prompt is the number 1"),
        ("[1]", "expected an object"),
        ("{", "not valid JSON"),
    ],
)
def test_wrong_maps(map_keys: str, message: str) -> None:
    with pytest.raises(Refused, match=message):
        make_handler(ALPACA, map_keys)


def test_an_unknown_handler_lists_the_known() -> None:
    with pytest.raises(Refused, match="--handler-name AlpacaHandler: unknown; expected one of AlpacaStyle"):
        make_handler("AlpacaHandler")


def test_instruction_handlers_are_no_text_handlers() -> None:
    handler: InstructionHandler | TextHandler = make_handler(ALPACA)
    assert not isinstance(handler, TextHandler)
    assert isinstance(make_handler(PRETRAIN), TextHandler)
