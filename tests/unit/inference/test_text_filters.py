"""What is shown of a text that comes in pieces is what would be shown of the whole."""

from __future__ import annotations

import random

import pytest

from mindspeed_lora.inference.text_filters import StopFilter, ThinkFilter, without_thinking

WORDS = ("###", "\nQ:", "##!")


def pieces(text: str, seed: int) -> list[str]:
    draw, found = random.Random(seed), []
    while text:
        size = draw.randint(1, 4)
        found.append(text[:size])
        text = text[size:]
    return [*found, ""]


def filtered(text_filter: StopFilter | ThinkFilter, text: str, seed: int) -> str:
    parts = pieces(text, seed)
    return "".join(text_filter.more(part, number == len(parts) - 1) for number, part in enumerate(parts))


@pytest.mark.parametrize("seed", range(8))
def test_a_stop_word_and_what_follows_are_not_shown(seed: int) -> None:
    assert filtered(StopFilter(WORDS), "a # b ## c\nQ and ### d", seed) == "a # b ## c\nQ and "
    assert filtered(StopFilter(WORDS), "goes on to ##", seed) == "goes on to ##"


@pytest.mark.parametrize("seed", range(8))
def test_tags_of_thinking_are_not_shown(seed: int) -> None:
    text = "<think>1 < 2, so</think>yes <b>"
    assert filtered(ThinkFilter(hide=False), text, seed) == "1 < 2, soyes <b>"
    assert filtered(ThinkFilter(hide=True), text, seed) == "yes <b>"
    assert filtered(ThinkFilter(hide=True, inside=True), "well</think>no", seed) == "no"
    assert filtered(ThinkFilter(hide=True), "<think>never ends", seed) == ""
    assert filtered(ThinkFilter(hide=True), "<think>a<think>b</think>c</think>d", seed) == "d"
    assert filtered(ThinkFilter(hide=True), "<think>the tag <think> opens</think>d", seed) == "d"
    assert (
        filtered(ThinkFilter(hide=True), "<think>a</think>the tag </think> closes", seed) == "the tag  closes"
    )


def test_later_turns_do_not_hear_the_thinking() -> None:
    assert without_thinking("<think>hm</think>\n\nyes") == "yes"
    assert without_thinking("hm</think> yes") == "yes"
    assert without_thinking("so <think>hm") == "so"
    assert without_thinking("yes") == "yes"
    assert without_thinking("one<think>a</think> two<think>b</think> three") == "one two three"
    assert without_thinking("hm</think> one<think>a</think> two<think>b") == "one two"
    assert without_thinking("hm, never ends", inside=True) == ""
    assert without_thinking("hm</think> yes", inside=True) == "yes"
    assert without_thinking("<think>a<think>b</think>c</think> d") == "d"
    assert without_thinking("<think>a</think>the tag </think> closes") == "the tag  closes"
