"""LoRA training on one CUDA GPU: ours against TRL with PEFT, at the shapes of real models with random weights.

    python benchmarks/train_vs_trl_gpu.py --json out.json           all shapes, both tables, bf16
    python benchmarks/train_vs_trl_gpu.py --device cpu --shape tiny --rows demo     a run of the script itself

Rows of 4,096 tokens: ``demo`` packs samples of the lengths of the demo rows, ``full`` are whole rows, each of one
sample. Both sides train the same tokens from the same adapter; TRL uses FlashAttention and Liger where these are
importable, without which its packed rows see each other. Exit status 1 where first losses differ.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import shlex
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from comparison.inputs import inputs_of_rows
from comparison.process import run_child
from comparison.report import Facts
from comparison.setting import Inputs, Setting
from comparison.shapes import SHAPES, TINY
from comparison.sides import Ours, Side, Trl, ours_flags
from comparison.summary import Summary, best_peer, ratios, summarise
from comparison.table import table
from train_vs_trl import alternate

from mindspeed_lora.errors import Failed, Refused, UserError

LENGTHS = Path(__file__).resolve().parent / "comparison" / "demo_lengths.json"
LOSS_TOLERANCE = {True: 0.05, False: 1e-4}
"""In bf16 and in fp32. The loss of random weights is the logarithm of the vocabulary, about 12, whose every logit
is rounded to 8 bits."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure, print, write; the exit status."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    options = _parser().parse_args(words)
    folder = Path(tempfile.mkdtemp(prefix="train_vs_trl_gpu-"))
    try:
        return _measure_all(options, words, folder)
    except Failed as error:
        kept = Path(tempfile.mkdtemp(prefix="train_vs_trl_gpu-logs-"))
        for log in folder.rglob("*log"):
            shutil.copy(log, kept / str(log.relative_to(folder)).replace("/", "_"))
        print(f"error: {error}; all logs are in {kept}", file=sys.stderr)
        return error.exit_status
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _measure_all(options: argparse.Namespace, words: Sequence[str], folder: Path) -> int:
    """Every shape and kind of rows, one after the other; weights of a shape are made once."""
    _check_device(options.device)
    command = shlex.join(["python", "benchmarks/train_vs_trl_gpu.py", *words])
    results = []
    facts = Facts.now(_setting(options, folder, "full"), command)
    for shape in options.shape:
        model = folder / shape
        for rows in options.rows:
            place = folder / f"{shape}-{rows}"
            place.mkdir()
            results.append(_measure(options, shape, rows, model, place))
            print(_text(results[-1]), flush=True)
        shutil.rmtree(model, ignore_errors=True)
    if options.json is not None:
        content = {"benchmark": "train_vs_trl_gpu", **asdict(facts), "results": results}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0 if all(result["first_losses_agree"] for result in results) else Failed.exit_status


def _measure(options: argparse.Namespace, shape: str, rows: str, model: Path, folder: Path) -> dict[str, Any]:
    setting = _setting(options, model, rows)
    inputs = _make_inputs(setting, shape, rows, folder)
    sides = _sides(rows, options)
    runs = alternate(setting, inputs, sides, options.repeats, folder)
    summaries = [summarise(setting, inputs, side, runs[side.name]) for side in sides]
    predicted = _predict(setting, inputs, sides[0].rows_at_once, folder)
    ours, peers = summaries[0], summaries[1:]
    peer = best_peer(peers)
    tolerance = LOSS_TOLERANCE[setting.bf16]
    agree = all(abs(p.losses[0] - ours.losses[0]) <= tolerance for p in peers if p.same_rows)
    expected_ms = predicted["products_ms"] + predicted["attention_ms"]
    return {
        "shape": shape,
        "rows": rows,
        "setting": asdict(setting.without_folders),
        "sides": [_figures(setting, summary, predicted) for summary in summaries],
        "predicted": predicted,
        "share_of_predicted_time": expected_ms / ours.step_ms.median,
        "ratios": None if peer is None else ratios(ours, peer),
        "first_losses_agree": agree,
    }


def _figures(setting: Setting, summary: Summary, predicted: dict[str, Any]) -> dict[str, Any]:
    """A side's figures with its rate in operations: 4·N a token, and attention by the mean length of a sample.

    The share of the memory's bandwidth is that of the frozen weights alone, each read twice a micro-batch.
    """
    tokens = summary.tokens_per_second.median
    per_step = tokens * summary.step_ms.median / 1e3
    length = per_step / setting.global_batch_size
    rate = tokens * (predicted["flop_per_token"] + predicted["flop_per_token_and_length"] * length)
    return {
        **summary.to_json(),
        "tflop_per_second": rate / 1e12,
        "share_of_peak": rate / 1e9 / predicted["peak_gflop_per_second"],
        "share_of_bandwidth": predicted["weight_bytes"]
        / (summary.step_ms.median / 1e3)
        / predicted["copy_bytes_per_second"],
    }


