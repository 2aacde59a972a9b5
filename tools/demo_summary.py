"""Prints what the demo has made: the loss on held-out rows and the model's answer, before and after; the paths."""

from __future__ import annotations

import json
import sys
import textwrap
from pathlib import Path
from typing import Any

WIDTH = 100


def summary(out: Path) -> str:
    """The text for a demo's output folder."""
    records = _read_lines(out / "run" / "metrics.jsonl")
    evaluations = [record for record in records if "eval_loss" in record]
    steps = [record for record in records if "lm_loss" in record]
    before, after = (_read_lines(out / f"{name}.jsonl")[0] for name in ("before", "after"))
    speed = sum(step["tokens"] for step in steps) / sum(step["elapsed_ms"] for step in steps) * 1e3
    lines = [
        f"Loss on held-out rows: {evaluations[0]['eval_loss']:.4f} before, "
        f"{evaluations[-1]['eval_loss']:.4f} after {steps[-1]['iteration']} steps "
        f"({evaluations[-1]['eval_tokens']} tokens)",
        f"Training: {speed:.0f} tokens/s, {max(step['peak_memory_bytes'] for step in steps) / 1e9:.2f} GB "
        "at most on a rank",
        "",
        f"Prompt: {after['prompt']}",
        *_answer("Before", before["text"]),
        *_answer("After", after["text"]),
        "",
    ]
    paths = {
        "PEFT adapter": out / "run" / "adapter",
        "Merged model": out / "merged" / "mg2hf",
        "Loss curve": out / "run" / "loss.png",
    }
    missing = [str(path) for path in paths.values() if not path.exists()]
    if missing:
        raise FileNotFoundError(f"the demo has not made {', '.join(missing)}")
    return "\n".join(lines + [f"{name + ':':<14}{path}" for name, path in paths.items()])


def _answer(name: str, text: str) -> list[str]:
    wrapped = [piece for line in text.strip().splitlines() for piece in textwrap.wrap(line, WIDTH) or [""]]
    return [f"{name}:", *(f"    {line}" for line in wrapped)]


def _read_lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


if __name__ == "__main__":
    print(summary(Path(sys.argv[1])))
