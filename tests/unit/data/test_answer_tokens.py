"""Which tokens are an answer's: counted from added tokens, against the places that the tokenizer tells."""

import random

import pytest

from mindspeed_lora.data.answer_tokens import AnswerTokens, Span
from tests.unit.data.made_tokenizers import KINDS, make_tokenizer

ANSWERS = [
    "apple",
    "\nplum",
    " pear",
    "",
    "a<|im_end|>b",
    "<|im_start|>",
    "ä你好",
    "\t x \n",
    "<|im_end|>",
    "1\n\n",
]
HEADERS = [
    "<|im_start|>assistant\n",
    "<|im_start|>assistant\n\n",
    "<|im_start|>",
    "</s>",
    " ",
    "[INST] x [/INST]",
]
ENDS = ["<|im_end|>\n", "</s>", "<|im_end|>", "\n"]


def made(chance: random.Random) -> tuple[str, list[Span]]:
    """A text and where its answers lie, each with the end token behind it."""
    text, spans = chance.choice(["", "<s>", " ", "You\n"]), []
    for _ in range(chance.randint(1, 3)):
        text += f"<|im_start|>user\n{chance.choice(ANSWERS)}<|im_end|>\n" + chance.choice(HEADERS)
        start = len(text)
        end = chance.choice(ENDS)
        text += chance.choice(ANSWERS) + end
        if len(text) > start:
            spans.append((start, len(text.rstrip("\n") if chance.random() < 0.7 else text)))
    return text, [(start, end) for start, end in spans if end > start]


@pytest.mark.parametrize("kind", KINDS)
def test_counting_gives_what_the_places_give(kind: str) -> None:
    chance = random.Random(1)
    rows = [made(chance) for _ in range(1500)]
    texts, spans = [text for text, _ in rows], [own for _, own in rows]
    answers = AnswerTokens(make_tokenizer(kind))
    found = answers.encode(texts, spans)
    for row, expected in zip(found, answers._by_offsets(texts, spans), strict=True):
        assert row[0].tolist() == expected[0].tolist()
        assert row[1].tolist() == expected[1].tolist()


@pytest.mark.parametrize("kind", ["gpt2", "llama3"])
def test_rows_of_the_usual_form_need_no_places(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = AnswerTokens(make_tokenizer(kind))
    text = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\napple<|im_end|>\n"
    start, end = text.index("apple"), len(text) - 1
    monkeypatch.setattr(answers, "_by_offsets", lambda texts, spans: iter([None] * len(texts)))
    ((_, owners),) = answers.encode([text], [[(start, end)]])
    assert owners.max() == 0
