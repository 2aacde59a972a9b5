import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mindspeed_lora.data.readers import BadRow, Row, input_files, read_rows
from mindspeed_lora.errors import Refused

ROWS = [{"a": "x", "b": None}, {"a": 'y "q" ä 好\n2', "b": [1, {"c": "d"}]}, {"a": "", "b": "z"}]
LIST = json.dumps(ROWS, ensure_ascii=False, indent=2)
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS)


def values(path: Path) -> list[dict]:
    rows = [row for row in read_rows(path) if isinstance(row, Row)]
    assert all(0 < row.fraction <= 1 for row in rows)
    assert sorted(row.fraction for row in rows) == [row.fraction for row in rows]
    return [row.values for row in rows]


def problems(path: Path) -> list[str]:
    return [row.problem for row in read_rows(path) if isinstance(row, BadRow)]


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


@pytest.mark.parametrize("size", [1, 7, 20, 1000])
def test_a_list_is_read_in_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr("mindspeed_lora.data.readers.json_rows._PIECE", size)
    rows = [*ROWS, {"n": 1e-7, "t": True, "u": "\u0000😀", "long": "x" * 300}] * 20
    assert values(write(tmp_path / "a.json", json.dumps(rows, indent=1))) == rows


@pytest.mark.parametrize("encoding", ["utf-16", "utf-8-sig"])
@pytest.mark.parametrize(("name", "text"), [("a.json", LIST), ("a.jsonl", LINES), ("a.json", LINES)])
def test_marks_of_encodings(tmp_path: Path, encoding: str, name: str, text: str) -> None:
    assert values(write(tmp_path / name, text.encode(encoding))) == ROWS


def zstd(content: bytes) -> bytes:
    return pa.compress(content, "zstd", asbytes=True)


@pytest.mark.parametrize("pack", [gzip.compress, zstd])
@pytest.mark.parametrize(("name", "text"), [("a.json", LIST), ("a.jsonl", LINES)])
def test_packed_files(tmp_path: Path, pack: Callable[[bytes], bytes], name: str, text: str) -> None:
    suffix = ".gz" if pack is gzip.compress else ".zst"
    assert values(write(tmp_path / (name + suffix), pack(text.encode()))) == ROWS


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_files_that_are_not_packed_as_they_say(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(Refused, match=rf"a\.jsonl\{suffix}: not a readable"):
        list(read_rows(write(tmp_path / f"a.jsonl{suffix}", LINES)))
    cut = gzip.compress(LINES.encode() * 500)[:-20]
    with pytest.raises(Refused, match="not a readable gzip file"):
        list(read_rows(write(tmp_path / "cut.jsonl.gz", cut)))


def test_parquet(tmp_path: Path) -> None:
    rows = [{"a": f"row {i}", "m": [{"role": "user", "content": str(i)}], "n": None} for i in range(2500)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert values(tmp_path / "a.parquet") == rows


@pytest.mark.parametrize("new", [pa.ipc.new_file, pa.ipc.new_stream])
def test_arrow(tmp_path: Path, new: Callable) -> None:
    table = pa.Table.from_pylist([{"a": i, "b": "x"} for i in range(3000)])
    with new(str(tmp_path / "a.arrow"), table.schema) as writer:
        writer.write_table(table, max_chunksize=700)
    assert values(tmp_path / "a.arrow") == table.to_pylist()
    with pytest.raises(Refused, match="not a readable Arrow file"):
        list(read_rows(write(tmp_path / "b.arrow", "no")))


def test_csv(tmp_path: Path) -> None:
    text = 'a,b\r\nx,"1,\r\n2"\r\n\r\n5,""""\r\n'
    expected = [{"a": "x", "b": "1,\r\n2"}, {"a": "5", "b": '"'}]
    assert values(write(tmp_path / "a.csv", "\ufeff" + text)) == expected
    assert values(write(tmp_path / "a.csv", text.encode("utf-16"))) == expected


def test_text(tmp_path: Path) -> None:
    path = write(tmp_path / "a.txt", b"\xef\xbb\xbfone\r\n\n two \n\xff\nthree")
    assert values(path) == [{"text": "one"}, {"text": " two "}, {"text": "three"}]
    assert problems(path) == [f"{path}, line 4: not UTF-8 text (byte 1)"]


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
        ("a.json", '[{"a": 1},\n]', r"row 2 \(line 2\): not valid JSON"),
        ("a.json", '[{"a": 1,}]', r"row 1 \(line 1\): not valid JSON"),
        ("a.json", '[{"a": "\n"}]', r"row 1 \(line 2\): not valid JSON: Invalid control character"),
        ("a.json", "[" * 200_000, "row 1 .*nested too deeply"),
        ("a.json", '[{"a": 1}] []', "text behind the list"),
        ("a.json", b'["\xe4"]', r"a\.json, behind line 1: not UTF-8 text"),
        ("a.csv", 'a,b\n1,"2\n', "not valid CSV"),
        ("a.csv", "a,a\n1,2\n", "line 1: expected column names"),
        ("a.csv", "a,b\n", "the file has no rows"),
        ("a.csv", b"a,b\n1,\xff\n", "not UTF-8"),
        ("a.parquet", "PAR1 no", "not a readable Parquet file"),
    ],
)
def test_files_that_cannot_be_read_on(tmp_path: Path, name: str, content: str | bytes, message: str) -> None:
    with pytest.raises(Refused, match=message) as refused:
        list(read_rows(write(tmp_path / name, content)))
    assert str(tmp_path / name) in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("a.json", "[1]", ["row 1: expected an object, found the number 1"]),
        (
            "a.json",
            '{\n "a": 1\n}',
            [
                "line 1: not valid JSON: Expecting property name enclosed in double quotes at character 2; expected "
                "one object a line or a list of objects, found {"
            ],
        ),
        ("a.jsonl", '{"a": 1}\n["x"]\n', ['line 2: expected an object, found a list ["x"]']),
        ("a.jsonl", '{"a": 1}\n{"a": 2', ["line 2: not valid JSON: Expecting ',' delimiter at character 8"]),
        ("a.jsonl", '{"a": 1,}\n{"a": 2}', ["line 1: not valid JSON: "]),
        (
            "a.jsonl",
            b'{"a": 1}\n{"a": "\xff"}\n',
            ["line 2: not UTF-8 text (byte 8); save the file as UTF-8"],
        ),
        ("a.jsonl", '{"a": "\0"}\n{"a": 2}', ["line 1: not valid JSON: Invalid control character"]),
        ("a.jsonl", '{"a": ' + "[" * 200_000 + '\n{"a": 2}', ["line 1: not usable JSON: nested too deeply"]),
        ("a.jsonl", '{"a": ' + "1" * 5000 + '}\n{"a": 2}', ["line 1: not usable JSON: Exceeds the limit"]),
        ("a.csv", "a,b\n1,2,3\n4,5", ["row 1 (line 2): 3 fields, but the header has 2"]),
    ],
)
def test_broken_rows_stand_among_the_others(
    tmp_path: Path, name: str, content: str | bytes, expected: list[str]
) -> None:
    path = write(tmp_path / name, content)
    found = problems(path)
    assert len(found) >= len(expected)
    for problem, beginning in zip(found, expected, strict=False):
        assert problem.startswith(f"{path}, {beginning}")
        assert "\n" not in problem and len(problem) < 400


