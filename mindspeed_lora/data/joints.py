"""What belongs between two pieces of text so that each is tokenised as if it stood alone.

Tokenizers of the SentencePiece kind put a blank before every text that they are given, so a blank has to be
written out where two texts meet; some of them want one behind a special token, too. Byte-level ones need
nothing. Which kind a tokenizer is, is found by trying.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from mindspeed_lora.data.tokenizer import encode_batch

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Joints:
    """The blanks that a tokenizer needs."""

    after_text: str = ""
    after_special: str = ""
    special_texts: tuple[str, ...] = ()
    """Texts that become one special token wherever they stand."""

    def starts_special(self, text: str) -> bool:
        """Whether a text begins with a special token, which needs nothing before it."""
        return text.startswith(self.special_texts)

    def ends_special(self, text: str) -> bool:
        """Whether a text ends with a special token."""
        return text.endswith(self.special_texts)

    def join(self, before: str, text: str) -> str:
        """``text`` behind ``before``."""
        if self.starts_special(text):
            return before + text
        return before + (self.after_special if self.ends_special(before) else self.after_text) + text


def find_joints(tokenizer: PreTrainedTokenizerBase) -> Joints:
    """Try what this tokenizer needs between two pieces of text and behind a special token."""
    end = tokenizer.eos_token
    trials = ["]", "a", "] a"]
    if end is not None:
        trials += [end + "a", end + " a"]
    bracket, letter, apart, *behind = encode_batch(tokenizer, trials)
    after_special = behind and behind[0][1:] != letter and behind[1][1:] == letter
    return Joints(
        after_text=" " if apart == bracket + letter else "",
        after_special=" " if after_special else "",
        special_texts=tuple(
            token.content for token in tokenizer.added_tokens_decoder.values() if token.content
        ),
    )
