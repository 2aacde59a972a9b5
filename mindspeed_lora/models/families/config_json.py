"""Reading the fields of a Hugging Face ``config.json`` that all families share, in both of its styles.

transformers 4 writes ``rope_theta``, ``rope_scaling`` and ``torch_dtype``; transformers 5 writes
``rope_parameters`` and ``dtype``. What changes the model and is not built is refused by name.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mindspeed_lora.config.shape import RopeScaling
from mindspeed_lora.errors import Refused

Config = Mapping[str, Any]

DTYPES = ("float32", "bfloat16", "float16")


def required(config: Config, key: str) -> Any:
    """The value of a key that must be there."""
    if config.get(key) is None:
        raise Refused(f"config.json: {key} is missing; the file does not describe a whole model.")
    return config[key]


def dtype_name(config: Config) -> str:
    """The stored dtype that the file claims; float32 when it claims none."""
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    if name not in DTYPES:
        raise Refused(f"config.json: dtype {name} is not supported; supported are {', '.join(DTYPES)}.")
    return name


def rope(config: Config) -> tuple[float, RopeScaling | None]:
    """The rotary base and the scaling of its frequencies."""
    parameters = dict(config.get("rope_scaling") or {})
    parameters.update(config.get("rope_parameters") or {})
    base = float(parameters.get("rope_theta") or config.get("rope_theta") or 10000.0)
    partial = parameters.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise Refused(f"config.json: partial_rotary_factor {partial} is not supported; only 1.0 is.")
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind == "default":
        return base, None
    if kind not in ("llama3", "linear"):
        raise Refused(
            f"config.json: rope type '{kind}' is not supported; supported are default, linear and llama3."
        )
    fields = ["factor"]
    if kind == "llama3":
        fields += ["low_freq_factor", "high_freq_factor", "original_max_position_embeddings"]
    missing = [field for field in fields if parameters.get(field) is None]
    if missing:
        raise Refused(f"config.json: rope type '{kind}' lacks {', '.join(missing)}.")
    values = {field: float(parameters[field]) for field in fields}
    if "original_max_position_embeddings" in values:
        return base, RopeScaling(
            rope_type=kind,
            factor=values["factor"],
            low_freq_factor=values["low_freq_factor"],
            high_freq_factor=values["high_freq_factor"],
            original_max_position_embeddings=int(values["original_max_position_embeddings"]),
        )
    return base, RopeScaling(rope_type=kind, factor=values["factor"])


def refuse_unsupported(config: Config) -> None:
    """Refuse what no family here computes: other activations, quantised weights, layers of several kinds."""
    activation = config.get("hidden_act") or config.get("hidden_activation") or "silu"
    if activation not in ("silu", "swish"):
        raise Refused(f"config.json: hidden_act '{activation}' is not supported; only silu (SwiGLU) is.")
    quantization = config.get("quantization_config")
    if quantization:
        method = (
            quantization.get("quant_method", "unknown") if isinstance(quantization, Mapping) else "unknown"
        )
        raise Refused(
            f"config.json: quantization_config (quant_method '{method}') is not supported; "
            "give the unquantised checkpoint."
        )
    kinds = sorted({str(kind) for kind in config.get("layer_types") or ()} - {"full_attention"})
    if kinds and config.get("model_type") != "mistral":
        raise Refused(
            f"config.json: layer_types {', '.join(kinds)} is not supported; only full_attention is."
        )


def attention_sizes(config: Config, default_groups: int | None, default_head: int | None) -> dict[str, int]:
    """Heads, query groups and head width, with the family's defaults for what is not given."""
    hidden = int(required(config, "hidden_size"))
    heads = int(required(config, "num_attention_heads"))
    groups = int(config.get("num_key_value_heads", default_groups) or heads)
    if heads % groups:
        raise Refused(
            f"config.json: num_attention_heads {heads} is not a multiple of num_key_value_heads {groups}."
        )
    head = config.get("head_dim") or default_head
    if not head and hidden % heads:
        raise Refused(f"config.json: hidden_size {hidden} is not a multiple of num_attention_heads {heads}.")
    return {
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_query_groups": groups,
        "kv_channels": int(head or hidden // heads),
    }


def shape_fields(
    config: Config, *, default_groups: int | None = None, default_head: int | None = None
) -> dict[str, Any]:
    """The fields of :class:`~mindspeed_lora.config.shape.ModelShape` that all families read alike.

    ``tie_word_embeddings`` that is not given means untied for every family here, as in transformers.
    """
    refuse_unsupported(config)
    base, scaling = rope(config)
    return {
        **attention_sizes(config, default_groups, default_head),
        "num_layers": int(required(config, "num_hidden_layers")),
        "ffn_hidden_size": int(required(config, "intermediate_size")),
        "vocab_size": int(required(config, "vocab_size")),
        "max_position_embeddings": int(required(config, "max_position_embeddings")),
        "norm_epsilon": float(config.get("rms_norm_eps") or 1e-6),
        "rotary_base": base,
        "rope_scaling": scaling,
        "untie_embeddings_and_output_weights": not config.get("tie_word_embeddings", False),
        "attention_dropout": float(config.get("attention_dropout") or 0.0),
        "params_dtype": dtype_name(config),
    }
