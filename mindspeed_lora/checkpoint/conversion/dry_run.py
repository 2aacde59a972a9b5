"""``--dry-run`` of a conversion: everything is checked as in the real one, and what it would do is told.

Nothing is written, not even a folder made. A ``--load-dir`` without weights is planned from its config.json, one that
is not there from ``--hf-cfg-dir`` or the shape flags; where those tell nothing either, the flags alone are checked.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from pathlib import Path

import torch

from mindspeed_lora.atomic import check_target
from mindspeed_lora.checkpoint.canonical import canonical_tensors
from mindspeed_lora.checkpoint.conversion.convert import (
    check_space,
    open_conversion,
    plan_files,
    protect_inputs,
    target_folder,
)
from mindspeed_lora.checkpoint.conversion.estimate import Estimate, estimate_lines, existing_folder
from mindspeed_lora.checkpoint.conversion.extract import open_extraction
from mindspeed_lora.checkpoint.conversion.inspect_adapter import describe_adapter_folder
from mindspeed_lora.checkpoint.engine import WritePlan
from mindspeed_lora.checkpoint.formats.hf import origin_of, shape_of
from mindspeed_lora.checkpoint.formats.model_files import is_without_weights, model_files
from mindspeed_lora.checkpoint.peft.adapter_file import WEIGHTS_FILE, open_adapter_file
from mindspeed_lora.checkpoint.peft.folder import find_adapter, read_adapter_config
from mindspeed_lora.checkpoint.peft.source import adapter_specs
from mindspeed_lora.checkpoint.source import CheckpointSource, Source
from mindspeed_lora.checkpoint.storage.manifest import manifest_text
from mindspeed_lora.checkpoint.storage.safetensors_writer import SafetensorsLayout
from mindspeed_lora.checkpoint.storage.tensor_writer import FileRecord, TensorRecord, spec_bytes
from mindspeed_lora.config.config_file import to_yaml
from mindspeed_lora.config.jobs import ConversionJob
from mindspeed_lora.config.moe import experts_from_flags
from mindspeed_lora.config.shape import ModelShape
from mindspeed_lora.config.shape_flags import shape_from_flags
from mindspeed_lora.errors import Refused

_TIMED_BYTES = 256 << 20


class ShapeSource(CheckpointSource):
    """A model of which only the shape is known; it can be planned with, not read."""

    def __init__(self, path: Path, shape: ModelShape, config_dir: Path | None) -> None:
        origin = origin_of(config_dir) if config_dir is not None else None
        super().__init__(path, shape, origin, config_dir)

    def dtype(self, name: str) -> torch.dtype:
        """The dtype that the configuration tells."""
        return getattr(torch, self.shape.params_dtype)


def dry_run(job: ConversionJob) -> None:
    """Check a conversion and print what it would do.

    Raises:
        Refused: the conversion cannot be, for the reason that the real one would give.
    """
    conversion, target = job.conversion, target_folder(job.conversion)
    protect_inputs(job, target)
    check_target(target, conversion.overwrite)
    _check_writable(target)
    if missing := _missing_inputs(job):
        for flag, path in missing:
            print(f"notice: {flag} {path} is not there", file=sys.stderr)
        print(f"would write {target}\ndry run: flags checked, nothing read, nothing written", flush=True)
        return
    if conversion.extract_lora:
        estimate, planned = _of_extraction(job), False
    elif conversion.exports_adapter:
        estimate, planned = _of_adapter(job), False
    else:
        job, notices = _without_missing_adapter(job)
        source, told = _stand_in(job)
        for notice in [*notices, *told]:
            print(f"notice: {notice}", file=sys.stderr)
        opened = open_conversion(job, source)
        plan, planned = plan_files(job, opened), source is not None
        config_dir = opened.config_dir or opened.source.config_dir
        estimate = _of_plan(plan, opened.source, config_dir, conversion.workers, is_readable=not planned)
    written = estimate.small_bytes + len(to_yaml(job).encode())
    estimate = dataclasses.replace(estimate, small_bytes=written)
    print("\n".join(estimate_lines(estimate, target)), flush=True)
    if not planned:
        check_space(target, estimate.total_bytes)
    checked = "planned without the weights" if planned else "everything checked"
    print(f"dry run: {checked}, nothing written", flush=True)


def _missing_inputs(job: ConversionJob) -> list[tuple[str, str]]:
    """Flags and paths at which nothing is, where without them nothing can be planned."""
    conversion = job.conversion
    given = [("--load-dir", conversion.load_dir or "")]
    if conversion.extract_lora or conversion.exports_adapter:
        given += [("--lora-load", path) for path in conversion.lora_load or ()]
        given += [("--extract-base", conversion.extract_base or "")] if conversion.extract_lora else []
    else:
        configured = (
            conversion.hf_cfg_dir is not None and (Path(conversion.hf_cfg_dir) / "config.json").is_file()
        )
        if configured or job.model.num_layers is not None:
            return []
    return [(flag, path) for flag, path in given if not Path(path).exists()]


def _check_writable(target: Path) -> None:
    """Refuse a target that could not be made."""
    place = existing_folder(target)
    if not os.access(place, os.W_OK | os.X_OK):
        raise Refused(f"{target}: cannot be written (permission denied: {place}).")


def _without_missing_adapter(job: ConversionJob) -> tuple[ConversionJob, list[str]]:
    """The job without an adapter that is not there; a merge changes no size."""
    conversion = job.conversion
    missing = [path for path in conversion.lora_load or () if not Path(path).exists()]
    if not missing:
        return job, []
    without = dataclasses.replace(conversion, lora_load=None, lora_weights=None, unmerge=False)
    notices = [f"--lora-load {path} is not there: planned without an adapter" for path in missing]
    return dataclasses.replace(job, conversion=without, lora=type(job.lora)()), notices


def _stand_in(job: ConversionJob) -> tuple[Source | None, list[str]]:
    """A source for a ``--load-dir`` without weights, and the notices on it; None where the weights are there."""
    conversion = job.conversion
    folder = Path(conversion.load_dir or "")
    if folder.is_dir():
        if not is_without_weights(folder):
            return None, []
        notice = f"--load-dir {folder} holds no weights: planned from its config.json"
        return ShapeSource(folder, shape_of(folder), folder), [notice]
    if folder.exists():
        return None, []
    if conversion.hf_cfg_dir is not None and (Path(conversion.hf_cfg_dir) / "config.json").is_file():
        place = Path(conversion.hf_cfg_dir)
        notice = f"--load-dir {folder} is not there: planned from {place}/config.json"
        return ShapeSource(folder, shape_of(place), place), [notice]
    shape = experts_from_flags(job.experts, shape_from_flags(job.model))
    return ShapeSource(folder, shape, None), [
        f"--load-dir {folder} is not there: planned from the shape flags"
    ]


def _of_plan(
    plan: WritePlan, source: Source, config_dir: Path | None, workers: int, is_readable: bool
) -> Estimate:
    sizes = {
        name: spec_bytes((source.dtype(name), size)) for name, size in canonical_tensors(source.shape).items()
    }
    name = max(sizes, key=lambda one: sizes[one])
    copied = 0 if config_dir is None else sum(file.stat().st_size for file in model_files(config_dir))
    text = manifest_text(
        {
            path: FileRecord(
                layout.num_bytes,
                0,
                {
                    key: TensorRecord(layout.offsets[key], spec_bytes(spec), 0)
                    for key, spec in layout.specs.items()
                },
            )
            for shard in plan.shards
            for path, layout in shard.files.items()
        }
    )
    return Estimate(
        files=plan.files,
        small_bytes=copied + len(text.encode()),
        largest=(name, sizes[name]),
        read_bytes=sum(sizes.values()),
        workers=workers,
        read_rate=_read_rate(source, name) if is_readable else None,
    )


def _read_rate(source: Source, name: str) -> float | None:
    """Bytes a second at which the largest tensor is read, or its first rows where it is very large."""
    rows, *rest = canonical_tensors(source.shape)[name]
    row = spec_bytes((source.dtype(name), (1, *rest)))
    stop = min(rows, max(1, _TIMED_BYTES // row))
    started = time.perf_counter()
    source.read(name, 0, [(0, stop)])
    return stop * row / max(time.perf_counter() - started, 1e-6)


def _of_adapter(job: ConversionJob) -> Estimate:
    """An adapter that is copied as it is."""
    named = job.conversion.lora_load or (job.conversion.load_dir or "",)
    folder = find_adapter(named[0])
    read_adapter_config(folder)
    describe_adapter_folder(folder)
    size = open_adapter_file(folder).path.stat().st_size
    others = sum(file.stat().st_size for file in folder.iterdir() if file.is_file()) - size
    return Estimate({WEIGHTS_FILE: size}, others, (WEIGHTS_FILE, size), size, 1)


def _of_extraction(job: ConversionJob) -> Estimate:
    """A new adapter; both models are read, and the largest matrix is held in float32 with its decomposition."""
    extraction, config, dtype = open_extraction(job)
    shape = extraction.base.shape
    size = SafetensorsLayout(adapter_specs(shape, config, extraction.spec, dtype)).num_bytes
    part = max(extraction.spec.parts, key=lambda one: one.out_features * one.in_features)
    largest = (part.name, 4 * part.out_features * part.in_features)
    read = sum(
        spec_bytes((extraction.base.dtype(name), full)) for name, full in canonical_tensors(shape).items()
    )
    return Estimate({WEIGHTS_FILE: size}, 0, largest, 2 * read, 1)
