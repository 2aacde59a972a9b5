"""Two halves of a micro-batch by turns: in which order, and that a layer's numbers stay what they are."""

from __future__ import annotations

import pytest
import torch

from mindspeed_lora.models.forward_context import ForwardContext
from mindspeed_lora.models.layer import tokens_of_ranks
from mindspeed_lora.models.turns import EXPERTS, Steps, by_turns, to_the_end


def steps(name: str, pauses: int, told: list[str]) -> Steps[str]:
    for number in range(pauses):
        told.append(f"{name}{number}")
        yield EXPERTS if number % 2 else None
    told.append(f"{name} ends")
    return name


def test_the_first_is_a_step_ahead() -> None:
    told: list[str] = []
    assert by_turns(steps("a", 4, told), steps("b", 4, told)) == ["a", "b"]
    assert told == ["a0", "b0", "a1", "a2", "b1", "a3", "b2", "a ends", "b3", "b ends"]


def test_where_only_experts_travel_they_change_when_tokens_have_set_out() -> None:
    told: list[str] = []
    assert by_turns(steps("a", 5, told), steps("b", 5, told), only_experts=True) == ["a", "b"]
    assert told == ["a0", "a1", "b0", "b1", "a2", "a3", "b2", "b3", "a4", "a ends", "b4", "b ends"]


@pytest.mark.parametrize(("first", "second"), [(0, 3), (3, 0), (0, 0), (5, 1)])
def test_halves_of_other_lengths_end_too(first: int, second: int) -> None:
    assert by_turns(steps("a", first, []), steps("b", second, [])) == ["a", "b"]
    assert to_the_end(steps("a", first, [])) == "a"


def test_tokens_of_every_rank() -> None:
    whole = torch.arange(8)
    assert tokens_of_ranks(whole, 0, 2, 2).tolist() == [0, 1, 4, 5]
    assert tokens_of_ranks(whole, 2, 4, 2).tolist() == [2, 3, 6, 7]
    assert tokens_of_ranks(whole, 3, 8, 1).tolist() == [3, 4, 5, 6, 7]


def test_a_context_is_cut_like_its_micro_batch() -> None:
    context = ForwardContext(sub_rows=((2, 4), (6,), (3, 3)), token_keys=torch.arange(18).view(6, 3))
    rows = context.rows(1, 3)
    assert rows.sub_rows == ((6,), (3, 3))
    assert rows.token_keys is not None and rows.token_keys[0].tolist() == [1, 2]
    tokens = context.tokens(1, 3, ranks=2)
    assert tokens.sub_rows is None
    assert tokens.token_keys is not None and tokens.token_keys[:, 0].tolist() == [3, 6, 12, 15]
    assert ForwardContext().rows(0, 1) == ForwardContext().tokens(0, 1, 1) == ForwardContext()
