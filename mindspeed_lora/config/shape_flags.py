"""The shape of a model that no checkpoint tells, from flags alone."""

from __future__ import annotations

from typing import Any

from mindspeed_lora.config.model import ModelConfig
from mindspeed_lora.config.model_features import features_of
from mindspeed_lora.config.rotary_flags import LONGROPE, rope_scaling_from_flags
from mindspeed_lora.config.shape import MLAShape, ModelShape
from mindspeed_lora.errors import Refused

MLA_FLAGS = ("q_lora_rank", "kv_lora_rank", "qk_head_dim", "qk_pos_emb_head_dim", "v_head_dim")
"""Widths of multi-latent attention."""
FEATURE_FLAGS = (
    *(
        "rotary_interleaved",
        "interleave_sliding_window",
        "attn_logit_softcapping",
        "output_logit_softcapping",
    ),
    *("input_embeds_norm", "scale_emb", "scale_depth", "dim_model_base", "geglu", "gelu_tanh"),
)
"""Flags that say a feature of the shape by its name."""


def _least_shape(model: ModelConfig, vocab_size: int | None = None) -> dict[str, int | None]:
    """What a model's shape needs at least, by flag; ``vocab_size`` where no flag tells it."""
    return {
        "--num-layers": model.num_layers,
        "--hidden-size": model.hidden_size,
        "--num-attention-heads": model.num_attention_heads,
        "--max-position-embeddings": model.max_position_embeddings,
        "--vocab-size": model.vocab_size or model.padded_vocab_size or vocab_size,
    }


def missing_shape_flags(model: ModelConfig, vocab_size: int | None = None) -> list[str]:
    """The flags without which there is no shape; ``vocab_size`` where none tells the vocabulary."""
    return [name for name, value in _least_shape(model, vocab_size).items() if value is None]


def shape_from_flags(model: ModelConfig, num_noops: int = 0) -> ModelShape:
    """The shape of a model with random weights, from the flags alone, with Megatron's defaults.

    ``--num-layers`` counts the no-op layers too.
    """
    missing = missing_shape_flags(model)
    if missing:
        raise Refused(f"without --load the shape must be given: {', '.join(missing)} missing")
    needed = _least_shape(model).values()
    layers, hidden, heads, positions, vocabulary = (value for value in needed if value is not None)
    mla = _mla(model)
    if layers <= num_noops:
        raise Refused(f"--num-layers {layers}: --noop-layers leaves none of them; raise it")
    return ModelShape(
        family=_family(model),
        num_layers=layers - num_noops,
        hidden_size=hidden,
        ffn_hidden_size=model.ffn_hidden_size or _default_ffn(hidden, bool(model.swiglu)),
        num_attention_heads=heads,
        num_query_groups=_query_groups(model, heads) if mla is None else heads,
        kv_channels=_head_width(model, hidden, heads) if mla is None else mla.head_size,
        vocab_size=vocabulary,
        max_position_embeddings=positions,
        norm_epsilon=model.norm_epsilon or 1e-5,
        rotary_base=model.rotary_base or 10000.0,
        rotary_percent=model.rotary_percent or 1.0,
        rope_scaling=rope_scaling_from_flags(model, positions),
        untie_embeddings_and_output_weights=bool(model.untie_embeddings_and_output_weights),
        add_qkv_bias=bool(model.add_qkv_bias),
        add_proj_bias=bool(model.add_dense_bias),
        post_norm=bool(model.post_norm),
        qk_layernorm=bool(model.qk_layernorm) and mla is None,
        mla=mla,
        sliding_window=model.sliding_window_size,
        hidden_dropout=model.hidden_dropout or 0.0,
        attention_dropout=model.attention_dropout or 0.0,
        features=_features(model),
    )


def _family(model: ModelConfig) -> str:
    """The family whose Hugging Face form has the switches that are on."""
    if model.multi_latent_attention:
        return "deepseek_v3"
    if model.gelu_tanh and model.add_rmsnorm_offset:
        return "gemma2" if model.post_norm else "gemma"
    if model.rotary_interleaved:
        return "glm4" if model.post_norm else "glm"
    if model.scale_emb is not None:
        return "minicpm"
    if model.rope_scaling_type == LONGROPE:
        return "phi3"
    if model.qk_layernorm:
        return "qwen3"
    if model.add_qkv_bias:
        return "qwen2"
    return "mistral" if model.sliding_window_size is not None else "llama"


def _features(model: ModelConfig) -> tuple[tuple[str, Any], ...]:
    """What the flags ask for otherwise than Llama's computation."""
    names = (*FEATURE_FLAGS, "query_pre_attn_scalar", "add_rmsnorm_offset")
    return features_of({name: getattr(model, name) for name in names})


def _default_ffn(hidden_size: int, swiglu: bool) -> int:
    """Megatron's width of the MLP: 4 h, or with a gate two thirds of it in multiples of 64."""
    return int(4 * hidden_size * 2 / 3) // 64 * 64 if swiglu else 4 * hidden_size


def _mla(model: ModelConfig) -> MLAShape | None:
    """Multi-latent attention, with megatron-core's widths; queries have a latent vector where its width is given."""
    given = {name: getattr(model, name) for name in MLA_FLAGS if getattr(model, name) is not None}
    if model.multi_latent_attention:
        widths = {"kv_lora_rank": 512, "qk_head_dim": 128, "qk_pos_emb_head_dim": 64, "v_head_dim": 128}
        return MLAShape(**{"q_lora_rank": None, **widths, **given})
    if given:
        name, value = next(iter(given.items()))
        raise Refused(f"--{name.replace('_', '-')} {value} needs --multi-latent-attention; add it")
    return None


def _head_width(model: ModelConfig, hidden_size: int, heads: int) -> int:
    if model.kv_channels is not None:
        return model.kv_channels
    if hidden_size % heads:
        raise Refused(
            f"--hidden-size {hidden_size} is not divisible by --num-attention-heads {heads}; give "
            "--kv-channels"
        )
    return hidden_size // heads


def _query_groups(model: ModelConfig, heads: int) -> int:
    if model.group_query_attention:
        groups = model.num_query_groups or 1
    elif model.num_query_groups in (None, heads):
        groups = heads
    else:
        raise Refused(f"--num-query-groups {model.num_query_groups} needs --group-query-attention; add it")
    if heads % groups:
        raise Refused(f"--num-query-groups {groups} does not divide --num-attention-heads {heads}")
    return groups
