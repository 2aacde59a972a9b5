"""What the comparison of quantised models adds: speed of quantising, bytes of a rank, and the bars."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from comparison.process import run_child
from comparison.setting import Inputs, Setting
from comparison.sides import NF4
from comparison.summary import Summary
from comparison.table import table

BARS = {
    "share_of_plain_lora": 0.8,
    "times_of_peer": 2.0,
    "quantising_to_reading": 1.5,
    "bits_a_weight": 4.2,
}
"""Speed at least this share of our own LoRA's and so many times the peer's; seconds of loading with quantising at most
so many times those of reading the file; at most so many bits for a quantised weight."""
AT_MOST = ("quantising_to_reading", "bits_a_weight")
LARGE: dict[str, list[str]] = {
    "Llama-2-70B": [
        *("--num-layers", "80", "--hidden-size", "8192", "--ffn-hidden-size", "28672"),
        *("--num-attention-heads", "64", "--group-query-attention", "--num-query-groups", "8"),
        *("--max-position-embeddings", "4096", "--padded-vocab-size", "32000"),
        "--untie-embeddings-and-output-weights",
    ],
    "Mixtral-8x7B": [
        *("--num-layers", "32", "--hidden-size", "4096", "--ffn-hidden-size", "14336"),
        *("--num-attention-heads", "32", "--group-query-attention", "--num-query-groups", "8"),
        *("--max-position-embeddings", "4096", "--padded-vocab-size", "32000", "--num-experts", "8"),
        *("--moe-router-topk", "2", "--moe-grouped-gemm", "--untie-embeddings-and-output-weights"),
    ],
}
"""Models that are not here, by their flags."""
PUBLISHED_GIB = {"Llama-2-70B": (129, 35), "Mixtral-8x7B": (87, 24)}
"""GiB of the weights in bf16 and quantised, as another trainer's documentation tells."""


def _job(rows: int, seq_length: int) -> list[str]:
    """A LoRA job's flags, without a model and without data."""
    return [
        *(
            "--lora-r",
            "16",
            "--lora-alpha",
            "32",
            "--micro-batch-size",
            str(rows),
            "--global-batch-size",
            str(rows),
        ),
        *("--seq-length", str(seq_length), "--train-iters", "1", "--lr", "1e-4"),
    ]


def quantising(
    setting: Setting, inputs: Inputs, gigabytes: float, repeats: int, folder: Path
) -> dict[str, Any]:
    """Seconds in which a made-up bf16 Llama is read, is loaded, and is loaded and quantised; cold cache each time."""
    child = str(Path(__file__).with_name("convert_child.py"))
    made = folder / "made"
    run_child([child, "make", str(made), str(gigabytes)], setting.threads, folder / "make.log")
    base = made / "base"
    plain = [*_job(1, setting.seq_length), "--load", str(base), "--data-path", inputs.data_prefix]
    flags = {"plain": plain, "quantised": [*plain, *NF4]}
    runs: dict[str, list[dict[str, Any]]] = {"read": [], "plain": [], "quantised": []}
    for repeat in range(repeats):
        for way, own in runs.items():
            run_child([child, "forget", str(base)], setting.threads, folder / "forget.log")
            request = {
                "what": "read" if way == "read" else "load",
                "folder": str(base),
                "flags": flags.get(way),
            }
            own.append(_child(request, setting, folder, f"{way}-{repeat}"))
    size = sum(path.stat().st_size for path in base.rglob("*.safetensors"))
    seconds = {way: statistics.median(run["seconds"] for run in own) for way, own in runs.items()}
    return {
        "bytes": size,
        "seconds": seconds,
        "peak_memory_bytes": {way: max(run["peak"] for run in own) for way, own in runs.items()},
        "ratio": seconds["quantised"] / seconds["read"],
    }


def quantising_text(found: Mapping[str, Any]) -> str:
    """Seconds and rates."""
    rows = [
        [
            way,
            f"{seconds:.2f}",
            f"{found['bytes'] / seconds / 1e9:.2f}",
            f"{found['peak_memory_bytes'][way] / 1e9:.2f}",
        ]
        for way, seconds in found["seconds"].items()
    ]
    return (
        f"{found['bytes'] / 1e9:.2f} GB in bf16, cold cache:\n\n"
        f"{table(['', 'seconds', 'GB/s', 'peak GB'], rows)}"
    )


