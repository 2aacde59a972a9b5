"""PEFT adapter folders, by Hugging Face module: found, and checked in full against their model."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

import torch

from mindspeed_lora.adapters.spec import AdapterSpec, KeptTensor
from mindspeed_lora.checkpoint.canonical import EMBEDDING, OUTPUT_LAYER, linear_kind
from mindspeed_lora.checkpoint.formats.hf import WEIGHT_DTYPES, read_json
from mindspeed_lora.checkpoint.formats.iteration import LATEST_FILE, latest_iteration
from mindspeed_lora.checkpoint.messages import first_few
from mindspeed_lora.checkpoint.peft.adapter_file import open_adapter_file
from mindspeed_lora.checkpoint.peft.config import CONFIG_FILE, AdapterConfig
from mindspeed_lora.checkpoint.peft.config_file import parse_adapter_config
from mindspeed_lora.checkpoint.peft.description import FUSED, describe_adapter, hf_linears
from mindspeed_lora.checkpoint.peft.expert_names import FUSED as FUSED_FORM
from mindspeed_lora.checkpoint.peft.expert_names import PER_EXPERT, is_expert, names_per_expert
from mindspeed_lora.checkpoint.peft.fused_experts import FusedExperts, expert_factors, has_blocks
from mindspeed_lora.checkpoint.peft.megatron_adapter import MegatronAdapter, holds_megatron_adapter
from mindspeed_lora.checkpoint.peft.token_rows import DELTA, with_vocabulary
from mindspeed_lora.checkpoint.peft.trained_tensors import PREFIX, factor_name, vocabulary_modules
from mindspeed_lora.checkpoint.storage.tensor_file import TensorFile
from mindspeed_lora.config.lora import LoraFlags
from mindspeed_lora.config.shape import ModelShape
from mindspeed_lora.errors import Refused
from mindspeed_lora.models.families import FAMILIES
from mindspeed_lora.models.families import Mapping as FamilyMapping

IDLE = re.compile(r"\.(original_module|modules_to_save)\.")
"""What PEFT also writes, and no one reads, of a module that is trained whole: with ``bias: all``, or resized."""

ADAPTER_FOLDER = "adapter"
_LAYER_NUMBER = re.compile(r"\.layers\.(\d+)\.")


def read_adapter_config(path: str | Path) -> AdapterConfig:
    """The configuration of the adapter that a path means, without looking at its tensors."""
    file = find_adapter(path) / CONFIG_FILE
    return parse_adapter_config(file, read_json(file))


def in_form_of(config: AdapterConfig, file: TensorFile) -> AdapterConfig:
    """The configuration with the form of experts that the tensors' names tell."""
    per_expert = any(map(names_per_expert, file.entries))
    return dataclasses.replace(config, moe_format=PER_EXPERT if per_expert else FUSED_FORM)


def find_adapter(path: str | Path) -> Path:
    """The PEFT folder that a path means: itself, that of an ``iter_*`` folder, or a save folder's newest."""
    found = _peft_folder(Path(path))
    if found is None:
        raise Refused(
            f"{path}: no adapter; expected a PEFT folder ({CONFIG_FILE}), a --save folder or one of its "
            "iter_* folders."
        )
    return found


def _peft_folder(folder: Path) -> Path | None:
    if not folder.is_dir():
        raise Refused(f"{folder}: no such adapter folder.")
    if (folder / CONFIG_FILE).is_file():
        return folder
    iteration = folder
    if (folder / LATEST_FILE).is_file():
        iteration = latest_iteration(folder)
    if (iteration / ADAPTER_FOLDER / CONFIG_FILE).is_file():
        return iteration / ADAPTER_FOLDER
    return None


def is_megatron_adapter(path: str | Path) -> bool:
    """Whether a path means factors within a Megatron checkpoint, and no PEFT folder."""
    return _peft_folder(Path(path)) is None and holds_megatron_adapter(Path(path))


def is_moe_shared(path: str | Path) -> bool:
    """Whether the adapter that a path means was trained with ``--lora-moe-shared`` and saved by this program."""
    return not is_megatron_adapter(path) and open_adapter_file(find_adapter(path)).is_moe_shared


