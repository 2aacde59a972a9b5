"""Llama 2 and 3, SmolLM2 and the many models of their architecture; also the base of the other tables."""

from __future__ import annotations

from mindspeed_lora.config.shape import ModelShape
from mindspeed_lora.models.families.config_json import Config, shape_fields
from mindspeed_lora.models.families.family import Family
from mindspeed_lora.models.families.mapping import QKV, Direct, GateUp, Mapping

_OURS, _HF = "decoder.layers.{layer}", "model.layers.{layer}"


def _attention(kind: str) -> tuple[Mapping, ...]:
    return (
        QKV(
            f"{_OURS}.self_attention.linear_qkv.{kind}",
            tuple(f"{_HF}.self_attn.{name}_proj.{kind}" for name in "qkv"),
        ),
        Direct(f"{_OURS}.self_attention.linear_proj.{kind}", (f"{_HF}.self_attn.o_proj.{kind}",)),
    )


def _mlp(kind: str) -> tuple[Mapping, ...]:
    return (
        GateUp(
            f"{_OURS}.mlp.linear_fc1.{kind}", (f"{_HF}.mlp.gate_proj.{kind}", f"{_HF}.mlp.up_proj.{kind}")
        ),
        Direct(f"{_OURS}.mlp.linear_fc2.{kind}", (f"{_HF}.mlp.down_proj.{kind}",)),
    )


LLAMA_TABLE: tuple[Mapping, ...] = (
    Direct("embedding.word_embeddings.weight", ("model.embed_tokens.weight",)),
    Direct(f"{_OURS}.input_layernorm.weight", (f"{_HF}.input_layernorm.weight",)),
    *_attention("weight"),
    *_attention("bias"),
    Direct(f"{_OURS}.pre_mlp_layernorm.weight", (f"{_HF}.post_attention_layernorm.weight",)),
    *_mlp("weight"),
    *_mlp("bias"),
    Direct("decoder.final_layernorm.weight", ("model.norm.weight",)),
    Direct("output_layer.weight", ("lm_head.weight",)),
)


def from_config(config: Config) -> ModelShape:
    """Read a Llama config.json; ``attention_bias`` covers q, k, v and o, ``mlp_bias`` the whole MLP."""
    bias = bool(config.get("attention_bias", False))
    return ModelShape(
        family="llama",
        **shape_fields(config),
        add_qkv_bias=bias,
        add_proj_bias=bias,
        add_mlp_bias=bool(config.get("mlp_bias", False)),
    )


FAMILY = Family(
    name="llama",
    model_type="llama",
    architecture="LlamaForCausalLM",
    aliases=("llama", "llama2", "llama3", "codellama", "yi", "smollm2"),
    from_config=from_config,
    table=LLAMA_TABLE,
)
