"""``--dry-run`` of ``preprocess_data.py``: flags, tokenizer, template and first rows are tried, nothing is written."""

from __future__ import annotations

import sys
from pathlib import Path

from mindspeed_lora.config.config_file import CONFIG_FILE
from mindspeed_lora.config.jobs import PreprocessJob
from mindspeed_lora.data.merging import merge_groups
from mindspeed_lora.data.preparation import prepare
from mindspeed_lora.data.prepared_output import dataset_prefixes
from mindspeed_lora.data.sources import input_paths, open_inputs


def dry_run(job: PreprocessJob) -> None:
    """Checks everything and tells what would be written.

    Raises:
        Refused: the job cannot be.
    """
    config, tokenizer = job.preprocess, job.tokenizer
    assert config.output_prefix is not None
    if config.merge_group_keys:
        if Path(config.input or "").exists():
            merge_groups(job)
        else:
            _notice(f"--input {config.input} is not there")
        print(
            "would write   "
            + "\n              ".join(f"{config.output_prefix}_{key}" for key in config.merge_group_keys)
        )
        print("dry run: flags checked, nothing written")
        return
    named = tokenizer.tokenizer_name_or_path or tokenizer.tokenizer_model or ""
    missing = [
        f"{flag} {path} is not there"
        for flag, path in (*(("--input", name) for name in input_paths(config)), ("the tokenizer", named))
        if not Path(path).exists()
    ]
    for text in missing:
        _notice(text)
    if missing:
        print("dry run: flags checked, rows not tried, nothing written")
        return
    inputs = open_inputs(config, _notice)
    preparation = prepare(job, inputs, _notice)
    print("would read    " + "\n              ".join(str(file) for file in inputs.files))
    written = [*dataset_prefixes(config.output_prefix, preparation), f"{config.output_prefix}_{CONFIG_FILE}"]
    print("would write   " + "\n              ".join(written))
    print("dry run: everything checked, nothing written")


def _notice(text: str) -> None:
    print(f"notice: {text}", file=sys.stderr)
