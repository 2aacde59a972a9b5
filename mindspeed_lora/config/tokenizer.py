"""The tokenizer and the prompt template."""

from __future__ import annotations

from dataclasses import dataclass

from mindspeed_lora.config.flags import Section, flag


@dataclass(frozen=True, kw_only=True)
class TokenizerConfig(Section):
    """Which tokenizer, and how a conversation becomes text."""

    tokenizer_type: str = flag(
        "kind of tokenizer; both names mean a Hugging Face folder",
        "PretrainedFromHF",
        choices=("PretrainedFromHF", "HuggingFaceTokenizer"),
    )
    tokenizer_name_or_path: str | None = flag(
        "folder of the tokenizer; left out: the model's own", metavar="PATH"
    )
    tokenizer_model: str | None = flag(
        "file or folder of the tokenizer, used when --tokenizer-name-or-path is left out", metavar="PATH"
    )
    add_tokens: str | None = flag(
        "file of tokens to add to the vocabulary, one a line or a JSON list; their rows of embedding and output layer "
        "are trained (with LoRA they alone), and start as the mean of all rows where the model has none",
        metavar="FILE",
    )
    tokenizer_not_use_fast: bool = flag("use the slow (Python) tokenizer", False)
    trust_remote_code: bool = flag("run the .py files of a model or tokenizer folder", False)
    prompt_type: str | None = flag(
        "name of the prompt template: llama2, chatml, qwen, alpaca, empty …",
        names=("--prompt-type", "--inference-prompt-type"),
    )
    prompt_type_path: str | None = flag(
        "file of prompt templates of your own, as MindSpeed-LLM's templates.json or LLaMA-Factory's; left out: the "
        "built-in ones",
        metavar="FILE",
    )
    enable_thinking: str = flag(
        "templates with thoughts: true trains an empty thought where an answer has none, none makes it part of the "
        "prompt, false takes all thoughts out, too",
        "none",
        choices=("true", "false", "none"),
    )
    hf_chat_template: bool = flag("use the chat template of the tokenizer", False)
    append_eod: bool = flag("end each document with the end token", False)

    @property
    def thinking(self) -> bool | None:
        """``--enable-thinking`` as a value; None: as the rows have it."""
        return {"true": True, "false": False}.get(self.enable_thinking)