def _sides(rows: str, options: argparse.Namespace) -> list[Side]:
    ours, peer = (Ours(None), Trl(None)) if rows == "demo" else (Ours(1), Trl(1))
    if all(importlib.util.find_spec(name) for name in ("trl", "peft", "datasets")):
        return [ours, peer]
    if options.alone:
        return [ours]
    raise Refused(
        "trl, peft or datasets cannot be imported; install them, or measure ours alone with --alone"
    )


def _setting(options: argparse.Namespace, model: Path, rows: str) -> Setting:
    mean = sum(length for length, _ in _lengths()) / len(_lengths())
    samples = max(1, int(options.rows_a_step * options.seq_length / mean))
    return Setting(
        model=str(model),
        data=rows,
        seq_length=options.seq_length,
        global_batch_size=samples if rows == "demo" else options.rows_a_step,
        packed_rows=options.rows_a_step,
        threads=options.threads,
        cuda=options.device == "cuda",
        bf16=options.device == "cuda",
        warmup=options.warmup,
        steps=options.steps,
    )


def _lengths() -> list[tuple[int, int]]:
    """Tokens and loss-carrying tokens of each demo row."""
    return [(tokens, loss) for tokens, loss in json.loads(LENGTHS.read_text())["lengths"]]


def _make_inputs(setting: Setting, shape: str, rows: str, folder: Path) -> Inputs:
    prefix, tokenizer, request = folder / "rows", folder / "tokenizer", folder / "made_rows.json"
    full = [(setting.seq_length, setting.seq_length - 1)] * setting.num_samples
    wanted = {
        "shape": shape,
        "model": setting.model,
        "tokenizer": str(tokenizer),
        "prefix": str(prefix),
        "lengths": _lengths() if rows == "demo" else full,
        "device": "cuda" if setting.cuda else "cpu",
        "dtype": _dtype(setting),
    }
    request.write_text(json.dumps(wanted))
    child = ["-m", "comparison.made_rows_child", str(request)]
    run_child(child, setting.threads, folder / "made_rows.log", setting.environment)
    return inputs_of_rows(setting, prefix, folder, tokenizer)


def _predict(setting: Setting, inputs: Inputs, rows_at_once: int | None, folder: Path) -> dict[str, Any]:
    request, result = folder / "predict.json", folder / "predicted.json"
    wanted = {
        "flags": ours_flags(setting, inputs, rows_at_once),
        "step": setting.warmup + 1,
        "rank": setting.rank,
        "device": "cuda" if setting.cuda else "cpu",
        "dtype": _dtype(setting),
        "result": str(result),
    }
    request.write_text(json.dumps(wanted))
    child = ["-m", "comparison.predicted_child", str(request)]
    run_child(child, setting.threads, folder / "predict.log", setting.environment)
    measured: dict[str, Any] = json.loads(result.read_text())
    return measured


def _dtype(setting: Setting) -> str:
    return "bfloat16" if setting.bf16 else "float32"


def _check_device(device: str) -> None:
    """The parent never touches the device, so that all of its memory is the children's."""
    if device == "cpu":
        return
    import torch

    if not torch.cuda.is_available():
        raise Refused(
            "--device cuda: torch sees no CUDA device; give --device cpu --shape tiny to try the script"
        )


def _text(result: dict[str, Any]) -> str:
    rows = [
        [
            side["name"],
            f"{side['tokens_per_second']['median']:.0f}",
            f"{side['tflop_per_second']:.3g}",
            f"{side['share_of_peak']:.0%}",
            f"{side['share_of_bandwidth']:.0%}",
            f"{side['peak_memory_bytes'] / 1e9:.2f}",
        ]
        for side in result["sides"]
    ]
    heading = ["", "tokens/s", "TFLOP/s (LoRA)", "of peak", "of bandwidth", "peak GB"]
    ratio = result["ratios"]
    told = "" if ratio is None else f"{ratio['tokens_per_second']:.2f} times as fast as TRL; "
    told += f"{result['share_of_predicted_time']:.0%} of the time predicted from products and attention alone"
    if not result["first_losses_agree"]:
        told += "; WARNING: first losses differ, the sides do not compute the same"
    return f"{result['shape']}, {result['rows']} rows\n\n{table(heading, rows)}\n\n{told}\n"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    add = parser.add_argument
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cuda computes in bf16, cpu in fp32")
    real = [name for name in SHAPES if name not in TINY]
    add("--shape", nargs="+", choices=list(SHAPES), default=real, help="default: all but the tiny ones")
    add("--rows", nargs="+", choices=("demo", "full"), default=["demo", "full"])
    add("--seq-length", type=int, default=4096, help="tokens of a row (default: %(default)s)")
    add("--rows-a-step", type=int, default=4, help="rows of an optimizer step (default: %(default)s)")
    add("--steps", type=int, default=10, help="measured steps (default: %(default)s)")
    add("--warmup", type=int, default=3, help="steps before them (default: %(default)s)")
    add("--repeats", type=int, default=2, help="repetitions of each side (default: %(default)s)")
    add("--threads", type=int, default=8, help="CPU threads of each process (default: %(default)s)")
    add("--alone", action="store_true", help="measure ours alone where TRL cannot be imported")
    add("--json", type=Path, metavar="FILE", help="also write everything to this file")
    return parser


if __name__ == "__main__":
    sys.exit(main())
