"""The resolved architecture of a model: what config.json, Megatron's ``args`` and the flags are brought to.

Everything that builds, reads, writes or converts a model takes a :class:`ModelShape`; nothing below it looks
at flags or at a ``config.json`` again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Scaling of the rotary frequencies, in the words of Hugging Face's ``rope_parameters``."""

    rope_type: str
    """``llama3`` (frequency bands, Llama 3.1), ``linear`` (positions divided by ``factor``), ``dynamic`` (nothing
    changes up to ``max_position_embeddings``, and longer rows are refused), ``yarn``, or ``longrope`` (Phi-3.5)."""
    factor: float
    """``longrope``: ``max_position_embeddings`` by the original ones."""
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192
    beta_fast: float = 32.0
    """``yarn``: what turns at least so often over the original positions is not scaled."""
    beta_slow: float = 1.0
    """``yarn``: what turns at most so often is scaled in full."""
    mscale: float | None = None
    """``yarn``: with ``mscale_all_dim``, how far cosine and sine are enlarged (:mod:`mindspeed_lora.models.rope`)."""
    mscale_all_dim: float | None = None
    attention_factor: float | None = None
    """``yarn`` and ``longrope``: what multiplies cosine and sine; None: as the other values say."""
    truncate: bool = True
    """``yarn``: both ends of the band are rounded outwards to whole frequencies."""
    short_factor: tuple[float, ...] = ()
    """``longrope``: what each frequency is divided by in rows of up to the original positions."""
    long_factor: tuple[float, ...] = ()
    """``longrope``: the same in longer rows."""
    short_mscale: float | None = None
    """``longrope``: with ``long_mscale``, ``attention_factor`` of rows of up to the original positions."""
    long_mscale: float | None = None
    """``longrope``: the same of longer rows."""


@dataclass(frozen=True, kw_only=True)
class MoEShape:
    """The mixture of experts in place of the MLP; every expert is a gated MLP without biases.

    The router's scores: a softmax over all experts (``softmax``) or a sigmoid of each (``sigmoid``); the ``topk`` best
    are taken, and their scores are the weights.
    """

    num_experts: int
    topk: int
    ffn_hidden_size: int
    """Inner width of one expert (``--moe-ffn-hidden-size``)."""
    dense_layers: tuple[int, ...] = ()
    """Numbers of the layers that have an ordinary MLP, of the shape's ``ffn_hidden_size``."""
    shared_ffn_hidden_size: int = 0
    """Inner width of the shared experts together, which every token goes through; 0: there are none."""
    shared_expert_gate: bool = False
    """The shared experts' output is multiplied by a sigmoid of one linear (Qwen2-MoE)."""
    score_function: str = "softmax"
    normalise: bool = True
    """The weights of a token are divided by their sum (``norm_topk_prob``)."""
    scaling_factor: float = 1.0
    """On the weights (``routed_scaling_factor``)."""
    expert_bias: bool = False
    """A bias on the scores that decides which experts are taken, and not their weights (DeepSeek-V3, equation 16)."""
    num_groups: int = 1
    """Groups of neighbouring experts, of which each token takes ``group_topk``."""
    group_topk: int = 1
    group_score: str = "max"
    """What ranks a group: its best score (``max``, DeepSeek-V2) or the sum of its two best (``top2``, DeepSeek-V3)."""
    aux_loss_coeff: float = 0.0
    """Of config.json (``router_aux_loss_coef``), for a notice; what is trained with is a flag."""

    def is_dense(self, layer: int) -> bool:
        """Whether a layer has an ordinary MLP."""
        return layer in self.dense_layers


@dataclass(frozen=True, kw_only=True)
class MLAShape:
    """Multi-latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1) in place of grouped queries.

    A head's query and key are ``qk_head_dim`` features without positions and ``qk_pos_emb_head_dim`` rotated ones; the
    rotated ones of the keys are shared by all heads.
    """

    q_lora_rank: int | None
    """Width of the queries' latent vector; None: queries are projected in one step (``linear_q_proj``)."""
    kv_lora_rank: int
    """Width of the latent vector of keys and values."""
    qk_head_dim: int
    qk_pos_emb_head_dim: int
    v_head_dim: int
    rope_interleave: bool = True
    """The pairs that are rotated are neighbours in the projections' rows; False: they are half of the width apart."""

    @property
    def head_size(self) -> int:
        """Width of one head's query and key."""
        return self.qk_head_dim + self.qk_pos_emb_head_dim


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A GPT-like model of the Llama kind: RMSNorm, SwiGLU, rotary positions, grouped-query attention."""

    family: str
    """Name of the family in ``models/families`` (``llama``, ``qwen2``, ``phi3`` …)."""
    num_layers: int
    hidden_size: int
    ffn_hidden_size: int
    num_attention_heads: int
    num_query_groups: int
    """Number of key/value heads; each serves ``num_attention_heads / num_query_groups`` query heads."""
    kv_channels: int
    """Width of one attention head."""
    vocab_size: int
    """The model's own vocabulary, without the padding that a TP layout adds."""
    max_position_embeddings: int
    norm_epsilon: float = 1e-5
    rotary_base: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rotary_percent: float = 1.0
    """The share of a head's features, the first ones, that is rotated."""
    untie_embeddings_and_output_weights: bool = True
    add_qkv_bias: bool = False
    add_proj_bias: bool = False
    """Bias on ``linear_proj`` (Llama's ``attention_bias`` sets this and ``add_qkv_bias``)."""
    add_mlp_bias: bool = False
    """Bias on ``linear_fc1`` and ``linear_fc2`` (Llama's ``mlp_bias``)."""
    qk_layernorm: bool = False
    post_norm: bool = False
    """RMSNorm also over the output of attention and of the MLP (``post_attn_norm``, ``post_mlp_layernorm``)."""
    sliding_window: int | None = None
    """Width of the attention window of every layer (Mistral 7B v0.1), or None."""
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    params_dtype: str = "float32"
    """The dtype of the stored weights: ``float32``, ``bfloat16`` or ``float16``."""
    moe: MoEShape | None = None
    """The experts; None: every layer has an ordinary MLP."""
    mla: MLAShape | None = None
    """Multi-latent attention; ``num_query_groups`` is then the number of heads, ``kv_channels`` ``mla.head_size``."""
    features: tuple[tuple[str, Any], ...] = ()
    """What the model computes otherwise than Llama, by Megatron's and MindSpeed-LLM's arguments, with their values
    (``("attn_logit_softcapping", 50.0)``): :mod:`mindspeed_lora.config.model_features`."""

    @property
    def qkv_size(self) -> int:
        """Rows of the fused ``linear_qkv`` matrix, ``(q + 2 k) · d``."""
        return (self.num_attention_heads + 2 * self.num_query_groups) * self.kv_channels

    @property
    def proj_input_size(self) -> int:
        """Columns of ``linear_proj``, ``q · d``."""
        head = self.kv_channels if self.mla is None else self.mla.v_head_dim
        return self.num_attention_heads * head

    def feature(self, name: str) -> Any:
        """The value of one of :attr:`features`; None where the model has it not."""
        return dict(self.features).get(name)

    def window_of(self, layer: int) -> int | None:
        """Width of a layer's attention window, or None."""
        interleaved: int | None = self.feature("interleave_sliding_window")
        if interleaved is None:
            return self.sliding_window
        return interleaved if layer % 2 == 0 else None

    def has_experts(self, layer: int) -> bool:
        """Whether a layer has experts in place of an ordinary MLP."""
        return self.moe is not None and not self.moe.is_dense(layer)
