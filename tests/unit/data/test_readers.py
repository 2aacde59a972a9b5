import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mindspeed_lora.data.readers import Row, input_files, read_rows
from mindspeed_lora.errors import Refused

ROWS = [{"a": "x", "b": None}, {"a": 'y "q" ä 好\n2', "b": [1, {"c": "d"}]}, {"a": "", "b": "z"}]


def values(path: Path) -> list[dict]:
    rows = list(read_rows(path))
    assert all(0 < row.fraction <= 1 for row in rows)
    assert sorted(row.fraction for row in rows) == [row.fraction for row in rows]
    return [row.values for row in rows]


def write(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


@pytest.mark.parametrize("indent", [None, 2])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"])
def test_json_list(tmp_path: Path, indent: int | None, mark: bytes) -> None:
    text = json.dumps(ROWS, ensure_ascii=False, indent=indent)
    assert values(write(tmp_path / "a.json", mark + b"\n " + text.encode() + b"\n")) == ROWS


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "A.JSONL"])
def test_one_object_a_line(tmp_path: Path, name: str) -> None:
    text = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
    assert values(write(tmp_path / name, text)) == ROWS
    assert values(write(tmp_path / name, text.replace("\n", "\r\n") + "\n")) == ROWS


def test_parquet(tmp_path: Path) -> None:
    rows = [{"a": f"row {i}", "m": [{"role": "user", "content": str(i)}], "n": None} for i in range(2500)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert values(tmp_path / "a.parquet") == rows


def test_csv(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", '\ufeffa,b\r\nx,"1,\r\n2"\r\n\r\n5,""""\r\n')
    assert values(path) == [{"a": "x", "b": "1,\r\n2"}, {"a": "5", "b": '"'}]


def test_places_are_told(tmp_path: Path) -> None:
    lines = write(tmp_path / "a.jsonl", '{"a": 1}\n\n{"a": 2}\n')
    assert [row.where for row in read_rows(lines)] == [f"{lines}, line 1", f"{lines}, line 3"]
    rows = write(tmp_path / "a.json", '[{"a": 1},\n{"a": 2}]')
    assert [row.where for row in read_rows(rows)] == [f"{rows}, row 1", f"{rows}, row 2"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", "", r"a\.json: the file is empty"),
        ("a.json", "  \n", "the file has no rows"),
        ("a.json", "[]", "the file has no rows"),
        ("a.json", '[{"a": 1}, {"a": ]', r"row 2 \(line 1\): not valid JSON: Expecting value"),
        ("a.json", '[{"a": 1},\n {"b" 2}]', r"row 2 \(line 2\): not valid JSON: Expecting ':'"),
        ("a.json", '[{"a": 1}\n{"a": 2}]', r"row 2 \(line 2\): expected , or ]"),
        ("a.json", '[{"a": 1}', r"row 2 \(line 1\): expected , or ]"),
        ("a.json", '[{"a": 1},', r"row 2 \(line 1\): not valid JSON"),
        ("a.json", "[1]", "row 1: expected an object, found the number 1"),
        ("a.json", '[{"a": 1}] []', "text behind the list"),
        ("a.json", '{\n "a": 1\n}', "line 1: not valid JSON.*one object a line or a list"),
        ("a.jsonl", '{"a": 1}\n["x"]\n', r'line 2: expected an object, found a list \["x"\]'),
        ("a.jsonl", '{"a": 1}\n{"a": 2', "line 2: not valid JSON"),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', r"line 2: not UTF-8 text \(byte 8\)"),
        ("a.json", b'["\xe4"]', r"a\.json: not UTF-8 text"),
        ("a.csv", "a,b\n1,2,3\n", r"row 1 \(line 2\): 3 fields, but the header has 2"),
        ("a.csv", 'a,b\n1,"2\n', "not valid CSV"),
        ("a.csv", "a,a\n1,2\n", "line 1: expected column names"),
        ("a.csv", "a,b\n", "the file has no rows"),
        ("a.csv", b"a,b\n1,\xff\n", "not UTF-8"),
        ("a.parquet", "PAR1 no", "not a readable Parquet file"),
    ],
)
def test_malformed_files(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(Refused, match=message) as refused:
        list(read_rows(write(tmp_path / name, content)))
    assert str(tmp_path / name) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_rows_before_the_damage_are_read(tmp_path: Path) -> None:
    rows = read_rows(write(tmp_path / "a.jsonl", '{"a": 1}\nx'))
    assert next(rows) == Row(f"{tmp_path}/a.jsonl, line 1", {"a": 1}, 0.9)
    with pytest.raises(Refused):
        next(rows)


def test_a_folder(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "info.json", "README.md", ".hidden.jsonl"):
        write(tmp_path / name, "{}")
    notices: list[str] = []
    assert [file.name for file in input_files(tmp_path, notices.append)] == ["a.jsonl", "b.jsonl"]
    assert notices == [f"--input {tmp_path}: the .jsonl files are read; left out: info.json"]


def test_inputs_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="no such file or folder"):
        input_files(tmp_path / "nowhere.json")
    with pytest.raises(
        Refused, match=r"a\.docx: unknown kind of file; expected \.json, \.jsonl, \.parquet, \.csv"
    ):
        input_files(write(tmp_path / "a.docx", "x"))
    with pytest.raises(Refused, match="the folder has no"):
        input_files(tmp_path)
