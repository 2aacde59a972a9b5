"""What a model can compute and ``models/`` does not: such a checkpoint is converted, but not trained or run.

The names are the arguments of Megatron-LM and MindSpeed-LLM, under which a Megatron checkpoint's ``args`` tell the
same; ``norm_head``, ``embd_pdrop`` and ``use_bidirectional_attention`` are of config.json.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mindspeed_lora.config.shape import ModelShape
from mindspeed_lora.errors import Refused


@dataclass(frozen=True)
class Feature:
    """One argument that changes what a model computes."""

    words: str
    built: tuple[Any, ...] = (None, False)
    """The values that ``models/`` computes."""


UNBUILT: dict[str, Feature] = {
    "post_norm": Feature("norms over the outputs of attention and MLP"),
    "attn_logit_softcapping": Feature("softcapping of attention scores"),
    "output_logit_softcapping": Feature("softcapping of logits"),
    "query_pre_attn_scalar": Feature("attention scores divided by another root than the head's width"),
    "interleave_sliding_window": Feature("sliding windows in some of the layers"),
    "geglu": Feature("a gated MLP with GELU"),
    "add_rmsnorm_offset": Feature("RMSNorm with weights counted from 1"),
    "apply_layernorm_1p": Feature("norms with weights counted from 1"),
    "input_embeds_norm": Feature("embeddings scaled by the root of their width"),
    "rotary_interleaved": Feature("rotary positions over neighbouring pairs"),
    "position_embedding_type": Feature("another position embedding than rotary", (None, "rope")),
    "rope_scaling_type": Feature(
        "this scaling of rotary positions", (None, "default", "linear", "llama3", "dynamic", "yarn")
    ),
    "apply_residual_connection_post_layernorm": Feature("residuals taken after the norm"),
    "norm_head": Feature("an output layer with normalised rows"),
    "embd_pdrop": Feature("dropout of the embedding alone"),
    "use_bidirectional_attention": Feature("attention in both directions"),
    "moe_input_jitter_eps": Feature("noise on the router's input", (None, False, 0.0)),
}
"""Argument → what it means; the order in which a model's features are told."""


def unbuilt_of(values: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """The arguments among ``values`` that ask for what is not built; ``post_norm`` is a field of the shape itself."""
    return tuple(
        (name, values[name])
        for name, feature in UNBUILT.items()
        if name != "post_norm" and values.get(name) not in feature.built
    )


def refuse_unbuilt(shape: ModelShape) -> None:
    """Refuse to train or run a model that ``models/`` does not compute.

    Raises:
        Refused: with the family and what is not built.
    """
    asked = {"post_norm": shape.post_norm, **dict(shape.unbuilt)}
    features = [
        f"{feature.words} ({name} {str(asked[name]).lower()})"
        for name, feature in UNBUILT.items()
        if asked.get(name) not in feature.built
    ]
    if features:
        raise Refused(
            f"{shape.family}: {'; '.join(features)}: not built, so this model can be converted, but neither trained "
            "nor run"
        )
