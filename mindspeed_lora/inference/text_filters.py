"""What is shown of a text that arrives piece by piece: nothing behind a stop word, thinking by its own rule."""

from __future__ import annotations

import re
from collections.abc import Iterable

OPEN, CLOSE = "<think>", "</think>"


def held_back(text: str, words: Iterable[str]) -> int:
    """How many characters at the end of a text may turn out to begin one of the words."""
    lengths = (
        length
        for word in words
        for length in range(1, min(len(word), len(text) + 1))
        if text.endswith(word[:length])
    )
    return max(lengths, default=0)


def without_thinking(text: str, inside: bool = False) -> str:
    """A text without what stands between ``<think>`` and ``</think>``, as later turns are told it.

    Args:
        text: the whole answer.
        inside: the prompt has opened the thinking; a text whose first tag closes it shows that by itself.
    """
    first = re.search(f"{OPEN}|{CLOSE}", text)
    inside = inside or (first is not None and first.group() == CLOSE)
    return ThinkFilter(hide=True, inside=inside).more(text, done=True).strip()


class StopFilter:
    """Text up to the first stop word."""

    def __init__(self, words: tuple[str, ...]) -> None:
        self._words = words
        self._rest = ""
        self._closed = False

    def more(self, piece: str, done: bool) -> str:
        """What can be shown after one more piece; ``done``: it is the last one."""
        if self._closed:
            return ""
        text = self._rest + piece
        places = [place for word in self._words if (place := text.find(word)) >= 0]
        if places:
            self._closed = True
            return text[: min(places)]
        kept = 0 if done else held_back(text, self._words)
        self._rest = text[len(text) - kept :]
        return text[: len(text) - kept]


class ThinkFilter:
    """Text without the tags of thinking, and on request without the thinking.

    Thinking that opens its tag once more ends with the outer ``</think>``, or with the last one if that never comes.

    Args:
        hide: do not show what stands between the tags.
        inside: the prompt has opened the thinking.
    """

    def __init__(self, hide: bool, inside: bool = False) -> None:
        self._hide = hide
        self._depth = int(inside)
        self._rest = ""
        self._after_close = ""
        """What stands behind the last ``</think>`` within thinking: the answer, if no other one comes."""
        self._has_closed = False

    def more(self, piece: str, done: bool) -> str:
        """What can be shown after one more piece; ``done``: it is the last one."""
        text, shown = self._rest + piece, ""
        while (match := re.search(f"{OPEN}|{CLOSE}", text)) is not None:
            shown += self._visible(text[: match.start()])
            self._depth = self._depth + 1 if match.group() == OPEN else max(0, self._depth - 1)
            self._has_closed = match.group() == CLOSE
            self._after_close = ""
            text = text[match.end() :]
        kept = 0 if done else held_back(text, (OPEN, CLOSE))
        self._rest = text[len(text) - kept :]
        shown += self._visible(text[: len(text) - kept])
        return shown + self._after_close if done else shown

    def _visible(self, text: str) -> str:
        if not (self._hide and self._depth):
            return text
        if self._has_closed:
            self._after_close += text
        return ""
