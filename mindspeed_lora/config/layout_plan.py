"""What ``tools/plan.py`` is told: the job, and the machines that it is to run on."""

from __future__ import annotations

from dataclasses import dataclass

from mindspeed_lora.config.conversion import parse_size
from mindspeed_lora.config.flags import AT_LEAST_ONE, POSITIVE, Check, Section, flag

_SIZE = Check(
    "a size with its unit, such as 80GB or 79GiB", lambda text: text[-1:].isalpha() and parse_size(text) > 0
)
_SHARE = Check("a number above 0, up to 1", lambda value: 0 < value <= 1)


@dataclass(frozen=True, kw_only=True)
class LayoutPlanConfig(Section):
    """The job: a model, the lengths of its rows and its batch."""

    model: str | None = flag("Hugging Face folder; its config.json is enough", metavar="DIR")
    seq_length: int = flag("tokens of a row", 4096, check=AT_LEAST_ONE)
    global_batch_size: int = flag(
        "rows of one optimizer step over all GPUs; left out: the next multiple of --gpus from 128 on",
        128,
        check=AT_LEAST_ONE,
    )
    full: bool = flag("train all parameters in place of an adapter", False)
    data_path: str = flag("for the printed command: prefix of the prepared data", "DATA", metavar="PREFIX")
    save: str = flag("for the printed command: folder of the run", "RUN", metavar="DIR")
    top: int = flag("layouts that are shown", 10, check=AT_LEAST_ONE)
    json: bool = flag("print one JSON object", False)


@dataclass(frozen=True, kw_only=True)
class MachineConfig(Section):
    """The GPUs and what joins them; the defaults are those of H100 SXM with 400 Gbit/s of network each."""

    gpus: int | None = flag("how many", check=AT_LEAST_ONE, metavar="N")
    gpus_per_node: int = flag("of one machine", 8, check=AT_LEAST_ONE)
    gpu_memory: str = flag("memory of each", "80GB", check=_SIZE, metavar="SIZE")
    reserve: str = flag(
        "of it, what CUDA, NCCL and holes between tensors take", "4GB", check=_SIZE, metavar="SIZE"
    )
    tflops: float = flag("peak of bf16 products, TFLOP/s", 989.0, check=POSITIVE)
    efficiency: float = flag("share of the peak that products reach", 0.45, check=_SHARE)
    memory_gb: float = flag("memory bandwidth, GB/s", 3350.0, check=POSITIVE)
    link_gb: float = flag("GB/s that a GPU sends to others of its node", 450.0, check=POSITIVE)
    network_gb: float = flag("GB/s that a GPU sends to other nodes", 50.0, check=POSITIVE)
    latency_us: float = flag("µs that a collective takes however small it is", 12.0, check=POSITIVE)
