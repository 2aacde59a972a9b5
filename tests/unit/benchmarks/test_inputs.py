import json
from pathlib import Path

import pytest
from comparison.inputs import first_rows

from mindspeed_lora.errors import Refused


def test_the_first_rows_of_a_list_and_of_lines(tmp_path: Path) -> None:
    rows = [{"instruction": f"Grüße {number}", "output": "x"} for number in range(5)]
    listed, lines = tmp_path / "rows.json", tmp_path / "rows.jsonl"
    listed.write_text(json.dumps(rows))
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = tmp_path / "work"
    folder.mkdir()
    assert json.loads(first_rows(listed, 2, folder).read_text()) == rows[:2]
    assert [json.loads(line) for line in first_rows(lines, 3, folder).read_text().splitlines()] == rows[:3]
    assert first_rows(listed, None, folder) == listed


@pytest.mark.parametrize(
    ("text", "message"), [("instruction,output", "no JSON"), ('{"a": 1}', "no list of rows")]
)
def test_what_cannot_be_cut_is_refused(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "rows.json"
    file.write_text(text)
    with pytest.raises(Refused, match=message):
        first_rows(file, 2, tmp_path)
