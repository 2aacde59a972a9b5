"""Which adapter a job trains or applies: the LoRA flags and the files of ``--lora-load`` brought together."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection

from mindspeed_lora.checkpoint.canonical import linear_kind
from mindspeed_lora.checkpoint.loading.model import AdapterPlan
from mindspeed_lora.checkpoint.peft.config import AdapterConfig
from mindspeed_lora.checkpoint.peft.contradictions import refuse_contradictions
from mindspeed_lora.checkpoint.peft.description import FUSED, describe_adapter, hf_linears
from mindspeed_lora.checkpoint.peft.expert_names import installed_moe_format
from mindspeed_lora.checkpoint.peft.flags import config_from_flags, shared_by_name
from mindspeed_lora.checkpoint.peft.folder import is_moe_shared
from mindspeed_lora.checkpoint.peft.source import AdapterSource
from mindspeed_lora.checkpoint.peft.token_rows import new_token_indices, with_vocabulary
from mindspeed_lora.checkpoint.peft.trained_tensors import model_shape
from mindspeed_lora.config.lora import LoraConfig
from mindspeed_lora.config.shape import ModelShape
from mindspeed_lora.errors import Refused


def plan_adapter(
    lora: LoraConfig,
    shape: ModelShape,
    seed: int,
    shared: Collection[str] | None = None,
    new_tokens: tuple[int, ...] = (),
) -> AdapterPlan | None:
    """The adapter of a job on a model of this shape; None where no LoRA flag was given.

    With ``--lora-load`` all but the dropout is as its files say. Without it rank, alpha and targets are set: the
    command line's rules have filled in what the user left out.

    Args:
        lora: the flags.
        shape: the model's.
        seed: of the starting values.
        shared: of a run that goes on: the fused linears that it trains with one A.
        new_tokens: numbers of the tokens of ``--add-tokens``, for an adapter that is not loaded.

    Raises:
        Refused: a flag contradicts the adapter's files, or the files or flags do not fit the model.
    """
    if lora.lora_load is not None:
        return _loaded(lora, lora.lora_load, shape, seed, shared)
    if not lora.enabled:
        return None
    config, named = config_from_flags(lora, shape)
    config = dataclasses.replace(config, trainable_token_indices=new_token_indices(new_tokens, config, shape))
    shape = with_vocabulary(shape, new_tokens)
    spec = describe_adapter(config, shape, named, lora.lora_moe_shared)
    return AdapterPlan(
        spec=spec,
        shape=model_shape(config, shape),
        config=config,
        shared=named,
        seed=seed,
        notices=_of_form(lora, config, shape),
    )


def _of_form(lora: LoraConfig, config: AdapterConfig, shape: ModelShape) -> tuple[str, ...]:
    """A notice where the adapter will not be in the form that the installed transformers load."""
    if shape.moe is None or lora.peft_moe_format is not None or config.moe_format == installed_moe_format():
        return ()
    return (
        f"the adapter is saved with its experts {config.moe_format}, since one parameter for all experts of a layer "
        "takes one rank and alpha on all of them, gate and up alike; the installed PEFT may not load it",
    )


def check_tokens(adapter: AdapterPlan, new_tokens: tuple[int, ...]) -> None:
    """Refuse ``--add-tokens`` beside an adapter that is loaded and has not the very same ones."""
    trained = {rows.tokens for rows in adapter.spec.token_rows}
    whole = not trained and adapter.source is not None and adapter.source.has_own_words
    if new_tokens and not (trained == {new_tokens} or (whole and max(new_tokens) < adapter.shape.vocab_size)):
        raise Refused(
            f"--add-tokens: contradicting {adapter.config.path}, which trains "
            f"{'other tokens' if trained else 'no added tokens'}; leave it out, or start a new adapter"
        )


def _loaded(
    lora: LoraConfig, path: str, shape: ModelShape, seed: int, shared: Collection[str] | None
) -> AdapterPlan:
    linears = hf_linears(shape)
    wanted = shared
    if shared is None and lora.lora_target_modules is not None:
        wanted = shared_by_name(lora.lora_target_modules, linears)
    notices = []
    if not lora.lora_moe_shared and is_moe_shared(path):
        notices.append(f"{path}: the experts of a layer have one pair of factors, as by --lora-moe-shared")
        lora = dataclasses.replace(lora, lora_moe_shared=True)
    source = AdapterSource(path, shape, wanted, lora)
    refuse_contradictions(lora, source.config, source.hf_modules, shape)
    dropout = source.config.dropout if lora.lora_dropout is None else lora.lora_dropout
    spec = dataclasses.replace(source.spec, dropout=dropout)
    apart = [
        linear
        for linear in (FUSED if wanted is None else wanted)
        if linear not in source.shared
        and len({part.label for part in spec.parts if linear_kind(part.module) == linear}) > 1
    ]
    if apart:
        labels = dict.fromkeys(part.label for part in spec.parts if linear_kind(part.module) in apart)
        notices.append(
            f"{source.path}: the matrices of {' and '.join(apart)} have no A in common; "
            f"{', '.join(labels)} keep separate factors"
        )
    if source.shape.vocab_size > shape.vocab_size:
        notices.append(
            f"{source.path}: the vocabulary grows from {shape.vocab_size} to {source.shape.vocab_size} words"
        )
    return AdapterPlan(
        spec=spec,
        shape=model_shape(source.config, source.shape),
        config=source.config,
        shared=source.shared,
        source=source,
        seed=seed,
        notices=tuple(notices),
    )
