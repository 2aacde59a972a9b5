"""InternLM2.5, GLM-4-9B and MiniCPM, whose code transformers lacks: another family there computes the same.

Its answers to prompts are ours for the same weights in the family's own form; how the other trains is compared in
``test_families.py``.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.parity.test_generation import tiny_prompts
from tests.support.generation import Case, Tokens, answers_on_rank, transformers_greedy
from tests.support.models import make_model
from tests.support.pool import WorkerPool
from tests.support.twins import TWINS, twin


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Case, list[Tokens]]]:
    """Every family's toy, and what transformers answers with its twin."""
    folder = tmp_path_factory.mktemp("twins")
    made = {}
    for seed, (family, (other, values, _)) in enumerate(TWINS.items()):
        theirs = make_model(other, folder / f"{family}-twin", **values)
        ours: Path = twin(family, theirs, folder / family)
        case = Case(model=str(ours), prompts=tiny_prompts(seed + 40))
        made[family] = case, transformers_greedy(str(theirs), case.prompts, case.max_new_tokens)
    return made


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 2)])
def test_answers_are_those_of_the_twin(
    cases: dict[str, tuple[Case, list[Tokens]]], workers: WorkerPool, tp: int, pp: int
) -> None:
    for answers in workers.run(tp * pp, answers_on_rank, tp, pp, [case for case, _ in cases.values()]):
        for (family, (_, expected)), found in zip(cases.items(), answers, strict=True):
            assert found == expected, family
