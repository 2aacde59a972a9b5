"""Runs over a quantised base: saved, taken up again, and their adapter in PEFT on the model of bitsandbytes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mindspeed_lora.errors import Refused
from tests.support.parity import ParityBench
from tests.support.quantized import Quant
from tests.support.reference import Reference
from tests.support.tiny import Tiny, plan
from tests.support.training import train, train_recorded

NESTED = Quant(double=True)
SPLIT = {"split": "80,20,0", "eval_iters": -1, "eval_interval": 2}


def losses(save: Path) -> dict[int, list[float]]:
    """Of each iteration the training loss, and the validation loss where there is one."""
    found: dict[int, list[float]] = {}
    for line in (save / "metrics.jsonl").read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        found.setdefault(record["iteration"], []).append(record.get("lm_loss", record.get("eval_loss")))
    return found


@pytest.mark.parametrize("tp", [1, 2])
def test_a_run_goes_on_bit_for_bit(tiny: Tiny, tmp_path: Path, bench: ParityBench, tp: int) -> None:
    words = tiny.words(save_interval=2, tensor_model_parallel_size=tp, qlora=True, quant_double=True, **SPLIT)
    whole, second = tmp_path / "whole", tmp_path / "second"
    assert set(bench.workers.run(tp, train, [*words, "--save", str(whole)])) == {0}
    again = [*words, "--save", str(second), "--lora-load", str(whole / "iter_0000002"), "--lora-r", "4"]
    assert set(bench.workers.run(tp, train, again)) == {0}
    expected = losses(whole)
    assert losses(second) == {iteration: expected[iteration] for iteration in (3, 4)}
    assert len(expected[4]) == 2
    ours, theirs = (load_file(run / "adapter" / "adapter_model.safetensors") for run in (second, whole))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    state = json.loads((whole / "iter_0000004" / "run_state.json").read_text(encoding="utf-8"))
    assert state["quantization"] == {"kind": "nf4", "block_size": 64, "double": True, "weights": 16}
    for other in (
        {},
        {"qlora": True},
        {"qlora": True, "quant_double": True, "quant_skip_modules": ("o_proj",)},
    ):
        with pytest.raises(Refused, match="was trained on a base that was quantised"):
            plan(tiny.words(lora_load=whole, **other))


def test_the_adapter_works_on_the_quantised_model_of_transformers(
    tiny: Tiny, tmp_path: Path, bench: ParityBench
) -> None:
    save = tmp_path / "run"
    words = tiny.words(save=save, tensor_model_parallel_size=2, qlora=True, quant_double=True)
    probe = torch.randint(0, 131, (1, 24), generator=torch.Generator().manual_seed(1))
    record = bench.workers.run(2, train_recorded, words, probe)[0]
    reference = Reference(tiny.model, quant=NESTED)
    reference.load_adapter(save / "adapter")
    logits = reference.logits(probe[0].tolist())
    assert record.end_logits is not None and record.start_logits is not None
    torch.testing.assert_close(record.end_logits[:, 0], logits, rtol=0, atol=1e-4)
    assert (record.start_logits - record.end_logits).abs().max() > 0.1


def test_the_base_is_saved_dequantised(tiny: Tiny, tmp_path: Path, bench: ParityBench) -> None:
    """What --lora-save-base writes is the model that the adapter saw: a plain one, with the same logits."""
    words = tiny.words(qlora=True, lora_save_base=True, qlora_save_dequantize=True, train_iters=1)
    probe = torch.randint(0, 131, (1, 24), generator=torch.Generator().manual_seed(1))
    save = tmp_path / "run"
    quantised = bench.workers.run(2, train_recorded, [*words, "--save", str(save), *TP2], probe)[0]
    plain = tiny.words(load=save, lora_load=save / "adapter", lora_r=None, train_iters=1, finetune=True)
    again = bench.workers.run(1, train_recorded, plain, probe)[0]
    assert quantised.end_logits is not None and again.start_logits is not None
    torch.testing.assert_close(again.start_logits, quantised.end_logits, rtol=0, atol=1e-5)


TP2 = ("--tensor-model-parallel-size", "2")
