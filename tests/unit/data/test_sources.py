"""Inputs by name: files, lists of them, and LLaMA-Factory's ``dataset_info.json``."""

import json
from pathlib import Path
from typing import Any

import pytest

from mindspeed_lora.config.preprocess import PreprocessConfig
from mindspeed_lora.data.handler_choice import choose_handler
from mindspeed_lora.data.handlers import LLAMA_FACTORY, EachItsOwn, EachItsOwnPair
from mindspeed_lora.data.handlers.alpaca import AlpacaHandler
from mindspeed_lora.data.readers import Row
from mindspeed_lora.data.sources import open_inputs
from mindspeed_lora.errors import Refused

ALPACA_ROWS = [{"instruction": f"i{number}", "input": "", "output": f"o{number}"} for number in range(5)]
SAID = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]


def config(**values: Any) -> PreprocessConfig:
    return PreprocessConfig(
        **{key: str(value) if isinstance(value, Path) else value for key, value in values.items()}
    )


def write(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content))
    return path


def ignore(text: str) -> None:
    """No notice is looked at."""


def test_a_list_of_inputs(tmp_path: Path) -> None:
    one = write(tmp_path / "a,b.json", ALPACA_ROWS[:2])
    assert len(open_inputs(config(input=one)).sources) == 1
    two, three = write(tmp_path / "b.json", ALPACA_ROWS[2:]), write(tmp_path / "c.json", ALPACA_ROWS[:1])
    inputs = open_inputs(config(input=f"{two}, {three}", datasets=(str(one),), max_samples=2))
    assert inputs.files == [two, three, one]
    rows = [row for row in inputs.rows() if isinstance(row, Row)]
    assert [row.values["instruction"] for row in rows] == ["i2", "i3", "i0", "i0", "i1"]
    assert [row.source for row in rows] == [0, 0, 1, 2, 2]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"interleave_probs": "0.5,0.5"}, "needs --mix-strategy interleave_under or interleave_over"),
        ({"interleave_probs": "0.5", "mix_strategy": "interleave_under"}, "1 numbers for 2 inputs"),
        ({"interleave_probs": "0.5,0.6", "mix_strategy": "interleave_under"}, "the sum is 1.1; expected 1"),
    ],
)
def test_wrong_probabilities(tmp_path: Path, values: dict[str, Any], message: str) -> None:
    path = write(tmp_path / "a.json", ALPACA_ROWS)
    with pytest.raises(Refused, match=f"--interleave-probs .*{message}"):
        open_inputs(config(input=f"{path},{path}", **values))


def test_inputs_of_several_kinds_are_found_out(tmp_path: Path) -> None:
    alpaca = write(tmp_path / "a.json", ALPACA_ROWS[:1])
    sharegpt = write(tmp_path / "s.json", [{"conversations": SAID}])
    given = config(input=f"{alpaca},{sharegpt}")
    inputs = open_inputs(given)
    notices: list[str] = []
    name, handler = choose_handler(given, inputs, notices.append)
    assert name == "AlpacaStyleInstructionHandler, SharegptStyleInstructionHandler"
    assert notices == [f"default taken: --handler-name {name}"]
    assert isinstance(handler, EachItsOwn)
    found = [handler.messages(row)[0]["content"] for row in inputs.rows() if isinstance(row, Row)]
    assert found == ["i0", "Q"]
    text = write(tmp_path / "t.json", [{"text": "x"}])
    given = config(input=f"{alpaca},{text}")
    with pytest.raises(Refused, match="do not go into one data set"):
        choose_handler(given, open_inputs(given), notices.append)


