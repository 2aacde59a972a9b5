from __future__ import annotations

import pytest

from mindspeed_lora.config.inference import InferenceConfig
from mindspeed_lora.errors import Refused
from mindspeed_lora.inference.lengths import LengthLimit


def limit(positions: int = 64, **flags: int) -> LengthLimit:
    return LengthLimit.of(InferenceConfig(**flags), positions, frozenset(flags))  # type: ignore[arg-type]


def test_an_answer_ends_at_the_first_bound() -> None:
    assert limit(max_new_tokens=10).checked_room(20, "prompt 1") == 10
    assert limit(max_new_tokens=10, max_length=25).checked_room(20, "prompt 1") == 5
    assert limit(max_new_tokens=10, seq_length=26).checked_room(20, "prompt 1") == 6


def test_the_default_length_gives_way_to_the_models_positions() -> None:
    assert limit().checked_room(20, "prompt 1") == 44


def test_more_positions_than_the_model_has_are_refused() -> None:
    with pytest.raises(Refused) as error:
        limit(max_new_tokens=50).checked_room(20, "prompt 3")
    assert str(error.value) == (
        "prompt 3 has 20 tokens: with --max-new-tokens 50 that exceeds the model's max_position_embeddings 64; "
        "lower --max-new-tokens to 44"
    )


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        ({}, "max_position_embeddings 64"),
        ({"max_length": 30}, "--max-length 30"),
        ({"seq_length": 9}, "--seq-length 9"),
    ],
)
def test_a_prompt_without_room_for_an_answer_is_refused(flags: dict[str, int], reason: str) -> None:
    with pytest.raises(Refused, match=reason):
        limit(**flags).checked_room(64, "prompt 1")
