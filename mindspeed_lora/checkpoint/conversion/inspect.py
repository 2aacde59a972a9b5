"""``convert_ckpt.py inspect DIR``: what a folder is, from names, headers and small files; weights are never read.

``--json`` prints one object. What a folder does not have is null; keys are never left out:

* ``path``, ``format`` (``hf``, ``mg``, ``torch_dist``, ``peft``, ``run``: a training's ``--save`` folder or one of
  its ``iter_*``, ``hf_config``: a configuration without weights), ``bytes`` and ``files`` on disk;
* ``model``: :func:`~mindspeed_lora.checkpoint.conversion.inspect_model.describe_model`;
* ``adapter``: :func:`~mindspeed_lora.checkpoint.conversion.inspect_adapter.describe_adapter_folder`;
* ``run``: :func:`~mindspeed_lora.checkpoint.conversion.inspect_run.describe_run`;
* ``tensors``: with ``--tensors`` every tensor of the model, then of the adapter: ``name``, ``shape``, ``dtype``,
  ``bytes`` and ``parts``, the tensors in files that it is made of, each with ``name``, ``file`` and ``shape``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from mindspeed_lora.checkpoint.conversion.file_sizes import disk_use
from mindspeed_lora.checkpoint.conversion.inspect_adapter import adapter_tensors, describe_adapter_folder
from mindspeed_lora.checkpoint.conversion.inspect_model import describe_model, describe_shape, model_tensors
from mindspeed_lora.checkpoint.conversion.inspect_run import describe_run
from mindspeed_lora.checkpoint.conversion.inspect_text import report_lines
from mindspeed_lora.checkpoint.formats.hf import shape_of
from mindspeed_lora.checkpoint.formats.mcore_files import find_iteration
from mindspeed_lora.checkpoint.formats.model_files import kept_origin
from mindspeed_lora.checkpoint.peft.config import CONFIG_FILE
from mindspeed_lora.checkpoint.peft.folder import ADAPTER_FOLDER
from mindspeed_lora.checkpoint.source import open_source
from mindspeed_lora.config.jobs import InspectJob
from mindspeed_lora.errors import Refused
from mindspeed_lora.training.run_folder import SavedRun, find_saved_run

_WEIGHTS = ("*.safetensors*", "*.bin*", "*.pt", "*.distcp")


def inspect(job: InspectJob) -> None:
    """Print what a folder is.

    Raises:
        Refused: there is no such folder, or it is none that is known, or it is damaged.
    """
    report = describe_folder(Path(job.inspect.dir or ""), job.inspect.tensors)
    text = json.dumps(report, indent=2, ensure_ascii=False) if job.inspect.json else None
    print(text or "\n".join(report_lines(report)), flush=True)


def describe_folder(folder: Path, with_tensors: bool = False) -> dict[str, Any]:
    """The report of a folder, in the form that the module describes."""
    if not folder.is_dir():
        found = "is a file; give its folder" if folder.exists() else "no such folder"
        raise Refused(f"inspect {folder}: {found}.")
    number, size = disk_use(folder)
    report: dict[str, Any] = {"path": str(folder), "format": None, "bytes": size, "files": number}
    report.update(dict.fromkeys(("model", "adapter", "run", "tensors")))
    tensors: list[dict[str, Any]] = []
    saved = find_saved_run(folder)
    if saved is not None:
        report["format"] = "run"
        report["run"] = describe_run(saved, folder)
        _add_parts_of_run(report, tensors, saved)
    elif (folder / CONFIG_FILE).is_file():
        report["format"] = "peft"
        _add_adapter(report, tensors, folder)
    elif _is_configuration(folder):
        report["format"] = "hf_config"
        report["model"] = describe_shape(shape_of(folder), kept_origin(folder))
    else:
        _add_model(report, tensors, folder)
        report["format"] = report["model"]["format"]
    if with_tensors:
        report["tensors"] = tensors
    return report


def _add_parts_of_run(report: dict[str, Any], tensors: list[dict[str, Any]], saved: SavedRun) -> None:
    """The model and the adapter that lie in an iteration's folder."""
    if find_iteration(saved.folder) is not None:
        _add_model(report, tensors, saved.folder)
    if (saved.folder / ADAPTER_FOLDER / CONFIG_FILE).is_file():
        _add_adapter(report, tensors, saved.folder / ADAPTER_FOLDER)


def _add_adapter(report: dict[str, Any], tensors: list[dict[str, Any]], folder: Path) -> None:
    report["adapter"] = describe_adapter_folder(folder)
    tensors += adapter_tensors(folder)


def _add_model(report: dict[str, Any], tensors: list[dict[str, Any]], folder: Path) -> None:
    source = open_source(folder, flag="inspect", headers_only=True)
    report["model"] = describe_model(source, folder)
    tensors += model_tensors(source, folder)


def _is_configuration(folder: Path) -> bool:
    """Whether a folder holds a config.json and no weights: an ``hf_config`` folder, or one before its download."""
    if not (folder / "config.json").is_file() or find_iteration(folder) is not None:
        return False
    return not any(True for pattern in _WEIGHTS for _ in folder.glob(pattern))
