"""Whether the flags on rows put together and the prepared data agree."""

from __future__ import annotations

from mindspeed_lora.config.data import DataConfig
from mindspeed_lora.data.gpt_dataset import EndOfDocument, GptDataset
from mindspeed_lora.data.prepared_info import PreparedInfo
from mindspeed_lora.data.sft_dataset import SftDataset
from mindspeed_lora.data.tokenizer import LazyTokenizer
from mindspeed_lora.errors import Refused


def check_packed(data: DataConfig, info: PreparedInfo | None, rows: SftDataset) -> tuple[str, ...]:
    """Notices on instruction rows; refused where a flag wants to know rows inside of rows and nothing tells them.

    ``info`` belongs to ``rows``. Rows that tell their sub-rows need no flag, and packing while training takes each
    row as it is.
    """
    if rows.tells_sub_rows() or (info is not None and info.pack == "neat"):
        return (
            f"the rows of {rows.prefix} are packed neatly: attention and loss stay inside of their sub-rows",
        )
    given = _given(data)
    if data.packing or not given:
        return ()
    if info is not None and info.pack is None and not data.neat_pack:
        return (f"no effect: {' '.join(given)}, since each row of {rows.prefix} is a document of its own",)
    raise Refused(
        f"{' '.join(given)}: nothing tells which rows the rows of --data-path {rows.prefix} were packed from "
        "(attention_mask holds no number above 1); prepare them with --neat-pack, or leave "
        f"{'the flags' if len(given) > 1 else 'the flag'} out; --packing packs single rows while training"
    )


def _given(data: DataConfig) -> list[str]:
    """The flags that only mean something for rows of several documents."""
    flags = {
        "--neat-pack": data.neat_pack,
        "--reset-attention-mask": data.reset_attention_mask,
        "--reset-position-ids": data.reset_position_ids,
    }
    return [name for name, is_given in flags.items() if is_given]


def end_of_document(
    data: DataConfig, info: PreparedInfo | None, tokenizer: LazyTokenizer | None
) -> EndOfDocument | None:
    """What ends a document of plain text, where a flag asks for it."""
    flags = _end_flags(data)
    if not flags:
        return None
    token_id = info.eos_token_id if info is not None else None
    if token_id is None and tokenizer is not None:
        token_id = tokenizer.loaded.eos_token_id
    if token_id is None:
        raise Refused(
            f"{' '.join(flags)}: it is not known which token ends a document; give a tokenizer with an end token "
            "by --tokenizer-name-or-path"
        )
    return EndOfDocument(
        token_id=token_id,
        reset_attention_mask=data.reset_attention_mask,
        reset_position_ids=data.reset_position_ids,
        mask_loss=data.eod_mask_loss,
    )


def check_ends(data: DataConfig, rows: GptDataset) -> None:
    """Refuse plain text in which no document ends with the end token that a flag goes by."""
    if rows.end is not None and len(rows) and not rows.ends_documents_with(rows.end.token_id):
        raise Refused(
            f"{' '.join(_end_flags(data))}: the documents of --data-path {rows.prefix} do not end with the end token "
            f"{rows.end.token_id}; prepare them with --append-eod"
        )


def _end_flags(data: DataConfig) -> list[str]:
    return _given(data) + (["--eod-mask-loss"] if data.eod_mask_loss else [])
