"""The comparison of experts on a tiny model: that it works and compares like with like. No figure is judged."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import moe
import pytest
import torch
from comparison import experts
from comparison.setting import Inputs, Setting
from comparison.summary import Spread, Summary
from transformers import AutoModelForCausalLM

HAS_TRL = importlib.util.find_spec("trl") is not None


@pytest.mark.slow
def test_one_step_of_every_side(
    model: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    peers = ["trl:8+kept+eager"] if HAS_TRL else []
    status = moe.main(
        [
            *("--model", model, "--data", data, "--rows", "8", "--steps", "1", "--warmup", "0"),
            *("--repeats", "1", "--threads", "1", "--json", str(out)),
            *("--sides", "ours:packed", "dense:packed", *peers),
        ]
    )
    shown = capsys.readouterr()
    assert status == 0, shown.err
    report = json.loads(out.read_text())
    assert report["benchmark"] == "moe"
    assert [side["name"] for side in report["sides"]][:2] == ["ours, packed", experts.DENSE]
    assert report["figures"]["dense_rate_share"]["value"] > 0
    assert ("times_at_its_best" in report["figures"]) == HAS_TRL
    ours, dense, *others = report["sides"]
    assert all(side["losses"] == pytest.approx(ours["losses"], abs=1e-4) for side in others)
    # Its adapter is another one.
    assert dense["losses"] != pytest.approx(ours["losses"], abs=1e-4)
    assert "of the dense model's rate" in shown.out


@pytest.mark.slow
def test_all_models_compute_the_same(model: str, data: str, tmp_path: Path) -> None:
    """The dense one that it is made of, the up-cycled one, and the wider one."""
    setting = Setting(model=model, data=data, rows=8, threads=1)
    mixture, dense = experts.make_jobs(setting, 4, 2, tmp_path)
    tokens = torch.arange(5, 45).unsqueeze(0)
    loaded = [
        AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        for folder in (model, mixture.setting.model, dense.setting.model)
    ]
    original, upcycled, wider = (one(tokens).logits.detach() for one in loaded)
    assert torch.allclose(upcycled, original, atol=1e-4) and torch.allclose(wider, original, atol=1e-4)
    active = (one.num_parameters() for one in loaded[1:])
    experts_and_router = 2 * (2 * 3 * 48 * 80 + 4 * 48)
    assert next(active) - experts_and_router == next(active)
    assert mixture.flop_per_token > dense.flop_per_token  # by the router


def summary(name: str, tokens_per_second: float, memory: int) -> Summary:
    spread = Spread.of([tokens_per_second])
    return Summary(
        name=name,
        rows_at_once=None,
        same_rows=True,
        tokens_per_second=spread,
        loss_tokens_per_second=spread,
        step_ms=spread,
        peak_memory_bytes=memory,
        process_seconds=1.0,
        real_share=None,
        losses=(1.0,),
    )


def test_figures_are_of_the_right_peers() -> None:
    inputs = Inputs(data_prefix="", rows_file="", start_adapter="", lengths=((10, 5), (30, 5)))
    setting = Setting(model="m", data="d", global_batch_size=2, warmup=0, steps=1)
    mixture = experts.Job(setting=setting, inputs=inputs, flop_per_token=80e6, flop_per_token_and_length=1e6)
    dense = experts.Job(setting=setting, inputs=inputs, flop_per_token=180e6, flop_per_token_and_length=1e6)
    summaries = [
        summary("ours, packed", 300.0, 50),
        summary(experts.DENSE, 200.0, 40),
        summary("TRL, batch 8", 100.0, 400),
        summary("TRL, packed", 60.0, 500),
        summary("TRL, batch 8, eager experts", 120.0, 100),
        summary("TRL, packed, memory kept", 150.0, 10),
    ]
    found = experts.reached(summaries, mixture, dense)
    assert found == pytest.approx(
        {
            "times_as_it_comes": 3.0,
            "memory_share": 0.5,
            "times_at_its_best": 2.5,
            "times_of_all": 2.0,
            # 300 tokens/s of 100 MFLOP against 200 of 200.
            "dense_rate_share": 0.75,
        }
    )
    assert all(experts.is_reached(name, value) for name, value in found.items())
    assert not experts.is_reached("memory_share", 0.71) and not experts.is_reached("times_at_its_best", 1.2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sides", "trl:8"], "begin with ours:packed"),
        (["--sides", "ours:packed", "trl:8+fast"], "--sides trl:8+fast: no such side"),
        (["--model", "/nowhere"], "--model /nowhere: there is no config.json"),
    ],
)
def test_what_cannot_be_is_refused(
    arguments: list[str], message: str, model: str, data: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert moe.main(["--model", model, "--data", data, *arguments]) == 2
    assert message in capsys.readouterr().err
