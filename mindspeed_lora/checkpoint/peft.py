"""PEFT adapter folders, by Hugging Face module: found, and checked in full against their model."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

import torch

from mindspeed_lora.adapters.spec import AdapterSpec, KeptTensor
from mindspeed_lora.checkpoint.adapter_description import FUSED, describe_adapter, hf_linears
from mindspeed_lora.checkpoint.canonical import EMBEDDING, OUTPUT_LAYER
from mindspeed_lora.checkpoint.hf import WEIGHT_DTYPES, read_json
from mindspeed_lora.checkpoint.iteration import LATEST_FILE, latest_iteration
from mindspeed_lora.checkpoint.messages import first_few
from mindspeed_lora.checkpoint.peft_config import CONFIG_FILE, AdapterConfig
from mindspeed_lora.checkpoint.peft_config_file import parse_adapter_config
from mindspeed_lora.checkpoint.safetensors_file import SafetensorsFile
from mindspeed_lora.checkpoint.token_rows import DELTA, with_vocabulary
from mindspeed_lora.checkpoint.trained_tensors import PREFIX, vocabulary_modules
from mindspeed_lora.config.shape import ModelShape
from mindspeed_lora.errors import Refused
from mindspeed_lora.models.families import FAMILIES
from mindspeed_lora.models.families import Mapping as FamilyMapping

IDLE = re.compile(r"\.(original_module|modules_to_save)\.")
"""What PEFT also writes, and no one reads, of a module that is trained whole: with ``bias: all``, or resized."""

WEIGHTS_FILE = "adapter_model.safetensors"
ADAPTER_FOLDER = "adapter"


def factor_name(module: str, factor: str) -> str:
    """Name in ``adapter_model.safetensors`` of factor ``"a"`` or ``"b"`` of a Hugging Face module."""
    return f"{PREFIX}{module}.lora_{factor.upper()}.weight"


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
    """A PEFT folder, checked against the model that it is for.

    Args:
        path: what :func:`find_adapter` takes.
        shape: the model's, without the adapter.
        shared: the fused linears to take as one pair of factors; None takes those whose A are equal throughout.
    """

    def __init__(self, path: str | Path, shape: ModelShape, shared: Collection[str] | None = None) -> None:
        self.path = find_adapter(path)
        self.linears = hf_linears(shape.family, shape.num_layers)
        self.config: AdapterConfig = read_adapter_config(self.path)
        if not (self.path / WEIGHTS_FILE).exists() and (self.path / "adapter_model.bin").exists():
            raise Refused(
                f"{self.path}: holds adapter_model.bin; expected {WEIGHTS_FILE}, save the adapter as such."
            )
        self.file = SafetensorsFile(self.path / WEIGHTS_FILE)
        self.base_vocab_size = shape.vocab_size
        self.shape = shape = self._with_its_vocabulary(shape)
        self._check_targets()
        separate = self._as_in_the_file(describe_adapter(self.config, shape, ()))
        self._check_tensors(separate)
        equal = [linear for linear in FUSED if self._is_shared(linear)]
        self.shared = frozenset(equal if shared is None else (linear for linear in shared if linear in equal))
        self.spec: AdapterSpec = self._as_in_the_file(describe_adapter(self.config, shape, self.shared))
        self.hf_modules = {name: part for part in separate.parts for name in part.hf_modules}
        """Full Hugging Face name of each module with an adapter → its own pair of factors."""

    @property
    def has_own_words(self) -> bool:
        """Whether it has more words than the base, or rows of some of them."""
        return self.shape.vocab_size > self.base_vocab_size or bool(self.spec.token_rows)

    def factors(self, module: str) -> tuple[torch.Tensor, torch.Tensor, float]:
        """``lora_A`` ``[r, in]``, ``lora_B`` ``[out, r]`` and the scaling of a Hugging Face module."""
        lora_a, lora_b = (self.file.read(factor_name(module, factor)) for factor in "ab")
        return lora_a, lora_b, self.hf_modules[module].scaling

    def _with_its_vocabulary(self, shape: ModelShape) -> ModelShape:
        """The base's shape, with as many words as the adapter's tensors and tokens need."""
        indices = self.config.trainable_token_indices or ()
        tokens = [
            token
            for one in (indices.values() if isinstance(indices, Mapping) else [indices])
            for token in one
        ]
        stored = [
            self.file.entries[name].shape[:1]
            for module in vocabulary_modules(shape)
            for name in _whole_names(module)
            if name in self.file.entries
        ]
        return with_vocabulary(shape, [*tokens, *(rows - 1 for size in stored for rows in size)])

    def _as_in_the_file(self, spec: AdapterSpec) -> AdapterSpec:
        """The description with what the file's names add: frozen vocabularies, and a second name of tied rows."""
        entries, modules = self.file.entries, vocabulary_modules(self.shape)
        expected = {name for tensor in spec.trained for names in tensor.members for name in names}
        kept: dict[str, list[str]] = {}
        for tensor, module in zip((EMBEDDING, OUTPUT_LAYER), modules, strict=True):
            tied = not self.shape.untie_embeddings_and_output_weights and not spec.untied
            names = [name for name in _whole_names(module) if name in entries and name not in expected]
            if names:
                kept.setdefault(EMBEDDING if tied else tensor, []).extend(names)
        output_rows = f"{PREFIX}{modules[1]}.{DELTA}"
        rows = [
            dataclasses.replace(one, members=(*one.members, output_rows))
            if one.tensor == EMBEDDING and len(spec.token_rows) == 1 and output_rows in entries
            else one
            for one in spec.token_rows
        ]
        tensors = tuple(KeptTensor(name=name, members=tuple(names)) for name, names in kept.items())
        return dataclasses.replace(spec, kept=tensors, token_rows=tuple(rows))

    def _check_targets(self) -> None:
        """The configuration targets what can take an adapter, and something at all."""
        names = [name for names in self.linears.values() for name in names]
        wrong = [name for name in ("lm_head", "model.embed_tokens") if self.config.targets(name)]
        if wrong:
            raise Refused(
                f"{self.config.path}: target_modules covers {wrong[0]}, which is not supported; "
                f"supported are {', '.join(_suffixes(names))}."
            )
        if not any(self.config.targets(name) for name in names):
            raise Refused(
                f"{self.config.path}: target_modules {self.config.target_modules!r} matches nothing in a "
                f"{self.shape.family} model; it has {', '.join(_suffixes(names))}."
            )

    def _check_tensors(self, spec: AdapterSpec) -> None:
        """The file holds the very tensors that the configuration means, in their shapes."""
        expected = self._expected_tensors(spec)
        entries = self.file.entries
        missing = [name for name in expected if name not in entries]
        extra = [name for name in entries if name not in expected and not IDLE.search(name)]
        for names, problem in (
            (missing, "missing"),
            (extra, f"not covered by target_modules, modules_to_save or bias in {CONFIG_FILE}"),
        ):
            if names:
                raise Refused(f"{self.file.path}: adapter tensors are {problem}: {first_few(names)}.")
        for name, (size, rank) in expected.items():
            entry = entries[name]
            if entry.shape != size:
                of_rank = "" if rank is None else f"r {rank} on "
                raise Refused(
                    f"{self.file.path}: {name} has shape {list(entry.shape)}; {of_rank}this base model needs "
                    f"{list(size)}."
                )
            if entry.dtype not in WEIGHT_DTYPES:
                raise Refused(
                    f"{self.file.path}: {name} has dtype {entry.dtype}; expected a floating-point one."
                )

    def _expected_tensors(self, spec: AdapterSpec) -> dict[str, tuple[tuple[int, ...], int | None]]:
        """Shape of each tensor of the file, and the rank that it follows from, for a factor."""
        expected: dict[str, tuple[tuple[int, ...], int | None]] = {}
        for part in spec.parts:
            for name, size in part.tensors.items():
                expected[factor_name(part.hf_modules[0], name[-1])] = (size, part.rank)
        for tensor in spec.trained:
            sizes = self.mapping(tensor.name).hf_shapes(self.shape, tensor.size)
            for names, hf_size in zip(tensor.members, sizes, strict=True):
                expected.update(dict.fromkeys(names, (hf_size, None)))
        for rows in spec.token_rows:
            expected.update(dict.fromkeys(rows.members, ((len(rows.tokens), rows.width), None)))
        vocabulary = (self.shape.vocab_size, self.shape.hidden_size)
        for kept in spec.kept:
            expected.update(dict.fromkeys(kept.members, (vocabulary, None)))
        return expected

    def mapping(self, name: str) -> FamilyMapping:
        """The family's row for a canonical tensor."""
        return FAMILIES[self.shape.family].mapping(name)[0]

    def _is_shared(self, linear: str) -> bool:
        """Whether the matrices of a fused linear have one A, rank and scaling wherever any is a target."""
        found = False
        for module, names in self.linears.items():
            targeted = [name for name in names if self.config.targets(name)]
            if module.rpartition(".")[2] != linear or not targeted:
                continue
            if len(targeted) < len(names) or not self._has_one_a(names):
                return False
            found = True
        return found

    def _has_one_a(self, names: Sequence[str]) -> bool:
        config = self.config
        if len({(config.rank_of(name), config.scaling_of(name)) for name in names}) > 1:
            return False
        if len({self.file.entries[factor_name(name, factor)].dtype for name in names for factor in "ab"}) > 1:
            return False
        first, *others = (self.file.read(factor_name(name, "a")) for name in names)
        return all(torch.equal(_bits(first), _bits(one)) for one in others)


def _whole_names(module: str) -> tuple[str, str]:
    """Names under which PEFT's file can hold a whole embedding or output layer, trained or as it was resized."""
    return f"{PREFIX}{module}.weight", f"{PREFIX}{module}.token_adapter.base_layer.weight"


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(torch.uint8)


def _suffixes(modules: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(module.rpartition(".")[2] for module in modules))
