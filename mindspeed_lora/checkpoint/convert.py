"""``convert_ckpt.py``: a source, operations on canonical tensors, a target; any formats and layouts."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from mindspeed_lora.atomic import atomic_directory, check_target
from mindspeed_lora.checkpoint.adapter import AdapterSource
from mindspeed_lora.checkpoint.adapter_contradictions import refuse_contradictions
from mindspeed_lora.checkpoint.export_adapter import export_adapter
from mindspeed_lora.checkpoint.hf import shape_of
from mindspeed_lora.checkpoint.hf_writer import write_hf
from mindspeed_lora.checkpoint.mcore import McoreSource, check_same_shape
from mindspeed_lora.checkpoint.mcore_writer import write_mcore
from mindspeed_lora.checkpoint.merge import CastSource, MergedSource
from mindspeed_lora.checkpoint.model_files import HF_CONFIG_FOLDER, replace_tokenizer_files
from mindspeed_lora.checkpoint.progress import Progress, readable_size
from mindspeed_lora.checkpoint.source import Source, open_source
from mindspeed_lora.config.checks import reconcile
from mindspeed_lora.config.conversion import ConversionConfig
from mindspeed_lora.config.jobs import ConversionJob
from mindspeed_lora.config.shape import ModelShape
from mindspeed_lora.errors import Refused
from mindspeed_lora.models.families import check_model_type_hf

HF_OUTPUT_FOLDER = "mg2hf"
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Conversion:
    """What is read, and how it is changed on its way."""

    source: Source
    adapter: AdapterSource | None
    config_dir: Path | None
    """Where a Hugging Face target takes configuration and tokenizer files from."""


def convert(job: ConversionJob) -> None:
    """Run one conversion.

    Raises:
        Refused: before anything is written, when source, flags and target do not fit each other.
    """
    conversion = job.conversion
    assert conversion.load_dir is not None and conversion.save_dir is not None
    target = target_folder(conversion)
    _protect_inputs(job, target)
    check_target(target, conversion.overwrite)
    if conversion.save_lora_to_hf or conversion.save_model_type == "peft":
        _export(job, target)
        return
    plan = open_conversion(job)
    progress = Progress(plan.source)
    with atomic_directory(target, conversion.overwrite) as folder:
        if conversion.save_model_type == "mg":
            _write_mg(job, plan, folder, progress)
        else:
            assert plan.config_dir is not None
            write_hf(plan.source, plan.config_dir, folder, observe=progress)
            if plan.adapter is not None:
                replace_tokenizer_files(plan.adapter.path, folder)
    progress.finish(target)


def target_folder(conversion: ConversionConfig) -> Path:
    """The folder that is written: ``<save-dir>/mg2hf`` for Hugging Face, else ``<save-dir>``."""
    save_dir = Path(conversion.save_dir or "")
    return save_dir / HF_OUTPUT_FOLDER if conversion.save_model_type == "hf" else save_dir


def open_conversion(job: ConversionJob) -> Conversion:
    """Open the source with its operations, everything checked against the flags."""
    conversion, lora = job.conversion, job.lora
    config_dir = _config_dir(conversion)
    source = open_source(conversion.load_dir or "", conversion.load_model_type, config_dir, "--load-dir")
    _check_family(conversion, source)
    reconcile(job.model, source.shape)
    if conversion.save_model_type == "hf":
        config_dir = _check_config_dir(config_dir or source.config_dir, source)
    if isinstance(source, McoreSource) and source.has_unmerged_adapter:
        print(
            f"notice: the LoRA factors in {source.folder} are left out; only its base is read",
            file=sys.stderr,
        )
    adapter: AdapterSource | None = None
    if lora.lora_load is not None:
        adapter = AdapterSource(lora.lora_load, source.shape)
        refuse_contradictions(lora, adapter.config, adapter.hf_modules, source.shape)
        source = MergedSource(source, adapter)
    elif lora.enabled:
        raise Refused(
            "LoRA flags are given without --lora-load; name the adapter to merge, or leave them out."
        )
    if conversion.params_dtype is not None:
        source = CastSource(source, _DTYPES[conversion.params_dtype])
    if conversion.save_model_type == "mg":
        _check_layout(conversion, source.shape)
    return Conversion(source, adapter, config_dir)


def _config_dir(conversion: ConversionConfig) -> Path | None:
    """A folder with config.json named by the flags: ``--hf-cfg-dir``, or for hf the ``--save-dir`` itself."""
    if conversion.hf_cfg_dir is not None:
        folder = Path(conversion.hf_cfg_dir)
        if not (folder / "config.json").is_file():
            raise Refused(f"--hf-cfg-dir {folder}: holds no config.json.")
        return folder
    save_dir = Path(conversion.save_dir or "")
    if conversion.save_model_type == "hf" and (save_dir / "config.json").is_file():
        return save_dir
    return None


def _check_config_dir(config_dir: Path | None, source: Source) -> Path:
    if config_dir is None:
        raise Refused(
            f"the configuration of the Hugging Face model is unknown: {source.path} keeps no "
            f"{HF_CONFIG_FOLDER}; give --hf-cfg-dir, or the original model's folder as --save-dir."
        )
    shape = shape_of(config_dir)
    check_same_shape(source.shape, shape, str(source.path), f"{config_dir}/config.json")
    if shape.vocab_size != source.shape.vocab_size:
        raise Refused(
            f"vocab_size is {source.shape.vocab_size} in {source.path}, but {shape.vocab_size} in "
            f"{config_dir}/config.json."
        )
    return config_dir


def _check_family(conversion: ConversionConfig, source: Source) -> None:
    found = "mg" if isinstance(source, McoreSource) else "hf"
    if conversion.load_model_type not in (None, found):
        raise Refused(f"--load-model-type {conversion.load_model_type}: {source.path} is {found}.")
    check_model_type_hf(conversion.model_type_hf, source.shape.family)


def _check_layout(conversion: ConversionConfig, shape: ModelShape) -> None:
    """Refuse a TP or PP degree that the model cannot be cut into."""
    for flag, size, what, count in (
        ("tensor", conversion.target_tensor_parallel_size, "attention heads", shape.num_attention_heads),
        ("tensor", conversion.target_tensor_parallel_size, "KV heads (query groups)", shape.num_query_groups),
        ("tensor", conversion.target_tensor_parallel_size, "ffn_hidden_size", shape.ffn_hidden_size),
        ("pipeline", conversion.target_pipeline_parallel_size, "layers", shape.num_layers),
    ):
        if count % (size or 1):
            raise Refused(
                f"--target-{flag}-parallel-size {size} does not divide the model's {what} ({count}); "
                f"choose a divisor of {count}."
            )


def _protect_inputs(job: ConversionJob, target: Path) -> None:
    """Refuse a target that holds something that is read: replacing it would delete the input."""
    inputs = {
        "--load-dir": job.conversion.load_dir,
        "--lora-load": job.lora.lora_load,
        "--hf-cfg-dir": job.conversion.hf_cfg_dir,
    }
    for flag, value in inputs.items():
        if value is not None and Path(value).resolve().is_relative_to(target.resolve()):
            raise Refused(
                f"{flag} {value} lies in the folder to be written, {target}; choose another --save-dir."
            )


def _write_mg(job: ConversionJob, plan: Conversion, folder: Path, progress: Progress) -> None:
    conversion, source = job.conversion, plan.source
    write_mcore(
        source,
        folder,
        conversion.target_tensor_parallel_size or 1,
        conversion.target_pipeline_parallel_size or 1,
        job.model.make_vocab_size_divisible_by,
        observe=progress,
    )
    if plan.adapter is not None and source.config_dir is not None:
        replace_tokenizer_files(plan.adapter.path, folder / HF_CONFIG_FOLDER)


def _export(job: ConversionJob, target: Path) -> None:
    conversion, started = job.conversion, time.monotonic()
    path = job.lora.lora_load or conversion.load_dir or ""
    with atomic_directory(target, conversion.overwrite) as folder:
        count = export_adapter(path, folder, job.lora, conversion.base_model_name)
        size = sum(file.stat().st_size for file in folder.iterdir())
    seconds = time.monotonic() - started
    print(f"wrote {target}: {count} tensors, {readable_size(size)}, {seconds:.1f} s", flush=True)
