"""The rank files of a Megatron checkpoint: ``iter_%07d/mp_rank_XX[_YYY][_ZZZ]/model_optim_rng.pt``, and what they hold.

The numbers are of the tensor-, pipeline- and expert-parallel rank; the pipeline's is there where there are several
stages, the expert-parallel one where experts are cut. What is no expert's is equal in the files of all expert-parallel
ranks, and read from the first of them.

The layout is found from the folders and checked against ``args``. Layers are numbered within a stage or, with a
virtual pipeline, within a chunk (``model0``, ``model1`` …); chunks are counted through in the order of the forward
pass, so that uneven stages need no flag. A number that no tensor has is a no-op layer.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from mindspeed_lora.checkpoint.formats.iteration import LATEST_FILE, latest_iteration
from mindspeed_lora.checkpoint.formats.mcore_experts import ExpertRanks
from mindspeed_lora.checkpoint.formats.mcore_names import flat_entries, is_adapter, is_before_mcore
from mindspeed_lora.checkpoint.storage.pt_file import PtFile
from mindspeed_lora.errors import Refused

RANK_FILE = "model_optim_rng.pt"
_OTHER_RANK_FILE = "model_rng.pt"
"""What Megatron-LM called it where the optimizer's state lies in a file of its own."""
_RANK_FOLDER = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?(?:_(\d{3,}))?")
_CHUNK = re.compile(r"model(\d*)")


def find_iteration(path: Path) -> Path | None:
    """The folder with the ``mp_rank_*`` folders that a path means, or None where there is none."""
    folder = latest_iteration(path) if (path / LATEST_FILE).is_file() else path
    if _rank_folders(folder):
        return folder
    iterations = sorted(path.glob("iter_*"))
    if len(iterations) == 1 and _rank_folders(iterations[0]):
        return iterations[0]
    return None


def _rank_folders(folder: Path) -> dict[tuple[int, ...], Path]:
    """Rank folders by the numbers in their names."""
    found: dict[tuple[int, ...], Path] = {}
    for path in sorted(folder.glob("mp_rank_*")):
        match = _RANK_FOLDER.fullmatch(path.name)
        if match is None:
            raise Refused(
                f"{path}: not a rank folder; expected mp_rank_XX, mp_rank_XX_YYY or mp_rank_XX_YYY_ZZZ."
            )
        numbers = tuple(int(number) for number in match.groups() if number is not None)
        if numbers in found:
            raise Refused(
                f"{path}: the folder of this rank is there twice; remove the one that is left over."
            )
        found[numbers] = path
    return found


Rank = tuple[int, int, int]
"""Numbers of the tensor-, pipeline- and expert-parallel rank of a file."""


@dataclass(frozen=True)
class RankFiles:
    """The files of all ranks of one checkpoint."""

    folder: Path
    files: dict[Rank, PtFile]
    """By (TP rank, PP rank, EP rank)."""
    tp_size: int
    pp_size: int
    ep_size: int = 1
    """Of the numbers in the folders' names."""

    @property
    def first(self) -> PtFile:
        """The file of the first rank, whose ``args`` are those of all."""
        return self.files[min(self.files)]

    @cached_property
    def columns(self) -> list[tuple[int, int]]:
        """(TP rank, EP rank) of the files that each stage has, the first expert-parallel ranks first."""
        return sorted({(tp, ep) for tp, _, ep in self.files}, key=lambda column: (column[1], column[0]))

    def stages(self, tp_rank: int, ep_rank: int | None = None) -> list[PtFile]:
        """The files of one TP rank, by pipeline rank; of the first EP rank that it has, if none is named."""
        if ep_rank is None:
            ep_rank = next(ep for tp, ep in self.columns if tp == tp_rank)
        return [self.files[tp_rank, pp_rank, ep_rank] for pp_rank in range(self.pp_size)]

    def expert_ranks(self) -> ExpertRanks:
        """How ``args`` say that the experts are cut over the files.

        Raises:
            Refused: in a way that the names of the files do not tell apart.
        """
        args = self.first.content.get("args")
        extended = bool(getattr(args, "moe_tp_extend_ep", None))
        etp_size = 1 if extended else getattr(args, "expert_tensor_parallel_size", None) or self.tp_size
        if not isinstance(etp_size, int) or self.tp_size % etp_size:
            raise Refused(
                f"{self.first.path}: args.expert_tensor_parallel_size is {etp_size!r}, which does not divide the "
                f"tensor-parallel size {self.tp_size}; the files of such ranks have the same names, so that one "
                "overwrote the other. Save it in the torch_dist format."
            )
        return ExpertRanks(tp_size=self.tp_size, ep_size=self.ep_size, etp_size=etp_size, extended=extended)

    def qkv_version(self) -> float:
        """The ``checkpoint_version`` that tells the order of q, k and v in a fused matrix.

        Below 2.0 it differs, and only with names from before megatron-core. There a missing version is 0, as
        Megatron takes it.
        """
        versions = {_qkv_version(file) for file in self.files.values()}
        if len(versions) > 1:
            raise Refused(f"{self.folder}: its ranks have different checkpoint_versions: {sorted(versions)}.")
        return versions.pop()

    @property
    def has_base(self) -> bool:
        """Whether there are tensors beside those of adapters."""
        return any(not is_adapter(name) for name in self._names())

    @property
    def has_adapter(self) -> bool:
        """Whether there are LoRA factors."""
        return any(is_adapter(name) for name in self._names())

    def _names(self) -> set[str]:
        """Names of the tensors of the first TP rank."""
        return {
            name
            for file in self.stages(0)
            for chunk in chunks(file)
            for name, value in flat_entries(chunk)
            if isinstance(value, torch.Tensor) and not name.endswith("_extra_state")
        }


