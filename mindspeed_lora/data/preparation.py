"""From the flags of ``preprocess_data.py`` to what its workers do and what is written beside the tokens."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mindspeed_lora.config.jobs import PreprocessJob
from mindspeed_lora.config.preprocess import PreprocessConfig
from mindspeed_lora.config.tokenizer import TokenizerConfig
from mindspeed_lora.data.added_tokens import job_tokenizer
from mindspeed_lora.data.chat_template import chat_template, count_differing
from mindspeed_lora.data.conversation import Message, UnusableRow
from mindspeed_lora.data.encoding import ConversationEncoder, TemplateEncoder
from mindspeed_lora.data.handler_choice import choose_handler
from mindspeed_lora.data.handlers import ALPACA_TEXT_BY_DEFAULT, Handler, PairHandler, TextHandler
from mindspeed_lora.data.hf_template import HfTemplateEncoder
from mindspeed_lora.data.packed_rows import PackFormat
from mindspeed_lora.data.pair_work import GIVEN_CONVERSATIONS, PairWork
from mindspeed_lora.data.prepared_info import PreparedInfo
from mindspeed_lora.data.prompt_template import missing_end_notice, special_tokens
from mindspeed_lora.data.readers import Row
from mindspeed_lora.data.row_work import InstructionWork, TextWork, Work
from mindspeed_lora.data.sources import Inputs
from mindspeed_lora.data.template_files import chosen_template
from mindspeed_lora.data.tokenizer import LazyTokenizer, pad_token_id, tokenizer_fingerprint
from mindspeed_lora.errors import Refused

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ROWS_CHECKED = 64
"""So many rows are rendered by the chat template too, to see that it gives the same tokens."""

Notice = Callable[[str], None]


@dataclass(frozen=True)
class Preparation:
    """What is done with each row, and the information on it, still without counts."""

    work: Work
    info: PreparedInfo
    packing: PackFormat | None = None
    """How rows are put together; None: each is a document of its own."""


@dataclass(frozen=True)
class _Encoding:
    """How conversations are encoded."""

    encoder: ConversationEncoder
    loss_on: str
    prompt_type: str | None
    chat_template: str
    end_token_id: int | None


def prepare(job: PreprocessJob, inputs: Inputs, notice: Notice) -> Preparation:
    """Load the tokenizer, choose handler and template, and try them on the first rows."""
    config = job.preprocess
    folder = job.tokenizer.tokenizer_name_or_path or job.tokenizer.tokenizer_model
    assert folder is not None, "checked when the flags were parsed"
    lazy = job_tokenizer(job.tokenizer, folder)
    tokenizer = lazy.loaded
    name, handler = choose_handler(config, inputs, notice)
    if isinstance(handler, TextHandler):
        return _prepare_text(job, name, handler, lazy, notice)
    pairs = isinstance(handler, PairHandler)
    if pairs and (config.pack or config.neat_pack):
        raise Refused(f"--handler-name {name}: pairs are not packed; leave --pack and --neat-pack out")
    encoding = _encoding(job, name, pairs, tokenizer, notice)
    if isinstance(encoding.encoder, TemplateEncoder):
        _check_chat_template(encoding.encoder, encoding.chat_template, handler, inputs, notice)
    work: Work = InstructionWork(
        handler=GIVEN_CONVERSATIONS if isinstance(handler, PairHandler) else handler,
        encoder=encoding.encoder,
        end_token_id=_appended(job.tokenizer, encoding.end_token_id, tokenizer),
        seq_length=config.seq_length,
        overlong=config.overlong,
    )
    if isinstance(handler, PairHandler):
        assert isinstance(work, InstructionWork)
        work = PairWork(handler=handler, single=work)
    packing = _packing(config, pad_token_id(tokenizer))
    info = PreparedInfo(
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        tokenizer_files=lazy.files_digest,
        handler_name=name,
        prompt_type=encoding.prompt_type,
        chat_template=encoding.chat_template,
        seq_length=config.seq_length,
        overlong=config.overlong,
        loss_on=encoding.loss_on,
        append_eod=job.tokenizer.append_eod,
        pad_token_id=pad_token_id(tokenizer),
        eos_token_id=encoding.end_token_id,
        pack=None if packing is None else packing.name,
    )
    return Preparation(work, info, packing)


def _packing(config: PreprocessConfig, pad_token: int) -> PackFormat | None:
    if not (config.pack or config.neat_pack):
        return None
    assert config.seq_length is not None, "checked with the flags"
    return PackFormat(seq_length=config.seq_length, pad_token_id=pad_token, neat=config.neat_pack)


def _prepare_text(
    job: PreprocessJob, name: str, handler: TextHandler, lazy: LazyTokenizer, notice: Notice
) -> Preparation:
    tokenizer = lazy.loaded
    if job.preprocess.pack or job.preprocess.neat_pack:
        flag = "--neat-pack" if job.preprocess.neat_pack else "--pack"
        raise Refused(f"{flag}: training cuts plain text into full windows by itself; leave it out")
    if job.preprocess.seq_length is not None:
        notice("--seq-length has no effect on plain text, which training cuts into windows")
    if job.tokenizer.prompt_type is not None or job.tokenizer.hf_chat_template:
        flag = "--hf-chat-template" if job.tokenizer.hf_chat_template else "--prompt-type"
        notice(f"{flag} has no effect on plain text, which has no turns")
    work = TextWork(
        handler=handler,
        tokenizer=tokenizer,
        end_token_id=_appended(job.tokenizer, tokenizer.eos_token_id, tokenizer),
    )
    info = PreparedInfo(
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        tokenizer_files=lazy.files_digest,
        handler_name=name,
        loss_on="all",
        append_eod=job.tokenizer.append_eod,
        pad_token_id=pad_token_id(tokenizer),
        eos_token_id=tokenizer.eos_token_id,
    )
    return Preparation(work, info)


def _appended(
    config: TokenizerConfig, end_token_id: int | None, tokenizer: PreTrainedTokenizerBase
) -> int | None:
    """The token that ``--append-eod`` puts at the end."""
    if not config.append_eod:
        return None
    if end_token_id is None:
        raise Refused(f"--append-eod: the tokenizer {tokenizer.name_or_path} has no end token; leave it out")
    return end_token_id


def _encoding(
    job: PreprocessJob, name: str, pairs: bool, tokenizer: PreTrainedTokenizerBase, notice: Notice
) -> _Encoding:
    loss_on = "last-assistant" if pairs else job.preprocess.loss_on
    prompt_type = job.tokenizer.prompt_type
    if prompt_type is None:
        if not job.tokenizer.hf_chat_template:
            prompt_type = None if tokenizer.chat_template else "default"
            if name in ALPACA_TEXT_BY_DEFAULT:
                prompt_type = "alpaca"
            taken = "--hf-chat-template" if prompt_type is None else f"--prompt-type {prompt_type}"
            notice(f"default taken: {taken}")
        if prompt_type is None:
            own = HfTemplateEncoder(tokenizer, loss_on, job.tokenizer.thinking)
            return _Encoding(own, loss_on, None, tokenizer.get_chat_template(), tokenizer.eos_token_id)
    template = chosen_template(dataclasses.replace(job.tokenizer, prompt_type=prompt_type))
    lacking = missing_end_notice(template, tokenizer, prompt_type)
    if lacking is not None:
        notice(lacking)
    encoder = TemplateEncoder(tokenizer, template, loss_on)
    end = special_tokens(template, tokenizer).end
    return _Encoding(encoder, loss_on, prompt_type, chat_template(template, tokenizer), end)


def _check_chat_template(
    encoder: TemplateEncoder, template: str, handler: Handler, inputs: Inputs, notice: Notice
) -> None:
    conversations: list[list[Message]] = []
    for row in itertools.islice(inputs.rows(), _ROWS_CHECKED):
        try:
            if not isinstance(row, Row) or isinstance(handler, TextHandler):
                continue
            conversation = handler.pair(row)[0] if isinstance(handler, PairHandler) else handler.messages(row)
            encoder.encode([conversation])
        except (UnusableRow, Refused):
            # Counted when the row's turn comes.
            continue
        conversations.append(conversation)
    differing = count_differing(encoder, template, conversations)
    if differing:
        notice(
            f"for {differing} of the first {len(conversations)} rows the chat template that is kept for "
            "generation gives other tokens than were trained, because this tokenizer merges the beginning of "
            "the answer with the end of the prompt; prompts by themselves are the same"
        )
