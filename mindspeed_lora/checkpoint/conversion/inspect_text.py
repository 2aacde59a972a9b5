"""The report of ``inspect`` as text: aligned lines, by section."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mindspeed_lora.checkpoint.conversion.inspect_model import stage_texts
from mindspeed_lora.checkpoint.conversion.progress import readable_size

_FORMATS = {
    "hf": "Hugging Face model",
    "mg": "Megatron checkpoint (legacy, mg)",
    "torch_dist": "Megatron distributed checkpoint (torch_dist)",
    "peft": "PEFT adapter",
    "run": "training checkpoint of this program",
    "hf_config": "configuration of a Hugging Face model, without weights",
}
_STAGES_SHOWN = 16

Row = tuple[str, Any]


def report_lines(report: Mapping[str, Any]) -> list[str]:
    """The lines of a report."""
    rows: list[Row] = [
        ("folder", report["path"]),
        ("what it is", _FORMATS[report["format"]]),
        ("on disk", f"{readable_size(report['bytes'])} in {report['files']} files"),
    ]
    sections = [("", rows)]
    if report["run"]:
        sections.append(("training", list(_run_rows(report["run"]))))
    if report["model"]:
        sections.append(("model (base)", list(_model_rows(report["model"]))))
    if report["adapter"]:
        sections.append(("adapter", list(_adapter_rows(report["adapter"]))))
    lines: list[str] = []
    for title, found in sections:
        lines += ["", title] if title else []
        lines += _aligned([(name, text) for name, text in found if text not in (None, "")], bool(title))
    if report["tensors"] is not None:
        lines += ["", *_tensor_lines(report["tensors"])]
    return lines


def _aligned(rows: Sequence[Row], indented: bool) -> list[str]:
    width = max(len(name) for name, _ in rows)
    return [f"{'  ' if indented else ''}{name:<{width}}  {text}" for name, text in rows]


def _model_rows(model: Mapping[str, Any]) -> Iterator[Row]:
    yield "format", model["format"] and _FORMATS[model["format"]]
    yield "family", model["family"]
    yield "layers", model["num_layers"]
    yield "hidden, ffn size", f"{model['hidden_size']:,}, {model['ffn_hidden_size']:,}"
    heads, groups, width = (model[key] for key in ("num_attention_heads", "num_query_groups", "kv_channels"))
    yield "attention heads", f"{heads} of width {width}, {groups} key/value"
    yield "experts", _experts(model["experts"])
    padded = model["padded_vocab_size"]
    padding = f", padded to {padded:,}" if padded and padded != model["vocab_size"] else ""
    yield "vocabulary", f"{model['vocab_size']:,}{padding}"
    yield "embeddings", "tied" if model["tied_embeddings"] else "not tied"
    yield "positions", f"{model['max_position_embeddings']:,}, rotary base {model['rotary_base']:g}"
    yield "parameters", f"{model['parameters']:,}"
    yield "dtype", _shares(model["dtypes"])
    yield "quantised", _quantization(model["quantization"])
    if model["weight_bytes"] is not None:
        largest = model["largest_tensor"]
        yield "weights", readable_size(model["weight_bytes"])
        yield "largest tensor", f"{largest['name']}, {readable_size(largest['bytes'])}"
    yield from _layout_rows(model["layout"], model["experts"] is not None)
    yield "iteration", model["iteration"]
    if model["format"] != "hf":
        yield "comes from", _origin(model["origin"])
        yield "configuration", model["config_dir"]
    yield "also holds", ", ".join(model["holds"])


def _experts(moe: Mapping[str, Any] | None) -> str | None:
    if moe is None:
        return None
    shared = f", shared of {moe['shared_ffn_hidden_size']:,}" if moe["shared_ffn_hidden_size"] else ""
    dense = f"; {len(moe['dense_layers'])} layers without" if moe["dense_layers"] else ""
    return f"{moe['num_experts']} of width {moe['ffn_hidden_size']:,}, a token takes {moe['topk']}{shared}{dense}"


def _quantization(found: Mapping[str, Any] | None) -> str | None:
    if found is None:
        return None
    blocks = f" in blocks of {found['block_size']}" if found["block_size"] else " in rows"
    nested = ", nested statistics" if found["double"] else ""
    size = f"{found['parameters']:,} parameters at {found['bits']:.2f} bits in the files"
    return f"{found['type']}{blocks}{nested}: {size}"


def _layout_rows(layout: Mapping[str, Any] | None, has_experts: bool) -> Iterator[Row]:
    if layout is None:
        return
    virtual = f" × VPP {layout['vpp']}" if layout["vpp"] > 1 else ""
    experts = f" × EP {layout['ep']} × ETP {layout['etp']}" if has_experts else ""
    yield "layout", f"TP {layout['tp']} × PP {layout['pp']}{virtual}{experts}"
    texts = stage_texts(layout["stages"])
    if len(texts) > 1:
        shown = texts if len(texts) <= _STAGES_SHOWN else [*texts[: _STAGES_SHOWN - 1], "…", texts[-1]]
        yield "layers of stages", ", ".join(shown)
    if layout["noop_layers"]:
        yield "no-op layers", f"at {', '.join(map(str, layout['noop_layers']))}"


def _adapter_rows(adapter: Mapping[str, Any]) -> Iterator[Row]:
    kind = "rsLoRA, " if adapter["use_rslora"] else "DoRA, " if adapter["use_dora"] else ""
    yield (
        "rank, alpha",
        f"r {adapter['r']}, alpha {adapter['lora_alpha']:g}: {kind}scaling {adapter['scaling']:g}",
    )
    yield "targets", _listed(adapter["target_modules"])
    yield "parameters of", _listed(adapter["target_parameters"])
    yield "not on", _listed(adapter["exclude_modules"])
    yield "only layers", _listed(adapter["layers_to_transform"])
    yield "rank pattern", _listed(adapter["rank_pattern"])
    yield "alpha pattern", _listed(adapter["alpha_pattern"])
    yield "trained whole", _listed(adapter["modules_to_save"])
    yield "token rows", _listed(adapter["trainable_token_indices"])
    yield "bias", adapter["bias"]
    yield "base model", adapter["base_model"] or "not named"
    ranks = ", ".join(f"{count} of rank {rank}" for rank, count in adapter["ranks"].items())
    yield "matrices", ranks or "none"
    yield "parameters", f"{adapter['parameters']:,}"
    yield "dtype", _shares(adapter["dtypes"])
    yield "not converted", adapter["not_supported"]
    vllm = adapter["vllm"]
    yield "vLLM", "loads it" if vllm["loads"] else f"does not load it: {'; '.join(vllm['reasons'])}"
    yield "serve", vllm["command"]


def _run_rows(run: Mapping[str, Any]) -> Iterator[Row]:
    others = [number for number in run["iterations"] if number != run["iteration"]]
    also = f" (also held: {', '.join(map(str, others))})" if others else ""
    yield "iteration", f"{run['iteration']}{also}"
    yield "best", run["best"] and f"iteration {run['best']}, loss {run['best_eval_loss']}"
    data = run["data"]
    if data["samples"] is not None:
        yield (
            "data position",
            f"{data['samples']:,} samples read, of {data['documents']} rows, seed {data['seed']}",
        )
    if run["layout"]:
        yield (
            "trained on",
            ", ".join(f"{name.upper()} {run['layout'].get(name)}" for name in ("tp", "pp", "cp", "dp")),
        )
        yield "layers of stages", run["layout"].get("stages")
    yield "base model", run["base_model"]
    yield "holds", ", ".join(_held(run["holds"]))
    yield "version", run["version"]


def _held(holds: Mapping[str, Any]) -> Iterator[str]:
    for key in ("adapter", "model"):
        if holds[key]:
            yield key
    optimizer = holds["optimizer"]
    if optimizer:
        states = ", ".join(optimizer["states"])
        yield f"optimizer state ({states} of {optimizer['parameters']:,} parameters, {optimizer['files']} files)"
    if holds["random_states"]:
        yield f"random states of {holds['random_states']} ranks"
    if holds["data_position"]:
        yield "data position"


def _tensor_lines(tensors: Sequence[Mapping[str, Any]]) -> list[str]:
    """A line for each tensor, and one below it for each of several parts."""
    shapes = [_size(one["shape"]) for one in tensors]
    names, sizes = (max(map(len, texts), default=0) for texts in ([one["name"] for one in tensors], shapes))
    lines = [f"{len(tensors)} tensors"]
    for one, shape in zip(tensors, shapes, strict=True):
        parts = one["parts"]
        same = len(parts) == 1 and parts[0]["shape"] == one["shape"]
        file = parts[0]["file"] if same else f"{len(parts)} parts" if parts else ""
        lines.append(f"  {one['name']:<{names}}  {shape:<{sizes}}  {one['dtype']:<8}  {file}".rstrip())
        if not same:
            lines += [f"    {_size(part['shape'])} in {part['file']}: {part['name']}" for part in parts]
    return lines


def _size(shape: Sequence[int]) -> str:
    return f"[{', '.join(map(str, shape))}]"


def _shares(dtypes: Mapping[str, int]) -> str:
    """One dtype, or each with its number of parameters."""
    if len(dtypes) == 1:
        return next(iter(dtypes))
    return ", ".join(f"{dtype} ({count:,} parameters)" for dtype, count in dtypes.items())


def _origin(origin: Mapping[str, Any] | None) -> str | None:
    if origin is None:
        return None
    name = origin["hub_id"] or origin["path"]
    return f"{name} at {origin['revision']}" if origin["revision"] else str(name)


def _listed(value: Any) -> str | None:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {item}" for key, item in value.items()) or None
    if isinstance(value, list):
        return ", ".join(map(str, value)) or None
    return None if value is None else str(value)
