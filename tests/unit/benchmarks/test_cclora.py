"""The sweep over link rates: what is computed from its seconds, and on this machine, if it may, a small one."""

from __future__ import annotations

import json
from pathlib import Path

import cclora
import pytest
from comparison.rate_limited_link import why_not


def test_figures_follow_from_the_seconds() -> None:
    rate = {
        "compute_seconds": 1.0,
        "communication_seconds": 0.5,
        "step_seconds": {"unfused": [1.5, 9.0, 1.4], "fused": [1.1]},
    }
    ways = cclora.with_figures(rate)["ways"]
    assert ways["unfused"] == pytest.approx({"seconds": 1.5, "speedup": 1.0, "hidden": 0.0, "of_bound": 1.5})
    assert ways["fused"] == pytest.approx(
        {"seconds": 1.1, "speedup": 1.5 / 1.1, "hidden": 0.8, "of_bound": 1.1}
    )


def test_where_there_can_be_no_slow_link_it_is_skipped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cclora, "why_not", lambda: "Operation not permitted")
    assert cclora.main([]) == 0
    assert "skipped" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(why_not() is not None, reason=f"no network namespace with a limited rate: {why_not()}")
def test_a_small_sweep(tmp_path: Path) -> None:
    target = tmp_path / "found.json"
    words = ["--hidden-size", "256", "--layers", "1", "--seq-length", "32", "--repeats", "1"]
    assert cclora.main([*words, "--json", str(target)]) == 0
    found = json.loads(target.read_text())
    assert [rate["ratio"] for rate in found["rates"]] == [0.25, 0.5, 1.0, 2.0, None]
    for rate in found["rates"]:
        assert set(rate["ways"]) == set(rate["plans"]) == set(rate["peak_bytes"])
        assert rate["plans"]["published, merge"]["linear_qkv"] == "overlapped, merge"
        assert rate["plans"]["unfused"]["linear_fc2"] == "unfused"
