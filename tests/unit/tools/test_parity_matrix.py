"""Which layouts the matrix has, what it calls exact, and that a layout which is not ends with status 1."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import parity_experts
import parity_matrix
import pytest
from parity_experts import FAMILIES, ExpertRow
from parity_matrix import DenseRow, choose, report
from parity_row import Row

from tests.support.expert_layouts import DISPATCHERS
from tests.support.layouts import UNFUSED, Layout, all_layouts

KINDS = (DenseRow, ExpertRow)
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


def good(kind: type[Row], name: str = "tp1", **changes: Any) -> Any:
    return kind(name=name, ranks=1, **{**dict.fromkeys(kind.figures(), 1e-7), **changes})


@pytest.mark.parametrize(
    ("kind", "figure"), [(kind, figure) for kind in KINDS for figure in kind.figures()], ids=str
)
@pytest.mark.parametrize("value", [1.0, float("nan")])
def test_one_figure_out_of_bounds_is_not_exact(kind: type[Row], figure: str, value: float) -> None:
    assert good(kind).exact
    assert not good(kind, **{figure: value}).exact
    assert not good(kind, problem="a rank failed").exact


@pytest.mark.parametrize("kind", KINDS)
def test_every_figure_stands_below_its_heading(kind: type[Row]) -> None:
    values = {name: float(number) for number, name in enumerate(kind.figures(), 1)}
    cells = dict(zip(kind.heading(), good(kind, **values).cells, strict=True))
    for name, heading in kind.figures().items():
        assert float(cells[heading]) == values[name]


def test_experts_are_cut_in_every_way() -> None:
    jobs = parity_experts.choose([1, 2, 4], None)
    first = [job.cut for job in jobs if job.model == FAMILIES[0]]
    degrees = {(cut.ep, cut.etp, cut.layout.tp, cut.layout.pp, cut.layout.sequence_parallel) for cut in first}
    for ep, etp, tp, pp in itertools.product((1, 2, 4), (1, 2), (1, 2), (1, 2)):
        if pp * max(tp, ep * etp) <= 4:
            for sequence_parallel in {False, tp > 1}:
                assert (ep, etp, tp, pp, sequence_parallel) in degrees
    assert {cut.layout.vpp for cut in first} == {1, 2}
    assert {cut.layout.attention for cut in first} == {"whole", "ring", "ulysses"}
    assert {cut.dispatcher for cut in first} == {*DISPATCHERS}
    assert {job.model for job in jobs} == {*FAMILIES}
    assert {job.ranks for job in jobs} == {1, 2, 4}
    assert {job.model for job in parity_experts.choose([2], "glm4")} == {"glm4-moe"}


def test_the_report_counts_and_names_what_is_not_exact() -> None:
    bad = DenseRow(name="tp2-none", ranks=2, problem="replicas differ")
    text = report([good(DenseRow), bad], [good(ExpertRow, "mixtral ep2")], 90.0)
    assert "2 of 3 layouts are exact" in text
    (line,) = [line for line in text.splitlines() if line.startswith("| tp2")]
    assert "NO replicas differ" in line
    assert "| mixtral ep2" in text
    assert "Mixtures of experts" not in report([good(DenseRow)], [], 90.0)


def test_a_layout_that_is_not_exact_ends_with_1(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(
        parity_matrix,
        "measure",
        lambda _bench, layout, _turn: good(DenseRow, str(layout), loss=1e-3 * (layout.tp - 1)),
    )
    monkeypatch.setattr(
        parity_experts,
        "measure",
        lambda _bench, job, _turn: good(ExpertRow, str(job), loss=1e-3 * (job.cut.ep - 1)),
    )
    target = tmp_path / "parity.md"
    assert parity_matrix.main(["--ranks", "1", "--output", str(target)]) == 0
    assert "2 of 2 layouts are exact" in target.read_text()
    assert parity_matrix.main(["--ranks", "1", "--rows", "experts", "--output", str(target)]) == 0
    assert "1 of 1 layouts are exact" in target.read_text()
    assert parity_matrix.main(["--ranks", "2", "--rows", "dense", "--only", "tp2"]) == 1
    assert parity_matrix.main(["--ranks", "2", "--rows", "experts", "--only", "ep2"]) == 1
    assert parity_matrix.main(["--ranks", "1", "--only", "tp2"]) == 2
