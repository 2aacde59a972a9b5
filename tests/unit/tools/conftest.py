"""Example scripts with their programs replaced."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[3] / "examples" / "mcore"


@pytest.fixture(scope="session")
def script_arguments(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    """Runs a script of ``examples/mcore`` with the programs replaced by one that tells its arguments, one a line."""
    folder = tmp_path_factory.mktemp("scripts")
    program = folder / "tell"
    program.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    program.chmod(0o755)

    def run(script: str, *words: str, **variables: str) -> list[str]:
        environment = {"PATH": os.environ["PATH"], "PYTHON": str(program), "TORCHRUN": str(program)}
        result = subprocess.run(
            [SCRIPTS / script, *words],
            env=environment | variables,
            cwd=folder,
            capture_output=True,
            text=True,
            check=True,
        )
        root = f"{SCRIPTS.parents[1]}/"
        return [line.removeprefix(root) for line in result.stdout.splitlines()]

    return run
