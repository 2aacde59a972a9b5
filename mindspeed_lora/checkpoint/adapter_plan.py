"""Which adapter a job trains or applies: the LoRA flags and the files of ``--lora-load`` brought together."""

from __future__ import annotations

from mindspeed_lora.adapters.inject import AdapterSpec
from mindspeed_lora.checkpoint.adapter import AdapterSource, open_adapter
from mindspeed_lora.checkpoint.canonical import LINEARS
from mindspeed_lora.checkpoint.load_model import AdapterPlan
from mindspeed_lora.config.lora import LoraConfig
from mindspeed_lora.config.shape import ModelShape
from mindspeed_lora.errors import Refused


def plan_adapter(lora: LoraConfig, shape: ModelShape, seed: int) -> AdapterPlan | None:
    """The adapter of a job on a model of this shape; None where no LoRA flag was given.

    With ``--lora-load`` rank, alpha and targets are those of its files. Without it they are set: the command
    line's rules have filled in what the user left out.

    Raises:
        Refused: a flag contradicts the adapter's files, or the files do not fit the model.
    """
    if lora.lora_load is not None:
        source = open_adapter(lora.lora_load, shape)
        _refuse_contradictions(lora, source)
        spec = AdapterSpec(
            rank=source.r,
            alpha=source.alpha,
            dropout=lora.lora_dropout,
            target_modules=source.target_modules,
            use_rslora=source.use_rslora,
        )
        return AdapterPlan(spec=spec, source=source, seed=seed)
    if not lora.enabled:
        return None
    assert lora.lora_r is not None and lora.lora_alpha is not None and lora.lora_target_modules is not None
    for target in lora.lora_target_modules:
        if target not in LINEARS:
            raise Refused(
                f"--lora-target-modules: the model has no module {target}; it has {', '.join(sorted(LINEARS))}"
            )
    spec = AdapterSpec(
        rank=lora.lora_r,
        alpha=lora.lora_alpha,
        dropout=lora.lora_dropout,
        target_modules=tuple(dict.fromkeys(lora.lora_target_modules)),
    )
    return AdapterPlan(spec=spec, source=None, seed=seed)


def _refuse_contradictions(lora: LoraConfig, source: AdapterSource) -> None:
    """Refuses a flag that was given and is not what the adapter's files say."""
    targets = lora.lora_target_modules
    same_targets = targets is None or set(targets) == set(source.target_modules)
    differing = [
        f"{flag} {given} (the adapter has {found})"
        for flag, given, found, same in (
            ("--lora-r", lora.lora_r, source.r, lora.lora_r in (None, source.r)),
            ("--lora-alpha", lora.lora_alpha, f"{source.alpha:g}", lora.lora_alpha in (None, source.alpha)),
            ("--lora-target-modules", " ".join(targets or ()), " ".join(source.target_modules), same_targets),
        )
        if not same
    ]
    if differing:
        raise Refused(
            f"contradicting --lora-load {lora.lora_load}: {', '.join(differing)}; "
            "leave out what the adapter's files tell"
        )
