"""How long prompt and answer may be together."""

from __future__ import annotations

from dataclasses import dataclass

from mindspeed_lora.config.inference import InferenceConfig
from mindspeed_lora.errors import Refused


@dataclass(frozen=True, kw_only=True)
class LengthLimit:
    """The tokens that a prompt and its answer may have."""

    longest: int
    """Of prompt and answer together."""
    reason: str
    """The flag or the model's value that sets ``longest``."""
    positions: int
    """The model's ``max_position_embeddings``."""
    max_new_tokens: int
    max_new_tokens_given: bool
    """Asked for by the user: then an answer that cannot have that many is refused instead of being shorter."""

    @classmethod
    def of(cls, inference: InferenceConfig, positions: int, given: frozenset[str]) -> LengthLimit:
        """The limit of a job on a model with that many positions."""
        bounds = {
            f"the model's max_position_embeddings {positions}": positions,
            f"--seq-length {inference.seq_length}": inference.seq_length,
            f"--max-length {inference.max_length}": inference.max_length,
        }
        longest, reason = min((bound, name) for name, bound in bounds.items() if bound is not None)
        return cls(
            longest=longest,
            reason=reason,
            positions=positions,
            max_new_tokens=inference.max_new_tokens,
            max_new_tokens_given="max_new_tokens" in given,
        )

    def room(self, prompt_tokens: int) -> int:
        """How many tokens an answer to a prompt of that length may have; 0 or less where none fits."""
        return min(self.max_new_tokens, self.longest - prompt_tokens)

    def checked_room(self, prompt_tokens: int, prompt: str) -> int:
        """The same, at least 1.

        Raises:
            Refused: nothing fits, or ``--max-new-tokens`` asks for more positions than the model has.
        """
        room = self.room(prompt_tokens)
        if room < 1:
            raise Refused(
                f"{prompt} has {prompt_tokens} tokens, but {self.reason} leaves no room for an answer; shorten it"
            )
        if self.longest == self.positions and self.max_new_tokens_given and room < self.max_new_tokens:
            raise Refused(
                f"{prompt} has {prompt_tokens} tokens: with --max-new-tokens {self.max_new_tokens} that exceeds the "
                f"model's max_position_embeddings {self.positions}; lower --max-new-tokens to {room}"
            )
        return room
