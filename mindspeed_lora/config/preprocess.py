"""Preparing data."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from mindspeed_lora.config.data import LOSS_ON_CHOICES, OVERLONG_CHOICES
from mindspeed_lora.config.flags import AT_LEAST_ONE, JSON_OBJECT, Check, Section, flag


def _is_bad_row_limit(text: str) -> bool:
    return re.fullmatch(r"\d+|\d+(\.\d+)?%", text) is not None and float(text.rstrip("%")) <= (
        100 if text.endswith("%") else math.inf
    )


def _is_probabilities(text: str) -> bool:
    return re.fullmatch(r"\s*\d*\.?\d+(\s*,\s*\d*\.?\d+)*\s*", text) is not None


_BAD_ROW_LIMIT = Check("a share of the rows like 1%, or a number of rows", _is_bad_row_limit)
_PROBABILITIES = Check("numbers like 0.3,0.7, one for each input", _is_probabilities)


@dataclass(frozen=True, kw_only=True)
class RowsConfig(Section):
    """What the rows are and how they become samples, wherever they are prepared."""

    handler_name: str | None = flag(
        "what the rows are: AlpacaStyle-, SharegptStyle-, OpenAI- or LlamaFactoryInstructionHandler, "
        "AlpacaStyle- or SharegptStylePairwiseHandler, GeneralPretrainHandler …; left out: found from the first row",
        metavar="NAME",
    )
    map_keys: str | None = flag(
        "JSON object: this tool's column names to yours", check=JSON_OBJECT, metavar="JSON"
    )
    json_keys: tuple[str, ...] = flag(
        "GeneralPretrainHandler: columns with text",
        ("text",),
        names=("--json-keys", "--json-key"),
        metavar="KEY",
    )
    loss_on: str = flag(
        "what carries loss: every answer, the last one, or the whole text; keys loss (true, false) and weight (0 and "
        "up) of messages, and weight of rows, are read anyway",
        "assistant",
        choices=LOSS_ON_CHOICES,
    )
    pack: bool = flag(
        "put rows together to rows of --seq-length; attention and positions run through them", False
    )
    max_samples: int | None = flag("rows that are read of each input, at most", check=AT_LEAST_ONE)
    max_bad_rows: str = flag(
        "share or number of rows that may be broken; they are left out and told",
        "1%",
        check=_BAD_ROW_LIMIT,
        metavar="N%",
    )
    workers: int = flag("processes that tokenise", 1, check=AT_LEAST_ONE)


@dataclass(frozen=True, kw_only=True)
class RawRowsConfig(RowsConfig):
    """Raw rows given to a training, which prepares them first; without effect on prepared data."""

    output_prefix: str | None = flag(
        "where raw rows of --data-path are prepared; left out: a folder .prepared beside them",
        metavar="PREFIX",
    )
    data_cache_path: str | None = flag(
        "folder for prepared rows in place of .prepared beside the raw ones", metavar="DIR"
    )


@dataclass(frozen=True, kw_only=True)
class PreprocessConfig(RowsConfig):
    """From rows of text to an indexed dataset."""

    input: str | None = flag(
        "JSON, JSONL, Parquet, Arrow, CSV or text file, a folder of them, or several, separated by commas; with "
        "LlamaFactoryInstructionHandler names of data sets",
        metavar="PATH",
    )
    datasets: tuple[str, ...] | None = flag("further inputs, behind those of --input", metavar="PATH")
    dataset_dir: str | None = flag(
        "LlamaFactoryInstructionHandler: folder of dataset_info.json; left out: the folder that --input names",
        metavar="DIR",
    )
    hf_datasets_params: str | None = flag(
        "JSON file with the arguments of datasets.load_dataset, which gives the rows in place of --input",
        metavar="FILE",
    )
    mix_strategy: str = flag(
        "several inputs: one after the other, or in turn until the shortest (under) or the longest (over) ends",
        "concat",
        choices=("concat", "interleave_under", "interleave_over"),
    )
    interleave_probs: str | None = flag(
        "in place of turns: how probable each input is to give the next row, like 0.3,0.7",
        check=_PROBABILITIES,
        metavar="P,P…",
    )
    seed: int = flag("seed of that choice", 1234)
    show: int | None = flag(
        "print so many rows with their tokens and labels, and write nothing", check=AT_LEAST_ONE, metavar="N"
    )
    merge_group_keys: tuple[str, ...] | None = flag(
        "merge the indexed data sets in the folder --input: those whose names hold a key become <prefix>_<key>",
        metavar="KEY",
    )
    output_prefix: str | None = flag("the files are named <prefix>_packed_…_document", metavar="PREFIX")
    seq_length: int | None = flag(
        "longest row, in tokens, and the length of packed rows; left out: no limit", check=AT_LEAST_ONE
    )
    overlong: str = flag(
        "what happens to rows longer than --seq-length", "truncate", choices=OVERLONG_CHOICES
    )
    neat_pack: bool = flag(
        "pack so that attention, positions and loss stay inside of each row (implies --pack)", False
    )
    n_subs: int = flag(
        "parts that are prepared side by side: as many processes, where these are more than --workers",
        1,
        check=AT_LEAST_ONE,
    )
    log_interval: int = flag("rows between progress lines", 1000, check=AT_LEAST_ONE)
    overwrite: bool = flag("replace existing output", False, names=("--overwrite", "--overwrite-cache"))
