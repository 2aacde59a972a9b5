"""What ``tools/gpu_check.sh`` asks and writes: the requirements without torch, and the JSON of a check."""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import subprocess
import sys
import tomllib
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TESTING = ("pytest", "pytest-timeout", "peft")
_VERSIONS = ("torch", "megatron-core", "transformers", "peft", "trl", "flash-attn", "liger-kernel", "triton")


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the requirements, or write the report; the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").strip())
    parser.add_argument("--requirements", action="store_true", help="print what the tests need, one a line")
    parser.add_argument("--tests", type=Path, help="pytest's JUnit file")
    parser.add_argument("--benchmark", type=Path, help="the benchmark's JSON")
    parser.add_argument("--merge-or-split", type=Path, help="the JSON of merging against splitting")
    parser.add_argument("--out", type=Path, help="the report")
    options = parser.parse_args(arguments)
    if options.requirements:
        print("\n".join(requirements()))
        return 0
    if options.out is None or options.tests is None:
        parser.error("give --tests and --out, or --requirements")
    made = report(options.tests, options.benchmark, options.merge_or_split)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(made, indent=1) + "\n", encoding="utf-8")
    return 0


def requirements() -> list[str]:
    """The package's dependencies and the tests', but for torch, which is the interpreter's own."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    own = [line for line in project["dependencies"] if not line.startswith("torch>")]
    return [*own, *TESTING]


def report(tests: Path, benchmark: Path | None, merge_or_split: Path | None = None) -> dict[str, Any]:
    """Device, versions, and the results of what ran."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "device": _device(),
        "versions": {"python": platform.python_version(), **_versions()},
        "tests": _tests(tests),
        "benchmark": _json(benchmark),
        "merge_or_split": _json(merge_or_split),
    }


def _json(path: Path | None) -> Any:
    """Of a file that may be missing."""
    return json.loads(path.read_text()) if path and path.is_file() else None


def _tests(path: Path) -> dict[str, Any]:
    """Counts, and the names of tests that failed; of a run that left no file nothing passed."""
    if not path.is_file():
        return {"passed": 0, "failed": [], "skipped": 0, "ended": False}
    cases = list(ElementTree.parse(path).iter("testcase"))
    failed = [f"{c.get('classname')}::{c.get('name')}" for c in cases if _has(c, "failure", "error")]
    skipped = sum(_has(case, "skipped") for case in cases)
    passed = len(cases) - len(failed) - skipped
    return {"passed": passed, "failed": failed, "skipped": skipped, "ended": True}


def _has(case: ElementTree.Element, *tags: str) -> bool:
    return any(case.find(tag) is not None for tag in tags)


def _versions() -> dict[str, str]:
    found = {}
    for package in _VERSIONS:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _device() -> dict[str, Any] | None:
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(0)
    return {
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda,
    }


def _commit() -> str | None:
    done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or None


if __name__ == "__main__":
    sys.exit(main())
