"""``loss.png``: the training and the evaluation loss over the iterations of ``metrics.jsonl``."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mindspeed_lora.atomic import atomic_file
from mindspeed_lora.training.reporting.metrics import read_metrics

PLOT_FILE = "loss.png"

_MARKED_POINTS = 40
_SMOOTHED_FROM = 60
_TRAINING_COLOUR = "#1f77b4"
_EVALUATION_COLOUR = "#d62728"


def draw_loss(metrics: Path) -> Path | None:
    """Draw ``loss.png`` beside a metrics file; None if there is no loss in it."""
    training, evaluation = loss_curves(read_metrics(metrics))
    if not training and not evaluation:
        return None
    # matplotlib says on standard error that it builds its font cache; nobody who trains wants to know.
    logging.getLogger("matplotlib").setLevel(logging.ERROR)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 5.0), dpi=150, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    _draw_training(axes, training)
    if evaluation:
        axes.plot(
            *_columns(evaluation), color=_EVALUATION_COLOUR, marker="o", markersize=5, label="evaluation"
        )
    _label(axes)
    target = metrics.with_name(PLOT_FILE)
    with atomic_file(target) as temporary:
        canvas.print_png(str(temporary))
    return target


def loss_curves(records: Iterable[dict[str, Any]]) -> tuple[dict[int, float], dict[int, float]]:
    """Training and evaluation loss by iteration; skipped steps and losses that are no number are left out."""
    training: dict[int, float] = {}
    evaluation: dict[int, float] = {}
    for record in records:
        if record.get("eval_loss") is not None:
            evaluation[record["iteration"]] = record["eval_loss"]
        elif record.get("lm_loss") is not None and not record.get("skipped"):
            training[record["iteration"]] = record["lm_loss"]
    return training, evaluation


def moving_average(values: list[float], width: int) -> list[float]:
    """Mean of up to ``width`` values that end at each."""
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    return [(sums[end] - sums[max(0, end - width)]) / min(end, width) for end in range(1, len(values) + 1)]


def _draw_training(axes: Any, curve: dict[int, float]) -> None:
    """One line, or for a long run a pale line with its moving average on top."""
    if not curve:
        return
    iterations, losses = _columns(curve)
    if len(losses) < _SMOOTHED_FROM:
        marker = "." if len(losses) <= _MARKED_POINTS else None
        axes.plot(iterations, losses, color=_TRAINING_COLOUR, marker=marker, label="training")
        return
    width = max(5, len(losses) // 30)
    axes.plot(iterations, losses, color=_TRAINING_COLOUR, alpha=0.3, linewidth=0.8, label="training")
    axes.plot(
        iterations,
        moving_average(losses, width),
        color=_TRAINING_COLOUR,
        label=f"training, mean of {width} iterations",
    )


def _label(axes: Any) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("iteration")
    axes.set_ylabel("loss per token (nats)")
    axes.set_title("Loss")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    axes.grid(True, alpha=0.3)
    axes.legend()


def _columns(curve: dict[int, float]) -> tuple[list[int], list[float]]:
    """Iterations in order, and their losses."""
    iterations = sorted(curve)
    return iterations, [curve[iteration] for iteration in iterations]
