"""Adapters within Megatron checkpoints, as MindSpeed-LLM trains them with PEFT around Megatron's linears.

Each rank's file holds ``decoder.layers.N.self_attention.linear_qkv.lora_A.default.weight`` and ``lora_B``, with or
without the base. Of a column-parallel linear A ``[r, in]`` is on every TP rank and B's rows are cut as the linear's
are (``linear_fc1``: the rank's rows of gate above those of up); of a row-parallel linear A's columns are cut and B
``[out, r]`` is on every rank. Experts have such factors each, or MindSpeed-LLM's grouped ones
(:mod:`mindspeed_lora.checkpoint.formats.mcore_experts`), cut over expert-parallel ranks. Here they are read as the
tensors of a PEFT file: a fused linear's A under each of its Hugging Face matrices, and the matrices' rows of B.
"""

from __future__ import annotations

from argparse import Namespace
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from mindspeed_lora.checkpoint.canonical import (
    adapter_linears,
    expert_number,
    of_all_experts,
    tensor_rule,
)
from mindspeed_lora.checkpoint.formats.hf import shape_of
from mindspeed_lora.checkpoint.formats.mcore_files import find_iteration, open_ranks
from mindspeed_lora.checkpoint.formats.mcore_names import factors
from mindspeed_lora.checkpoint.formats.mcore_shards import Shards, shard_segments
from mindspeed_lora.checkpoint.formats.megatron_args import shape_from_args, switched_names
from mindspeed_lora.checkpoint.formats.model_files import kept_hf_config, kept_origin
from mindspeed_lora.checkpoint.messages import first_few
from mindspeed_lora.checkpoint.peft.chosen_names import shortest_names
from mindspeed_lora.checkpoint.peft.config import AdapterConfig
from mindspeed_lora.checkpoint.peft.config_file import is_finite
from mindspeed_lora.checkpoint.peft.description import hf_linears
from mindspeed_lora.checkpoint.peft.trained_tensors import factor_name
from mindspeed_lora.checkpoint.storage.safetensors_file import TensorEntry
from mindspeed_lora.config.lora import LoraFlags
from mindspeed_lora.config.shape import ModelShape
from mindspeed_lora.errors import Refused
from mindspeed_lora.models.families import FAMILIES
from mindspeed_lora.models.families.mapping import Region, gather


def holds_megatron_adapter(path: Path) -> bool:
    """Whether a folder is a Megatron checkpoint with LoRA factors in it."""
    return path.is_dir() and find_iteration(path) is not None and open_ranks(path).has_adapter


def shape_of_adapted(path: Path, config_dir: Path | None) -> ModelShape:
    """The shape of the model that a Megatron checkpoint's adapter is for, from config.json, else from ``args``."""
    ranks = open_ranks(path)
    folder = config_dir or kept_hf_config(ranks.folder)
    if folder is not None:
        return shape_of(folder)
    args = ranks.first.content.get("args")
    if not isinstance(args, Namespace):
        raise Refused(
            f"{ranks.first.path}: holds no args, and there is no hf_config; name the base model's folder with "
            "--hf-cfg-dir."
        )
    return shape_from_args(args, switched_names(args), ranks.first.path)


