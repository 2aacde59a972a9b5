"""The page of results says what the JSON says, and nothing of the results before."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import render

FACTS: dict[str, Any] = {
    "machine": {"cpu": "a processor", "cores": 2},
    "versions": {"torch": "2.13"},
    "commit": {"sha": "0123456789abcdef"},
    "date": "2026-01-02T03:04:05",
    "command": "python x.py",
}


def side(name: str, speed: float, peak: int) -> dict[str, Any]:
    spread = {"median": speed, "lowest": speed, "highest": speed}
    return {
        "name": name,
        "tokens_per_second": spread,
        "loss_tokens_per_second": spread,
        "peak_memory_bytes": peak,
    }


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A page with old results, beside four new ones."""
    results = tmp_path / "results"
    results.mkdir()
    sides = [side("ours, packed", 250.0, 2 * 10**9), side("TRL, batch 8", 50.0, 10**10)]
    made = {
        "train_vs_trl": {
            "sides": sides,
            "ratios": [{"tokens_per_second": 5.0, "peak_memory_bytes": 0.2}],
            "best_peer": "TRL, batch 8",
            "profile": None,
        },
        "tensor_parallel": {
            "sides": [side("one process", 200.0, 10**9), side("2 TP ranks", 180.0, 10**9)],
            "ratio": 0.9,
        },
        "qlora": {
            "sides": sides,
            "ratios": [{"tokens_per_second": 5.0, "peak_memory_bytes": 0.2}],
            "profile": None,
            "quantising": {
                "bytes": 3 * 10**9,
                "seconds": {"read": 2.0, "quantised": 2.5},
                "peak_memory_bytes": {"read": 10**8, "quantised": 2 * 10**9},
            },
            "memory": [
                {
                    **{"model": "Llama", "form": "QLoRA", "dtype": "bf16", "weights": 35e9, "bits": 4.127},
                    **{"adapter_and_optimizer": 1e9, "total": 40e9},
                }
            ],
            "figures": {"share_of_plain_lora": {"value": 0.85, "bar": 0.8, "reached": True}},
        },
        "start_up": {"start_seconds": 6.25, "import_seconds": 0.5},
        "preprocess": {
            "runs": [
                {
                    **{"kind": "chat", "workers": 2, "tokens": 10**6, "of_raw": 0.93, "of_first": 1.77},
                    **{"ours_tokens_per_second": 1.86e6, "raw_tokens_per_second": 2e6},
                }
            ]
        },
    }
    for name, own in made.items():
        (results / f"{name}.json").write_text(json.dumps({"benchmark": name, **FACTS, **own}))
    path = tmp_path / "README.md"
    path.write_text("before\n<!-- results -->\nold figures\n<!-- end of results -->\nafter\n")
    monkeypatch.setattr(render, "HERE", tmp_path)
    monkeypatch.setattr(render, "RESULTS", results)
    return path


def test_the_page_has_every_result_and_keeps_what_is_around(page: Path) -> None:
    assert render.main() == 0
    text = page.read_text()
    assert text.startswith("before\n<!-- results -->") and text.endswith("<!-- end of results -->\nafter\n")
    assert "old figures" not in text
    for words in (
        "| TRL, batch 8 |",
        "5.00",
        "The fastest peer is TRL, batch 8.",
        "reach 0.90 of one process",
        "first step 6.2 s",
        "1,860",
        "1.77",
        "commit 0123456789ab",
        "`python x.py`",
        "1.20",
        "| Llama, QLoRA, bf16 |",
        "4.127",
        "- 0.85 of the speed of our own LoRA; at least 0.8",
    ):
        assert words in text, words
    charts = {path.name for path in (page.parent / "results").glob("*.png")}
    assert charts == {
        f"{result}_{figure}.png"
        for result in ("train_vs_trl", "qlora")
        for figure in ("tokens_per_second", "peak_memory_bytes")
    }
    assert all(f"results/{chart}" in text for chart in charts)


def test_a_second_time_changes_nothing(page: Path) -> None:
    render.main()
    once = page.read_text()
    render.main()
    assert page.read_text() == once


def test_a_page_without_its_block_is_told(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page.write_text("nothing")
    assert render.main() == 1
    assert "has no block" in capsys.readouterr().err
