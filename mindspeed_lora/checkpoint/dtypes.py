"""The dtypes that flags name."""

from __future__ import annotations

import torch

FLAG_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
"""Of ``--params-dtype`` and ``--lora-save-dtype``."""
