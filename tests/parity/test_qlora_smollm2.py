"""SmolLM2-135M over NF4 with nested statistics: the weights of bitsandbytes bit for bit, and 20 steps as in PEFT.

The reference is PEFT in fp64 over the weights that bitsandbytes quantised and dequantised, for the reason that
``test_smollm2.py`` gives.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.conftest import Assets
from tests.parity.test_smollm2 import LONGEST, RealCase, real_rows
from tests.support.differences import Differences
from tests.support.layouts import Layout
from tests.support.parity import ParityBench
from tests.support.quantized import Quant, quantized_shards
from tests.support.reference import Recipe, Reference
from tests.support.rows import write_rows
from tests.support.shards import assemble

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800)]
RECIPE = Recipe(steps=20, lr=5e-4, warmup_iters=1)
NESTED = Quant(double=True)


@pytest.fixture(scope="module")
def real(smollm2: Assets, bench: ParityBench, tmp_path_factory: pytest.TempPathFactory) -> RealCase:
    folder: Path = tmp_path_factory.mktemp("qlora-smollm2")
    rows = real_rows(smollm2)
    reference = Reference(smollm2.padded_model, quant=replace(NESTED, by_library=False))
    reference.add_adapter(rank=8, alpha=16)
    start = reference.save_adapter(folder / "start")
    probe_rows = [row.input_ids for row in rows[:2]]
    reference.model.double()
    record = reference.train(rows, RECIPE, probe_rows)
    flags = [
        *("--stage", "sft", "--load", str(smollm2.padded_model), "--lora-load", str(start), *NESTED.flags),
        *("--data-path", str(write_rows(folder / "rows", rows)), "--no-shuffle", "--variable-seq-lengths"),
        *("--seq-length", str(LONGEST), "--micro-batch-size", "2", *RECIPE.flags),
    ]
    return RealCase(record, probe_rows, flags)


@pytest.mark.parametrize(
    "layout", [Layout(), Layout(tp=2, sequence_parallel=True), Layout(tp=2, pp=2), Layout(tp=4)], ids=str
)
def test_real_model_is_exact(
    layout: Layout, real: RealCase, bench: ParityBench, within: Callable[[Differences], None]
) -> None:
    outcome = bench.run([*real.flags, *layout.flags], layout, real.probe())
    found = outcome.record([len(row) for row in real.probe_rows])
    differences = Differences.between(found, real.record)
    size = max(float(logits.abs().max()) for logits in real.record.start_logits)
    within(replace(differences, logits=differences.logits * 10 / size))


def test_the_weights_are_those_of_bitsandbytes(smollm2: Assets, real: RealCase, bench: ParityBench) -> None:
    expected = Reference(smollm2.padded_model, quant=NESTED).linears()
    argv = [*real.flags, *Layout(tp=2).flags]
    found = assemble(bench.workers.run(2, quantized_shards, argv))
    assert found.keys() == expected.keys() and len(found) == 4 * 30
    assert all(torch.equal(found[name], expected[name]) for name in found)
