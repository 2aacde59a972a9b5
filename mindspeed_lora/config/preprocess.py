"""Preparing data."""

from __future__ import annotations

import json
from dataclasses import dataclass

from mindspeed_lora.config.data import OVERLONG_CHOICES
from mindspeed_lora.config.flags import AT_LEAST_ONE, Check, Section, flag


def _is_json_object(text: str) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except json.JSONDecodeError:
        return False


_JSON_OBJECT = Check("a JSON object", _is_json_object)


@dataclass(frozen=True, kw_only=True)
class PreprocessConfig(Section):
    """From rows of text to an indexed dataset."""

    input: str | None = flag("JSON, JSONL, Parquet or CSV file, or a folder of them", metavar="PATH")
    output_prefix: str | None = flag("the files are named <prefix>_packed_…_document", metavar="PREFIX")
    handler_name: str | None = flag(
        "what the rows are: AlpacaStyleInstructionHandler, OpenAIInstructionHandler or "
        "GeneralPretrainHandler; left out: found from the first row",
        metavar="NAME",
    )
    map_keys: str | None = flag(
        "JSON object: this tool's column names to yours", check=_JSON_OBJECT, metavar="JSON"
    )
    json_keys: tuple[str, ...] = flag("GeneralPretrainHandler: columns with text", ("text",), metavar="KEY")
    seq_length: int | None = flag(
        "longest row, in tokens, and the length of packed rows; left out: no limit", check=AT_LEAST_ONE
    )
    overlong: str = flag(
        "what happens to rows longer than --seq-length", "truncate", choices=OVERLONG_CHOICES
    )
    pack: bool = flag(
        "put rows together to rows of --seq-length; attention and positions run through them", False
    )
    neat_pack: bool = flag(
        "pack so that attention, positions and loss stay inside of each row (implies --pack)", False
    )
    workers: int = flag("processes that tokenise", 1, check=AT_LEAST_ONE)
    log_interval: int = flag("rows between progress lines", 1000, check=AT_LEAST_ONE)
    overwrite: bool = flag("replace existing output", False, names=("--overwrite", "--overwrite-cache"))
