"""Child process: the mean loss per loss-carrying token of rows, by transformers with PEFT in fp32."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from transformers import AutoModelForCausalLM


@torch.inference_mode()
def main() -> None:
    """Read the request, judge the adapter, write the loss."""
    request: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text())
    base = AutoModelForCausalLM.from_pretrained(request["model"], dtype=torch.float32)
    model = PeftModel.from_pretrained(base, request["adapter"]).to(request["device"]).eval()
    total, count = 0.0, 0
    for row in json.loads(Path(request["rows_file"]).read_text()):
        tokens, labels = (torch.tensor(row[key], device=request["device"]) for key in ("input_ids", "labels"))
        logits = model(input_ids=tokens.unsqueeze(0)).logits[0, :-1].float()
        total += float(F.cross_entropy(logits, labels[1:], reduction="sum"))
        count += int((labels[1:] != -100).sum())
    Path(request["result"]).write_text(json.dumps({"loss": total / count}))


if __name__ == "__main__":
    main()
