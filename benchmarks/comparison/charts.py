"""Bar charts of results."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

_OURS, _PEER = "#1f77b4", "#b0b0b0"


def bar_chart(target: Path, names: Sequence[str], values: Sequence[float], unit: str) -> None:
    """One horizontal bar a side, ours (the first) in a colour of its own, with its figure."""
    figure = Figure(figsize=(7.0, 0.45 * len(names) + 0.9), dpi=120, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    places = range(len(names) - 1, -1, -1)
    bars = axes.barh(list(places), values, color=[_OURS, *[_PEER] * (len(names) - 1)])
    axes.bar_label(bars, [f"{value:.3g}" for value in values], padding=3)
    axes.set_yticks(list(places), names)
    axes.set_xlabel(unit)
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(x=0.12)
    canvas.print_png(str(target))
