"""The resolved architecture of a model: what config.json, Megatron's ``args`` and the flags are brought to.

Everything that builds, reads, writes or converts a model takes a :class:`ModelShape`; nothing below it looks
at flags or at a ``config.json`` again.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class RopeScaling:
    """Scaling of the rotary frequencies, in the words of Hugging Face's ``rope_parameters``."""

    rope_type: str
    """``llama3`` (frequency bands, Llama 3.1) or ``linear`` (positions divided by ``factor``)."""
    factor: float
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192


@dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A GPT-like model of the Llama kind: RMSNorm, SwiGLU, rotary positions, grouped-query attention."""

    family: str
    """Name of the family's file in ``models/families`` (``llama``, ``mistral``, ``qwen2``, ``qwen3``)."""
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
    untie_embeddings_and_output_weights: bool = True
    add_qkv_bias: bool = False
    add_proj_bias: bool = False
    """Bias on ``linear_proj`` (Llama's ``attention_bias`` sets this and ``add_qkv_bias``)."""
    add_mlp_bias: bool = False
    """Bias on ``linear_fc1`` and ``linear_fc2`` (Llama's ``mlp_bias``)."""
    qk_layernorm: bool = False
    sliding_window: int | None = None
    """Width of the attention window of every layer (Mistral 7B v0.1), or None."""
    hidden_dropout: float = 0.0
    attention_dropout: float = 0.0
    params_dtype: str = "float32"
    """The dtype of the stored weights: ``float32``, ``bfloat16`` or ``float16``."""

    @property
    def qkv_size(self) -> int:
        """Rows of the fused ``linear_qkv`` matrix, ``(q + 2 k) · d``."""
        return (self.num_attention_heads + 2 * self.num_query_groups) * self.kv_channels

    @property
    def proj_input_size(self) -> int:
        """Columns of ``linear_proj``, ``q · d``."""
        return self.num_attention_heads * self.kv_channels
