"""The pieces of a streamed answer are its text, and no piece shows half of a character or of a stop."""

from __future__ import annotations

import random

import pytest
from transformers import PreTrainedTokenizerFast

from mindspeed_lora.inference.generator import Answer, Request
from mindspeed_lora.inference.stopping import StopRule
from mindspeed_lora.inference.streaming import AnswerStream
from tests.unit.data.made_tokenizers import KINDS, make_tokenizer

TEXT = "Über 3 Zäune: 你好世界 🎉👩‍👩‍👧 naïve café — don't  stop\n\n\tx = [1, 2]  # ok 🙂"


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest) -> PreTrainedTokenizerFast:
    return make_tokenizer(request.param)


def streamed(tokenizer: PreTrainedTokenizerFast, tokens: list[int], rule: StopRule) -> list[str]:
    answer = Answer(Request((1,), max_new_tokens=len(tokens)))
    stream = AnswerStream(tokenizer, rule)
    pieces = []
    for token in tokens:
        answer.tokens.append(token)
        answer.ending = rule.ending(answer.tokens)
        pieces.append(stream.more(answer))
    return pieces


def test_a_text_comes_whole_and_character_by_character(tokenizer: PreTrainedTokenizerFast) -> None:
    tokens = tokenizer.encode(TEXT, add_special_tokens=False)
    pieces = streamed(tokenizer, tokens, StopRule(()))
    assert "".join(pieces) == tokenizer.decode(tokens, skip_special_tokens=True)
    assert sum(bool(piece) for piece in pieces) > 20
    if tokenizer.decode(tokens) == TEXT:
        assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("seed", range(20))
def test_any_tokens_come_whole(tokenizer: PreTrainedTokenizerFast, seed: int) -> None:
    """Random tokens are mostly bytes that form no character."""
    draw = random.Random(seed)
    tokens = [draw.randrange(len(tokenizer)) for _ in range(60)]
    pieces = streamed(tokenizer, tokens, StopRule(()))
    whole = tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert "".join(pieces) == whole


def test_a_stop_is_never_shown(tokenizer: PreTrainedTokenizerFast) -> None:
    words = [
        tokenizer.encode(word, add_special_tokens=False) for word in ("Hello", " END OF", " END OF TEXT")
    ]
    rule = StopRule((tuple(words[2]),))
    assert len(words[2]) > 3
    tokens = [*words[0], *words[1], *words[0], *words[2]]
    pieces = streamed(tokenizer, tokens, rule)
    assert "".join(pieces) == tokenizer.decode([*words[0], *words[1], *words[0]])
    assert pieces[-1] == ""
