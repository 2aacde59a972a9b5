"""The comparison of quantised models on a tiny one: that it works and compares like with like. No figure is judged."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
import qlora
from comparison import quantised
from comparison.setting import Inputs, Setting
from comparison.summary import Spread, Summary

HAS_PEER = all(importlib.util.find_spec(name) for name in ("trl", "datasets", "bitsandbytes"))


@pytest.mark.slow
def test_one_step_of_every_side(
    model: str, data: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    peers = ["trl:4+nf4"] if HAS_PEER else []
    status = qlora.main(
        [
            *("--model", model, "--data", data, "--seq-length", "32", "--steps", "1", "--warmup", "0"),
            *("--repeats", "1", "--threads", "1", "--json", str(out), "--loads", "1", "--gigabytes", "0.01"),
            *("--sides", "ours:4+nf4", "ours:4", *peers),
        ]
    )
    shown = capsys.readouterr()
    assert status == 0, shown.err
    report = json.loads(out.read_text())
    assert report["benchmark"] == "qlora"
    assert [side["name"] for side in report["sides"]][:2] == ["ours, batch 4, 4 bits", "ours, batch 4"]
    figures = report["figures"]
    assert set(figures) >= {"share_of_plain_lora", "quantising_to_reading", "bits_a_weight"}
    assert ("times_of_peer" in figures) == HAS_PEER
    ours, plain, *others = report["sides"]
    assert all(side["losses"] == pytest.approx(ours["losses"], abs=1e-4) for side in others)
    assert plain["losses"] != pytest.approx(ours["losses"], abs=1e-4)
    seconds = report["quantising"]["seconds"]
    assert seconds["read"] > 0 and {*seconds} == {"read", "plain", "quantised"}
    assert "of the speed of our own LoRA" in shown.out


def row(form: str, bits: float) -> dict[str, object]:
    return {"form": form, "bits": bits}


def summary(name: str, tokens_per_second: float) -> Summary:
    spread = Spread.of([tokens_per_second])
    return Summary(
        name=name,
        rows_at_once=4,
        same_rows=True,
        tokens_per_second=spread,
        loss_tokens_per_second=spread,
        step_ms=spread,
        peak_memory_bytes=1,
        process_seconds=1.0,
        real_share=None,
        losses=(1.0,),
    )


def test_figures_are_of_the_right_peers() -> None:
    summaries = [
        summary("ours, batch 4, 4 bits", 180.0),
        summary("ours, batch 4", 200.0),
        summary("TRL, batch 4, 4 bits", 60.0),
        summary("TRL, batch 4, 4 bits, memory kept", 80.0),
    ]
    bytes_of = [row("LoRA", 32.0), row("QLoRA", 4.13), row("QLoRA", 4.16)]
    found = quantised.reached(summaries, {"ratio": 1.4}, bytes_of)
    assert found == pytest.approx(
        {
            "share_of_plain_lora": 0.9,
            "times_of_peer": 2.25,
            "quantising_to_reading": 1.4,
            "bits_a_weight": 4.16,
        }
    )
    assert all(quantised.is_reached(name, value) for name, value in found.items())
    for name, value in {"times_of_peer": 1.9, "quantising_to_reading": 1.6, "bits_a_weight": 4.3}.items():
        assert not quantised.is_reached(name, value)
    assert quantised.reached(summaries[:1], None, []) == {}
    assert len(quantised.told(found).splitlines()) == 4


def test_bytes_are_those_of_the_model(model: str, tmp_path: Path) -> None:
    """In full every weight of the tiny model counts, and of the large ones what their parameters take in bf16."""
    setting = Setting(model=model, data="", threads=1, global_batch_size=4)
    inputs = Inputs(data_prefix="nowhere", rows_file="", start_adapter="nowhere", lengths=())
    found = {
        (row["model"], row["form"]): row
        for row in quantised.memory(setting, inputs, [], tmp_path, measure=False)
    }
    assert found["Llama-2-70B", "LoRA"]["weights"] == pytest.approx(2 * 68.98e9, rel=1e-3)
    assert found["Mixtral-8x7B", "LoRA"]["weights"] == pytest.approx(2 * 46.70e9, rel=1e-3)
    for name in ("Llama-2-70B", "Mixtral-8x7B"):
        assert found[name, "LoRA"]["bits"] == pytest.approx(16)
        assert found[name, "QLoRA"]["bits"] < quantised.BARS["bits_a_weight"]
        assert found[name, "QLoRA"]["total"] < 0.6 * found[name, "LoRA"]["total"]
    assert "Mixtral-8x7B, QLoRA, bf16" in quantised.memory_text([*found.values()])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sides", "ours:4"], "begin with ours:4+nf4"),
        (["--sides", "ours:4+nf4", "trl:8+nf4"], "takes 4 rows at once"),
        (["--sides", "ours:4+nf4", "trl:4+nf5"], "--sides trl:4+nf5: no such side"),
        (["--model", "/nowhere", "--sides", "ours:4+nf4"], "--model /nowhere: there is no config.json"),
    ],
)
def test_what_cannot_be_is_refused(
    arguments: list[str], message: str, model: str, data: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert qlora.main(["--model", model, "--data", data, *arguments]) == 2
    assert message in capsys.readouterr().err