class MegatronAdapter:
    """The factors of a Megatron checkpoint as the tensors of a PEFT file, and their configuration.

    Args:
        path: the checkpoint's folder or one of its iterations.
        shape: of the model that it is for.
        lora: flags, which tell the alpha where the files do not.
    """

    def __init__(self, path: Path, shape: ModelShape, lora: LoraFlags | None = None) -> None:
        self.ranks = open_ranks(path)
        self.path = self.ranks.folder
        self.shape = shape
        self.shards = Shards(self.ranks, shape, factors)
        self._linears = adapter_linears(shape)
        self._modules = self._found_modules()
        self._sizes = {name: self._checked_size(name) for name in self.shards.entries}
        self._last: tuple[str, tuple[torch.Tensor, ...]] | None = None
        self._members: dict[str, tuple[str, int]] = {}
        self.entries: dict[str, TensorEntry] = {}
        for module in self._modules:
            self._add(module)
        self.config = self._configuration(lora)

    def read_into(self, out: torch.Tensor, name: str, region: Region) -> None:
        """Fill ``out`` with ``region`` of a tensor."""
        (start, stop), (low, high) = region
        out.copy_(self.read(name)[start:stop, low:high])

    def read(self, name: str) -> torch.Tensor:
        """One whole tensor by its name in a PEFT file."""
        factor, part = self._members[name]
        last = self._last
        if last is None or last[0] != factor:
            whole = self._read_factor(factor)
            mapping, _ = FAMILIES[self.shape.family].mapping(f"{factor.rpartition('.')[0]}.weight")
            is_a = factor.endswith("_a")
            self._last = last = (
                factor,
                (whole,) * len(mapping.hf) if is_a else mapping.split(self.shape, whole),
            )
        return last[1][part]

    def _read_factor(self, name: str) -> torch.Tensor:
        """A factor by canonical name, put together from its TP ranks."""
        rule, shards = tensor_rule(name), self.shards.entries[name]
        out = torch.empty(self._sizes[name], dtype=shards[0].dtype)
        names = [f"{rank}:{name}" for rank in range(len(shards))]
        wanted = [((0, size),) for size in out.shape]
        gather(self.shards, out, names, shard_segments(rule, shards), rule.axis or 0, wanted)
        return out

    def _found_modules(self) -> list[str]:
        """Canonical names of the linears with factors; each must have both."""
        known = self._linears
        names = self.shards.entries
        unknown = [name for name in names if name.rpartition(".")[0] not in known]
        if unknown:
            raise Refused(f"{self.path}: factors are not of a linear of this model: {first_few(unknown)}.")
        for name in names:
            module, _, factor = name.rpartition(".")
            other = f"{module}.{'lora_b' if factor == 'lora_a' else 'lora_a'}"
            if other not in names:
                raise Refused(f"{self.path}: {module} has {factor} only; the adapter is incomplete.")
        found = [module for module in known if f"{module}.lora_a" in names]
        if not found:
            raise Refused(f"{self.path}: holds no LoRA factors.")
        self._check_experts(found)
        return found

    def _check_experts(self, found: list[str]) -> None:
        """All experts of a layer have factors, or none: their ranks' files are all there."""
        counts = Counter(of_all_experts(module) for module in found if expert_number(module) is not None)
        for linear, count in counts.items():
            if self.shape.moe is not None and count != self.shape.moe.num_experts:
                raise Refused(
                    f"{self.path}: {count} of {self.shape.moe.num_experts} experts have factors of {linear}; the "
                    "folders of expert-parallel ranks are missing."
                )

    def _checked_size(self, name: str) -> tuple[int, int]:
        """The whole factor's shape; shards that do not belong together are refused."""
        shards, rule = self.shards.entries[name], tensor_rule(name)
        cut_over = self.shards.num_ranks(name)
        if len(shards) != cut_over:
            raise Refused(f"{self.path}: {name} is in {len(shards)} of {cut_over} tensor-parallel ranks.")
        first = shards[0]
        if (
            any((one.shape, one.dtype) != (first.shape, first.dtype) for one in shards)
            or len(first.shape) != 2
        ):
            raise Refused(
                f"{self.path}: {name} has the shapes {[list(one.shape) for one in shards]} over its ranks."
            )
        if rule.axis is None:
            self._check_replicas(name)
        size = list(first.shape)
        if rule.axis is not None:
            size[rule.axis] *= cut_over
        rows, columns = self._linears[name.rpartition(".")[0]]
        is_a = name.endswith("_a")
        if size[1 if is_a else 0] != (columns if is_a else rows):
            expected = ["r", columns] if is_a else [rows, "r"]
            raise Refused(
                f"{self.path}: {name} has shape {size} over {cut_over} tensor-parallel ranks; this base "
                f"model needs [{expected[0]}, {expected[1]}]."
            )
        return size[0], size[1]

    def _check_replicas(self, name: str) -> None:
        """A factor that every TP rank holds whole is the same on all of them."""
        shards = self.shards.entries[name]
        region = tuple((0, size) for size in shards[0].shape)
        first, other = (torch.empty(shards[0].shape, dtype=shards[0].dtype) for _ in range(2))
        self.shards.read_into(first, f"0:{name}", region)
        for rank in range(1, len(shards)):
            self.shards.read_into(other, f"{rank}:{name}", region)
            if not torch.equal(first.view(torch.uint8), other.view(torch.uint8)):
                raise Refused(
                    f"{self.shards.path(rank, name)}: {name} differs from that of tensor-parallel rank 0, though every "
                    "rank must hold the same; the training that saved it did not keep its ranks together, so that no "
                    "one adapter is what was trained."
                )

    def _add(self, module: str) -> None:
        """Enter a linear's factors under the names of its Hugging Face matrices."""
        mapping, layer = FAMILIES[self.shape.family].mapping(f"{module}.weight")
        for factor in "ab":
            name = f"{module}.lora_{factor}"
            size, dtype = self._sizes[name], self.shards.entries[name][0].dtype
            sizes = [size] * len(mapping.hf) if factor == "a" else mapping.hf_shapes(self.shape, size)
            for part, (hf_module, own) in enumerate(zip(mapping.modules(layer), sizes, strict=True)):
                self._members[factor_name(hf_module, factor)] = (name, part)
                self.entries[factor_name(hf_module, factor)] = TensorEntry(dtype, tuple(own), 0)

    def _configuration(self, lora: LoraFlags | None) -> AdapterConfig:
        args = self.ranks.first.content.get("args")
        told: dict[str, Any] = vars(args) if isinstance(args, Namespace) else {}
        ranks = {self._sizes[f"{module}.lora_a"][0] for module in self._modules}
        if len(ranks) > 1 or told.get("lora_r") not in (None, *ranks):
            found = " and ".join(map(str, sorted(ranks)))
            raise Refused(
                f"{self.ranks.first.path}: the factors have rank {found}, args.lora_r is {told.get('lora_r')}; "
                "expected one rank."
            )
        alpha = told.get("lora_alpha")
        if alpha is None and lora is not None:
            alpha = lora.lora_alpha
        if alpha is None or not is_finite(alpha):
            raise Refused(
                f"{self.ranks.first.path}: args tells no lora_alpha ({alpha!r}), and the factors do not show it; give "
                "--lora-alpha (MindSpeed-LLM's default was 32)."
            )
        return AdapterConfig(
            path=self.ranks.first.path,
            r=ranks.pop(),
            alpha=float(alpha),
            target_modules=self._target_modules(),
            base_model_name=self._base_model_name(),
        )

    def _target_modules(self) -> tuple[str, ...]:
        linears = hf_linears(self.shape)
        chosen = (name for module in self._modules for name in linears[module])
        return shortest_names(chosen, (name for names in linears.values() for name in names))

    def _base_model_name(self) -> str | None:
        kept = kept_hf_config(self.path)
        origin = kept_origin(kept) if kept is not None else None
        return origin.name if origin is not None else None