def memory(
    setting: Setting, inputs: Inputs, summaries: Sequence[Summary], folder: Path, measure: bool = True
) -> list[dict[str, Any]]:
    """A row a model and form: bytes of the weights and of a whole rank, predicted, and of the model here measured."""
    rows, here = setting.global_batch_size, Path(setting.model).name
    jobs = {here: ["--load", setting.model, *_job(rows, setting.seq_length)]}
    jobs |= {name: [*shape, *_job(1, 4096)] for name, shape in LARGE.items()}
    peaks = {summary.name: summary.peak_memory_bytes for summary in summaries}
    found: list[dict[str, Any]] = []
    asked: list[dict[str, Any]] = []
    for name, words in jobs.items():
        for form, extra in (("LoRA", ()), ("QLoRA", NF4)):
            # The large ones as they are trained on a device; what is here in fp32, as on this CPU.
            dtype, itemsize = ("fp32", 4) if name == here else ("bf16", 2)
            found.append({"model": name, "form": form, "dtype": dtype})
            asked.append({"flags": [*words, *extra], "itemsize": itemsize})
    predicted = _child({"what": "predict", "jobs": asked}, setting, folder, "predict")["jobs"]
    for row, figures in zip(found, predicted, strict=True):
        row |= figures
    for row, job, side in zip(found[:2] if measure else (), asked, ("", ", 4 bits"), strict=False):
        request = {"what": "load", "flags": [*job["flags"], "--data-path", inputs.data_prefix]}
        row["weights_measured"] = _child(request, setting, folder, f"load-{row['form']}")["weights"]
        row["measured"] = peaks.get(f"ours, batch {rows}{side}")
    return found


def memory_text(found: Sequence[Mapping[str, Any]]) -> str:
    """As a table in GB."""

    def gb(value: float | None) -> str:
        return "" if value is None else f"{value / 1e9:.2f}"

    rows = [
        [
            f"{row['model']}, {row['form']}, {row['dtype']}",
            gb(row["weights"]),
            gb(row.get("weights_measured")),
            f"{row['bits']:.3f}",
            gb(row["adapter_and_optimizer"]),
            gb(row["total"]),
            gb(row.get("measured")),
        ]
        for row in found
    ]
    heading = ["", "weights", "measured", "bits of a linear's weight", "adapter, gradients, optimizer"]
    return table([*heading, "rank in all, predicted", "measured peak"], rows)


def _child(request: Mapping[str, Any], setting: Setting, folder: Path, name: str) -> dict[str, Any]:
    asked, result = folder / f"{name}.json", folder / f"{name}-result.json"
    asked.write_text(json.dumps({**request, "result": str(result)}))
    run_child(["-m", "comparison.quantised_child", str(asked)], setting.threads, folder / f"{name}.log")
    answer: dict[str, Any] = json.loads(result.read_text())
    return answer


def reached(
    summaries: Sequence[Summary], speed: Mapping[str, Any] | None, bytes_of: Sequence[Mapping[str, Any]]
) -> dict[str, float]:
    """The figures of :data:`BARS` that were measured; the first side is ours in 4 bits."""
    found: dict[str, float] = {}
    rates = {summary.name: summary.tokens_per_second.median for summary in summaries}
    names = list(rates)
    plain = names[0].removesuffix(", 4 bits") if names else ""
    if plain in rates and plain != names[0]:
        found["share_of_plain_lora"] = rates[names[0]] / rates[plain]
    peers = [rate for name, rate in rates.items() if name.startswith("TRL")]
    if peers:
        found["times_of_peer"] = rates[names[0]] / max(peers)
    if speed is not None:
        found["quantising_to_reading"] = speed["ratio"]
    bits = [row["bits"] for row in bytes_of if row["form"] == "QLoRA"]
    if bits:
        found["bits_a_weight"] = max(bits)
    return found


def is_reached(name: str, value: float) -> bool:
    """Whether a figure passes its bar."""
    return value <= BARS[name] if name in AT_MOST else value >= BARS[name]


def told(found: Mapping[str, float]) -> str:
    """The figures beside their bars, a line each."""
    words = {
        "share_of_plain_lora": "of the speed of our own LoRA; at least",
        "times_of_peer": "times as fast as the fastest of TRL + bitsandbytes + PEFT; at least",
        "quantising_to_reading": "times the time of reading the file, to load and quantise it; at most",
        "bits_a_weight": "bits a quantised weight, of the model with most; at most",
    }
    return "\n".join(f"{value:.2f} {words[name]} {BARS[name]:g}" for name, value in found.items())
