"""``--extract-lora``: the adapter of rank r that is nearest to the difference of two checkpoints, as a PEFT folder.

Each Hugging Face matrix that is a target has its own factors, of its own difference in float32. What differs and is
neither a target nor in ``--lora-modules-to-save`` or ``--lora-bias`` is lost, and told.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod, sqrt
from pathlib import Path

import torch

from mindspeed_lora.adapters.spec import AdapterSpec, PartSpec
from mindspeed_lora.atomic import atomic_directory
from mindspeed_lora.checkpoint.canonical import canonical_tensors
from mindspeed_lora.checkpoint.conversion.progress import readable_size
from mindspeed_lora.checkpoint.conversion.svd import low_rank_factors
from mindspeed_lora.checkpoint.dtypes import FLAG_DTYPES
from mindspeed_lora.checkpoint.formats.mcore import check_same_shape
from mindspeed_lora.checkpoint.formats.model_files import copy_tokenizer_files
from mindspeed_lora.checkpoint.messages import first_few
from mindspeed_lora.checkpoint.peft.config import AdapterConfig
from mindspeed_lora.checkpoint.peft.description import describe_adapter
from mindspeed_lora.checkpoint.peft.flags import config_from_flags
from mindspeed_lora.checkpoint.peft.source import write_adapter
from mindspeed_lora.checkpoint.source import Source, open_source
from mindspeed_lora.config.checks import reconcile
from mindspeed_lora.config.conversion import ConversionConfig
from mindspeed_lora.config.jobs import ConversionJob
from mindspeed_lora.config.moe import reconcile_experts
from mindspeed_lora.errors import Failed, Refused
from mindspeed_lora.models.families import FAMILIES, check_model_type_hf
from mindspeed_lora.models.families.segments import Range

_PIECE_VALUES = 1 << 22
_TOLD = 5
_KINDS = ("difference", "captured")


def extract(job: ConversionJob, target: Path) -> None:
    """Write the adapter into ``target``, and print the share of the difference that it holds.

    Raises:
        Refused: the checkpoints are of different shapes, or no target differs.
        Failed: a difference is not finite.
    """
    started, conversion = time.monotonic(), job.conversion
    extraction, config, dtype = open_extraction(job)
    tuned, base = extraction.tuned, extraction.base
    with atomic_directory(target, conversion.overwrite) as folder:
        write_adapter(folder, base.shape, config, extraction.spec, extraction.tensor, dtype)
        lost = extraction.not_captured()
        total = _sum(extraction.shares)
        if total.difference == 0:
            raise Refused(_nothing(conversion, lost))
        if tuned.config_dir is not None:
            copy_tokenizer_files(tuned.config_dir, folder)
        size = sum(file.stat().st_size for file in folder.iterdir())
    _tell(extraction, lost, total)
    seconds = time.monotonic() - started
    print(
        f"wrote {target}: {len(extraction.shares)} targets, {readable_size(size)}, {seconds:.1f} s",
        flush=True,
    )


def open_extraction(job: ConversionJob) -> tuple[Extraction, AdapterConfig, torch.dtype]:
    """Both checkpoints, with the configuration of the adapter and the dtype of its factors.

    Raises:
        Refused: they are of different shapes.
    """
    conversion, lora = job.conversion, job.lora
    tuned, base = _open(conversion)
    reconcile_experts(job.experts, reconcile(job.model, tuned.shape))
    config, _ = config_from_flags(lora, base.shape, together=False)
    config = dataclasses.replace(config, base_model_name=conversion.base_model_name or base.hf_origin)
    extraction = Extraction(tuned, base, describe_adapter(config, base.shape, ()))
    return extraction, config, FLAG_DTYPES[lora.lora_save_dtype or "fp32"]


@dataclass(frozen=True)
class Share:
    """Squared Frobenius norms of a difference, and of the part of it that the adapter holds."""

    difference: float = 0.0
    captured: float = 0.0

    @property
    def fraction(self) -> float:
        """``‖s·B·A‖² / ‖Δ‖²``; 1 where nothing differs."""
        return self.captured / self.difference if self.difference else 1.0


class Extraction:
    """The adapter's tensors, computed from two sources as they are asked for."""

    def __init__(self, tuned: Source, base: Source, spec: AdapterSpec) -> None:
        self.tuned = tuned
        self.base = base
        self.spec = spec
        self.shares: dict[str, Share] = {}
        """By full Hugging Face module name, of the targets whose factors were asked for."""
        self._sizes = canonical_tensors(base.shape)
        self._family = FAMILIES[base.shape.family]
        self._parts = {name: part for part in spec.parts for name in part.tensors}
        self._waiting: tuple[str, torch.Tensor] | None = None

    def tensor(self, name: str) -> torch.Tensor:
        """A factor ``[r, in]`` or ``[out, r]``, or a tensor that is saved whole, by canonical name.

        B comes with A: it is kept until it is asked for, which is next.
        """
        part = self._parts.get(name)
        if part is None:
            return self.tuned.read(name)
        if self._waiting is not None and self._waiting[0] == name:
            lora_b = self._waiting[1]
            self._waiting = None
            return lora_b
        lora_a, lora_b = self._factors(part)
        self._waiting = (f"{part.name}.lora_b", lora_b)
        return lora_a

    def not_captured(self) -> dict[str, float]:
        """Squared norm of the difference of each Hugging Face tensor that the adapter does not hold, if any."""
        held = {module for part in self.spec.parts for module in part.hf_modules}
        trained = {tensor.name: tensor.members for tensor in self.spec.trained}
        found: dict[str, float] = {}
        for name in self.base.names():
            mapping, layer = self._family.mapping(name)
            for number, hf_name in enumerate(mapping.names(layer)):
                module, _, kind = hf_name.rpartition(".")
                if (kind == "weight" and module in held) or (name in trained and trained[name][number]):
                    continue
                pieces = self._differences(name, self._ranges(name, number))
                norm = sum(_squared(piece) for piece in pieces)
                if norm:
                    found[hf_name] = norm
        return found

    def _factors(self, part: PartSpec) -> tuple[torch.Tensor, torch.Tensor]:
        module, name = part.hf_modules[0], f"{part.module}.weight"
        mapping, layer = self._family.mapping(name)
        ranges = self._ranges(name, mapping.modules(layer).index(module))
        delta = torch.empty(part.out_features, part.in_features)
        at = 0
        for piece in self._differences(name, ranges):
            delta[at : at + len(piece)] = piece
            at += len(piece)
        norm = _squared(delta)
        if not delta.isfinite().all():
            raise Failed(
                f"the difference of {module} between {self.tuned.path} and {self.base.path} holds NaN or infinite "
                "values, of which there is no decomposition; mend the checkpoint, or leave this target out"
            )
        lora_a, lora_b, captured = low_rank_factors(delta, part.rank, part.scaling)
        self.shares[module] = Share(norm, min(captured, norm))
        return lora_a, lora_b

    def _ranges(self, name: str, number: int) -> list[Range]:
        """Rows of a canonical tensor that are those of one of its Hugging Face tensors, in that one's order."""
        mapping, _ = self._family.mapping(name)
        ranges, at = [], 0
        for part, start, stop in mapping.segments(self.base.shape, self._sizes[name][0]):
            if part == number:
                ranges.append((at, at + stop - start))
            at += stop - start
        return ranges

    def _differences(self, name: str, ranges: Sequence[Range]) -> Iterator[torch.Tensor]:
        """``tuned − base`` of these rows, float32, some rows at a time."""
        step = max(1, _PIECE_VALUES // prod(self._sizes[name][1:]))
        for first, last in ranges:
            for start in range(first, last, step):
                rows = [(start, min(start + step, last))]
                tuned, base = (source.read(name, 0, rows).float() for source in (self.tuned, self.base))
                yield tuned.sub_(base)


def _open(conversion: ConversionConfig) -> tuple[Source, Source]:
    config_dir = None if conversion.hf_cfg_dir is None else Path(conversion.hf_cfg_dir)
    checking = not conversion.no_checking
    tuned = open_source(
        conversion.load_dir or "", conversion.load_model_type, config_dir, "--load-dir", checking
    )
    base = open_source(conversion.extract_base or "", None, config_dir, "--extract-base", checking)
    names = f"--load-dir {tuned.path}", f"--extract-base {base.path}"
    check_model_type_hf(conversion.model_type_hf, tuned.shape.family)
    check_same_shape(tuned.shape, base.shape, *names)
    if tuned.shape.family != base.shape.family:
        raise Refused(
            f"{names[0]} is a {tuned.shape.family} model, but {names[1]} a {base.shape.family} one."
        )
    if tuned.shape.vocab_size != base.shape.vocab_size:
        raise Refused(
            f"{names[0]} has {tuned.shape.vocab_size} words, but {names[1]} has {base.shape.vocab_size}; an adapter "
            "holds no added words, and padding is told from words by a config.json (--hf-cfg-dir)"
        )
    return tuned, base


def _squared(tensor: torch.Tensor) -> float:
    """The squared Frobenius norm, summed in double precision."""
    return sum(float(chunk.double().square().sum()) for chunk in tensor.view(-1).split(_PIECE_VALUES))


def _sum(shares: Mapping[str, Share]) -> Share:
    differences, captured = ([getattr(share, kind) for share in shares.values()] for kind in _KINDS)
    return Share(sum(differences), sum(captured))


def _nothing(conversion: ConversionConfig, lost: Mapping[str, float]) -> str:
    others = (
        f"; they differ in {first_few(list(lost))}, which --lora-target-modules or --lora-modules-to-save must name"
        if lost
        else " and in everything else"
    )
    return (
        f"--extract-lora: nothing to extract, --load-dir {conversion.load_dir} and --extract-base "
        f"{conversion.extract_base} are equal in every target{others}."
    )


def _tell(extraction: Extraction, lost: Mapping[str, float], total: Share) -> None:
    """The shares by target, in all, and what is lost."""
    by_kind: dict[str, dict[str, Share]] = {}
    for module, share in extraction.shares.items():
        by_kind.setdefault(module.rpartition(".")[2], {})[module] = share
    for kind, shares in by_kind.items():
        lowest = min(shares, key=lambda module: shares[module].fraction)
        print(
            f"{kind}: {_percent(_sum(shares).fraction)} of ‖Δ‖² captured (least: "
            f"{_percent(shares[lowest].fraction)} of {lowest})"
        )
    print(f"total: {_percent(total.fraction)} of ‖Δ‖² of the targets captured", flush=True)
    if lost:
        most = sorted(lost, key=lost.__getitem__, reverse=True)[:_TOLD]
        outside = sum(lost.values())
        listed = ", ".join(f"{name} (‖Δ‖ {sqrt(lost[name]):.3g})" for name in most)
        more = f" and {len(lost) - len(most)} others" if len(lost) > len(most) else ""
        portion = _percent(outside / (outside + total.difference))
        print(
            f"warning: the adapter leaves out differences outside of its targets, {portion} of all ‖Δ‖²: "
            f"{listed}{more}",
            file=sys.stderr,
        )


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.4g}%"
