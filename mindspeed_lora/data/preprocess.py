"""``preprocess_data.py``: rows of text become indexed data sets, with the information on how they were made.

An interrupted run leaves an earlier set as it was, and the same command goes on where it was
(:mod:`mindspeed_lora.data.prepared_output`).
"""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

from mindspeed_lora.config.jobs import PreprocessJob
from mindspeed_lora.data.atomic_output import output_folder
from mindspeed_lora.data.bad_rows import BadRowLimit, CheckedWork, told
from mindspeed_lora.data.preparation import Preparation, prepare
from mindspeed_lora.data.prepared_output import PreparedOutput, job_key
from mindspeed_lora.data.progress import Progress
from mindspeed_lora.data.readers import BadRow, Row
from mindspeed_lora.data.sources import Inputs, open_inputs
from mindspeed_lora.data.summary import Summary
from mindspeed_lora.data.worker_pool import ordered_map
from mindspeed_lora.errors import Failed, Refused

_ROWS_A_CHUNK = 128
SAME_BYTES = ("output_prefix", "workers", "n_subs", "log_interval", "overwrite")
"""Settings that change nothing about the rows."""


def preprocess(job: PreprocessJob, source: str | None = None) -> Summary:
    """Prepare the rows of ``--input`` and print the summary; ``source`` is noted beside them.

    Raises:
        Refused: input or flags are wrong; nothing is written then.
    """
    for text in job.notices:
        _notice(text)
    assert job.preprocess.output_prefix is not None
    inputs = open_inputs(job.preprocess, _notice)
    preparation = prepare(job, inputs, _notice)
    preparation = dataclasses.replace(preparation, info=dataclasses.replace(preparation.info, source=source))
    with output_folder(Path(job.preprocess.output_prefix).parent):
        return _write(job, preparation, inputs, job.preprocess.output_prefix)


def _write(job: PreprocessJob, preparation: Preparation, inputs: Inputs, prefix: str) -> Summary:
    """All rows, and what they add up to."""
    settings = {k: v for k, v in dataclasses.asdict(job.preprocess).items() if k not in SAME_BYTES}
    key = job_key(preparation, settings, inputs.files)
    output = PreparedOutput(prefix, preparation, key)
    if output.position.chunks:
        _notice(f"going on after row {output.position.summary.read:,}, where an interrupted run was")
    progress = Progress(job.preprocess.log_interval)
    try:
        summary = _run(job, preparation, inputs, output, progress)
        output.pack(summary)
        output.publish(summary)
    except Failed:
        raise  # a worker died: what is done need not be done again
    except Exception:
        output.discard()
        raise
    finally:
        progress.close()
    for text in told(summary):
        _notice(text)
    print(summary.text(output.position.seconds + progress.seconds))
    print("written       " + "\n              ".join(str(path) for path in output.prefixes))
    return summary


def _run(
    job: PreprocessJob, preparation: Preparation, inputs: Inputs, output: PreparedOutput, progress: Progress
) -> Summary:
    done, summary = output.position.chunks, output.position.summary
    fractions: list[float] = []
    chunks = itertools.islice(_chunks(inputs.rows(), fractions), done, None)
    limit = BadRowLimit(job.preprocess.max_bad_rows, job.preprocess.input or "")
    workers = max(job.preprocess.workers, job.preprocess.n_subs)
    work = ordered_map(CheckedWork(preparation.work), chunks, workers)
    for number, outcomes in enumerate(work, start=done):
        tokens = sum(summary.add(outcome) for outcome in outcomes)
        for outcome in outcomes:
            output.add(outcome)
        output.mark(number + 1, summary, output.position.seconds + progress.seconds)
        progress.update(len(outcomes), tokens, fractions[number])
        limit.check_on_the_way(summary)
    limit.check(summary)
    if summary.kept == 0:
        reasons = ", ".join(f"{count} × {reason}" for reason, count in summary.dropped.most_common())
        raise Refused(f"--input {job.preprocess.input}: none of {summary.read} rows can be used ({reasons})")
    return summary


def _chunks(rows: Iterator[Row | BadRow], fractions: list[float]) -> Iterator[list[Row | BadRow]]:
    """Rows in order, many at a time; ``fractions`` gets how much of the input each chunk reaches to."""
    while chunk := list(itertools.islice(rows, _ROWS_A_CHUNK)):
        fractions.append(chunk[-1].fraction)
        yield chunk


def _notice(text: str) -> None:
    print(f"notice: {text}", file=sys.stderr)
