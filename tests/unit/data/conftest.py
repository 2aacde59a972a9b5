from __future__ import annotations

import pytest
from transformers import PreTrainedTokenizerFast

from tests.unit.data.made_tokenizers import KINDS, add_family_tokens, make_tokenizer


@pytest.fixture(scope="session")
def tokenizers() -> dict[str, PreTrainedTokenizerFast]:
    """One tokenizer of each kind; do not change them."""
    return {kind: make_tokenizer(kind) for kind in KINDS}


@pytest.fixture(scope="session")
def family_tokenizers() -> dict[str, PreTrainedTokenizerFast]:
    """The same with the special tokens of all families; do not change them."""
    return {kind: add_family_tokens(make_tokenizer(kind)) for kind in KINDS}
