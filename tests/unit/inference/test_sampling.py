"""The filters are transformers' warpers; draws follow the distribution and depend on nothing but their name."""

from __future__ import annotations

import pytest
import torch
from transformers.generation.logits_process import (
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from mindspeed_lora.inference.sampling import TokenChoice, draw, filter_logits, penalise_repetition, uniform


def some_logits(rows: int = 5, words: int = 301) -> torch.Tensor:
    return torch.randn(rows, words, generator=torch.Generator().manual_seed(0)) * 3


@pytest.mark.parametrize("temperature", [0.3, 0.7, 1.0, 1.9])
@pytest.mark.parametrize("top_k", [0, 1, 7, 300, 301, 1000])
@pytest.mark.parametrize("top_p", [0.01, 0.5, 0.95, 1.0])
def test_filters_keep_what_transformers_keeps(temperature: float, top_k: int, top_p: float) -> None:
    logits = some_logits()
    ids = torch.zeros(5, 1, dtype=torch.int64)
    expected = TemperatureLogitsWarper(temperature)(ids, logits) if temperature != 1.0 else logits
    if top_k:
        expected = TopKLogitsWarper(top_k)(ids, expected)
    if top_p < 1.0:
        expected = TopPLogitsWarper(top_p)(ids, expected)
    assert torch.equal(filter_logits(logits, temperature, top_k, top_p), expected)


def test_equal_logits_at_the_edge_of_top_k_are_kept_together() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 2.0, 0.0]])
    kept = filter_logits(logits, 1.0, 2, 1.0)
    assert torch.isfinite(kept).tolist() == [[False, True, True, True, False]]


def test_the_repetition_penalty_is_that_of_transformers() -> None:
    logits = some_logits()
    seen = torch.randint(0, 301, (5, 9), generator=torch.Generator().manual_seed(1))
    expected = RepetitionPenaltyLogitsProcessor(1.3)(seen, logits.clone())
    assert torch.equal(penalise_repetition(logits, seen.tolist(), 1.3), expected)


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([[0.0, 1.0, float("-inf"), 2.0]])
    count = 20_000
    draws = torch.tensor([uniform(1, 0, position) for position in range(count)], dtype=torch.float64)
    tokens = draw(logits.expand(count, -1), draws)
    found = torch.bincount(tokens, minlength=4) / count
    # Four standard deviations of a share of at most 1/2.
    assert (found - logits.softmax(-1)[0]).abs().max() < 4 * 0.5 / count**0.5
    assert found[2] == 0


@pytest.mark.parametrize("edge", [0.0, 1.0 - 2**-53])
def test_a_draw_at_the_edge_takes_a_token_that_is_left(edge: float) -> None:
    infinite = float("-inf")
    logits = torch.tensor([[infinite, 1.0, 2.0, infinite]])
    token = draw(logits, torch.tensor([edge], dtype=torch.float64))
    assert token.tolist() == [1 if edge == 0.0 else 2]


def test_the_rows_of_a_batch_are_chosen_independently() -> None:
    choice = TokenChoice(do_sample=True, temperature=0.9, top_k=40, top_p=0.9, repetition_penalty=1.1)
    logits, draws = some_logits(), [0.1, 0.3, 0.5, 0.7, 0.9]
    seen = [[1, 2], [3], [4, 4], [5], [6]]
    whole = choice.choose(logits, seen, draws).tolist()
    single = [choice.choose(logits[i : i + 1], seen[i : i + 1], draws[i : i + 1]).item() for i in range(5)]
    assert whole == single


def test_greedy_takes_the_likeliest() -> None:
    logits = some_logits().to(torch.bfloat16)
    choice = TokenChoice(do_sample=False)
    assert torch.equal(choice.choose(logits, [[]] * 5, [0.0] * 5), logits.float().argmax(-1))


def test_the_numbers_of_draws_differ_by_seed_prompt_and_position() -> None:
    numbers = {
        uniform(*name) for name in [(1, 0, 0), (2, 0, 0), (1, 1, 0), (1, 0, 1), (1, 10, 0), (11, 0, 0)]
    }
    assert len(numbers) == 6 and all(0 <= number < 1 for number in numbers)
