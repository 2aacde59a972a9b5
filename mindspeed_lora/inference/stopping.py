"""Where an answer ends: at tokens, or at words of its text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BYTES_OF_A_CHARACTER = 4
"""Most tokens that one character is spelled with."""


@dataclass(frozen=True)
class StopWords:
    """Texts that end an answer wherever they appear in it, also across tokens."""

    tokenizer: PreTrainedTokenizerBase
    words: tuple[str, ...]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase, words: Iterable[str]) -> StopWords | None:
        """Those words, None where there are none."""
        given = tuple(dict.fromkeys(word for word in words if word))
        return cls(tokenizer, given) if given else None

    def found(self, tokens: Sequence[int]) -> bool:
        """Whether a word is in what the last tokens say."""
        longest = max(map(len, self.words))
        # One more at each end: a token may begin before the word and end behind it.
        tail = list(tokens[-(_BYTES_OF_A_CHARACTER * longest + 2) :])
        text = str(self.tokenizer.decode(tail, skip_special_tokens=True))
        return any(word in text for word in self.words)

    def cut(self, text: str) -> str:
        """The text up to the first of the words."""
        places = [place for word in self.words if (place := text.find(word)) >= 0]
        return text[: min(places, default=len(text))]


@dataclass(frozen=True)
class StopRule:
    """Sequences of tokens that end an answer, end tokens being sequences of one, and words."""

    sequences: tuple[tuple[int, ...], ...]
    words: StopWords | None = None

    def ending(self, tokens: Sequence[int]) -> int:
        """How many tokens at the end of an answer are the stop; 0 where none of the sequences ends it."""
        found = (len(stop) for stop in self.sequences if stop and tuple(tokens[-len(stop) :]) == stop)
        return max(found, default=0)

    def stops(self, tokens: Sequence[int]) -> bool:
        """Whether an answer ends with the last of its tokens."""
        return self.ending(tokens) > 0 or (self.words is not None and self.words.found(tokens))

    def cut(self, text: str) -> str:
        """An answer's text without the word that ended it."""
        return text if self.words is None else self.words.cut(text)

    def held_back(self, tokens: Sequence[int]) -> int:
        """How many tokens at the end may turn out to begin a stop sequence, and are not shown yet."""
        longest = max((len(stop) for stop in self.sequences), default=0)
        for length in range(min(longest - 1, len(tokens)), 0, -1):
            tail = tuple(tokens[-length:])
            if any(len(stop) > length and stop[:length] == tail for stop in self.sequences):
                return length
        return 0
