"""Small real tokenizers of the kinds that model folders hold, trained on a few lines."""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

KINDS = ("gpt2", "llama3", "spm-legacy", "spm-first", "spm-always")
CHAT_TOKENS = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
THINK_TOKENS = ["<think>", "</think>"]
FAMILY_TOKENS = [
    *("[gMASK]", "sop", "<sop>", "<|user|>", "<|assistant|>", "<|system|>", "<|observation|>"),
    *(
        "<start_of_turn>",
        "<end_of_turn>",
        "<｜User｜>",
        "<｜Assistant｜>",
        "<role>",
        "</role>",
        "<|role_end|>",
    ),
    *(
        "<reserved_106>",
        "<reserved_107>",
        "<用户>",
        "<AI>",
        "<|endoftext|>",
        "<tool_response>",
        "</tool_response>",
    ),
    *(
        "<|start|>",
        "<|message|>",
        "<|channel|>",
        "<|end|>",
        "[INST]",
        "[/INST]",
        "<tool_call>",
        "</tool_call>",
    ),
    *("[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"),
]
"""What the published families have as tokens of their own, and the small vocabularies have not."""
CORPUS = [
    "Human: How do I bake bread?\nAssistant: Mix flour and water, then wait.",
    "[INST] <<SYS>>\nYou are a helpful assistant.\n<</SYS>>\n\nName three fruits. [/INST] apple, pear, plum",
    "### Instruction:\nTranslate this sentence to French.\n\n### Response:\nVoici la phrase.",
    "<|im_start|>system\nuser\nassistant\nYou are a helpful assistant.<|im_end|>",
    "def add(a, b):\n    return a + b\n\nprint(add(1, 2))  # 3",
    "Title\n\n\nText\n\n\n",
] * 4
_LLAMA3_SPLIT = Regex(
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def make_tokenizer(kind: str, vocab_size: int = 420, corpus: list[str] = CORPUS) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer (``gpt2``, ``llama3``) or one that marks words as SentencePiece does."""
    special = ["<unk>", "<s>", "</s>", *CHAT_TOKENS]
    if kind.startswith("spm"):
        tokenizer = _sentencepiece_like(kind.removeprefix("spm-"), vocab_size, special, corpus)
    else:
        tokenizer = _byte_level(kind, vocab_size, special, corpus)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    fast.add_tokens([AddedToken(token, normalized=False) for token in THINK_TOKENS])
    return fast


def _byte_level(kind: str, vocab_size: int, special: list[str], corpus: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind == "gpt2")
    if kind == "llama3":
        split = pre_tokenizers.Split(_LLAMA3_SPLIT, behavior="isolated")
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, plain])
    else:
        tokenizer.pre_tokenizer = plain
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return tokenizer


def _sentencepiece_like(prepend: str, vocab_size: int, special: list[str], corpus: list[str]) -> Tokenizer:
    """Words carry the blank before them; ``prepend``: when text gets one that has none."""
    alphabet = [*map(chr, range(32, 127)), "\n", "▁", "é", "ä", "好"]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    # Learn pieces that do not reach over a blank, as SentencePiece does.
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    tokenizer.train_from_iterator(corpus, trainer)
    if prepend == "legacy":
        tokenizer.pre_tokenizer = None
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=prepend, split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always")
    return tokenizer


def save_tokenizer(folder: Path, kind: str = "gpt2", chat_template: str | None = None) -> Path:
    """Save a tokenizer as a folder."""
    tokenizer = make_tokenizer(kind)
    tokenizer.chat_template = chat_template
    tokenizer.save_pretrained(folder)
    return folder


def add_family_tokens(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The tokenizer, knowing the special tokens of every built-in template."""
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in FAMILY_TOKENS])
    return tokenizer
