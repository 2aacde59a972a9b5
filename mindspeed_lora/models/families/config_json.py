"""Reading the fields of a Hugging Face ``config.json`` that all families share, in both of its styles.

transformers 4 writes ``rope_theta``, ``rope_scaling`` and ``torch_dtype``; transformers 5 writes
``rope_parameters`` and ``dtype``. What changes the computation is noted in the shape's ``features``, under Megatron's
name; what changes the tensors and is not known is refused by name.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from mindspeed_lora.config.model_features import features_of
from mindspeed_lora.config.shape import RopeScaling
from mindspeed_lora.errors import Refused
from mindspeed_lora.models.rope import longrope_magnitude

Config = Mapping[str, Any]

DTYPES = ("float32", "bfloat16", "float16")
_SILU = ("silu", "swish")
_GELU = ("gelu",)
_GELU_TANH = ("gelu_pytorch_tanh", "gelu_new", "gelu_fast")
_ROPE_FIELDS = {
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (),
    "longrope": ("short_factor", "long_factor"),
}
"""Types of rotary scaling that are built, and what they must tell."""
_YARN = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor")
"""What YaRN need not tell; a 0 of these is as good as none."""
_ROPE_ALIASES = {"su": "longrope"}
"""Earlier names of types."""


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


def rope_parameters(config: Config) -> dict[str, Any]:
    """The keys of ``rope_scaling`` and ``rope_parameters``; where layers differ, those of full attention."""
    parameters = dict(config.get("rope_scaling") or {})
    given = dict(config.get("rope_parameters") or {})
    parameters.update(given.get("full_attention") or given)
    return parameters


def rope(config: Config) -> tuple[float, RopeScaling | None]:
    """The rotary base and the scaling of its frequencies, if that is a built one."""
    parameters = rope_parameters(config)
    base = float(parameters.get("rope_theta") or config.get("rope_theta") or 10000.0)
    _check_positive({"rope_theta": base})
    kind = _rope_type(parameters)
    if kind not in _ROPE_FIELDS:
        return base, None
    if kind == "yarn":
        return base, _yarn(config, parameters)
    missing = [field for field in _ROPE_FIELDS[kind] if parameters.get(field) is None]
    if missing:
        raise Refused(f"config.json: rope type '{kind}' lacks {', '.join(missing)}.")
    if kind == "longrope":
        return base, _longrope(config, parameters)
    values: dict[str, Any] = {field: float(parameters[field]) for field in _ROPE_FIELDS[kind]}
    _check_positive(values)
    if "original_max_position_embeddings" in values:
        values["original_max_position_embeddings"] = int(values["original_max_position_embeddings"])
    return base, RopeScaling(rope_type=kind, **values)


def _yarn(config: Config, parameters: Config) -> RopeScaling:
    """As transformers reads it: what is not given follows from the longest row that the model is for."""
    longest, original = _positions(config, parameters)
    told: dict[str, Any] = {field: float(parameters[field]) for field in _YARN if parameters.get(field)}
    return RopeScaling(
        rope_type="yarn",
        factor=float(parameters.get("factor") or longest / original),
        original_max_position_embeddings=original,
        truncate=bool(parameters.get("truncate", True)),
        **told,
    )


def _check_positive(values: Mapping[str, float]) -> None:
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise Refused(
                f"config.json: {name} of the rotary positions is {value:g}; expected a number above 0."
            )


def _longrope(config: Config, parameters: Config) -> RopeScaling:
    """As transformers reads it; a factor that is given says how far cosine and sine are enlarged, and nothing else."""
    longest, original = _positions(config, parameters)
    scaling = RopeScaling(
        rope_type="longrope",
        factor=longest / original,
        original_max_position_embeddings=original,
        short_factor=_numbers(parameters, "short_factor"),
        long_factor=_numbers(parameters, "long_factor"),
    )
    factor, magnitude = parameters.get("factor"), parameters.get("attention_factor")
    if magnitude is None and factor is not None and float(factor) != scaling.factor:
        magnitude = longrope_magnitude(replace(scaling, factor=float(factor)))
    return scaling if magnitude is None else replace(scaling, attention_factor=float(magnitude))


def _positions(config: Config, parameters: Config) -> tuple[int, int]:
    """The longest row that the model is for, and the one that it was for before its positions were scaled."""
    longest = int(required(config, "max_position_embeddings"))
    original = config.get("original_max_position_embeddings") or parameters.get(
        "original_max_position_embeddings"
    )
    original = int(original or longest)
    _check_positive({"max_position_embeddings": longest, "original_max_position_embeddings": original})
    return longest, original


def _numbers(parameters: Config, key: str) -> tuple[float, ...]:
    values = parameters[key]
    if not isinstance(values, list) or not all(
        isinstance(value, (int, float)) and value > 0 for value in values
    ):
        raise Refused(f"config.json: {key} of the rotary scaling is not a list of numbers above 0.")
    return tuple(map(float, values))


def _rope_type(parameters: Config) -> str:
    kind = str(parameters.get("rope_type") or parameters.get("type") or "default")
    kind = _ROPE_ALIASES.get(kind, kind)
    if kind != "default" and kind not in _ROPE_FIELDS:
        known = ", ".join(sorted({"default", *_ROPE_FIELDS}))
        raise Refused(f"config.json: rope type '{kind}' is not supported; supported are {known}.")
    return kind


def rotary_share(config: Config) -> float:
    """The share of a head that is rotated."""
    share = rope_parameters(config).get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if share is None:
        return 1.0
    if not 0 < float(share) <= 1:
        raise Refused(
            f"config.json: partial_rotary_factor {share} is no share of a head; expected above 0, up to 1."
        )
    return float(share)


def refuse_quantised(config: Config) -> None:
    """Refuse weights that were quantised otherwise than by bitsandbytes: their tensors are others."""
    quantization = config.get("quantization_config")
    if not quantization:
        return
    found: Mapping[str, Any] = quantization if isinstance(quantization, Mapping) else {}
    # Early configurations of bitsandbytes do not name it.
    of_bitsandbytes = found.get("load_in_4bit") or found.get("load_in_8bit")
    method = found.get("quant_method") or ("bitsandbytes" if of_bitsandbytes else "unknown")
    if method != "bitsandbytes":
        raise Refused(
            f"config.json: quantization_config (quant_method '{method}') is not supported, only 'bitsandbytes' is; "
            "give the unquantised checkpoint."
        )


def features_told(config: Config, head_width: int, windowed: bool) -> dict[str, Any]:
    """What config.json asks for beyond Llama's computation, under Megatron's names.

    ``windowed`` families have one ``sliding_window`` for all layers.
    """
    scalar = config.get("query_pre_attn_scalar")
    return {
        "geglu": _activation(config) in _GELU,
        "gelu_tanh": _activation(config) in _GELU_TANH,
        **({} if windowed else _windows(config)),
        "attn_logit_softcapping": config.get("attn_logit_softcapping"),
        "output_logit_softcapping": config.get("final_logit_softcapping"),
        "query_pre_attn_scalar": scalar if scalar != head_width else None,
        "use_bidirectional_attention": config.get("use_bidirectional_attention"),
    }


def _activation(config: Config) -> str:
    activation = str(config.get("hidden_act") or config.get("hidden_activation") or "silu")
    known = (*_SILU, *_GELU, *_GELU_TANH)
    if activation not in known:
        raise Refused(
            f"config.json: hidden_act '{activation}' is not supported; supported are {', '.join(known)}."
        )
    return activation


def _windows(config: Config) -> dict[str, int | bool]:
    """The window of the layers that have one, by which layers those are."""
    told = [str(kind) for kind in config.get("layer_types") or ()]
    kinds = set(told)
    foreign = sorted(kinds - {"full_attention", "sliding_attention"})
    if foreign:
        raise Refused(
            f"config.json: layer_types {', '.join(foreign)} is not supported; only full_attention and "
            "sliding_attention are."
        )
    if "sliding_attention" not in kinds and not config.get("use_sliding_window"):
        return {}
    window = int(config.get("sliding_window") or 0)
    second = [("sliding_attention", "full_attention")[layer % 2] for layer in range(len(told))]
    return {
        "interleave_sliding_window" if window and told and told == second else "window_layers": window or True
    }


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


def sliding_window(config: Config) -> int | None:
    """The window of every layer; null means none."""
    window = config.get("sliding_window")
    if window is not None and int(window) < 1:
        raise Refused(
            f"config.json: sliding_window {window} is not a window; expected a positive number or null."
        )
    return None if window is None else int(window)


def shape_fields(
    config: Config,
    *,
    default_groups: int | None = None,
    default_head: int | None = None,
    tied: bool = False,
    windowed: bool = False,
    features: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The fields of :class:`~mindspeed_lora.config.shape.ModelShape` that all families read alike.

    Args:
        config: under Llama's keys.
        default_groups: ``num_key_value_heads`` where it is not given; None means one a query head.
        default_head: ``head_dim`` where it is not given; None means ``hidden_size`` by heads.
        tied: ``tie_word_embeddings`` where it is not given.
        windowed: whether ``sliding_window`` is of every layer.
        features: what the family computes beyond Llama, by the names of
            :data:`~mindspeed_lora.config.model_features.FEATURES`.
    """
    refuse_quantised(config)
    base, scaling = rope(config)
    sizes = attention_sizes(config, default_groups, default_head)
    asked = {**features_told(config, sizes["kv_channels"], windowed), **(features or {})}
    return {
        **sizes,
        "num_layers": int(required(config, "num_hidden_layers")),
        "ffn_hidden_size": int(required(config, "intermediate_size")),
        "vocab_size": int(required(config, "vocab_size")),
        "max_position_embeddings": int(required(config, "max_position_embeddings")),
        "norm_epsilon": float(config.get("rms_norm_eps") or 1e-6),
        "rotary_base": base,
        "rope_scaling": scaling,
        "rotary_percent": rotary_share(config),
        "sliding_window": sliding_window(config) if windowed else None,
        "untie_embeddings_and_output_weights": not config.get("tie_word_embeddings", tied),
        "attention_dropout": float(config.get("attention_dropout") or 0.0),
        "params_dtype": dtype_name(config),
        "features": features_of(asked),
    }
