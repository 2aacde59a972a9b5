"""When a linear with an adapter computes what, and what travels between the ranks meanwhile.

Three families give the same numbers: :mod:`one_collective` (the adapter's part rides on the base's collective),
:mod:`overlapped` (CCLoRA as published: r-wide collectives behind products) and :mod:`unfused` (PEFT's Megatron
layers, the base line). ``docs/cclora.md`` derives each of them and draws its timeline.
"""

from mindspeed_lora.adapters.schedules.plan import Family, SchedulePlan

__all__ = ["Family", "SchedulePlan"]