def test_rows_before_the_damage_are_read(tmp_path: Path) -> None:
    rows = read_rows(write(tmp_path / "a.json", '[{"a": 1},\nx'))
    assert next(rows) == Row(f"{tmp_path}/a.json, row 1", {"a": 1}, 1.0)
    with pytest.raises(Refused):
        next(rows)


def test_a_line_that_is_too_long_is_one_broken_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mindspeed_lora.data.readers.json_rows._LONGEST_LINE", 50)
    path = write(tmp_path / "a.jsonl", '{"a": 1}\n{"a": "' + "x" * 333 + '"}\n{"a": 2}\n')
    assert values(path) == [{"a": 1}, {"a": 2}]
    assert problems(path) == [f"{path}, line 2: longer than 50 bytes"]


def test_a_folder(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl.gz", "info.json", "README.md", ".hidden.jsonl"):
        write(tmp_path / name, "{}")
    notices: list[str] = []
    assert [file.name for file in input_files(tmp_path, notices.append)] == ["a.jsonl.gz", "b.jsonl"]
    assert notices == [f"--input {tmp_path}: the .jsonl files are read; left out: info.json"]


def test_a_folder_that_datasets_saved(tmp_path: Path) -> None:
    for name in ("data-00000-of-00001.arrow", "dataset_info.json"):
        write(tmp_path / name, "{}")
    write(tmp_path / "state.json", '{"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}')
    assert [file.name for file in input_files(tmp_path)] == ["data-00000-of-00001.arrow"]


def test_inputs_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="no such file or folder"):
        input_files(tmp_path / "nowhere.json")
    with pytest.raises(
        Refused, match=r"a\.docx: unknown kind of file; expected \.json, \.jsonl, \.parquet, \.csv"
    ):
        input_files(write(tmp_path / "a.docx", "x"))
    with pytest.raises(Refused, match="a script, and code of data sets is not run"):
        input_files(write(tmp_path / "set.py", "x"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(Refused, match=r"the folder has no .*\.txt file$"):
        input_files(tmp_path / "empty")
    (tmp_path / "empty" / "part_1").mkdir()
    with pytest.raises(Refused, match=r"folders inside \(part_1\) are not looked into, name them"):
        input_files(tmp_path / "empty")


@pytest.mark.parametrize(
    "name", ["dataset_info.json", "dataset_infos.json", "state.json", "made_packed_info.json"]
)
def test_files_that_describe_rows_are_none(tmp_path: Path, name: str) -> None:
    for file in (name, "train.jsonl"):
        write(tmp_path / file, "{}")
    notices: list[str] = []
    assert [file.name for file in input_files(tmp_path, notices.append)] == ["train.jsonl"]
    assert not notices


def test_a_snapshot_of_a_hub(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    write(tmp_path / "README.md", "")
    for name in ("test-0-of-1.parquet", "train-0-of-2.parquet", "train-1-of-2.parquet"):
        write(tmp_path / "data" / name, "")
    names = [file.name for file in input_files(tmp_path)]
    assert names == ["train-0-of-2.parquet", "train-1-of-2.parquet"]


def test_parts_that_datasets_saved(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    write(tmp_path / "dataset_dict.json", '{"splits": ["train"]}')
    write(tmp_path / "train" / "data-00000-of-00001.arrow", "")
    write(tmp_path / "train" / "state.json", '{"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}')
    assert [file.name for file in input_files(tmp_path)] == ["data-00000-of-00001.arrow"]


def test_a_csv_with_an_index(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", ",a,b\n0,x,\n1,y,z\n")
    assert values(path) == [
        {"Unnamed: 0": "0", "a": "x", "b": ""},
        {"Unnamed: 0": "1", "a": "y", "b": "z"},
    ]


@pytest.mark.parametrize("indent", [None, 2])
def test_a_list_under_the_name_of_lines(tmp_path: Path, indent: int | None) -> None:
    assert values(write(tmp_path / "rows.jsonl", " " + json.dumps(ROWS, indent=indent))) == ROWS
