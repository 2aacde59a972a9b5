"""What a model computes otherwise than Llama, by the arguments of Megatron-LM and MindSpeed-LLM.

They are the shape's ``features``: read from config.json or from a Megatron checkpoint's ``args``, written into the
latter, compared with flags. A model with one that ``models/`` does not compute is converted, but not trained or run.
``norm_head``, ``embd_pdrop``, ``use_bidirectional_attention`` and ``window_layers`` are names of our own.
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
    built: bool = False
    """Whether ``models/`` computes it, in models without experts and latent attention."""
    plain: tuple[Any, ...] = (None, False)
    """The values that leave the computation as it is."""


FEATURES: dict[str, Feature] = {
    "attn_logit_softcapping": Feature("softcapping of attention scores", built=True),
    "output_logit_softcapping": Feature("softcapping of logits", built=True),
    "query_pre_attn_scalar": Feature(
        "attention scores divided by another root than the head's width", built=True
    ),
    "interleave_sliding_window": Feature(
        "sliding windows in every second layer, from the first on", built=True
    ),
    "window_layers": Feature("sliding windows in other layers than every second one"),
    "geglu": Feature("a gated MLP with GELU", built=True),
    "gelu_tanh": Feature("a gated MLP with GELU's tanh form", built=True),
    "add_rmsnorm_offset": Feature("RMSNorm with weights counted from 1", built=True),
    "apply_layernorm_1p": Feature("norms with weights counted from 1", built=True),
    "input_embeds_norm": Feature("embeddings scaled by the root of their width", built=True),
    "scale_emb": Feature("scaled embeddings", built=True),
    "scale_depth": Feature("residuals scaled by the depth of the model", built=True),
    "dim_model_base": Feature("logits scaled by the width of the model", built=True),
    "rotary_interleaved": Feature("rotary positions over neighbouring pairs", built=True),
    "position_embedding_type": Feature("another position embedding than rotary", plain=(None, False, "rope")),
    "rope_scaling_type": Feature(
        "this scaling of rotary positions",
        plain=(None, False, "default", "linear", "llama3", "dynamic", "yarn", "longrope"),
    ),
    "apply_residual_connection_post_layernorm": Feature("residuals taken after the norm"),
    "norm_head": Feature("an output layer with normalised rows"),
    "embd_pdrop": Feature("dropout of the embedding alone"),
    "use_bidirectional_attention": Feature("attention in both directions"),
    "moe_input_jitter_eps": Feature("noise on the router's input", plain=(None, False, 0.0)),
}
"""Argument → what it means; the order in which a model's features are told."""

_UNBUILT_FAMILIES = {"gemma3_text": "another rotary base in the layers with a window"}
"""Families that compute what no argument tells."""


def features_of(values: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """The arguments among ``values`` that change what is computed."""
    return tuple(
        (name, values[name]) for name, feature in FEATURES.items() if values.get(name) not in feature.plain
    )


def refuse_unbuilt(shape: ModelShape) -> None:
    """Refuse to train or run a model that ``models/`` does not compute.

    Raises:
        Refused: with the family and what is not built.
    """
    plain_layers = shape.moe is None and shape.mla is None
    missing = [
        f"{FEATURES[name].words} ({name} {str(value).lower()})"
        for name, value in shape.features
        if not (plain_layers and FEATURES[name].built)
    ]
    if shape.post_norm and not plain_layers:
        missing.append("norms over the outputs of attention and MLP (post_norm true)")
    if shape.family in _UNBUILT_FAMILIES:
        missing.append(_UNBUILT_FAMILIES[shape.family])
    if missing:
        raise Refused(
            f"{shape.family}: {'; '.join(missing)}: not built, so this model can be converted, but neither trained "
            "nor run"
        )
