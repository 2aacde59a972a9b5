"""Fixtures of the parity tests, and the summary of what they observed."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.support.differences import Differences, largest
from tests.support.parity import ParityBench
from tests.support.pool import WorkerPool

_OBSERVED = pytest.StashKey[dict[str, Differences]]()


@pytest.fixture(scope="session")
def bench(tmp_path_factory: pytest.TempPathFactory, workers: WorkerPool) -> ParityBench:
    """Models, rows and references of the session."""
    import torch

    # Products of a few thousand elements only get slower by a second thread.
    torch.set_num_threads(1)
    return ParityBench(tmp_path_factory.mktemp("parity"), workers)


@pytest.fixture
def within(request: pytest.FixtureRequest) -> Callable[[Differences], None]:
    """Checks differences against the tolerances, and keeps them for the summary."""

    def check(differences: Differences) -> None:
        request.config.stash.setdefault(_OBSERVED, {})[request.node.name] = differences
        differences.check()

    return check


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The largest differences from the reference; with -v those of every test."""
    observed = terminalreporter.config.stash.get(_OBSERVED, {})
    if not observed:
        return
    terminalreporter.write_sep("-", f"differences from transformers and PEFT in {len(observed)} runs")
    if terminalreporter.config.get_verbosity() > 0:
        for name, differences in observed.items():
            terminalreporter.write_line(f"{name:<60} {differences}")
    terminalreporter.write_line(f"{'largest':<60} {largest(list(observed.values()))}")
