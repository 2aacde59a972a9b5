"""Converting, resharding and merging checkpoints."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from mindspeed_lora.config.flags import AT_LEAST_ONE, Check, Section, flag

_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}
_SIZE_WORD = re.compile(r"(\d+(?:\.\d+)?) *([KMGT]?)(i?)B?", re.IGNORECASE)


def parse_size(text: str) -> int:
    """Bytes that ``5GB``, ``500MB``, ``2GiB`` or ``100000`` mean, as Hugging Face reads them; 0 for other words."""
    match = _SIZE_WORD.fullmatch(text.strip())
    if match is None:
        return 0
    number, unit, binary = match.groups()
    power = "KMGT".find(unit.upper()) + 1 if unit else 0
    return int(float(number) * (1024**power if binary else _UNITS[unit.upper()]))


_FINITE = Check("a finite number", math.isfinite)
_SIZE = Check("a size such as 5GB, 500MB or 2GiB", lambda text: parse_size(text) > 0)


@dataclass(frozen=True, kw_only=True)
class ConversionConfig(Section):
    """From which folder to which, in which formats and layout."""

    load_model_type: str | None = flag(
        "format of --load-dir; left out: found from the folder", choices=("hf", "mg", "torch_dist", "peft")
    )
    save_model_type: str | None = flag(
        "format to write",
        choices=("hf", "mg", "torch_dist", "peft"),
        same_as={"save_huggingface_llama": "hf"},
    )
    saver: str | None = flag(
        "module that writes, in older scripts: without --save-model-type it means hf where its name says so, else mg"
    )
    ckpt_format: str | None = flag(
        "form of the mg checkpoint to write: torch is the legacy one, torch_dist megatron-core's distributed one; "
        "with another target, the form of the source",
        choices=("torch", "torch_dist"),
    )
    load_dir: str | None = flag("the model, or with --save-lora-to-hf the adapter, to read", metavar="DIR")
    save_dir: str | None = flag("folder to write to; for hf: into its mg2hf/", metavar="DIR")
    target_tensor_parallel_size: int = flag("mg: tensor-parallel size", 1, check=AT_LEAST_ONE)
    target_pipeline_parallel_size: int = flag("mg: pipeline stages", 1, check=AT_LEAST_ONE)
    target_expert_parallel_size: int = flag(
        "mg: ranks that share the experts of a layer", 1, check=AT_LEAST_ONE
    )
    expert_tensor_parallel_size: int | None = flag(
        "mg: ranks that share each expert's matrices; left out: --target-tensor-parallel-size",
        check=AT_LEAST_ONE,
    )
    moe_tp_extend_ep: bool = flag(
        "mg: tensor-parallel ranks share the experts instead of each expert's matrices, in MindSpeed-LLM's order",
        False,
    )
    moe_grouped_gemm: bool = flag(
        "mg: stack the experts of a rank in weight1 and weight2; with --transformer-impl transformer_engine write them "
        "as weight0, weight1 … of one linear",
        False,
    )
    transformer_impl: str | None = flag(
        "mg: whose names norms get; left out: local", choices=("local", "transformer_engine")
    )
    max_shard_size: str = flag(
        "hf: size of a file of weights at most, as 5GB or 500MB", "5GB", check=_SIZE, metavar="SIZE"
    )
    params_dtype: str | None = flag(
        "dtype to write; left out: each tensor keeps its own", choices=("fp32", "bf16", "fp16")
    )
    lora_load: tuple[str, ...] | None = flag(
        "adapters to merge, in this order: PEFT folders, --save folders or their iter_*; with --save-model-type peft "
        "the one to export",
        metavar="DIR",
    )
    lora_weights: tuple[float, ...] | None = flag(
        "factor on each adapter's B·A, one for each of --lora-load; left out: 1", check=_FINITE, metavar="W"
    )
    unmerge: bool = flag("subtract --lora-load from a --load-dir that it was merged into", False)
    extract_lora: bool = flag(
        "write the rank --lora-r adapter nearest to --load-dir minus --extract-base", False
    )
    extract_base: str | None = flag(
        "with --extract-lora: the model that --load-dir was trained from", metavar="DIR"
    )
    pad_vocab_size_to: int | None = flag(
        "mg: pad the vocabulary to this size", check=AT_LEAST_ONE, metavar="N"
    )
    save_lora_to_hf: bool = flag("write only the adapter, as a PEFT folder", False)
    hf_cfg_dir: str | None = flag("folder of the configuration and tokenizer files for hf", metavar="DIR")
    model_type_hf: str | None = flag("the model's family; left out: found from config.json")
    w_pack: bool | None = flag("the Hugging Face model holds q, k and v in one tensor; must agree with it")
    model_type: str | None = flag("kind of model", choices=("GPT",))
    tokenizer_model: str | None = flag(
        "tokenizer file of the source (found beside the weights when left out)", metavar="PATH"
    )
    load_checkpoint_loosely: bool = flag("accept a --load-dir that holds only an adapter", False)
    base_model_name: str | None = flag("base_model_name_or_path of the adapter; left out: where it came from")
    overwrite: bool = flag("replace an existing target", False)
    resume: bool = flag(
        "go on with a conversion to this target that was killed, after its last finished file", False
    )
    no_checking: bool = flag("do not compare what is read with the source's checksums.json", False)
    workers: int = flag(
        "threads that read, change and write, each one tensor at a time", 2, check=AT_LEAST_ONE
    )

    @property
    def exports_adapter(self) -> bool:
        """Whether an adapter is written alone, as it is."""
        return self.save_lora_to_hf or "peft" in (self.load_model_type, self.save_model_type)

    @property
    def max_shard_bytes(self) -> int:
        """``--max-shard-size`` in bytes."""
        return parse_size(self.max_shard_size)
