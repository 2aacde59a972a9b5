"""PEFT adapter folders, by Hugging Face module: found, and checked in full against their model."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch

from mindspeed_lora.checkpoint.canonical import LINEARS, adapter_modules, linear_shapes
from mindspeed_lora.checkpoint.hf import WEIGHT_DTYPES, read_json
from mindspeed_lora.checkpoint.iteration import LATEST_FILE, latest_iteration
from mindspeed_lora.checkpoint.messages import first_few
from mindspeed_lora.checkpoint.peft_config import CONFIG_FILE, AdapterConfig, parse_adapter_config
from mindspeed_lora.checkpoint.safetensors_file import SafetensorsFile
from mindspeed_lora.config.shape import ModelShape
from mindspeed_lora.errors import Refused
from mindspeed_lora.models.families import FAMILIES

WEIGHTS_FILE = "adapter_model.safetensors"
ADAPTER_FOLDER = "adapter"


def factor_name(module: str, factor: str) -> str:
    """Name in ``adapter_model.safetensors`` of factor ``"a"`` or ``"b"`` of a Hugging Face module."""
    return f"base_model.model.{module}.lora_{factor.upper()}.weight"


def hf_linears(shape: ModelShape) -> dict[str, tuple[int, int]]:
    """``(out, in)`` of every Hugging Face linear that can take an adapter, by its full module name."""
    family, sizes = FAMILIES[shape.family], linear_shapes(shape)
    linears: dict[str, tuple[int, int]] = {}
    for module in adapter_modules(shape, tuple(LINEARS)):
        mapping, layer = family.mapping(f"{module}.weight")
        parts = mapping.hf_shapes(shape, sizes[module.rpartition(".")[2]])
        linears.update(
            {name: (size[0], size[1]) for name, size in zip(mapping.modules(layer), parts, strict=True)}
        )
    return linears


def read_adapter_config(path: str | Path) -> AdapterConfig:
    """The configuration of the adapter that a path means, without looking at its tensors."""
    file = find_adapter(path) / CONFIG_FILE
    return parse_adapter_config(file, read_json(file))


def find_adapter(path: str | Path) -> Path:
    """The PEFT folder that a path means: itself, that of an ``iter_*`` folder, or a save folder's newest."""
    folder = Path(path)
    if not folder.is_dir():
        raise Refused(f"{folder}: no such adapter folder.")
    if (folder / CONFIG_FILE).is_file():
        return folder
    iteration = folder
    if (folder / LATEST_FILE).is_file():
        iteration = latest_iteration(folder)
    if (iteration / ADAPTER_FOLDER / CONFIG_FILE).is_file():
        return iteration / ADAPTER_FOLDER
    raise Refused(
        f"{folder}: no adapter; expected a PEFT folder ({CONFIG_FILE}), a --save folder or one of its "
        "iter_* folders."
    )


class PeftAdapter:
    """A PEFT folder, checked against the model that it is for."""

    def __init__(self, path: str | Path, shape: ModelShape) -> None:
        self.path = find_adapter(path)
        self.shape = shape
        self.config: AdapterConfig = read_adapter_config(self.path)
        if not (self.path / WEIGHTS_FILE).exists() and (self.path / "adapter_model.bin").exists():
            raise Refused(
                f"{self.path}: holds adapter_model.bin; expected {WEIGHTS_FILE}, save the adapter as such."
            )
        self.file = SafetensorsFile(self.path / WEIGHTS_FILE)
        self.hf_modules = self._targeted()
        self._check_tensors()

    def factors(self, module: str) -> tuple[torch.Tensor, torch.Tensor]:
        """``lora_A`` ``[r, in]`` and ``lora_B`` ``[out, r]`` of a Hugging Face module."""
        return self.file.read(factor_name(module, "a")), self.file.read(factor_name(module, "b"))

    def _targeted(self) -> dict[str, tuple[int, int]]:
        """``(out, in)`` of the Hugging Face modules that the configuration targets."""
        linears = hf_linears(self.shape)
        others = ("lm_head", "model.embed_tokens")
        wrong = [name for name in others if self.config.targets(name)]
        if wrong:
            raise Refused(
                f"{self.config.path}: target_modules covers {wrong[0]}, which is not supported; "
                f"supported are {', '.join(_suffixes(linears))}."
            )
        targeted = {name: size for name, size in linears.items() if self.config.targets(name)}
        if not targeted:
            raise Refused(
                f"{self.config.path}: target_modules {self.config.target_modules!r} matches nothing in a "
                f"{self.shape.family} model; it has {', '.join(_suffixes(linears))}."
            )
        return targeted

    def _check_tensors(self) -> None:
        expected: dict[str, tuple[int, int]] = {}
        for module, (rows, columns) in self.hf_modules.items():
            expected[factor_name(module, "a")] = (self.config.r, columns)
            expected[factor_name(module, "b")] = (rows, self.config.r)
        entries = self.file.entries
        missing = [name for name in expected if name not in entries]
        extra = [name for name in entries if name not in expected]
        for names, problem in (
            (missing, "missing"),
            (extra, f"not covered by target_modules in {CONFIG_FILE}"),
        ):
            if names:
                raise Refused(f"{self.file.path}: adapter tensors are {problem}: {first_few(names)}.")
        for name, size in expected.items():
            entry = entries[name]
            if entry.shape != size:
                raise Refused(
                    f"{self.file.path}: {name} has shape {list(entry.shape)}; r {self.config.r} on this base "
                    f"model needs {list(size)}."
                )
            if entry.dtype not in WEIGHT_DTYPES:
                raise Refused(
                    f"{self.file.path}: {name} has dtype {entry.dtype}; expected a floating-point one."
                )


def _suffixes(modules: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(module.rpartition(".")[2] for module in modules))
