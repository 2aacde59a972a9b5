"""What the entry files and console scripts call: parse, run one function of the package, end with a status.

A user sees one sentence on standard error, from one rank; a traceback only with ``--debug``.
"""

from __future__ import annotations

import json
import os
import select
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path
from typing import Any, NoReturn

from mindspeed_lora.config.commands import chosen_command, parse
from mindspeed_lora.config.config_file import CONFIG_FILE, to_yaml, write_config
from mindspeed_lora.config.help import help_text
from mindspeed_lora.config.launcher import adopt_slurm, has_launchers_store, restart_count
from mindspeed_lora.config.parser import HELP_FLAGS
from mindspeed_lora.config.runtime import LaunchedRuntimeConfig
from mindspeed_lora.errors import PeerFailure, Refused, UserError, system_error, system_reason
from mindspeed_lora.hub import with_local_folders

_FAILED = 1


def posttrain() -> NoReturn:
    """Fine-tune: ``posttrain_gpt.py``."""
    run("posttrain", sys.argv[1:], _train)


def pretrain() -> NoReturn:
    """Train on plain text: ``pretrain_gpt.py``."""
    run("pretrain", sys.argv[1:], _train)


def convert() -> NoReturn:
    """Convert, inspect and verify checkpoints: ``convert_ckpt.py``."""
    functions = {"convert": _convert, "inspect": _inspect, "verify": _verify}
    command, argv = chosen_command("convert", sys.argv[1:])
    run(command, argv, functions[command])


def preprocess() -> NoReturn:
    """Prepare data: ``preprocess_data.py``."""
    run("preprocess", sys.argv[1:], _preprocess)


def inference() -> NoReturn:
    """Generate text: ``inference.py``."""
    run("inference", sys.argv[1:], _infer)


def evaluation() -> NoReturn:
    """Judge a model on benchmarks: ``evaluation.py``."""
    run("evaluation", sys.argv[1:], _evaluate)


def _train(job: Any) -> int | None:
    from mindspeed_lora.device.megatron_import import import_megatron

    import_megatron()
    from mindspeed_lora.training.main import train

    return train(job)


def _convert(job: Any) -> None:
    from mindspeed_lora.checkpoint.conversion.convert import convert, target_folder
    from mindspeed_lora.device.heap import keep_freed_memory

    # Tensor after tensor in the same memory: fresh pages cost as much as the copy into them.
    keep_freed_memory()
    convert(job)
    if not job.runtime.dry_run:
        write_config(target_folder(job.conversion) / CONFIG_FILE, job, "convert_ckpt.py")


def _inspect(job: Any) -> None:
    from mindspeed_lora.checkpoint.conversion.inspect import inspect

    inspect(job)


def _verify(job: Any) -> int:
    from mindspeed_lora.checkpoint.conversion.verify import verify

    return verify(job)


def _preprocess(job: Any) -> None:
    if job.runtime.dry_run:
        from mindspeed_lora.data.dry_run import dry_run

        dry_run(job)
        return
    if job.preprocess.merge_group_keys:
        from mindspeed_lora.data.merging import merge

        merge(job)
        return
    if job.preprocess.show is not None:
        from mindspeed_lora.data.show import show

        show(job)
        return
    from mindspeed_lora.data.preprocess import preprocess

    preprocess(job)
    write_config(Path(f"{job.preprocess.output_prefix}_{CONFIG_FILE}"), job, "preprocess_data.py")


def _infer(job: Any) -> None:
    from mindspeed_lora.device.megatron_import import import_megatron

    import_megatron()
    from mindspeed_lora.inference.main import infer

    infer(job)


def _is_started_anew(job: Any) -> bool:
    """Whether a job of several ranks is one that its launcher has started before, on this node or on another."""
    runtime = job.runtime
    works = isinstance(runtime, LaunchedRuntimeConfig) and not (runtime.dry_run or runtime.print_config)
    if not works or not has_launchers_store(os.environ):
        return False
    from mindspeed_lora.parallel.attempt import agree_on_attempt

    agree_on_attempt()
    return restart_count(os.environ) > 0


