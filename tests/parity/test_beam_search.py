"""Beam search answers as transformers' ``generate`` does, token by token, in every layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.parity.test_generation import tiny_prompts
from tests.support.generation import Case, Tokens, answers_on_rank, transformers_greedy
from tests.support.models import make_model
from tests.support.pool import WorkerPool
from tests.support.reference import Reference

LAYOUTS = [(1, 1), *(pytest.param(*cut, marks=pytest.mark.slow) for cut in ((2, 1), (1, 2))), (2, 2)]
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {"num_beams": 4},
    "early": {"num_beams": 3, "early_stopping": "true", "num_return_sequences": 3},
    "never, long": {
        "num_beams": 4,
        "early_stopping": "never",
        "length_penalty": 2.0,
        "num_return_sequences": 2,
    },
    "short": {"num_beams": 5, "length_penalty": -1.5, "num_return_sequences": 4},
    "sums": {"num_beams": 2, "length_penalty": 0.0, "early_stopping": "never"},
    "one beam": {"num_beams": 1, "early_stopping": "never", "length_penalty": 3.0},
}
EARLY = {"true": True, "false": False, "never": "never"}
NAMES = ("llama", "mistral-window", "qwen2", "deepseek-v3", "mixtral", "phi3-longrope")


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Case, list[Tokens]]]:
    """Every setting on one model with an adapter, two of them on others; and what transformers answers."""
    folder = tmp_path_factory.mktemp("beams")
    found = {}
    for seed, name in enumerate(NAMES):
        model = str(make_model(name, folder / name))
        adapter = None
        if name == "llama":
            reference = Reference(Path(model))
            reference.add_adapter(rank=4, alpha=8)
            adapter = str(reference.save_adapter(folder / "adapter"))
        for setting in SETTINGS if name == "llama" else ("early", "never, long"):
            beams = SETTINGS[setting]
            # Some answers must end early for the settings to matter: four words end one.
            case = Case(
                model=model,
                prompts=tiny_prompts(seed)[:3],
                adapter=adapter,
                max_new_tokens=14,
                eos=(2, 5, 9, 77),
                beams=beams,
            )
            keywords = {**beams, "early_stopping": EARLY[beams.get("early_stopping", "false")]}
            expected = transformers_greedy(
                model, case.prompts, case.max_new_tokens, adapter, eos_token_id=list(case.eos), **keywords
            )
            found[f"{name}, {setting}"] = (case, expected)
    return found


@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
def test_beam_search_is_transformers_beam_search(
    cases: dict[str, tuple[Case, list[Tokens]]], workers: WorkerPool, tp: int, pp: int
) -> None:
    # On four ranks: every setting on one model, and one of them on the others.
    some = {
        name: case
        for name, case in cases.items()
        if tp * pp < 4 or name.startswith("llama,") or "early" in name
    }
    for rank, answers in enumerate(
        workers.run(tp * pp, answers_on_rank, tp, pp, [case for case, _ in some.values()])
    ):
        for (name, (_, expected)), found in zip(some.items(), answers, strict=True):
            assert found == expected, f"{name} on rank {rank}"


def test_the_settings_of_these_tests_change_the_answers(cases: dict[str, tuple[Case, list[Tokens]]]) -> None:
    best = {}
    for setting, beams in SETTINGS.items():
        told = cases[f"llama, {setting}"][1]
        best[setting] = tuple(map(tuple, told[:: beams.get("num_return_sequences", 1)]))
    assert len(set(best.values())) >= 4
    lengths = {len(answer) for _, answers in cases.values() for answer in answers}
    assert 14 in lengths and min(lengths) < 8


def test_sampled_beams_are_the_same_in_every_layout(
    cases: dict[str, tuple[Case, list[Tokens]]], workers: WorkerPool
) -> None:
    plain, _ = cases["llama, plain"]
    sampling = {"temperature": 1.2, "top_k": 30, "top_p": 0.95, "seed": 5}
    common = {"model": plain.model, "prompts": plain.prompts, "max_new_tokens": 14, "beams": {"num_beams": 3}}
    drawn = Case(**common, sampling=sampling)
    other = Case(**common, sampling={**sampling, "seed": 6})
    ((expected, of_other_seed),) = workers.run(1, answers_on_rank, 1, 1, [drawn, other])
    assert expected != of_other_seed
    for tp, pp in [(2, 1), (1, 2)]:
        for answers in workers.run(tp * pp, answers_on_rank, tp, pp, [drawn]):
            assert answers == [expected]
