"""``convert_ckpt.py``: a source, operations on canonical tensors, a target; any formats and layouts."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from mindspeed_lora.atomic import atomic_directory, atomic_link, check_target
from mindspeed_lora.checkpoint.conversion.adapters import open_adapters, tokenizer_folder
from mindspeed_lora.checkpoint.conversion.export_adapter import export_adapter
from mindspeed_lora.checkpoint.conversion.extract import extract
from mindspeed_lora.checkpoint.conversion.merge import CastSource, DerivedSource, MergedSource
from mindspeed_lora.checkpoint.conversion.progress import Progress, readable_size
from mindspeed_lora.checkpoint.conversion.quantize import QuantizingSource
from mindspeed_lora.checkpoint.conversion.quantized_form import (
    dequantized_base,
    in_target_form,
)
from mindspeed_lora.checkpoint.conversion.target_layout import (
    check_expert_flags,
    target_experts,
    target_padded_vocab_size,
    target_placement,
)
from mindspeed_lora.checkpoint.dtypes import FLAG_DTYPES
from mindspeed_lora.checkpoint.engine import WritePlan, execute, journal_fingerprint
from mindspeed_lora.checkpoint.formats.hf import shape_of
from mindspeed_lora.checkpoint.formats.hf_writer import plan_hf
from mindspeed_lora.checkpoint.formats.iteration import LATEST_FILE, iteration_folder
from mindspeed_lora.checkpoint.formats.mcore import McoreSource, check_same_shape
from mindspeed_lora.checkpoint.formats.mcore_writer import plan_mcore
from mindspeed_lora.checkpoint.formats.model_files import HF_CONFIG_FOLDER, replace_tokenizer_files
from mindspeed_lora.checkpoint.formats.torch_dist import TorchDistSource
from mindspeed_lora.checkpoint.formats.torch_dist_writer import plan_torch_dist
from mindspeed_lora.checkpoint.peft.folder import ADAPTER_FOLDER
from mindspeed_lora.checkpoint.source import Source, open_source
from mindspeed_lora.config.checks import reconcile
from mindspeed_lora.config.conversion import ConversionConfig
from mindspeed_lora.config.jobs import ConversionJob
from mindspeed_lora.errors import Refused
from mindspeed_lora.models.families import check_model_type_hf, check_w_pack

HF_OUTPUT_FOLDER = "mg2hf"


@dataclass(frozen=True)
class Conversion:
    """What is read, and how it is changed on its way."""

    source: Source
    tokenizer_from: Path | None
    """The adapter whose tokenizer files the target takes; None keeps the source's."""
    config_dir: Path | None
    """Where a Hugging Face target takes configuration and tokenizer files from."""
    stages: tuple[Source, ...] = ()
    """The sources that each is made of the one before, :attr:`source` the last of them."""


def convert(job: ConversionJob) -> None:
    """Run one conversion.

    Raises:
        Refused: before anything is written, when source, flags and target do not fit each other.
    """
    conversion = job.conversion
    assert conversion.load_dir is not None and conversion.save_dir is not None
    if job.runtime.dry_run:
        # It plans with the functions below.
        from mindspeed_lora.checkpoint.conversion.dry_run import dry_run

        dry_run(job)
        return
    target = target_folder(conversion)
    protect_inputs(job, target)
    check_target(target, conversion.overwrite)
    if conversion.extract_lora:
        extract(job, target)
        return
    if conversion.exports_adapter:
        _export(job, target)
        return
    opened = open_conversion(job)
    plan = plan_files(job, opened)
    check_space(target, plan.num_bytes)
    progress, fingerprint = Progress(opened.source), _fingerprint(job, opened)
    with atomic_directory(
        target, conversion.overwrite, _adopter(conversion, fingerprint), conversion.resume
    ) as folder:
        execute(plan, folder, conversion.workers, progress, fingerprint)
    _finish(opened, progress, target, plan.num_bytes)


def _finish(opened: Conversion, progress: Progress, target: Path, num_bytes: int) -> None:
    """Say what was written, and what it lost."""
    derived = [stage for stage in opened.stages if isinstance(stage, DerivedSource)]
    progress.finish(target, num_bytes, derived[-1].losses.of("infinite") if derived else None)
    for stage in opened.stages:
        if isinstance(stage, DerivedSource) and (lost := stage.losses.sentence()) is not None:
            print(f"warning: {lost}", file=sys.stderr)
        if isinstance(stage, MergedSource) and stage.residual is not None:
            print(stage.residual.sentence(), flush=True)
        if isinstance(stage, QuantizingSource) and stage.error is not None:
            told = ("quantised", "merged") if stage is opened.source else ("dequantised", "original")
            print(stage.error.sentence(f"the {told[0]} weights", f"the {told[1]} ones"), flush=True)