class PeftAdapter:
    """A PEFT folder, checked against the model that it is for.

    Args:
        path: what :func:`find_adapter` takes, or a Megatron checkpoint with factors in it.
        shape: the model's, without the adapter.
        shared: the kinds of fused linears to take as one pair of factors; None takes those whose A are equal
            throughout.
        lora: flags, which tell what the files of a Megatron checkpoint do not, and whether experts share factors.
    """

    path: Path
    config: AdapterConfig
    file: TensorFile

    def __init__(
        self,
        path: str | Path,
        shape: ModelShape,
        shared: Collection[str] | None = None,
        lora: LoraFlags | None = None,
    ) -> None:
        self._open(path, shape, lora)
        self.linears = hf_linears(shape)
        self._separate_experts(shape, shared)
        self.base_vocab_size = shape.vocab_size
        self.shape = shape = self._with_its_vocabulary(shape)
        self._check_targets()
        separate = self._as_in_the_file(describe_adapter(self.config, shape, ()))
        self._check_tensors(separate)
        self.hf_modules = {name: part for part in separate.parts for name in part.hf_modules}
        """Full Hugging Face name of each module with an adapter → its own pair of factors."""
        equal = [linear for linear in FUSED if self._is_shared(linear)]
        self.shared = frozenset(equal if shared is None else (linear for linear in shared if linear in equal))
        moe_shared = lora is not None and lora.lora_moe_shared
        described = describe_adapter(self.config, shape, self.shared, moe_shared)
        if moe_shared:
            self._check_equal_experts(described)
        self.spec: AdapterSpec = self._as_in_the_file(described)

    def _open(self, path: str | Path, shape: ModelShape, lora: LoraFlags | None) -> None:
        if is_megatron_adapter(path):
            megatron = MegatronAdapter(Path(path), shape, lora)
            self.path, self.config, self.file = megatron.path, megatron.config, megatron
            return
        self.path = find_adapter(path)
        config = read_adapter_config(self.path)
        self.file = open_adapter_file(self.path)
        self.config = in_form_of(config, self.file)

    def _separate_experts(self, shape: ModelShape, shared: Collection[str] | None) -> None:
        """From here on the fused factors of experts are those of their matrices."""
        if shape.moe is None or self.config.moe_format != FUSED_FORM:
            return
        factors = expert_factors(self.config, self.linears, shape)
        read = FusedExperts(self.file, factors)
        wanted = shared is None or "experts.linear_fc1" in shared
        blocks = has_blocks(self.file, factors)
        # Where nothing was trained yet, they are what the caller says.
        if blocks or (blocks is None and not wanted and all(one.rank % 2 == 0 for one in factors)):
            self.config = dataclasses.replace(self.config, separate_gate_up=True)
            read = FusedExperts(self.file, expert_factors(self.config, self.linears, shape))
        self.file = read

    @property
    def has_own_words(self) -> bool:
        """Whether it has more words than the base, or rows of some of them."""
        return self.shape.vocab_size > self.base_vocab_size or bool(self.spec.token_rows)

    def factors(self, module: str) -> tuple[torch.Tensor, torch.Tensor, float]:
        """``lora_A`` ``[r, in]``, ``lora_B`` ``[out, r]`` and the scaling of a Hugging Face module."""
        stored = self.stored_name(module)
        lora_a, lora_b = (self.file.read(factor_name(stored, factor)) for factor in "ab")
        return lora_a, lora_b, self.hf_modules[module].scaling

    def stored_name(self, module: str) -> str:
        """What the factors of a Hugging Face module are named by in ``file``, where experts are apart."""
        return module if is_expert(module) else self.config.stored_name(module)

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
        embedding, output_layer = vocabulary_modules(self.shape)
        wrong = [name for name in (output_layer, embedding) if self.config.targets(name)]
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
                of_another = self._made_for(entries, other_names=bool(missing) and self._is_strange(extra))
                raise Refused(
                    f"{self.file.path}: adapter tensors are {problem}: {first_few(names)}{of_another}."
                )
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

    def _is_strange(self, names: Iterable[str]) -> bool:
        """Whether tensors are factors of modules that the model does not have."""
        known = {name for linear in self.linears.values() for name in linear}
        modules = (name.removeprefix("base_model.model.").partition(".lora_")[0] for name in names)
        return any(module not in known for module in modules)

    def _made_for(self, entries: Iterable[str], other_names: bool) -> str:
        """A hint where the file was made for a model with other names, or with another number of layers."""
        numbers = [int(match[1]) for name in entries if (match := _LAYER_NUMBER.search(name))]
        reached = max(numbers, default=-1) + 1
        made_for = f", made for {self.config.base_model_name}," if self.config.base_model_name else ""
        mend = "give the base that it was trained on"
        if reached != self.shape.num_layers and not self.config.layers_to_transform:
            has = self.shape.num_layers
            return f"; the adapter{made_for} reaches {reached} layers, and this base has {has}: {mend}"
        return f"; the adapter{made_for} has modules that this base has not: {mend}" if other_names else ""

    def _expected_tensors(self, spec: AdapterSpec) -> dict[str, tuple[tuple[int, ...], int | None]]:
        """Shape of each tensor of the file, and the rank that it follows from, for a factor."""
        expected: dict[str, tuple[tuple[int, ...], int | None]] = {}
        for part in spec.parts:
            for name, size in part.tensors.items():
                expected[factor_name(self.stored_name(part.hf_modules[0]), name[-1])] = (size, part.rank)
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
        """Whether several matrices of a fused linear have one A, rank and scaling wherever any is a target."""
        found = False
        for module, names in self.linears.items():
            if linear_kind(module) != linear:
                continue
            targeted = [name for name in names if self.config.targets(name)]
            if not targeted:
                continue
            if len(names) == 1 or len(targeted) < len(names) or not self._has_one_a(names):
                return False
            found = True
        return found

    def _check_equal_experts(self, spec: AdapterSpec) -> None:
        """``--lora-moe-shared``: each expert's factors are the first one's."""
        for part in spec.parts:
            matrices = 1 if part.label else len(self.linears[part.weight.removesuffix(".weight")])
            for first, *others in (part.hf_modules[number::matrices] for number in range(matrices)):
                expected = self.factors(first)[:2] if others else ()
                for module in others:
                    found = self.factors(module)[:2]
                    if not all(torch.equal(_bits(a), _bits(b)) for a, b in zip(found, expected, strict=True)):
                        raise Refused(
                            f"--lora-moe-shared: the factors of {module} in {self.file.path} are not those of {first}; "
                            "leave the flag out"
                        )

    def _has_one_a(self, names: Sequence[str]) -> bool:
        config = self.config
        if len({(config.rank_of(name), config.scaling_of(name)) for name in names}) > 1:
            return False
        if config.moe_format == FUSED_FORM and is_expert(names[0]):
            return not config.separate_gate_up
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
