"""``--dry-run`` of ``preprocess_data.py``: flags, tokenizer, template and first rows are tried, nothing is written."""

from __future__ import annotations

import sys
from pathlib import Path

from mindspeed_lora.config.jobs import PreprocessJob
from mindspeed_lora.data.preparation import prepare
from mindspeed_lora.data.preprocess import dataset_prefixes
from mindspeed_lora.data.readers import input_files


def dry_run(job: PreprocessJob) -> None:
    """Checks everything and tells what would be written.

    Raises:
        Refused: the job cannot be.
    """
    config, tokenizer = job.preprocess, job.tokenizer
    assert config.input is not None and config.output_prefix is not None
    named = tokenizer.tokenizer_name_or_path or tokenizer.tokenizer_model or ""
    missing = [
        f"{flag} {path} is not there"
        for flag, path in (("--input", config.input), ("the tokenizer", named))
        if not Path(path).exists()
    ]
    for text in missing:
        _notice(text)
    if missing:
        print("dry run: flags checked, rows not tried, nothing written")
        return
    files = input_files(config.input, _notice)
    preparation = prepare(job, files, _notice)
    print("would read    " + "\n              ".join(str(file) for file in files))
    print("would write   " + "\n              ".join(dataset_prefixes(config.output_prefix, preparation)))
    print("dry run: everything checked, nothing written")


def _notice(text: str) -> None:
    print(f"notice: {text}", file=sys.stderr)