def plan_files(job: ConversionJob, opened: Conversion) -> WritePlan:
    """Every file that the conversion writes."""
    conversion, source = job.conversion, opened.source
    if conversion.save_model_type == "hf":
        assert opened.config_dir is not None
        plan = plan_hf(source, opened.config_dir, conversion.max_shard_bytes)
        tokenizer_folder = ""
    else:
        tp_size = conversion.target_tensor_parallel_size
        padded = target_padded_vocab_size(job, source.shape)
        placement, experts = target_placement(job, source.shape), target_experts(job, source.shape)
        fused = conversion.transformer_impl == "transformer_engine"
        if conversion.save_model_type == "torch_dist":
            plan = plan_torch_dist(source, placement, tp_size, padded, fused, experts)
        else:
            # Megatron's stacks are of plain experts.
            grouped = conversion.moe_grouped_gemm and (fused or source.quantization is None)
            plan = plan_mcore(source, placement, tp_size, padded, fused, experts, grouped)
        tokenizer_folder = HF_CONFIG_FOLDER
    tokenizer_from = opened.tokenizer_from
    if tokenizer_from is None or source.config_dir is None:
        return plan

    def finish(folder: Path) -> None:
        plan.finish(folder)
        replace_tokenizer_files(tokenizer_from, folder / tokenizer_folder)

    return dataclasses.replace(plan, finish=finish)


def check_space(target: Path, num_bytes: int) -> None:
    """Refuse a conversion whose files the disk of the target does not hold."""
    parent = next(folder for folder in target.absolute().parents if folder.is_dir())
    free = shutil.disk_usage(parent).free
    if num_bytes > free:
        raise Refused(
            f"{target}: {readable_size(num_bytes)} would be written, but its disk has {readable_size(free)} free; "
            "free some, or choose another --save-dir."
        )


def _fingerprint(job: ConversionJob, opened: Conversion) -> str:
    """Names this conversion: its flags, and the files that it reads as they are now."""
    conversion = job.conversion
    # The target may lie in the configuration's folder.
    read = [
        (conversion.load_dir, "**/*"),
        *((path, "**/*") for path in conversion.lora_load or ()),
        (opened.config_dir, "*.json"),
    ]
    files = [
        (str(path), path.stat().st_size, path.stat().st_mtime_ns)
        for folder, pattern in read
        if folder is not None
        for path in sorted(Path(folder).glob(pattern))
        if path.is_file()
    ]
    ways = dataclasses.replace(conversion, overwrite=False, resume=False, no_checking=False, workers=1)
    family_file = job.runtime.family_file
    family = Path(family_file).read_bytes() if family_file is not None else b""
    text = repr((ways, job.stages, job.lora, job.model, job.experts, job.quantization, files, family))
    return hashlib.sha256(text.encode()).hexdigest()


def _adopter(conversion: ConversionConfig, fingerprint: str) -> Callable[[Path], bool] | None:
    """With ``--resume``: takes the temporary folder of this very conversion."""
    if not conversion.resume:
        return None

    def adopt(folder: Path) -> bool:
        found = journal_fingerprint(folder)
        if found == fingerprint:
            print(f"resuming the conversion in {folder}", flush=True)
        elif found is not None:
            print(
                f"notice: --resume: {folder} is of a conversion with other flags or files; starting anew",
                file=sys.stderr,
            )
        return found == fingerprint

    return adopt


def target_folder(conversion: ConversionConfig) -> Path:
    """The folder that is written: ``<save-dir>/mg2hf`` for Hugging Face, else ``<save-dir>``."""
    save_dir = Path(conversion.save_dir or "")
    return save_dir / HF_OUTPUT_FOLDER if conversion.save_model_type == "hf" else save_dir


