"""Experts over a slow link: that every way computes the same, and on this machine, if it may, a small sweep."""

from __future__ import annotations

import json
from pathlib import Path

import moe_overlap
import pytest
import torch
from comparison.expert_layers import ExpertLayers, ExpertSizes
from comparison.rate_limited_link import why_not

from mindspeed_lora.config.parallel import ParallelConfig
from mindspeed_lora.models.layers_by_turns import goes_by_turns
from mindspeed_lora.parallel.groups import destroy_groups, initialize_groups
from tests.support.pool import WorkerPool

Tensors = list[torch.Tensor]


def outputs_and_gradients() -> dict[str, Tensors]:
    """Of every way, on one of two ranks."""
    groups, _ = initialize_groups(ParallelConfig(expert_model_parallel_size=2), 1)
    layers = ExpertLayers(ExpertSizes(hidden_size=192, ffn_hidden_size=64, layers=3, seq_length=12), groups)
    for factor in layers.factors:
        torch.nn.init.normal_(factor, std=0.05, generator=torch.Generator().manual_seed(factor.numel()))
    found = {}
    for way in (None, "rows", "tokens"):
        layers.use(way)
        assert goes_by_turns(layers.decoder, 2) == (way == "rows")
        assert not goes_by_turns(layers.decoder, 1)
        output = layers.output()
        output.backward(layers.grad)
        gradients = [tensor.grad for tensor in (layers.x, *layers.factors)]
        found[str(way)] = [output.detach(), *(grad for grad in gradients if grad is not None)]
        for tensor in (layers.x, *layers.factors):
            tensor.grad = None
    destroy_groups()
    return found


def test_every_way_computes_the_same(workers: WorkerPool) -> None:
    """Sums over a half's rows, and then over halves, have another order: rounding of fp32."""
    for found in workers.run(2, outputs_and_gradients):
        waits = found.pop("None")
        # The output, the input's gradient, and those of two factors of four linears of three layers.
        assert len(waits) == 2 + 2 * 4 * 3
        for tensors in found.values():
            for one, other in zip(tensors, waits, strict=True):
                assert (one - other).norm() <= 1e-5 * other.norm()


def test_where_there_can_be_no_slow_link_it_is_skipped(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(moe_overlap, "why_not", lambda: "Operation not permitted")
    assert moe_overlap.main([]) == 0
    assert "skipped" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.skipif(why_not() is not None, reason=f"no network namespace with a limited rate: {why_not()}")
def test_a_small_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "found.json"
    words = ["--hidden-size", "192", "--layers", "2", "--seq-length", "32", "--repeats", "1"]
    assert moe_overlap.main([*words, "--json", str(target)]) == 0
    found = json.loads(target.read_text())
    assert [rate["ratio"] for rate in found["rates"]] == [0.25, 0.5, 1.0, None]
    for rate in found["rates"]:
        assert set(rate["ways"]) == {"waits", "rows by turns", "tokens by turns"}
        assert rate["ways"]["waits"]["speedup"] == 1.0
    assert "times waiting" in capsys.readouterr().out
