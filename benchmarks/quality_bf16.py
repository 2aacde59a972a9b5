"""Held-out loss after a LoRA training in bf16: ours against TRL with PEFT, several seeds.

    python benchmarks/quality_bf16.py --json out.json                 200 steps on the demo rows, three seeds, on CUDA
    python benchmarks/quality_bf16.py --device cpu --steps 2 --seeds 1 …          a run of the script itself, in fp32

Both sides train the same rows in the same order from the same adapter, a seed changing order and adapter. The two
adapters they save are judged by one program, transformers with PEFT in fp32, on rows that neither has seen. Exit
status 1 where a loss of ours is more than 0.5% above its counterpart.
"""

from __future__ import annotations

import argparse
import json
import random
import shlex
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from comparison.assets import assets
from comparison.inputs import make_inputs
from comparison.process import run_child
from comparison.report import Facts
from comparison.setting import Inputs, Setting
from comparison.sides import Ours, Trl
from comparison.table import table

from mindspeed_lora.errors import Failed, Refused, UserError

TOLERANCE = 0.005
"""Of the held-out loss, relative: what bf16 may cost."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Train, judge, print, write; the exit status."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    options = _parser().parse_args(words)
    folder = Path(tempfile.mkdtemp(prefix="quality_bf16-"))
    try:
        status = _measure(options, words, folder)
    except Failed as error:
        # The message names a log in the folder.
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        status = error.exit_status
    shutil.rmtree(folder, ignore_errors=True)
    return status


def _measure(options: argparse.Namespace, words: Sequence[str], folder: Path) -> int:
    setting = _setting(options)
    facts = Facts.now(setting, shlex.join(["python", "benchmarks/quality_bf16.py", *words]))
    rows = json.loads(Path(setting.data).read_text(encoding="utf-8"))
    if len(rows) <= options.held_out:
        raise Refused(f"--held-out {options.held_out}: the file has {len(rows)} rows; leave some to train on")
    held_out = _written(folder / "held_out.json", rows[-options.held_out :])
    results = [
        _seed(setting, seed, rows[: -options.held_out], held_out, folder)
        for seed in range(1, options.seeds + 1)
    ]
    print(_text(results), flush=True)
    good = all(result["difference"] <= TOLERANCE for result in results)
    if options.json is not None:
        content = {"benchmark": "quality_bf16", **asdict(facts), "results": results, "within": good}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return 0 if good else Failed.exit_status


def _seed(setting: Setting, seed: int, rows: Sequence[Any], held_out: Path, folder: Path) -> dict[str, Any]:
    """Both trainings of a seed, and the losses of what they leave."""
    place = folder / f"seed{seed}"
    for part in ("train", "test", "ours", "trl"):
        (place / part).mkdir(parents=True)
    shuffled = random.Random(seed).sample(list(rows), len(rows))
    setting = replace(setting, seed=seed, data=str(_written(place / "rows.json", shuffled)))
    inputs = make_inputs(setting, place / "train")
    test = make_inputs(replace(setting, data=str(held_out)), place / "test")
    ours = Ours(None).run(setting, inputs, place / "ours")
    theirs = Trl(setting.global_batch_size).run(setting, inputs, place / "trl")
    losses = {
        "start": _loss(setting, Path(inputs.start_adapter), test, place / "start"),
        "ours": _loss(setting, place / "ours" / "run" / "adapter", test, place / "judged_ours"),
        "peft": _loss(setting, place / "trl" / "run" / "adapter", test, place / "judged_peft"),
    }
    return {
        "seed": seed,
        **losses,
        "difference": losses["ours"] / losses["peft"] - 1,
        "train_losses": {
            "ours": [step.loss for step in ours.steps],
            "peft": [step.loss for step in theirs.steps],
        },
    }


def _loss(setting: Setting, adapter: Path, test: Inputs, request: Path) -> float:
    """Held-out loss of an adapter."""
    result = request.with_suffix(".result")
    wanted = {
        "model": setting.model,
        "adapter": str(adapter.resolve()),
        "rows_file": test.rows_file,
        "device": "cuda" if setting.cuda else "cpu",
        "result": str(result),
    }
    request.write_text(json.dumps(wanted))
    child = ["-m", "comparison.held_out_child", str(request)]
    run_child(child, setting.threads, request.with_suffix(".log"), setting.environment)
    return float(json.loads(result.read_text())["loss"])


def _written(path: Path, rows: Sequence[Any]) -> Path:
    path.write_text(json.dumps(rows), encoding="utf-8")
    return path


def _setting(options: argparse.Namespace) -> Setting:
    cuda = options.device == "cuda"
    if cuda:
        import torch

        if not torch.cuda.is_available():
            raise Refused("--device cuda: torch sees no CUDA device; --device cpu tries the script in fp32")
    found = assets() if options.model is None or options.data is None else {}
    return Setting(
        model=options.model or found["MODEL"],
        data=options.data or f"{found['DATA']}/alpaca_en_demo.json",
        threads=options.threads,
        cuda=cuda,
        bf16=cuda,
        warmup=0,
        steps=options.steps,
    )


def _text(results: Sequence[dict[str, Any]]) -> str:
    rows = [
        [
            str(r["seed"]),
            f"{r['start']:.4f}",
            f"{r['ours']:.4f}",
            f"{r['peft']:.4f}",
            f"{r['difference']:+.2%}",
        ]
        for r in results
    ]
    return table(["seed", "before", "ours", "TRL + PEFT", "ours above it by"], rows)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    add = parser.add_argument
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cuda trains in bf16, cpu in fp32")
    add("--model", help="Hugging Face folder (default: SmolLM2-135M-Instruct, fetched)")
    add("--data", help="JSON instruction rows (default: the demo rows, fetched)")
    add("--held-out", type=int, default=100, help="rows at the end of the file (default: %(default)s)")
    add("--steps", type=int, default=200, help="optimizer steps of 8 rows (default: %(default)s)")
    add("--seeds", type=int, default=3, help="how many (default: %(default)s)")
    add("--threads", type=int, default=8, help="CPU threads of each process (default: %(default)s)")
    add("--json", type=Path, metavar="FILE", help="also write everything to this file")
    return parser


if __name__ == "__main__":
    sys.exit(main())
