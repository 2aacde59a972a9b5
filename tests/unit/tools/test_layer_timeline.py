"""What the timeline reads off a profiler's trace, and that it draws it."""

from __future__ import annotations

from pathlib import Path

import pytest
from layer_timeline import draw, spans


def event(name: str, start: float, length: float, category: str = "cpu_op") -> dict[str, object]:
    return {"ph": "X", "cat": category, "name": name, "ts": start, "dur": length}


EVENTS = [
    event("aten::mm", 1000, 500),
    event("gloo:all_gather", 1200, 2000, "user_annotation"),
    event("gloo:barrier", 1300, 9000, "user_annotation"),
    event("aten::add_", 1600, 300),
    event("aten::view", 1950, 1),
    {"ph": "i", "name": "a mark", "ts": 0},
]


def test_products_steps_and_collectives() -> None:
    found = spans(EVENTS)
    assert found["products"] == [(0.0, 0.5)]
    assert found["element-wise"] == [(pytest.approx(0.6), pytest.approx(0.3))]
    assert found["collectives"] == [(pytest.approx(0.2), pytest.approx(2.0))]


def test_a_picture_of_two_ways(tmp_path: Path) -> None:
    target = tmp_path / "folder" / "picture.png"
    draw({"unfused": spans(EVENTS), "fused": spans(EVENTS)}, target)
    assert target.read_bytes().startswith(b"\x89PNG")
