"""The commands as functions, their flags as keywords.

``lora_r=16`` is ``--lora-r 16``; ``True`` is a switch, ``False`` and ``None`` leave a flag out, a list is several
words, a dictionary a JSON object, a path a text. What a command refuses is refused here too, by
:class:`~mindspeed_lora.errors.Refused` with the same sentence. A program runs in one process, or in as many as torchrun
starts, all of which make the same calls.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mindspeed_lora.config.commands import grammar, parse
from mindspeed_lora.config.config_file import flag_words
from mindspeed_lora.errors import Refused
from mindspeed_lora.hub import with_local_folders

if TYPE_CHECKING:
    from mindspeed_lora.config.jobs import Job
    from mindspeed_lora.data.summary import Summary
    from mindspeed_lora.inference.model import Model
    from mindspeed_lora.training.trainer import History, Trainer

Folder = str | PathLike[str]


def job(command: str, **flags: Any) -> Job:
    """The checked configuration of a command: posttrain, pretrain, convert, preprocess or inference.

    Raises:
        Refused: an unknown flag (the sentence names the nearest), a wrong value, or what cannot be together.
    """
    known = grammar(command)
    words = [word for key, value in flags.items() for word in flag_words(key, value, known)]
    parsed: Job = parse(command, words)
    if parsed.runtime.family_file is not None:
        raise Refused(
            "family_file is for the commands; convert the checkpoint to Megatron's form with it first"
        )
    if parsed.runtime.print_config or getattr(parsed.runtime, "dry_run", False):
        raise Refused("print_config and dry_run are for the commands, which print and leave")
    return parsed


def _with_folders(command: str, flags: Mapping[str, Any]) -> Any:
    """A job in which hub ids have become local folders."""
    described, taken = with_local_folders(job(command, **flags))
    return dataclasses.replace(described, notices=(*described.notices, *taken))


def prepare(input: Folder, output_prefix: Folder, **flags: Any) -> Summary:
    """``preprocess_data.py``: rows of text become an indexed data set; called by one process.

    Returns:
        Counts of rows and tokens, and why rows were dropped.
    """
    described = _with_folders("preprocess", {"input": input, "output_prefix": output_prefix, **flags})
    from mindspeed_lora.data.preprocess import preprocess

    return preprocess(described)


def trainer(load: Folder, data_path: Folder, **flags: Any) -> Trainer:
    """``posttrain_gpt.py``, opened: the model is loaded, the adapter injected, and nothing trained yet."""
    described = _with_folders("posttrain", {"load": load, "data_path": data_path, **flags})
    from mindspeed_lora.device.megatron_import import import_megatron

    import_megatron()
    from mindspeed_lora.training.trainer import Trainer

    return Trainer(described)


def train(load: Folder, data_path: Folder, **flags: Any) -> History:
    """``posttrain_gpt.py`` from its start to its end.

    Returns:
        The records of all steps and evaluations, the same on every rank.
    """
    with trainer(load, data_path, **flags) as run:
        return run.train()


def load(load: Folder, **flags: Any) -> Model:
    """``inference.py``, opened: a model, with ``lora_load`` its adapter, ready to be asked."""
    # A job has a prompt; here prompts come later.
    described = _with_folders("inference", {"load": load, "prompt": ".", "task": "greedy", **flags})
    from mindspeed_lora.device.megatron_import import import_megatron

    import_megatron()
    from mindspeed_lora.inference.model import Model

    return Model(described)


def convert(load_dir: Folder, save_dir: Folder, save_model_type: str, **flags: Any) -> Path:
    """``convert_ckpt.py``: a checkpoint in another format, layout or dtype; called by one process.

    Returns:
        The folder that was written.
    """
    described = _with_folders(
        "convert", {"load_dir": load_dir, "save_dir": save_dir, "save_model_type": save_model_type, **flags}
    )
    from mindspeed_lora.checkpoint.conversion.convert import convert, target_folder

    convert(described)
    return target_folder(described.conversion)


def merge(load_dir: Folder, lora_load: Folder, save_dir: Folder, **flags: Any) -> Path:
    """A base with its adapter merged into it, as a Hugging Face folder; called by one process.

    Returns:
        The folder that was written.
    """
    return convert(load_dir, save_dir, "hf", lora_load=lora_load, **flags)