def open_conversion(job: ConversionJob, planned: Source | None = None) -> Conversion:
    """Open the source with its operations, everything checked against the flags.

    ``planned`` stands for a ``--load-dir`` that is not there, in a dry run.
    """
    conversion, lora = job.conversion, job.lora
    config_dir = _config_dir(conversion)
    if planned is None:
        source = open_source(
            conversion.load_dir or "",
            conversion.load_model_type,
            config_dir,
            "--load-dir",
            checking=not conversion.no_checking,
        )
        _check_family(conversion, source)
    else:
        source = planned
    check_expert_flags(job, reconcile(job.model, source.shape))
    if conversion.save_model_type == "hf":
        config_dir = _check_config_dir(config_dir or source.config_dir, source)
    if (
        isinstance(source, (McoreSource, TorchDistSource))
        and source.has_unmerged_adapter
        and not lora.enabled
    ):
        print(
            f"notice: the LoRA factors in {source.folder} are left out; only its base is read (--lora-load of the same "
            "folder merges them)",
            file=sys.stderr,
        )
    dtype = None if conversion.params_dtype is None else FLAG_DTYPES[conversion.params_dtype]
    lora_load = conversion.lora_load
    if lora_load is None and lora.enabled and isinstance(source, McoreSource) and source.has_unmerged_adapter:
        # Base and adapter in one checkpoint.
        lora_load = (conversion.load_dir or "",)
    if lora_load is None and lora.enabled:
        raise Refused(
            "LoRA flags are given without --lora-load; name the adapter to merge, or leave them out."
        )
    adapters = open_adapters(lora_load or (), conversion.lora_weights, lora, source.shape, conversion.unmerge)
    stages = [source]
    if adapters:
        stages.append(dequantized_base(job, stages[-1]))
        stages.append(MergedSource(stages[-1], adapters, dtype, conversion.unmerge))
    elif dtype is not None:
        stages.append(CastSource(source, dtype))
    stages.append(in_target_form(job, stages[-1], source.quantization))
    return Conversion(stages[-1], tokenizer_folder(adapters, conversion.unmerge), config_dir, tuple(stages))


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
    if isinstance(source, TorchDistSource):
        found = "torch_dist"
    wanted = conversion.load_model_type
    if wanted not in (None, found) and (wanted, found) != ("mg", "torch_dist"):
        raise Refused(f"--load-model-type {wanted}: {source.path} is {found}.")
    of_source = conversion.save_model_type not in ("mg", "torch_dist")
    if of_source and conversion.ckpt_format not in (None, {"mg": "torch"}.get(found, found)):
        raise Refused(f"--ckpt-format {conversion.ckpt_format}: {source.path} is {found}.")
    check_model_type_hf(conversion.model_type_hf, source.shape.family)
    check_w_pack(conversion.w_pack, source.shape.family)


def protect_inputs(job: ConversionJob, target: Path) -> None:
    """Refuse a target that holds something that is read: replacing it would delete the input."""
    conversion = job.conversion
    inputs = [
        ("--load-dir", conversion.load_dir),
        *(("--lora-load", path) for path in conversion.lora_load or ()),
        ("--extract-base", conversion.extract_base),
        ("--hf-cfg-dir", conversion.hf_cfg_dir),
        ("--family-file", job.runtime.family_file),
    ]
    for flag, value in inputs:
        if value is not None and Path(value).resolve().is_relative_to(target.resolve()):
            raise Refused(
                f"{flag} {value} lies in the folder to be written, {target}; choose another --save-dir."
            )


def _export(job: ConversionJob, target: Path) -> None:
    conversion, started = job.conversion, time.monotonic()
    path = conversion.lora_load[0] if conversion.lora_load else conversion.load_dir or ""
    if conversion.save_model_type == "hf" and not conversion.save_lora_to_hf:
        raise Refused(
            f"--load-model-type peft: {path} is an adapter; add --save-lora-to-hf to write it alone, or merge it with "
            "its base model as --load-dir and the adapter as --lora-load."
        )
    with atomic_directory(target, conversion.overwrite) as folder:
        place = folder
        if conversion.save_model_type == "mg":
            place = iteration_folder(folder, 1) / ADAPTER_FOLDER
        count = export_adapter(path, place, job.lora, conversion.base_model_name, _config_dir(conversion))
        if place != folder:
            atomic_link(folder / ADAPTER_FOLDER, str(place.relative_to(folder)))
            (folder / LATEST_FILE).write_text("1", encoding="utf-8")
        size = sum(file.stat().st_size for file in place.iterdir())
    seconds = time.monotonic() - started
    print(f"wrote {target}: {count} tensors, {readable_size(size)}, {seconds:.1f} s", flush=True)
