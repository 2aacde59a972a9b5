"""Raw rows among the data of a training: prepared, and replaced by the prefixes of what was made of them."""

from __future__ import annotations

import dataclasses
from typing import Any

from mindspeed_lora.config.blend import parse_blend
from mindspeed_lora.config.flags import options
from mindspeed_lora.config.jobs import PreprocessJob, TrainJob
from mindspeed_lora.config.preprocess import PreprocessConfig, RawRowsConfig, RowsConfig
from mindspeed_lora.config.runtime import FileRuntimeConfig
from mindspeed_lora.data.handlers import HANDLER_NAMES, LLAMA_FACTORY, make_handler
from mindspeed_lora.data.raw_rows import RawRows, holds_raw_rows, is_prepared, training_prefix
from mindspeed_lora.data.template_files import prompt_template
from mindspeed_lora.data.tokenizer import LazyTokenizer
from mindspeed_lora.errors import Refused

DATA_FIELDS = ("data_path", "train_data_path", "valid_data_path", "test_data_path")
"""Fields of the configuration whose words name data."""


def raw_paths(job: TrainJob) -> list[str]:
    """The words that name raw rows, in order."""
    return [path for path in _paths(job) if holds_raw_rows(path)]


def _paths(job: TrainJob) -> list[str]:
    """All words that name data, in order."""
    named = [(name, getattr(job.data, name)) for name in DATA_FIELDS]
    return [
        path
        for name, words in named
        if words is not None
        for path in parse_blend(words, "--" + name.replace("_", "-")).paths
    ]


def _check_names(job: TrainJob) -> None:
    """A misspelt template or handler is refused where prepared data make it without effect, too."""
    if job.tokenizer.prompt_type is not None and job.tokenizer.prompt_type_path is None:
        prompt_template(job.tokenizer.prompt_type)
    handler = job.raw_rows.handler_name
    if handler is not None and handler not in HANDLER_NAMES:
        make_handler(handler)


def _refuse_names_of_sets(job: TrainJob) -> None:
    """Entries of a ``dataset_info.json`` are prepared by ``preprocess_data.py``."""
    unprepared = [path for path in _paths(job) if not is_prepared(path)]
    if job.raw_rows.handler_name == LLAMA_FACTORY and unprepared:
        raise Refused(
            f"--data-path {unprepared[0]}: --handler-name {LLAMA_FACTORY} reads names in a dataset_info.json, which "
            "preprocess_data.py prepares; give its --output-prefix here, or a file of rows with the handler of their "
            "own kind"
        )


def with_prepared_rows(
    job: TrainJob, seq_length: int, tokenizer: LazyTokenizer | None
) -> tuple[TrainJob, list[str]]:
    """The job with prepared data in the place of raw rows, and notices.

    Raises:
        Refused: there is no tokenizer to prepare them with, or they cannot be prepared.
    """
    _refuse_names_of_sets(job)
    raw = raw_paths(job)
    if not raw:
        _check_names(job)
        unused = [option.name for option in options(RawRowsConfig) if option.dest in job.given - {"workers"}]
        notice = f"no effect here: {', '.join(unused)}, since the data are prepared"
        return job, [notice] if unused and any(getattr(job.data, name) for name in DATA_FIELDS) else []
    if job.raw_rows.output_prefix is not None and len(set(raw)) > 1:
        raise Refused(
            f"--output-prefix {job.raw_rows.output_prefix} is one place for {len(set(raw))} sets of raw rows; leave "
            "it out, or prepare them with preprocess_data.py"
        )
    if tokenizer is None or tokenizer.folder is None:
        raise Refused(
            f"--data-path {raw[0]} holds raw rows, and there is no tokenizer; give --tokenizer-name-or-path"
        )
    made = {path: _prepared(job, path, seq_length, str(tokenizer.folder)) for path in dict.fromkeys(raw)}
    words: dict[str, Any] = {
        name: tuple(made.get(word, word) for word in given)
        for name in DATA_FIELDS
        if (given := getattr(job.data, name)) is not None
    }
    data = dataclasses.replace(job.data, **words)
    told = [f"{path} is prepared as {prefix}" for path, prefix in made.items()]
    return dataclasses.replace(job, data=data), told


def _prepared(job: TrainJob, path: str, seq_length: int, tokenizer_folder: str) -> str:
    rows = {option.dest: getattr(job.raw_rows, option.dest) for option in options(RowsConfig)}
    packed = job.raw_rows.pack or job.data.neat_pack
    if rows["handler_name"] is None and job.training.stage == "pretrain":
        rows["handler_name"] = "GeneralPretrainHandler"
    config = PreprocessConfig(
        **rows,
        input=path,
        output_prefix=job.raw_rows.output_prefix,
        # Training cuts single rows by the same rule, so that they need not be prepared for each length.
        seq_length=seq_length if packed else None,
        overlong=job.data.overlong if packed else "truncate",
        neat_pack=job.data.neat_pack,
    )
    tokenizer = dataclasses.replace(job.tokenizer, tokenizer_name_or_path=tokenizer_folder)
    runtime = FileRuntimeConfig()
    made = RawRows(
        PreprocessJob(runtime=runtime, preprocess=config, tokenizer=tokenizer), job.raw_rows.data_cache_path
    )
    return training_prefix(made.prepared(), job.training.stage)
