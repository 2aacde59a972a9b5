"""Rewrites the tables of ``benchmarks/README.md`` and draws the bar charts, from ``benchmarks/results/*.json``.

python benchmarks/render.py
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

from comparison import experts, quantised
from comparison.charts import bar_chart
from comparison.table import table
from convert import text as convert_text
from preprocess import text as preprocess_text

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
_BLOCK = re.compile(r"(<!-- results -->\n).*?(<!-- end of results -->)", re.DOTALL)


def main() -> int:
    """Read every result, write page and charts."""
    sections = []
    for path in sorted(RESULTS.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        sections.append(_section(path, result))
    page = HERE / "README.md"
    text, found = _BLOCK.subn(
        lambda match: match[1] + "\n" + "\n\n".join(sections) + "\n\n" + match[2],
        page.read_text(encoding="utf-8"),
    )
    if not found:
        print(
            f"error: {page} has no block between <!-- results --> and <!-- end of results -->",
            file=sys.stderr,
        )
        return 1
    page.write_text(text, encoding="utf-8")
    return 0


def _section(path: Path, result: dict[str, Any]) -> str:
    """One result: what it is of, its table, its chart."""
    body = {
        "train_vs_trl": _train_vs_trl,
        "tensor_parallel": _tensor_parallel,
        "start_up": _start_up,
        "cclora": _cclora,
        "convert": _convert,
        "moe": _moe,
        "moe_overlap": _cclora,
        "qlora": _qlora,
        "preprocess": _preprocess,
    }
    machine, commit = result["machine"], result["commit"].get("sha", "unknown")[:12]
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    where = (
        f"`{path.name}`: {machine['cpu']}, {machine['cores']} cores; {result['date'][:10]}, commit {commit}"
    )
    return "\n\n".join(
        [
            f"#### {path.stem}",
            f"{where}; {versions}.\n`{result['command']}`",
            body[result["benchmark"]](path, result),
        ]
    )


def _train_vs_trl(path: Path, result: dict[str, Any]) -> str:
    sides = result["sides"]
    if not sides:
        return _profile(result["profile"])
    ratios = [None, *result["ratios"]]
    rows = [
        [
            side["name"],
            f"{side['tokens_per_second']['median']:.0f}",
            f"{side['loss_tokens_per_second']['median']:.0f}",
            f"{side['peak_memory_bytes'] / 1e9:.2f}",
            "" if ratio is None else f"{ratio['tokens_per_second']:.2f}",
            "" if ratio is None else f"{ratio['peak_memory_bytes']:.2f}",
        ]
        for side, ratio in zip(sides, ratios, strict=True)
    ]
    heading = [
        "",
        "real tokens/s",
        "loss-carrying tokens/s",
        "peak GB",
        "ours is faster by",
        "ours takes of its memory",
    ]
    parts = [table(heading, rows)]
    names = [side["name"] for side in sides]
    for key, unit, scale in (
        ("tokens_per_second", "real tokens/s", 1.0),
        ("peak_memory_bytes", "peak GB", 1e-9),
    ):
        values = [side[key]["median"] if isinstance(side[key], dict) else side[key] for side in sides]
        chart = RESULTS / f"{path.stem}_{key}.png"
        bar_chart(chart, names, [value * scale for value in values], unit)
        parts.append(f"![{unit} of each side](results/{chart.name})")
    if result.get("best_peer"):
        parts.insert(1, f"The fastest peer is {result['best_peer']}.")
    if result.get("profile"):
        parts.append(_profile(result["profile"]))
    return "\n\n".join(parts)


def _profile(profile: dict[str, Any]) -> str:
    wall = profile["profiled_step_ms"]
    rows = [
        [
            name,
            f"{part['ms'] / wall:.0%}",
            f"{part['gflop'] / part['ms'] * 1000:.0f}" if part["gflop"] else "",
        ]
        for name, part in profile["parts"].items()
    ]
    return (
        f"Where a step of ours goes; its products reach {profile['share_of_peak']:.0%} of the best fp32 product of the "
        f"run ({profile['peak_gflop_per_second']:.0f} GFLOP/s):\n\n{table(['part', 'share', 'GFLOP/s'], rows)}"
    )


def _tensor_parallel(_path: Path, result: dict[str, Any]) -> str:
    rows = [
        [side["name"], f"{side['tokens_per_second']['median']:.0f}", f"{side['peak_memory_bytes'] / 1e9:.2f}"]
        for side in result["sides"]
    ]
    first, second = (side["name"] for side in result["sides"])
    heading = ["", "real tokens/s", "peak GB of a process"]
    return f"{table(heading, rows)}\n\n{second} reach {result['ratio']:.2f} of {first}."


def _convert(path: Path, result: dict[str, Any]) -> str:
    """Seconds, rate, share of a raw copy and memory of each operation."""
    return convert_text(result)


def _cclora(_path: Path, result: dict[str, Any]) -> str:
    """Times as fast as the first way, and how much is hidden, by link rate; the last table is of memory."""
    rates = result["rates"]
    plainest = next(iter(rates[0]["ways"]))

    def ratio(rate: dict[str, Any]) -> str:
        measured = rate["communication_seconds"] / rate["compute_seconds"]
        return f"{measured:.2f}" if rate["ratio"] else f"{measured:.2f} (no limit)"

    heading = ["communication / compute", *map(ratio, rates)]
    blocks = []
    for title, shown in (
        (f"Times as fast as `{plainest}`", lambda figures: f"{figures['speedup']:.2f}"),
        ("Share of the communication that is hidden", lambda figures: f"{100 * figures['hidden']:.0f}%"),
        (
            "Step, by the longer of compute and communication alone",
            lambda figures: f"{figures['of_bound']:.2f}",
        ),
    ):
        rows = [[name, *(shown(rate["ways"][name]) for rate in rates)] for name in rates[0]["ways"]]
        if "hidden" in title and rates[-1]["ratio"] is None:
            # There is next to nothing to hide.
            rows = [row[:-1] for row in rows]
        blocks.append(f"{title}:\n\n{table(heading[: len(rows[0])], rows)}")
    peaks = [
        [name, *(f"{rate['peak_bytes'][name] / 2**20:.0f}" for rate in rates)] for name in rates[0]["ways"]
    ]
    blocks.append(f"Peak of a step above what is there before it, MiB of a rank:\n\n{table(heading, peaks)}")
    return "\n\n".join(blocks)


def _moe(path: Path, result: dict[str, Any]) -> str:
    """Training as in train_vs_trl.py, then the figures that have bars."""
    figures = {name: figure["value"] for name, figure in result["figures"].items()}
    bars = "\n".join(f"- {line}" for line in experts.told(figures).splitlines())
    # Of all sides our own dense model is the fastest; it is no peer.
    training = _train_vs_trl(path, {**result, "best_peer": None})
    return f"{training}\n\n{bars}"


def _qlora(path: Path, result: dict[str, Any]) -> str:
    """Training as in train_vs_trl.py, then loading, memory and the bars."""
    figures = {name: figure["value"] for name, figure in result["figures"].items()}
    parts = [_train_vs_trl(path, result)]
    if result["quantising"] is not None:
        parts.append(quantised.quantising_text(result["quantising"]))
    parts.append(f"GB of one rank that holds the whole model:\n\n{quantised.memory_text(result['memory'])}")
    parts.append("\n".join(f"- {line}" for line in quantised.told(figures).splitlines()))
    return "\n\n".join(parts)


def _preprocess(_path: Path, result: dict[str, Any]) -> str:
    return preprocess_text(result)


def _start_up(_path: Path, result: dict[str, Any]) -> str:
    return (
        f"From the command to the first step {result['start_seconds']:.1f} s; importing the package "
        f"{result['import_seconds']:.2f} s."
    )


if __name__ == "__main__":
    sys.exit(main())
