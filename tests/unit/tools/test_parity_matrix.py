"""Which layouts the matrix has, what it calls exact, and that a layout which is not ends with status 1."""

from __future__ import annotations

from pathlib import Path

import parity_matrix
import pytest
from parity_matrix import Row, choose, report

from tests.support.layouts import UNFUSED, Layout, all_layouts

FIGURES = ["loss", "gradient", "logits", "dropped_loss", "fused_loss", "fused_gradient"]
GOOD = {**dict.fromkeys(FIGURES, 1e-7), "replicas": "bit-equal"}
LAYOUTS = all_layouts(4, [UNFUSED])


def degrees(layout: Layout) -> tuple[object, ...]:
    return tuple(
        value for name, value in vars(layout).items() if name not in ("recompute", "stages", "overlap")
    )


def test_every_combination_of_degrees_is_there_once() -> None:
    layouts = choose([1, 2, 4], every_variation=False, only=None)
    wanted = {degrees(layout) for layout in LAYOUTS}
    assert {degrees(layout) for layout in layouts} == wanted
    assert len(layouts) == len(wanted)
    assert {layout.world_size for layout in layouts} == {1, 2, 4}
    for field in ("recompute", "stages", "overlap"):
        assert {getattr(layout, field) for layout in layouts} == {
            getattr(layout, field) for layout in LAYOUTS
        }


def test_all_crosses_everything_and_a_name_chooses() -> None:
    assert len(choose([1, 2, 4], every_variation=True, only=None)) == len(LAYOUTS)
    assert {layout.tp for layout in choose([2], every_variation=True, only="tp2")} == {2}
    assert choose([2], every_variation=False, only="tp9") == []


@pytest.mark.parametrize("figure", FIGURES)
@pytest.mark.parametrize("value", [1.0, float("nan")])
def test_one_figure_out_of_bounds_is_not_exact(figure: str, value: float) -> None:
    assert Row(Layout(), **GOOD).exact
    assert not Row(Layout(), **{**GOOD, figure: value}).exact
    assert not Row(Layout(), **GOOD, problem="a rank failed").exact


def test_the_report_counts_and_names_what_is_not_exact() -> None:
    text = report([Row(Layout(), **GOOD), Row(Layout(tp=2), problem="replicas differ")], 90.0)
    assert "1 of 2 layouts are exact" in text
    (line,) = [line for line in text.splitlines() if line.startswith("| tp2")]
    assert "NO replicas differ" in line


def test_a_layout_that_is_not_exact_ends_with_1(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(
        parity_matrix,
        "measure",
        lambda _bench, layout, _turn: Row(layout, **{**GOOD, "loss": 1e-3 * (layout.tp - 1)}),
    )
    target = tmp_path / "parity.md"
    assert parity_matrix.main(["--ranks", "1", "--output", str(target)]) == 0
    assert "1 of 1 layouts are exact" in target.read_text()
    assert parity_matrix.main(["--ranks", "2", "--only", "tp2"]) == 1
    assert parity_matrix.main(["--ranks", "1", "--only", "tp2"]) == 2
