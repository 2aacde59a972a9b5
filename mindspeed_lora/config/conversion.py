"""Converting, resharding and merging checkpoints."""

from __future__ import annotations

from dataclasses import dataclass

from mindspeed_lora.config.flags import AT_LEAST_ONE, Section, flag


@dataclass(frozen=True, kw_only=True)
class ConversionConfig(Section):
    """From which folder to which, in which formats and layout."""

    load_model_type: str | None = flag(
        "format of --load-dir; left out: found from the folder", choices=("hf", "mg")
    )
    save_model_type: str | None = flag("format to write", choices=("hf", "mg", "peft"))
    load_dir: str | None = flag("the model, or with --save-lora-to-hf the adapter, to read", metavar="DIR")
    save_dir: str | None = flag("folder to write to; for hf: into its mg2hf/", metavar="DIR")
    target_tensor_parallel_size: int = flag("mg: tensor-parallel size", 1, check=AT_LEAST_ONE)
    target_pipeline_parallel_size: int = flag("mg: pipeline stages", 1, check=AT_LEAST_ONE)
    params_dtype: str | None = flag(
        "dtype to write; left out: each tensor keeps its own", choices=("fp32", "bf16", "fp16")
    )
    save_lora_to_hf: bool = flag("write only the adapter, as a PEFT folder", False)
    hf_cfg_dir: str | None = flag("folder of the configuration and tokenizer files for hf", metavar="DIR")
    model_type_hf: str | None = flag("the model's family; left out: found from config.json")
    model_type: str | None = flag("kind of model", choices=("GPT",))
    tokenizer_model: str | None = flag(
        "tokenizer file of the source (found beside the weights when left out)", metavar="PATH"
    )
    load_checkpoint_loosely: bool = flag("accept a --load-dir that holds only an adapter", False)
    base_model_name: str | None = flag("base_model_name_or_path of the adapter; left out: where it came from")
    overwrite: bool = flag("replace an existing target", False)
