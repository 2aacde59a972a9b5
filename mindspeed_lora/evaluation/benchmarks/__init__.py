"""The benchmarks that are built in, one file a form of question."""

from __future__ import annotations

from mindspeed_lora.evaluation.benchmark import Benchmark
from mindspeed_lora.evaluation.benchmarks.agieval import AgiEval
from mindspeed_lora.evaluation.benchmarks.bbh import BigBenchHard
from mindspeed_lora.evaluation.benchmarks.boolq import BoolQ
from mindspeed_lora.evaluation.benchmarks.gsm8k import Gsm8k
from mindspeed_lora.evaluation.benchmarks.hellaswag import HellaSwag
from mindspeed_lora.evaluation.benchmarks.human_eval import HumanEval
from mindspeed_lora.evaluation.benchmarks.letter_tests import ceval, cmmlu, mmlu, mmlu_ppl
from mindspeed_lora.evaluation.benchmarks.needlebench import NeedleBench


def benchmark(name: str) -> Benchmark:
    """The benchmark of that name, one of :data:`mindspeed_lora.config.evaluation.BENCHMARKS`."""
    makers = {
        "mmlu": mmlu,
        "mmlu_ppl": mmlu_ppl,
        "cmmlu": cmmlu,
        "ceval": ceval,
        "gsm8k": Gsm8k,
        "boolq": BoolQ,
        "bbh": BigBenchHard,
        "agieval": AgiEval,
        "human_eval": HumanEval,
        "hellaswag": HellaSwag,
        "needlebench": NeedleBench,
    }
    made: Benchmark = makers[name]()
    return made
