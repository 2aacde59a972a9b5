"""Tokenizers of Hugging Face folders: loading without network and without foreign code, identity, batches."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mindspeed_lora.errors import Refused

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_PROBE = "The 3 quick-brown foxes\n\n\tjump,  über Zäune… 你好世界 x²=4; don't STOP<|im_end|>a</s> b</s>\n"
"""Text whose tokens tell two tokenizers with the same vocabulary but other rules apart."""
_FILES = (
    "added_tokens.json",
    "config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
)
"""What decides which tokenizer transformers makes of a folder, and which tokens it gives."""


def tokenizer_folder(path: str | Path) -> Path:
    """The folder that ``path`` names, itself or by one of its files (``…/tokenizer.model``)."""
    folder = Path(path)
    if folder.is_file():
        folder = folder.parent
    if not folder.is_dir():
        raise Refused(
            f"tokenizer {path}: no such folder; expected a folder with tokenizer.json or tokenizer.model"
        )
    return folder


def load_tokenizer(
    path: str | Path, use_fast: bool = True, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The tokenizer of a local folder.

    Raises:
        Refused: there is no tokenizer, or it is code of the folder and ``trust_remote_code`` is off.
    """
    folder = tokenizer_folder(path)
    if not trust_remote_code:
        _refuse_code(folder)
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), use_fast=use_fast, trust_remote_code=trust_remote_code, local_files_only=True
        )
    except StrictDataclassError as error:
        raise Refused(f"{folder}/config.json: {' '.join(str(error).split())}") from error
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        lines = str(error).strip().splitlines()
        found = ", ".join(sorted(file.name for file in folder.glob("*token*"))) or "no tokenizer file"
        raise Refused(
            f"tokenizer {path}: cannot be loaded ({lines[0] if lines else type(error).__name__}); "
            f"found {found}"
        ) from error
    if tokenizer.is_fast:
        # Some tokenizer.json cut and pad by themselves, which is for whoever makes batches.
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
    return tokenizer


class LazyTokenizer:
    """A tokenizer that is read when it is first needed; that and importing transformers takes seconds."""

    def __init__(
        self,
        load: Callable[[], PreTrainedTokenizerBase],
        files_digest: str | None = None,
        folder: Path | None = None,
    ) -> None:
        self._load = load
        self.folder = folder
        """Where its files lie; None: it is not known."""
        self.files_digest = files_digest
        """What :func:`files_digest` says; None: it is not known."""

    @functools.cached_property
    def loaded(self) -> PreTrainedTokenizerBase:
        """The tokenizer itself."""
        return self._load()


def lazy_tokenizer(path: str | Path, use_fast: bool = True, trust_remote_code: bool = False) -> LazyTokenizer:
    """The tokenizer of a local folder, not loaded yet; refused as by :func:`load_tokenizer`."""
    folder = tokenizer_folder(path)
    if not trust_remote_code:
        _refuse_code(folder)
    load = functools.partial(load_tokenizer, path, use_fast, trust_remote_code)
    # Code of the folder may read what it likes.
    return LazyTokenizer(load, None if trust_remote_code else files_digest(path, use_fast), folder)


def files_digest(path: str | Path, use_fast: bool) -> str:
    """A hash of the files that a tokenizer is made of: where it is the same, so is the tokenizer."""
    digest = hashlib.sha256(f"use_fast {use_fast}".encode())
    folder = tokenizer_folder(path)
    for name in _FILES:
        if (folder / name).is_file():
            content = (folder / name).read_bytes()
            digest.update(f"\n{name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def _refuse_code(folder: Path) -> None:
    """Refuse a tokenizer that is a class in a ``.py`` file, which loading would run."""
    for name in ("tokenizer_config.json", "config.json"):
        try:
            auto_map = json.loads((folder / name).read_text(encoding="utf-8")).get("auto_map", {})
        except FileNotFoundError:
            continue
        except (OSError, ValueError, AttributeError) as error:
            raise Refused(f"{folder / name}: not readable as JSON ({error})") from error
        # Old folders have a bare list: the slow class and the fast one.
        classes = auto_map.get("AutoTokenizer", []) if isinstance(auto_map, dict) else auto_map
        for reference in [classes] if isinstance(classes, str) else classes:
            if reference:
                module = reference.rpartition("--")[2].partition(".")[0]
                raise Refused(
                    f"{folder / (module + '.py')}: the tokenizer is code of its folder, which runs only with "
                    "--trust-remote-code"
                )


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of the vocabulary, merges, added tokens and rules; the same wherever the files lie."""
    content: dict[str, Any] = {
        "vocab": sorted((str(token), int(number)) for token, number in tokenizer.get_vocab().items()),
        "added": sorted(
            (number, token.content, token.special) for number, token in tokenizer.added_tokens_decoder.items()
        ),
        "probe": tokenizer(_PROBE, add_special_tokens=False)["input_ids"],
    }
    if tokenizer.is_fast:
        model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
        content["merges"] = [
            merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges") or []
        ]
    return hashlib.sha256(json.dumps(content, ensure_ascii=True).encode()).hexdigest()


def encode_batch(
    tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], add_special_tokens: bool = False
) -> list[list[int]]:
    """The token ids of each text, with or without the special tokens that the tokenizer puts around a text."""
    if not texts:
        return []
    if tokenizer.is_fast:
        encodings = tokenizer.backend_tokenizer.encode_batch_fast(
            list(texts), add_special_tokens=add_special_tokens
        )
        return [encoding.ids for encoding in encodings]
    return tokenizer(list(texts), add_special_tokens=add_special_tokens, verbose=False)["input_ids"]


def pad_token_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The id to pad with: the tokenizer's, else its end token, else 0; padding never carries loss."""
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return int(token_id)
    return 0
