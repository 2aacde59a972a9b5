"""Greedy answers are transformers' ``generate`` token by token, in every layout, with and without an adapter."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from tests.conftest import Assets
from tests.support.generation import Case, Tokens, answers_on_rank, transformers_greedy
from tests.support.models import MODELS, VOCAB_SIZE, make_model
from tests.support.pool import WorkerPool
from tests.support.reference import Reference

LAYOUTS = [(1, 1), *(pytest.param(*cut, marks=pytest.mark.slow) for cut in ((2, 1), (1, 2))), (2, 2)]
SLOW_AT_TWO_STAGES = [
    (1, 1),
    (2, 1),
    *(pytest.param(*cut, marks=pytest.mark.slow) for cut in ((1, 2), (2, 2))),
]
ON_FOUR_RANKS = (
    "llama-tied",
    "mistral-window",
    "qwen3-moe",
    "deepseek-v3-moe",
    "phi3-longrope",
    "gemma2",
    "granite",
)
"""One of each kind of cache, of embeddings and of experts; on two ranks, in the slow tests, all of them."""
LENGTHS = (1, 5, 17, 11)
"""Of the prompts; with 14 new tokens all of them outgrow the window of 9 positions."""
TEXTS = (
    "The capital of France is",
    "Once upon a time, in a small village by the sea, there lived an old man who",
    "def fibonacci(n):",
)


def tiny_prompts(seed: int) -> tuple[tuple[int, ...], ...]:
    draw = random.Random(seed)
    return tuple(tuple(draw.randrange(3, VOCAB_SIZE) for _ in range(length)) for length in LENGTHS)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Case, list[Tokens]]]:
    """Every tiny model with and without an adapter, and what transformers answers."""
    folder = tmp_path_factory.mktemp("tiny")
    cases = {}
    for seed, name in enumerate(MODELS):
        model = str(make_model(name, folder / name))
        reference = Reference(Path(model))
        reference.add_adapter(rank=4, alpha=8)
        adapter = str(reference.save_adapter(folder / f"{name}-adapter"))
        for with_adapter in (None, adapter):
            case = Case(model=model, prompts=tiny_prompts(seed), adapter=with_adapter)
            expected = transformers_greedy(model, case.prompts, case.max_new_tokens, with_adapter)
            cases[name + ("-adapter" if with_adapter else "")] = (case, expected)
    return cases


@pytest.mark.parametrize(("tp", "pp"), LAYOUTS)
def test_tiny_models_answer_as_transformers_does(
    tiny: dict[str, tuple[Case, list[Tokens]]], workers: WorkerPool, tp: int, pp: int
) -> None:
    """Prompts of unequal lengths in one batch; every rank knows the same answers."""
    some = tiny
    if tp * pp > 1:
        # With their adapters alone, which go through the models' own linears too.
        names = MODELS if tp * pp == 2 else ON_FOUR_RANKS
        some = {f"{name}-adapter": tiny[f"{name}-adapter"] for name in names}
    of_ranks = workers.run(tp * pp, answers_on_rank, tp, pp, [case for case, _ in some.values()])
    for rank, answers in enumerate(of_ranks):
        for (name, (_, expected)), found in zip(some.items(), answers, strict=True):
            assert found == expected, f"{name} on rank {rank}"


@pytest.mark.parametrize(
    "stages", [{"num_layer_list": "1,3"}, {"noop_layers": "0,1,3,7"}], ids=["uneven", "no-ops"]
)
def test_uneven_stages_answer_alike(
    tiny: dict[str, tuple[Case, list[Tokens]]], workers: WorkerPool, stages: dict[str, str]
) -> None:
    cases = [tiny[name] for name in ("llama-tied", "qwen2-adapter")]
    for answers in workers.run(2, answers_on_rank, 1, 2, [case for case, _ in cases], stages):
        assert answers == [expected for _, expected in cases]


def test_the_adapters_of_these_tests_change_the_answers(tiny: dict[str, tuple[Case, list[Tokens]]]) -> None:
    for name in MODELS:
        assert tiny[name][1] != tiny[f"{name}-adapter"][1], name


def test_some_answers_of_these_tests_end_early_and_some_do_not(
    tiny: dict[str, tuple[Case, list[Tokens]]],
) -> None:
    lengths = {len(answer) for _, answers in tiny.values() for answer in answers}
    assert 14 in lengths and min(lengths) < 14


def test_a_prompt_alone_is_answered_as_in_a_batch(
    tiny: dict[str, tuple[Case, list[Tokens]]], workers: WorkerPool
) -> None:
    case, expected = tiny["mistral-window"]
    alone = [Case(model=case.model, prompts=(prompt,)) for prompt in case.prompts]
    (answers,) = workers.run(1, answers_on_rank, 1, 1, alone)
    assert [answer for (answer,) in answers] == expected


def test_draws_are_the_same_in_every_layout_and_batch(
    tiny: dict[str, tuple[Case, list[Tokens]]], workers: WorkerPool
) -> None:
    case, greedy = tiny["llama"]
    sampling = {"temperature": 1.3, "top_k": 40, "top_p": 0.95, "seed": 5}
    together = Case(model=case.model, prompts=case.prompts, sampling=sampling)
    single = Case(model=case.model, prompts=case.prompts[2:3], sampling=sampling, first_stream=2)
    other_seed = Case(model=case.model, prompts=case.prompts, sampling={**sampling, "seed": 6})
    ((expected, alone, other),) = workers.run(1, answers_on_rank, 1, 1, [together, single, other_seed])
    assert expected[2:3] == alone and len(set(alone[0])) > 5
    assert expected != greedy and expected != other
    for tp, pp in [(2, 1), (1, 2), (2, 2)]:
        for answers in workers.run(tp * pp, answers_on_rank, tp, pp, [together]):
            assert answers == [expected]


@pytest.fixture(scope="module")
def real(smollm2: Assets, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Case, list[Tokens]]]:
    """The real model with and without an adapter, its head-padded form with one, and what transformers answers."""
    from transformers import AutoTokenizer

    cases = {}
    for kind, folder in (("plain", smollm2.model), ("padded", smollm2.padded_model)):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        prompts = tuple(tuple(tokenizer(text)["input_ids"]) for text in TEXTS)
        reference = Reference(folder)
        reference.add_adapter(rank=8, alpha=16)
        adapter = str(reference.save_adapter(tmp_path_factory.mktemp(kind) / "adapter"))
        for with_adapter in (None, adapter) if kind == "plain" else (adapter,):
            case = Case(
                model=str(folder),
                prompts=prompts,
                adapter=with_adapter,
                max_new_tokens=10,
                eos=(tokenizer.eos_token_id,),
            )
            expected = transformers_greedy(case.model, prompts, case.max_new_tokens, with_adapter)
            cases[kind + ("-adapter" if with_adapter else "")] = (case, expected)
    return cases


@pytest.mark.parametrize(("tp", "pp"), SLOW_AT_TWO_STAGES)
def test_the_real_model_answers_as_transformers_does(
    real: dict[str, tuple[Case, list[Tokens]]], workers: WorkerPool, tp: int, pp: int
) -> None:
    """Nine query and three key/value heads do not divide by two, so TP 2 takes the padded form."""
    named = ["plain", "plain-adapter"] if tp == 1 else ["padded-adapter"]
    of_ranks = workers.run(tp * pp, answers_on_rank, tp, pp, [real[name][0] for name in named])
    for answers in of_ranks:
        for name, found in zip(named, answers, strict=True):
            assert found == real[name][1], name
