"""The figures of ``benchmarks/preprocess.py``."""

from __future__ import annotations

import json
from pathlib import Path

import preprocess
from comparison.tokenised import TURN, Request, write_rows


def measured(kind: str, workers: int, ours: float, raw: float) -> dict[str, object]:
    return {"kind": kind, "workers": workers, "ours": ours, "raw": raw, "tokens": 1000}


def test_medians_and_ratios() -> None:
    first = [measured("text", 1, seconds, 4.0) for seconds in (5.0, 4.0, 10.0)]
    second = [measured("text", 2, 2.5, 2.0), measured("chat", 2, 2.0, 2.0)]
    text, faster, chat = preprocess.summarised([*first, *second])
    assert (text["ours_tokens_per_second"], text["of_raw"], text["of_first"]) == (200, 0.8, 1)
    assert (faster["of_raw"], faster["of_first"]) == (0.8, 2.0)
    assert (chat["kind"], chat["of_raw"], chat["of_first"]) == ("chat", 1.0, 1.0)


def test_both_sides_get_the_same_text(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text(json.dumps([{"instruction": "q", "input": "i", "output": "a"}]))
    write_rows(tmp_path / "rows.json", tmp_path, 3)
    texts, raw_texts, chats, raw_chats = (
        [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        for name in ("text", "text_raw", "chat", "chat_raw")
    )
    assert [row["text"] for row in texts] == raw_texts == ["0. q\ni\na", "1. q\ni\na", "2. q\ni\na"]
    assert [message["content"] for message in chats[1]["messages"]] == ["1. q\ni", "a"]
    assert raw_chats[1] == TURN.format(question="1. q\ni", answer="a")
    assert Request("text", 2, "f", "m").environment["RAYON_NUM_THREADS"] == "2"