def _evaluate(job: Any) -> None:
    from mindspeed_lora.device.megatron_import import import_megatron

    import_megatron()
    from mindspeed_lora.evaluation.main import evaluate

    evaluate(job)


def _family(file: str | None) -> AbstractContextManager[None]:
    """``--family-file``: while the command runs, its family is one of those that are known."""
    if file is None:
        return nullcontext()
    from mindspeed_lora.models.families.family_file import custom_family

    return custom_family(file)


def run(command: str, argv: Sequence[str], function: Callable[[Any], int | None]) -> NoReturn:
    """Run a command and end the process: 0 done, the function's own status, 2 refused, 1 failed."""
    status = _status(command, argv, function)
    if _nobody_reads():
        # Without this the interpreter complains at exit that it cannot flush standard output.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = status or _FAILED
    sys.exit(status)


def _status(command: str, argv: Sequence[str], function: Callable[[Any], int | None]) -> int:
    """Run a command; errors become one sentence on standard error."""
    try:
        if any(word in HELP_FLAGS for word in argv):
            _say(sys.stdout, help_text(command))
            return 0
        adopt_slurm(os.environ)
        job = parse(command, argv)
        if _is_started_anew(job):
            job = parse(command, argv)
        if job.runtime.print_config:
            _say(sys.stdout, to_yaml(job))
            return 0
        job, taken = with_local_folders(job)
        for notice in (*job.notices, *taken):
            _say(sys.stderr, f"notice: {notice}")
        with _family(job.runtime.family_file):
            return function(job) or 0
    except Refused as error:
        _trace(argv)
        _say(sys.stderr, f"error: {error}")
        _tell_launcher(f"error: {error}")
        return error.exit_status
    except PeerFailure as error:
        _trace(argv)
        return error.exit_status
    except KeyboardInterrupt:
        _trace(argv)
        _say(sys.stderr, "error: interrupted")
        return _FAILED
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _nobody_reads():
            return _FAILED
        _trace(argv)
        where = "" if "--debug" in argv else " (--debug tells where)"
        sentence = f"error: {_speaker()}{_sentence(error, where)}"
        print(sentence, file=sys.stderr, flush=True)
        _tell_launcher(sentence)
        return error.exit_status if isinstance(error, UserError) else _FAILED


def _say(stream: Any, text: str) -> None:
    """Print by rank 0 alone: what every rank finds before there are peers to speak for it."""
    if os.environ.get("RANK", "0") == "0":
        print(text, file=stream, flush=True)


def _tell_launcher(sentence: str, environ: Mapping[str, str] = os.environ) -> None:
    """torchrun ends with a report of pages, in which it quotes what a rank wrote to this file."""
    file = environ.get("TORCHELASTIC_ERROR_FILE")
    if file is None:
        return
    message = {"message": sentence, "extraInfo": {"timestamp": str(int(time.time()))}}
    with suppress(OSError):
        Path(file).write_text(json.dumps({"message": message}), encoding="utf-8")


def _nobody_reads() -> bool:
    """Whether the reader of standard output has left (``| head``)."""
    try:
        written = sys.stdout.fileno()
    except (OSError, ValueError):
        return False
    watch = select.poll()
    watch.register(written, select.POLLOUT)
    return any(events & select.POLLERR for _, events in watch.poll(0))


def _trace(argv: Sequence[str]) -> None:
    if "--debug" in argv:
        traceback.print_exc()


def _speaker() -> str:
    """The rank that speaks, where there are several."""
    several = os.environ.get("WORLD_SIZE", "1") != "1"
    return f"rank {os.environ.get('RANK', '0')}: " if several else ""


def _sentence(error: Exception, where: str) -> str:
    """An error as one line; ``where`` ends that of an error which nobody foresaw."""
    if isinstance(error, UserError):
        return str(error)
    system = system_error(error)
    if system is not None and system.strerror:
        return system_reason(system)
    if isinstance(error, MemoryError):
        return "out of memory"
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message or 'no message'}{where}"
