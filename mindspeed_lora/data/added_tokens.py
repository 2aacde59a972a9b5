"""``--add-tokens``: words that a tokenizer learns, and their numbers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mindspeed_lora.config.tokenizer import TokenizerConfig
from mindspeed_lora.data.tokenizer import LazyTokenizer, lazy_tokenizer
from mindspeed_lora.errors import Refused

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def job_tokenizer(config: TokenizerConfig, folder: str | Path) -> LazyTokenizer:
    """The tokenizer of a folder as the flags want it, with the tokens that they add, not loaded yet."""
    plain = lazy_tokenizer(
        str(folder),
        use_fast=not config.tokenizer_not_use_fast,
        trust_remote_code=config.trust_remote_code,
    )
    if config.add_tokens is None:
        return plain
    tokens = read_added_tokens(config.add_tokens)
    digest = plain.files_digest
    if digest is not None:
        digest = hashlib.sha256(f"{digest} {json.dumps(tokens)}".encode()).hexdigest()
    return LazyTokenizer(lambda: _with_tokens(plain.loaded, tokens), digest, plain.folder)


def read_added_tokens(path: str) -> list[str]:
    """The tokens of a file: one a line, or a JSON list.

    Raises:
        Refused: there is no such file, or it does not hold tokens, each once.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8"
        raise Refused(f"--add-tokens {path}: cannot be read ({reason}); name a text file") from error
    tokens = [line.strip() for line in text.splitlines() if line.strip()]
    if text.lstrip().startswith("["):
        try:
            tokens = json.loads(text)
        except ValueError as error:
            raise Refused(f"--add-tokens {path}: starts as a JSON list, but is none ({error})") from error
    if not tokens or not all(isinstance(token, str) and token for token in tokens):
        raise Refused(f"--add-tokens {path}: expected tokens, one a line, or a JSON list of texts")
    twice = next((token for token in tokens if tokens.count(token) > 1), None)
    if twice is not None:
        raise Refused(f"--add-tokens {path}: {twice!r} is there twice; give each token once")
    return tokens


def token_numbers(config: TokenizerConfig, tokenizer: LazyTokenizer | None) -> tuple[int, ...]:
    """The numbers of the tokens that the flags add; none without ``--add-tokens``."""
    if config.add_tokens is None:
        return ()
    if tokenizer is None:
        raise Refused(
            f"--add-tokens {config.add_tokens}: there is no tokenizer beside the weights; name its folder with "
            "--tokenizer-name-or-path"
        )
    return tuple(
        int(number) for number in tokenizer.loaded.convert_tokens_to_ids(read_added_tokens(config.add_tokens))
    )


def _with_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str]) -> PreTrainedTokenizerBase:
    """The tokenizer, knowing these tokens; those that it knows already keep their numbers."""
    tokenizer.add_tokens(list(tokens))
    return tokenizer
