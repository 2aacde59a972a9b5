"""Child process: the prepared rows as JSON, and a starting adapter as a PEFT folder.

B is not zero, as it would be in a new adapter: a side that lost the adapter would then have the same first
loss as one that has it.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path

import torch

from comparison.setting import Setting
from mindspeed_lora.adapters.initial import generator_for, initial_lora_a
from mindspeed_lora.checkpoint.canonical import LINEARS
from mindspeed_lora.checkpoint.peft.plan import plan_adapter
from mindspeed_lora.checkpoint.peft.source import write_adapter
from mindspeed_lora.checkpoint.source import open_source
from mindspeed_lora.config.lora import LoraConfig
from mindspeed_lora.config.shape import ModelShape
from mindspeed_lora.data.sft_dataset import SftDataset

_LORA_B_STD = 0.01


def main() -> None:
    """Read the request, write ``made.json`` beside it."""
    request = json.loads(Path(sys.argv[1]).read_text())
    setting, folder = Setting(**request["setting"]), Path(request["folder"])
    dataset = SftDataset(request["prefix"], setting.seq_length)
    samples = [dataset[index] for index in range(len(dataset))]
    rows = [{"input_ids": s.input_ids.tolist(), "labels": s.labels.tolist()} for s in samples]
    rows_file = folder / "rows.json"
    rows_file.write_text(json.dumps(rows))
    start_adapter = folder / "start"
    _write_start(setting, open_source(setting.model).shape, start_adapter)
    lengths = [(len(s.input_ids), int((s.labels[1:] != -100).sum())) for s in samples]
    made = {"rows_file": str(rows_file), "start_adapter": str(start_adapter), "lengths": lengths}
    (folder / "made.json").write_text(json.dumps(made))


def _write_start(setting: Setting, shape: ModelShape, folder: Path) -> None:
    """An adapter on every linear: A drawn as for a new one, B small and normal."""
    lora = LoraConfig(lora_r=setting.rank, lora_alpha=setting.alpha, lora_target_modules=tuple(LINEARS))
    plan = plan_adapter(lora, shape, setting.seed)
    assert plan is not None

    def draw(name: str) -> torch.Tensor:
        """``lora_a [r, in]`` or ``lora_b [out, r]`` by canonical name."""
        rows, columns = plan.spec.tensors[name]
        if name.endswith("lora_a"):
            return initial_lora_a(setting.seed, name, rows, columns)
        return _LORA_B_STD * torch.randn(rows, columns, generator=generator_for(setting.seed, name))

    config = dataclasses.replace(plan.config, base_model_name=setting.model)
    write_adapter(folder, shape, config, plan.spec, draw)


if __name__ == "__main__":
    main()
