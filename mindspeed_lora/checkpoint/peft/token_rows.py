"""``trainable_token_indices`` of an adapter on one model, and how large its vocabulary becomes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping

from mindspeed_lora.adapters.spec import TokenRowsSpec
from mindspeed_lora.checkpoint.canonical import EMBEDDING, OUTPUT_LAYER
from mindspeed_lora.checkpoint.peft.config import AdapterConfig, TokenIndices
from mindspeed_lora.checkpoint.peft.trained_tensors import PREFIX, unties, vocabulary_modules
from mindspeed_lora.config.shape import ModelShape
from mindspeed_lora.errors import Refused

DELTA = "token_adapter.trainable_tokens_delta"
"""What PEFT calls the rows below a module."""


def token_rows(config: AdapterConfig, shape: ModelShape) -> tuple[TokenRowsSpec, ...]:
    """The rows that an adapter trains on a model of this shape, its vocabulary already as large as the adapter needs.

    Raises:
        Refused: they are of no vocabulary tensor, or of one that is trained whole.
    """
    indices = config.trainable_token_indices
    if indices is None:
        return ()
    embedding, output = vocabulary_modules(shape)
    by_tensor = _by_tensor(config, indices, {EMBEDDING: embedding, OUTPUT_LAYER: output})
    tied = not shape.untie_embeddings_and_output_weights
    if tied:
        by_tensor = _tied(config, by_tensor)
    modules = {EMBEDDING: embedding, OUTPUT_LAYER: output}
    for tensor in by_tensor:
        if config.saves(modules[tensor]) or unties(config, shape):
            raise Refused(
                f"{_where(config)}: rows of {modules[tensor]} cannot be trained beside modules_to_save "
                f"{' '.join(config.modules_to_save)}; leave one out"
            )
    return tuple(
        TokenRowsSpec(
            tensor=tensor,
            tokens=tokens,
            width=shape.hidden_size,
            members=(f"{PREFIX}{modules[tensor]}.{DELTA}",),
        )
        for tensor, tokens in by_tensor.items()
    )


def with_vocabulary(shape: ModelShape, tokens: Iterable[int]) -> ModelShape:
    """The shape with as many words as these tokens need."""
    return dataclasses.replace(shape, vocab_size=max(shape.vocab_size, *(token + 1 for token in tokens), 0))


def new_token_indices(
    tokens: tuple[int, ...], config: AdapterConfig, shape: ModelShape
) -> TokenIndices | None:
    """``trainable_token_indices`` for added tokens; nothing where embedding and output layer are trained whole."""
    modules = vocabulary_modules(shape)
    whole = [module for module in modules if config.saves(module)]
    if not tokens or len(whole) == len(modules) or (whole and config.ensure_weight_tying):
        return None
    if not shape.untie_embeddings_and_output_weights:
        if whole:
            raise Refused(
                f"--add-tokens on a tied model with --lora-modules-to-save {' '.join(config.modules_to_save)}: name "
                "both embed_tokens and lm_head there, or none, or add --lora-ensure-weight-tying"
            )
        return tokens
    return {module.rpartition(".")[2]: tokens for module in modules if module not in whole}


def _by_tensor(
    config: AdapterConfig, indices: TokenIndices, modules: Mapping[str, str]
) -> dict[str, tuple[int, ...]]:
    """Tokens by canonical tensor; PEFT takes the end of a module's name, and a mere list for the embedding."""
    if not isinstance(indices, Mapping):
        return {EMBEDDING: indices}
    found: dict[str, tuple[int, ...]] = {}
    for name, tokens in indices.items():
        meant = [tensor for tensor, module in modules.items() if module.endswith(name)]
        if len(meant) != 1 or meant[0] in found:
            raise Refused(
                f"{_where(config)}: trainable_token_indices of {name!r} is not supported; expected those of "
                f"{' and '.join(modules.values())}"
            )
        found[meant[0]] = tokens
    return found


def _tied(config: AdapterConfig, by_tensor: dict[str, tuple[int, ...]]) -> dict[str, tuple[int, ...]]:
    """Rows of a tied embedding are also the output layer's."""
    embedding = by_tensor.get(EMBEDDING)
    if embedding is None or by_tensor.get(OUTPUT_LAYER, embedding) != embedding:
        raise Refused(
            f"{_where(config)}: trainable_token_indices are not the same for the embedding and the output layer, which "
            "are tied in this model; give one list"
        )
    return {EMBEDDING: embedding}


def _where(config: AdapterConfig) -> str:
    return str(config.path) if config.path is not None else "--add-tokens"