def open_ranks(path: Path, checking: bool = True) -> RankFiles:
    """Open the files of all ranks of the checkpoint that a path means."""
    folder = find_iteration(path)
    if folder is None:
        raise Refused(f"{path}: no Megatron checkpoint; expected iter_%07d/mp_rank_XX/{RANK_FILE}.")
    opened = {numbers: PtFile(_rank_file(path), checking) for numbers, path in _rank_folders(folder).items()}
    for file in opened.values():
        if not isinstance(file.content, dict) or not chunks(file):
            raise Refused(f"{file.path}: holds no model.")
    files = _by_rank(folder, opened)
    tp_size, pp_size, ep_size = (1 + max(rank[axis] for rank in files) for axis in range(3))
    ranks = RankFiles(folder, files, tp_size, pp_size, ep_size)
    _check_presence(ranks)
    _check_sizes(ranks)
    return ranks


def _by_rank(folder: Path, opened: Mapping[tuple[int, ...], PtFile]) -> dict[Rank, PtFile]:
    """The files by rank; a second number alone is the pipeline's, or where there is one stage the experts'."""
    lengths = {len(numbers) for numbers in opened}
    if len(lengths) > 1:
        listed = ", ".join(sorted(file.path.parent.name for file in opened.values())[:4])
        raise Refused(
            f"{folder}: its rank folders have names of different kinds ({listed} …); some are of another checkpoint."
        )
    if lengths == {2} and _second_is_expert(opened):
        return {(numbers[0], 0, numbers[1]): file for numbers, file in opened.items()}
    padded = {(*numbers, 0, 0)[:3]: file for numbers, file in opened.items()}
    return {(tp, pp, ep): file for (tp, pp, ep), file in padded.items()}


def _second_is_expert(opened: Mapping[tuple[int, ...], PtFile]) -> bool:
    """Whether two numbers in a name are those of the tensor- and the expert-parallel rank."""
    args = next(iter(opened.values())).content.get("args")
    pipeline, experts = (
        getattr(args, f"{kind}_model_parallel_size", None) for kind in ("pipeline", "expert")
    )
    if pipeline is not None or experts is not None:
        return (pipeline or 1) == 1 and (experts or 1) > 1
    # Without args: only the first stage has the embedding.
    others = [file for numbers, file in opened.items() if numbers[1] == 1]
    names = {name for file in others for chunk in chunks(file) for name, _ in flat_entries(chunk)}
    return any(name.endswith("word_embeddings.weight") for name in names)


def _check_presence(ranks: RankFiles) -> None:
    """Refuse a checkpoint that lacks the folder of a rank."""
    lacking = [
        (tp_rank, pp_rank)
        for tp_rank in range(ranks.tp_size)
        for pp_rank in range(ranks.pp_size)
        if not any((tp_rank, pp_rank, ep_rank) in ranks.files for ep_rank in range(ranks.ep_size))
    ]
    if lacking:
        raise Refused(
            f"{ranks.folder}: the folder of tensor-parallel rank {lacking[0][0]}, pipeline rank {lacking[0][1]} is "
            f"missing ({ranks.tp_size} × {ranks.pp_size} ranks)."
        )
    for tp_rank, ep_rank in ranks.columns:
        for pp_rank in range(ranks.pp_size):
            if (tp_rank, pp_rank, ep_rank) not in ranks.files:
                raise Refused(
                    f"{ranks.folder}: the folder of tensor-parallel rank {tp_rank}, pipeline rank {pp_rank}, "
                    f"expert-parallel rank {ep_rank} is missing, and other stages have it."
                )


def _rank_file(folder: Path) -> Path:
    other = folder / _OTHER_RANK_FILE
    return other if other.is_file() and not (folder / RANK_FILE).exists() else folder / RANK_FILE


def chunks(file: PtFile) -> list[dict[str, Any]]:
    """The model of each virtual-pipeline chunk of a rank's file; one chunk without a virtual pipeline."""
    keys = [
        key
        for key, value in dict.items(file.content)
        if isinstance(key, str) and _CHUNK.fullmatch(key) and isinstance(value, dict)
    ]
    return [file.content[key] for key in sorted(keys, key=lambda key: int(key.removeprefix("model") or 0))]


def _check_sizes(ranks: RankFiles) -> None:
    for file in ranks.files.values():
        args = file.content.get("args")
        for attribute, size in (
            ("tensor_model_parallel_size", ranks.tp_size),
            ("pipeline_model_parallel_size", ranks.pp_size),
            ("expert_model_parallel_size", ranks.ep_size),
        ):
            told = getattr(args, attribute, None)
            if told is not None and told != size:
                raise Refused(
                    f"{file.path}: args.{attribute} is {told}, but the mp_rank_* folders of "
                    f"{ranks.folder} mean {size}; rank folders are missing or do not belong together."
                )


def _qkv_version(file: PtFile) -> float:
    version = file.content.get("checkpoint_version")
    is_old = any(is_before_mcore(chunk) for chunk in chunks(file))
    if version is None:
        return 0.0 if is_old else 3.0
    if isinstance(version, bool) or not isinstance(version, (int, float)):
        raise Refused(f"{file.path}: checkpoint_version is {version!r}; expected a number.")
    known = version >= 2.0 or (is_old and version in (0, 1))
    if not known:
        raise Refused(
            f"{file.path}: checkpoint_version {version} is not supported with these names; expected 2.0 or 3.0, "
            "or 0 and 1.0 with query_key_value."
        )
    return float(version) if version < 2.0 else 3.0
