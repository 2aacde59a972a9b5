"""The prepared data and how batches are made of it."""

from __future__ import annotations

import re
from dataclasses import dataclass

from mindspeed_lora.config.flags import AT_LEAST_ONE, Check, Section, flag

OVERLONG_CHOICES = ("truncate", "proportional", "drop")
LOSS_ON_CHOICES = ("assistant", "last-assistant", "all")


def _is_split(text: str) -> bool:
    if not re.fullmatch(r"\d+(\.\d+)?(,\d+(\.\d+)?){0,2}", text):
        return False
    return float(text.split(",")[0]) > 0


_SPLIT = Check(
    "one to three numbers like 949,50,1 (training, validation, test), the first above 0",
    _is_split,
)


@dataclass(frozen=True, kw_only=True)
class DataConfig(Section):
    """Where the prepared rows lie, in what order they are taken and how they are padded."""

    data_path: tuple[str, ...] | None = flag(
        "prefix of the prepared data, without _packed_…, or a file or folder of raw rows; several of them, each with a "
        "weight before it (0.3 A 0.7 B) or all without (taken by their sizes)",
        metavar="PREFIX",
    )
    train_data_path: tuple[str, ...] | None = flag(
        "data for training alone, in place of --data-path and --split; named in the same way",
        metavar="PREFIX",
    )
    valid_data_path: tuple[str, ...] | None = flag(
        "data for the evaluation loss, named in the same way", metavar="PREFIX"
    )
    test_data_path: tuple[str, ...] | None = flag(
        "data for the test loss at the end of the run, named in the same way", metavar="PREFIX"
    )
    data_args_path: str | None = flag("file that holds the words of --data-path", metavar="FILE")
    per_split_data_args_path: str | None = flag(
        'JSON file with the words of the three: {"train": [0.3, "A", 0.7, "B"], "valid": ["C"], "test": null}',
        metavar="FILE",
    )
    split: str = flag("shares of training, validation and test, cut in file order", "100,0,0", check=_SPLIT)
    seq_length: int | None = flag(
        "longest row, in tokens; left out: the model's max_position_embeddings, at most 4096",
        check=AT_LEAST_ONE,
    )
    no_shuffle: bool = flag("take the rows in file order", False)
    padded_samples: bool = flag(
        "fill each epoch up to whole global batches with its first rows, so that no batch reaches into the next one",
        False,
    )
    overlong: str = flag(
        "what happens to rows longer than --seq-length", "truncate", choices=OVERLONG_CHOICES
    )
    variable_seq_lengths: bool = flag(
        "pad to the longest row of the micro-batch instead of --seq-length",
        False,
        names=("--variable-seq-lengths", "--no-pad-to-seq-lengths"),
    )
    pad_to_multiple_of: int = flag(
        "with --variable-seq-lengths: pad to a multiple of this many tokens", 8, check=AT_LEAST_ONE
    )
    packing: bool = flag(
        "pack the rows of each global batch while training: attention and loss stay inside of each row", False
    )
    neat_pack: bool = flag(
        "the data were prepared with --neat-pack, as they tell themselves; raw rows are", False
    )
    reset_attention_mask: bool = flag(
        "attention does not cross documents: rows packed with --neat-pack; with plain text, end tokens", False
    )
    reset_position_ids: bool = flag("positions start anew in each document, in the same way", False)
    eod_mask_loss: bool = flag("plain text: an end token does not predict the next document", False)
    is_instruction_dataset: bool = flag(
        "the data are instruction rows (what --stage sft reads anyway)", False
    )
