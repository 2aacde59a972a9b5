"""Text that appears while its tokens arrive."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mindspeed_lora.inference.generator import Answer
from mindspeed_lora.inference.stopping import StopRule

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_INCOMPLETE = "\ufffd"
"""What decoding makes of a character of which some bytes are still to come."""


class AnswerStream:
    """The text of one answer, piece by piece; the pieces together are the decoded answer.

    Tokens are decoded in a window that begins one step back, since some tokenizers write the first token of a
    text differently (without its blank). Incomplete characters and what may become a stop are held back.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: StopRule) -> None:
        self.tokenizer = tokenizer
        self.stop = stop
        # Left out before windows are cut, or a window would begin with a token that is not written.
        self._unwritten = set(tokenizer.all_special_ids) | {
            number for number, token in tokenizer.added_tokens_decoder.items() if token.special
        }
        self._first = 0
        self._known = 0
        self._shown = 0

    def more(self, answer: Answer) -> str:
        """What can be shown now and was not yet."""
        tokens = answer.text_tokens
        if not answer.done:
            tokens = tokens[: len(tokens) - self.stop.held_back(tokens)]
        tokens = [token for token in tokens if token not in self._unwritten]
        text = self._decode(tokens[self._first :])
        complete = text if answer.done else text.rstrip(_INCOMPLETE)
        new = complete[self._shown :]
        self._shown = max(self._shown, len(complete))
        if complete == text and len(tokens) > self._known:
            self._first, self._known = self._known, len(tokens)
            self._shown = len(self._decode(tokens[self._first :]))
        return new

    def _decode(self, tokens: list[int]) -> str:
        return str(
            self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        )
