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


def without_thinking(text: str) -> str:
    """A text without what stands between ``<think>`` and ``</think>``, as later turns are told it.

    A template may have opened the thinking in the prompt: then everything up to ``</think>`` is thinking.
    """
    text = re.sub(f"{OPEN}.*?{CLOSE}", "", text, flags=re.DOTALL).rpartition(CLOSE)[2]
    return re.sub(f"{OPEN}.*", "", text, flags=re.DOTALL).strip()


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

    Args:
        hide: do not show what stands between the tags.
        inside: the prompt has opened the thinking.
    """

    def __init__(self, hide: bool, inside: bool = False) -> None:
        self._hide = hide
        self._inside = inside
        self._rest = ""

    def more(self, piece: str, done: bool) -> str:
        """What can be shown after one more piece; ``done``: it is the last one."""
        text, shown = self._rest + piece, ""
        while (match := re.search(f"{OPEN}|{CLOSE}", text)) is not None:
            shown += self._visible(text[: match.start()])
            self._inside = match.group() == OPEN
            text = text[match.end() :]
        kept = 0 if done else held_back(text, (OPEN, CLOSE))
        self._rest = text[len(text) - kept :]
        return shown + self._visible(text[: len(text) - kept])

    def _visible(self, text: str) -> str:
        return "" if self._hide and self._inside else text
