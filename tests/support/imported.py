"""Imports what every process of the tests needs; those are forks of the process that has done so."""

from __future__ import annotations

from importlib import import_module

from mindspeed_lora.device.megatron_import import import_megatron

import_megatron()
for _name in ("mindspeed_lora.inference.main", "mindspeed_lora.training.main"):
    import_module(_name)