def test_a_mapped_column_that_no_row_has(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", ALPACA_ROWS)
    given = config(input=path, handler_name="AlpacaStyleInstructionHandler", map_keys='{"query": "inptu"}')
    with pytest.raises(Refused, match="query is the column inptu, .*found input, instruction, output"):
        choose_handler(given, open_inputs(given), ignore)


INFO = {
    "plain": {"file_name": "plain.json"},
    "few": {
        "file_name": "plain.json",
        "num_samples": 2,
        "columns": {"prompt": "output", "response": "instruction"},
    },
    "chat": {
        "file_name": "chat.json",
        "formatting": "sharegpt",
        "columns": {"messages": "m", "tools": "t"},
        "tags": {
            "role_tag": "role",
            "content_tag": "content",
            "user_tag": "user",
            "assistant_tag": "assistant",
        },
    },
    "pairs": {"file_name": "pairs.json", "ranking": True, "columns": {"chosen": "good", "rejected": "bad"}},
    "hub": {"hf_hub_url": "someone/something"},
    "pictures": {"file_name": "plain.json", "columns": {"images": "pictures"}},
    "unknown": {"file_name": "plain.json", "columns": {"promt": "x"}},
    "new": {"file_name": "plain.json", "formatting": "new"},
    "missing": {"file_name": "nowhere.json"},
    "likes": {"file_name": "plain.json", "columns": {"kto_tag": "liked"}},
    "text": {"file_name": "plain.json", "columns": {"prompt": "output"}},
    "short": {"file_name": "rich.json", "columns": {"prompt": "instruction", "response": "output"}},
    "rich": {
        "file_name": "rich.json",
        "columns": {
            **{"prompt": "instruction", "query": "input", "response": "output"},
            **{"system": "system", "history": "history"},
        },
    },
    "usual": {"file_name": "rich.json"},
    "asked": {"file_name": "rich.json", "columns": {"query": "input", "response": "output"}},
    "said": {"file_name": "said.json", "formatting": "sharegpt"},
    # What has no effect there has none here.
    "old": {"file_name": "plain.json", "file_sha1": "0123", "tags": {"role_tag": "role"}},
    "called": {"file_name": "called.json", "columns": {"tools": "t"}},
    "openai": {"file_name": "chat.json", "formatting": "openai", "columns": {"messages": "m"}},
    "openai_by_tags": {
        "file_name": "tagged.json",
        "formatting": "openai",
        "tags": {"role_tag": "who", "user_tag": "me"},
    },
    "openai_pairs": {
        "file_name": "chosen.json",
        "formatting": "openai",
        "ranking": True,
        "columns": {"chosen": "good", "rejected": "bad"},
    },
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "dataset_info.json", INFO)
    write(tmp_path / "plain.json", ALPACA_ROWS)
    rich = {"instruction": "I", "input": "J", "output": "O", "system": "S", "history": [["a", "b"]]}
    write(tmp_path / "rich.json", [rich])
    write(tmp_path / "said.json", [{"conversations": SAID, "system": "S", "tools": '[{"name": "f"}]'}])
    said = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    write(tmp_path / "chat.json", [{"m": said, "t": ""}])
    write(tmp_path / "called.json", [{"instruction": "I", "output": "O", "t": '[{"name": "f"}]'}])
    tagged = [{"who": "me", "content": "Q"}, {"who": "assistant", "content": "A"}]
    write(tmp_path / "tagged.json", [{"messages": tagged}])
    answers = {"good": said[1], "bad": {"role": "assistant", "content": "B"}}
    write(tmp_path / "chosen.json", [{"messages": said[:1], **answers}])
    write(tmp_path / "pairs.json", [{"instruction": "I", "good": "g", "bad": "b"}] * 2)
    return tmp_path


def described(folder: Path, names: str, **values: Any) -> tuple[Any, list[Row]]:
    given = config(input=names, handler_name=LLAMA_FACTORY, dataset_dir=folder, **values)
    inputs = open_inputs(given)
    _, handler = choose_handler(given, inputs, ignore)
    return handler, [row for row in inputs.rows() if isinstance(row, Row)]


def test_dataset_info(folder: Path) -> None:
    handler, rows = described(folder, "few,chat,plain")
    assert isinstance(handler, EachItsOwn)
    asked = [handler.messages(row)[0]["content"] for row in rows]
    assert asked == ["o0", "o1", "Q", "i0", "i1", "i2", "i3", "i4"]
    handler, rows = described(folder, "plain", max_samples=3)
    assert isinstance(handler, AlpacaHandler) and len(rows) == 3
    handler, rows = described(folder, "pairs")
    assert not isinstance(handler, EachItsOwnPair)
    chosen, rejected = handler.pair(rows[0])
    assert (chosen[-1]["content"], rejected[-1]["content"]) == ("g", "b")
    # The folder may stand before the name.
    inputs = open_inputs(config(input=folder / "plain", handler_name=LLAMA_FACTORY))
    assert inputs.files == [folder / "plain.json"]


def test_entries_of_other_kinds(folder: Path) -> None:
    handler, rows = described(folder, "old")
    assert [message["content"] for message in handler.messages(rows[0])] == ["i0", "o0"]
    handler, rows = described(folder, "called")
    assert handler.messages(rows[0])[0]["tools"] == [{"name": "f"}]
    for name in ("openai", "openai_by_tags"):
        handler, rows = described(folder, name)
        said = [(message["role"], message["content"]) for message in handler.messages(rows[0])]
        assert said == [("user", "Q"), ("assistant", "A")]
    handler, rows = described(folder, "openai_pairs")
    assert [[message["content"] for message in one] for one in handler.pair(rows[0])] == [
        ["Q", "A"],
        ["Q", "B"],
    ]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("short", ["I", "O"]),
        ("asked", ["J", "O"]),
        ("usual", ["I\nJ", "O"]),
        ("rich", ["S", "a", "b", "I\nJ", "O"]),
        ("said", ["Q", "A"]),
    ],
)
def test_columns_that_an_entry_does_not_name_are_not_read(
    folder: Path, name: str, expected: list[str]
) -> None:
    handler, rows = described(folder, name)
    assert [message["content"] for message in handler.messages(rows[0])] == expected


