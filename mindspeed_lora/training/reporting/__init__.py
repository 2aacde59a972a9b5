"""What a run tells while it goes.

The training loop of rank 0 has a :class:`Reporter`, the other ranks have :meth:`Reporter.silent`; each step
ends with a :class:`StepRecord`, each evaluation with an :class:`EvaluationRecord`.
"""

from mindspeed_lora.training.reporting.layout import ParameterCounts, layout_lines, layout_rows
from mindspeed_lora.training.reporting.model_flops import ModelFlops
from mindspeed_lora.training.reporting.records import EvaluationRecord, StepRecord
from mindspeed_lora.training.reporting.reporter import Reporter

__all__ = [
    "EvaluationRecord",
    "ModelFlops",
    "ParameterCounts",
    "Reporter",
    "StepRecord",
    "layout_lines",
    "layout_rows",
]
