"""The model's architecture as flags; what is left out is taken from the checkpoint."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mindspeed_lora.config.flags import AT_LEAST_ONE, POSITIVE, PROBABILITY, Check, Section, flag


def numbers(text: str) -> tuple[float, ...]:
    """The numbers of a text with commas between them."""
    return tuple(map(float, text.split(",")))


def _are_positive(text: str) -> bool:
    try:
        return all(0 < value < math.inf for value in numbers(text))
    except ValueError:
        return False


_NUMBERS = Check("numbers above 0 with commas between them", _are_positive)
_SHARE = Check("a number above 0, up to 1", lambda value: 0 < value <= 1)


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Section):
    """Shape flags; what is left out is as the checkpoint says, what is given must agree with it."""

    num_layers: int | None = flag("number of transformer layers", check=AT_LEAST_ONE)
    hidden_size: int | None = flag("width of the residual stream", check=AT_LEAST_ONE)
    ffn_hidden_size: int | None = flag("width of the MLP's inner layer", check=AT_LEAST_ONE)
    num_attention_heads: int | None = flag("number of query heads", check=AT_LEAST_ONE)
    group_query_attention: bool | None = flag("query heads share key/value heads (see --num-query-groups)")
    num_query_groups: int | None = flag("number of key/value heads", check=AT_LEAST_ONE)
    kv_channels: int | None = flag("width of one attention head", check=AT_LEAST_ONE)
    max_position_embeddings: int | None = flag("longest sequence the model is meant for", check=AT_LEAST_ONE)
    position_embedding_type: str | None = flag("kind of position embedding", choices=("rope",))
    rotary_base: float | None = flag("base of the rotary frequencies", check=POSITIVE)
    rotary_percent: float | None = flag(
        "share of a head's features, the first ones, that is rotated", check=_SHARE
    )
    rope_scaling_type: str | None = flag(
        "scaling of the rotary frequencies", choices=("llama3", "linear", "yarn", "longrope")
    )
    rope_scaling_factor: float | None = flag("factor of the rotary scaling", check=POSITIVE)
    low_freq_factor: float | None = flag("llama3 rotary scaling: end of the low band", check=POSITIVE)
    high_freq_factor: float | None = flag("llama3 rotary scaling: start of the high band", check=POSITIVE)
    original_max_position_embeddings: int | None = flag(
        "llama3, yarn and longrope rotary scaling: positions that the model was first trained for",
        names=("--original-max-position-embeddings", "--rope-scaling-original-max-position-embeddings"),
        check=AT_LEAST_ONE,
    )
    beta_fast: float | None = flag(
        "yarn rotary scaling: turns over the original positions from which nothing is scaled",
        names=("--beta-fast", "--rope-scaling-beta-fast"),
        check=POSITIVE,
    )
    beta_slow: float | None = flag(
        "yarn rotary scaling: turns over the original positions up to which all is scaled",
        names=("--beta-slow", "--rope-scaling-beta-slow"),
        check=POSITIVE,
    )
    rope_scaling_mscale: float | None = flag(
        "yarn rotary scaling: magnitude of the rotation", names=("--rope-scaling-mscale", "--mscale")
    )
    rope_scaling_mscale_all_dim: float | None = flag(
        "yarn rotary scaling: magnitude of the scores",
        names=("--rope-scaling-mscale-all-dim", "--mscale-all-dim"),
    )
    short_factor: str | None = flag(
        "longrope rotary scaling: what divides each frequency in rows of up to the original positions",
        check=_NUMBERS,
        metavar="X,X,…",
    )
    long_factor: str | None = flag(
        "longrope rotary scaling: what divides each frequency in longer rows", check=_NUMBERS, metavar="X,X,…"
    )
    short_mscale: float | None = flag(
        "longrope rotary scaling: magnitude of the rotation in rows of up to the original positions",
        check=POSITIVE,
    )
    long_mscale: float | None = flag(
        "longrope rotary scaling: magnitude of the rotation in longer rows", check=POSITIVE
    )
    multi_latent_attention: bool | None = flag(
        "multi-latent attention (DeepSeek)",
        names=("--multi-latent-attention", "--multi-head-latent-attention"),
    )
    q_lora_rank: int | None = flag("multi-latent attention: width of the queries' latent", check=AT_LEAST_ONE)
    kv_lora_rank: int | None = flag(
        "multi-latent attention: width of the keys' and values' latent", check=AT_LEAST_ONE
    )
    qk_head_dim: int | None = flag(
        "multi-latent attention: features of a key without positions",
        names=("--qk-head-dim", "--qk-nope-head-dim"),
        check=AT_LEAST_ONE,
    )
    qk_pos_emb_head_dim: int | None = flag(
        "multi-latent attention: rotated features of a key",
        names=("--qk-pos-emb-head-dim", "--qk-rope-head-dim"),
        check=AT_LEAST_ONE,
    )
    v_head_dim: int | None = flag("multi-latent attention: width of a head's value", check=AT_LEAST_ONE)
    rotary_interleaved: bool | None = flag(
        "rotary positions over neighbouring pairs (GLM)", names=("--rotary-interleaved", "--use-glm-rope")
    )
    sliding_window_size: int | None = flag(
        "width of the attention window",
        names=("--sliding-window-size", "--sliding-window"),
        check=AT_LEAST_ONE,
    )
    interleave_sliding_window: int | None = flag(
        "width of the attention window of every second layer, from the first on (Gemma 2)", check=AT_LEAST_ONE
    )
    query_pre_attn_scalar: float | None = flag(
        "attention scores are divided by its root; left out: the head's width", check=POSITIVE
    )
    attn_logit_softcapping: float | None = flag("bound of the attention scores (Gemma 2)", check=POSITIVE)
    output_logit_softcapping: float | None = flag("bound of the logits (Gemma 2)", check=POSITIVE)
    input_embeds_norm: bool | None = flag("embeddings times the root of --hidden-size (Gemma)")
    scale_emb: float | None = flag("factor on the embeddings (MiniCPM)", check=POSITIVE)
    scale_depth: float | None = flag(
        "factor on what is added to the residual stream, divided by the root of the number of layers (MiniCPM)",
        check=POSITIVE,
    )
    dim_model_base: float | None = flag(
        "logits are multiplied by this over --hidden-size (MiniCPM)", check=POSITIVE
    )
    norm_epsilon: float | None = flag("epsilon of the norms", check=POSITIVE)
    normalization: str | None = flag("kind of norm", choices=("RMSNorm",))
    swiglu: bool | None = flag("gated MLP with SiLU")
    geglu: bool | None = flag("gated MLP with GELU")
    gelu_tanh: bool | None = flag("gated MLP with GELU's tanh form (Gemma)")
    disable_bias_linear: bool | None = flag("no bias on linear_proj, linear_fc1 and linear_fc2")
    add_qkv_bias: bool | None = flag("bias on linear_qkv")
    add_dense_bias: bool | None = flag("bias on linear_proj")
    post_norm: bool | None = flag("norms over the outputs of attention and MLP too")
    add_rmsnorm_offset: bool | None = flag(
        "norm weights counted from 1", names=("--add-rmsnorm-offset", "--apply-layernorm-1p")
    )
    qk_layernorm: bool | None = flag("norm on each head's query and key")
    untie_embeddings_and_output_weights: bool | None = flag("output layer with a weight of its own")
    vocab_size: int | None = flag(
        "the model's own vocabulary, without padding",
        names=("--vocab-size", "--true-vocab-size"),
        check=AT_LEAST_ONE,
    )
    padded_vocab_size: int | None = flag(
        "vocabulary with padding; at least the model's own", check=AT_LEAST_ONE
    )
    make_vocab_size_divisible_by: int = flag(
        "pad the vocabulary to a multiple of this times the tensor-parallel size", 1, check=AT_LEAST_ONE
    )
    init_method_std: float = flag("standard deviation of random starting weights", 0.02, check=POSITIVE)
    hidden_dropout: float | None = flag(
        "dropout after attention and MLP; else the checkpoint's", check=PROBABILITY
    )
    attention_dropout: float | None = flag(
        "dropout of attention weights; else the checkpoint's", check=PROBABILITY
    )
