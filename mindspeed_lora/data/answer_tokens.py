"""From where answers lie in a text to which of its tokens are theirs.

A fast tokenizer tells the place of every token in the text, which costs it a quarter of its speed. It is seldom
needed: added tokens (``<|im_start|>`` …) cut a text before anything else does, so that counting them in the text and
among the tokens leads to the same places, and between such a cut and the answer stands a short header, always of the
same tokens. Where that does not fit (an answer that merges with its header, say), the places are asked for.
"""

from __future__ import annotations

import bisect
import itertools
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mindspeed_lora.data.prompt_template import PROMPT
from mindspeed_lora.data.tokenizer import encode_batch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Span = tuple[int, int]
Array = np.ndarray[Any, Any]
_Cuts = list[tuple[int, int, str]]
"""Where added tokens begin and end in a text, and what they are."""
_LONGEST_HEADER = 64
"""Characters; what is longer holds more than a header, and is not the same in every row."""


class AnswerTokens:
    """Tokenises texts with a fast tokenizer and says which answer each token belongs to."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        added = tokenizer.added_tokens_decoder
        self._ids = {token.content: number for number, token in added.items() if token.content}
        # Numbers of tokens may have holes, so that there are more of them than tokens.
        self._is_added = np.zeros(max([*tokenizer.get_vocab().values(), *added]) + 1, dtype=bool)
        self._is_added[list(self._ids.values())] = True
        # Tokens that take in the blanks beside them do not end where their text does.
        exact = not any(token.lstrip or token.rstrip or token.single_word for token in added.values())
        longest_first = sorted(self._ids, key=len, reverse=True)
        pattern = "|".join(map(re.escape, longest_first)) if exact else ""
        self._added = re.compile(pattern) if pattern else None
        self._headers: dict[tuple[str, str], list[int] | None] = {}

    def encode(self, texts: Sequence[str], spans: Sequence[Sequence[Span]]) -> list[tuple[Array, Array]]:
        """Of each text its tokens, int32 ``[n]``, and the numbers of the answers that they belong to, or PROMPT.

        ``spans`` are the answers of each text, in order. A token belongs to an answer if any of its characters does.
        """
        cuts = [self._cuts(text, own) for text, own in zip(texts, spans, strict=True)]
        quick = [text for text, own in zip(texts, cuts, strict=True) if own is not None]
        tokens = iter(encode_batch(self._tokenizer, quick))
        found = [
            None if own is None else self._by_cuts(next(tokens), text, answers, own)
            for text, answers, own in zip(texts, spans, cuts, strict=True)
        ]
        left = [number for number, row in enumerate(found) if row is None]
        slow = self._by_offsets([texts[number] for number in left], [spans[number] for number in left])
        return [next(slow) if row is None else row for row in found]

    def _cuts(self, text: str, spans: Sequence[Span]) -> _Cuts | None:
        """The added tokens of a text, where every answer begins and ends near one."""
        if self._added is None:
            return None
        cuts = [(*match.span(), match.group()) for match in self._added.finditer(text)]
        ends = [0, *(end for _, end, _ in cuts), len(text)]
        for start, end in spans:
            before = ends[bisect.bisect_right(ends, start, hi=len(ends) - 1) - 1]
            if start - before > _LONGEST_HEADER or ends[bisect.bisect_left(ends, end)] != end:
                return None
        return cuts

    def _by_cuts(
        self, token_ids: list[int], text: str, spans: Sequence[Span], cuts: _Cuts
    ) -> tuple[Array, Array] | None:
        ids: Array = np.array(token_ids, dtype=np.int32)
        at = np.flatnonzero(self._is_added[ids]).tolist()
        if [token_ids[place] for place in at] != [self._ids[name] for _, _, name in cuts]:
            return None
        answers = np.full(len(ids), PROMPT, dtype=np.int32)
        ends = [end for _, end, _ in cuts]
        for number, (start, end) in enumerate(spans):
            before = bisect.bisect_right(ends, start)
            name, behind = (cuts[before - 1][2], ends[before - 1]) if before else ("", 0)
            header = self._header(name, text[behind:start])
            first = at[before - 1] + 1 if before else 0
            if header is None or token_ids[first : first + len(header)] != header:
                return None
            last = len(ids) if end == len(text) else at[bisect.bisect_left(ends, end)] + 1
            answers[first + len(header) : last] = number
        return ids, answers

    def _header(self, name: str, text: str) -> list[int] | None:
        """The tokens of a header behind an added token; None where they do not tell its text."""
        key = name, text
        if key not in self._headers:
            (ids,) = encode_batch(self._tokenizer, [name + text])
            begins = ids[:1] == [self._ids[name]] if name else True
            own = ids[1:] if name else ids
            exact = begins and self._tokenizer.unk_token_id not in own
            if len(self._headers) > 1024:
                self._headers.clear()
            self._headers[key] = own if exact else None
        return self._headers[key]

    def _by_offsets(
        self, texts: Sequence[str], spans: Sequence[Sequence[Span]]
    ) -> Iterator[tuple[Array, Array]]:
        if not texts:
            return
        encodings = self._tokenizer.backend_tokenizer.encode_batch(list(texts), add_special_tokens=False)
        for encoding, own in zip(encodings, spans, strict=True):
            offsets = encoding.offsets
            flat = itertools.chain.from_iterable(offsets)
            bounds = np.fromiter(flat, dtype=np.int64, count=2 * len(offsets)).reshape(-1, 2)
            answers = np.full(len(offsets), PROMPT, dtype=np.int32)
            for number, (start, end) in enumerate(own):
                answers[(bounds[:, 1] > start) & (bounds[:, 0] < end)] = number
            yield np.array(encoding.ids, dtype=np.int32), answers