def test_an_entry_without_answers_is_plain_text(folder: Path) -> None:
    handler, rows = described(folder, "text")
    assert (handler.keys, handler.texts(rows[1])) == (("text",), ("o1",))
    with pytest.raises(Refused, match="do not go into one data set"):
        described(folder, "plain,text")


def test_a_misspelt_name_among_many(folder: Path) -> None:
    many = {f"set_{number}": {"file_name": "plain.json"} for number in range(30)}
    write(folder / "dataset_info.json", {**many, "questions_en": {}})
    with pytest.raises(Refused, match=r"it has set_0, .*set_19 and 11 more; did you mean questions_en\?$"):
        described(folder, "question_en")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("nothing", "--input nothing: not in .*dataset_info.json; it has plain, few"),
        ("hub", "hub has hf_hub_url; only files are read here"),
        ("pictures", "pictures: the column images is not text"),
        ("likes", "likes: kto_tag names the column liked for KTO training, which is not done here"),
        ("unknown", "unknown: unknown key promt"),
        ("new", "new: formatting new with ranking False is unknown"),
        ("missing", "nowhere.json: no such file or folder"),
        ("plain,pairs", "do not go into one data set"),
    ],
)
def test_wrong_entries(folder: Path, names: str, message: str) -> None:
    with pytest.raises(Refused, match=message):
        described(folder, names)


def test_rows_of_the_package_datasets(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps(row) + "\n" for row in ALPACA_ROWS))
    parameters = write(
        tmp_path / "p.json", {"path": "json", "data_files": str(rows), "cache_dir": str(tmp_path / "c")}
    )
    found = list(open_inputs(config(hf_datasets_params=parameters)).rows())
    assert [row.values for row in found if isinstance(row, Row)] == ALPACA_ROWS
    code = write(tmp_path / "q.json", {"path": "json", "trust_remote_code": True})
    with pytest.raises(Refused, match="trust_remote_code is refused"):
        open_inputs(config(hf_datasets_params=code))
