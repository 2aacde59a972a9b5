"""A decoder's table from the names of its modules; what a family does not say is Llama's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, fields

from mindspeed_lora.models.families import mapping
from mindspeed_lora.models.families.mapping import QKV, Direct, GateUp

LAYER = "decoder.layers.{layer}"
"""Canonical pattern of a layer."""
LLAMA_NORMS = {"input_layernorm": "input_layernorm", "pre_mlp_layernorm": "post_attention_layernorm"}
HEAD_NORMS = {
    "self_attention.q_layernorm": "self_attn.q_norm",
    "self_attention.k_layernorm": "self_attn.k_norm",
}


EXPERT = f"{LAYER}.mlp.experts.local_experts.{{expert}}"
"""Canonical pattern of an expert."""


@dataclass(frozen=True, kw_only=True)
class ExpertNames:
    """Hugging Face names of a mixture of experts, within a layer; ``{expert}`` is the number of an expert."""

    router: str = "mlp.gate"
    expert_bias: str | None = None
    """The tensor that decides with the router's scores which experts are taken, if the family has one."""
    linear_fc1: tuple[str, ...] = ("mlp.experts.{expert}.gate_proj", "mlp.experts.{expert}.up_proj")
    linear_fc2: str = "mlp.experts.{expert}.down_proj"
    shared: str | None = None
    """The module of the shared experts, whose linears are named like those of a dense layer's MLP."""
    shared_gate: str | None = None


@dataclass(frozen=True, kw_only=True)
class LatentNames:
    """Hugging Face names of multi-latent attention, within a layer; Megatron's rows lie in the same order."""

    linear_q_proj: str = "self_attn.q_proj"
    linear_q_down_proj: str = "self_attn.q_a_proj"
    q_layernorm: str = "self_attn.q_a_layernorm"
    linear_q_up_proj: str = "self_attn.q_b_proj"
    linear_kv_down_proj: str = "self_attn.kv_a_proj_with_mqa"
    kv_layernorm: str = "self_attn.kv_a_layernorm"
    linear_kv_up_proj: str = "self_attn.kv_b_proj"


@dataclass(frozen=True, kw_only=True)
class DecoderNames:
    """Hugging Face names of a decoder's modules; those of a layer without the layer's own name."""

    embedding: str = "model.embed_tokens"
    layer: str = "model.layers.{layer}"
    norms: Mapping[str, str] = field(default_factory=lambda: LLAMA_NORMS)
    """Megatron's name of a norm within a layer → Hugging Face's."""
    linear_qkv: tuple[str, ...] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    """Of q, k and v, or of the one module that holds them."""
    qkv: type[mapping.Mapping] = QKV
    """How the rows of ``linear_qkv`` lie; :class:`Direct` where one module has them by query group already."""
    linear_proj: str = "self_attn.o_proj"
    linear_fc1: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    """Of gate and up, or of the one module that stacks them."""
    linear_fc2: str = "mlp.down_proj"
    final_layernorm: str = "model.norm"
    output_layer: str = "lm_head"
    experts: ExpertNames | None = None
    """Of the layers that have experts."""
    latent: LatentNames | None = None
    """Of multi-latent attention, which then stands for ``linear_qkv``."""

    def table(self) -> tuple[mapping.Mapping, ...]:
        """One row for each tensor that a model of the family can have, with biases everywhere."""
        return (
            Direct("embedding.word_embeddings.weight", (f"{self.embedding}.weight",)),
            *(Direct(f"{LAYER}.{ours}.weight", self._names((name,))) for ours, name in self.norms.items()),
            *self._linears("weight"),
            *self._linears("bias"),
            *self._experts(),
            Direct("decoder.final_layernorm.weight", (f"{self.final_layernorm}.weight",)),
            Direct("output_layer.weight", (f"{self.output_layer}.weight",)),
        )

    def _linears(self, kind: str) -> Iterator[mapping.Mapping]:
        if self.latent is None:
            yield self.qkv(f"{LAYER}.self_attention.linear_qkv.{kind}", self._names(self.linear_qkv, kind))
        elif kind == "weight":
            for name in (one.name for one in fields(self.latent)):
                hf = self._names((getattr(self.latent, name),))
                yield Direct(f"{LAYER}.self_attention.{name}.weight", hf)
        yield Direct(f"{LAYER}.self_attention.linear_proj.{kind}", self._names((self.linear_proj,), kind))
        yield GateUp(f"{LAYER}.mlp.linear_fc1.{kind}", self._names(self.linear_fc1, kind))
        yield Direct(f"{LAYER}.mlp.linear_fc2.{kind}", self._names((self.linear_fc2,), kind))

    def _experts(self) -> Iterator[mapping.Mapping]:
        names = self.experts
        if names is None:
            return
        mlp = f"{LAYER}.mlp"
        yield Direct(f"{mlp}.router.weight", self._names((names.router,)))
        if names.expert_bias is not None:
            yield Direct(f"{mlp}.router.expert_bias", (f"{self.layer}.{names.expert_bias}",))
        yield GateUp(f"{EXPERT}.linear_fc1.weight", self._names(names.linear_fc1))
        yield Direct(f"{EXPERT}.linear_fc2.weight", self._names((names.linear_fc2,)))
        if names.shared is not None:
            fc1, fc2 = (
                tuple(f"{names.shared}.{name.rpartition('.')[2]}" for name in linear)
                for linear in (self.linear_fc1, (self.linear_fc2,))
            )
            yield GateUp(f"{mlp}.shared_experts.linear_fc1.weight", self._names(fc1))
            yield Direct(f"{mlp}.shared_experts.linear_fc2.weight", self._names(fc2))
        if names.shared_gate is not None:
            yield Direct(f"{mlp}.shared_experts.gate_weight", self._names((names.shared_gate,)))

    def _names(self, modules: tuple[str, ...], kind: str = "weight") -> tuple[str, ...]:
        return tuple(f"{self.layer}.{module}.{kind}" for module in modules)
