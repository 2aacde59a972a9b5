import json
from pathlib import Path

import pytest
from demo_summary import summary


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """What a demo of two steps leaves, as far as the summary reads it."""
    step = {"tokens": 300, "elapsed_ms": 2000.0, "peak_memory_bytes": 1_500_000_000}
    records = [
        {"iteration": 0, "eval_loss": 1.75, "eval_tokens": 999},
        {"iteration": 1, "lm_loss": 2.0, **step},
        {"iteration": 2, "lm_loss": 1.9, **step, "tokens": 500},
        {"iteration": 2, "eval_loss": 1.5, "eval_tokens": 999},
    ]
    for folder in ("run/adapter", "merged/mg2hf"):
        (tmp_path / folder).mkdir(parents=True)
    (tmp_path / "run" / "loss.png").touch()
    (tmp_path / "run" / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for name, text in {"before": "I am\n\na model. " * 12, "after": "Fast pizza."}.items():
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"prompt": "A tagline?", "text": text}) + "\n")
    return tmp_path


def test_tells_losses_answers_and_paths(out: Path) -> None:
    text = summary(out)
    assert "Loss on held-out rows: 1.7500 before, 1.5000 after 2 steps (999 tokens)" in text
    assert "Training: 200 tokens/s, 1.50 GB at most on a rank" in text
    assert "Prompt: A tagline?\nBefore:\n    I am\n    \n    a model." in text
    assert "After:\n    Fast pizza." in text
    for path in ("run/adapter", "merged/mg2hf", "run/loss.png"):
        assert str(out / path) in text


def test_says_what_the_demo_has_not_made(out: Path) -> None:
    (out / "run" / "loss.png").unlink()
    with pytest.raises(FileNotFoundError, match=r"the demo has not made .*/run/loss\.png"):
        summary(out)
