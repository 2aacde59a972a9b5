"""The flags and the argument lists that published scripts have, as data, against what each command makes of them."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest

from mindspeed_lora.config.commands import COMMANDS, grammar, parse
from mindspeed_lora.config.parser import parse_words
from mindspeed_lora.errors import Refused

HERE = Path(__file__).parent


def listed_flags() -> Iterator[tuple[str, str, str]]:
    """Command, what becomes of the flag, and the flag with a value."""
    command = ""
    for line in (HERE / "published_by_command.txt").read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            command = line.strip("[]")
        elif line:
            state, _, words = line.partition(" ")
            yield command, state, words.strip()


def told(command: str, words: str) -> str:
    """``means``: it sets something; ``none``: it is told to have no effect; ``not``: refused, but not as unknown."""
    try:
        parsed = parse_words(words.split(), grammar(command))
    except Refused as error:
        assert "unknown" not in str(error), str(error)
        return "not"
    return "none" if parsed.without_effect else "means"


@pytest.mark.parametrize("command", sorted({command for command, _, _ in listed_flags()}))
def test_every_flag_is_known_to_its_command(command: str) -> None:
    """``any``: known, whatever becomes of it."""
    otherwise = [
        f"{words}: {found}, listed as {state}"
        for known, state, words in listed_flags()
        if known == command and (found := told(command, words)) != state and state != "any"
    ]
    assert not otherwise, "\n".join(otherwise)


def published_scripts() -> Iterator[tuple[str, str, int, list[str]]]:
    """Name, command, processes and words of each script."""
    for path in sorted((HERE / "published_scripts").glob("*.txt")):
        head, *lines = path.read_text(encoding="utf-8").splitlines()
        command, _, processes = head.partition(" ")
        yield path.stem, command, int(processes or 1), shlex.split(" ".join(lines))


SCRIPTS = list(published_scripts())
REFUSED = {
    "dpo_llama2_7b_lora_ptd": "--stage dpo: preference training is not supported",
    "tune_qwen3_235b_a22b_32K_lora_pack_A2_ptd": "--handler-name",
}
"""What a script asks for that may not be built, by the flag that the refusal names."""


def test_there_are_scripts_of_every_kind() -> None:
    assert {command for _, command, _, _ in SCRIPTS} >= {"posttrain", "convert", "preprocess", "inference"}


@pytest.mark.parametrize(("name", "command", "processes", "words"), SCRIPTS, ids=[s[0] for s in SCRIPTS])
def test_published_scripts_are_accepted(name: str, command: str, processes: int, words: list[str]) -> None:
    if command not in COMMANDS:
        pytest.skip(f"there is no {command}")
    try:
        job = parse(command, [*words, "--dry-run"], {"WORLD_SIZE": str(processes)})
    except Refused as error:
        assert name in REFUSED and REFUSED[name] in str(error), str(error)
        return
    assert len([notice for notice in job.notices if notice.startswith("no effect here")]) <= 1


def test_the_launcher_s_flags_may_stand_among_the_others() -> None:
    """Scripts that are started without torchrun hand its flags on."""
    name, command, processes, words = next(s for s in SCRIPTS if s[0] == "tune_llama2_7b_lora_ptd")
    launcher = [
        "--nproc_per_node",
        "8",
        "--nnodes",
        "1",
        "--node_rank",
        "0",
        "--master_addr",
        "localhost",
        "--master_port",
        "6080",
    ]
    job = parse(command, [*launcher, *words, "--dry-run"], {})
    assert job.runtime.resolve_world_size(job.parallel, {}) == processes == 8, name


@pytest.mark.parametrize(
    ("words", "field", "value"),
    [
        (["--lora-r", "8", "--lora-r=16"], "lora_r", 16),
        (["--context-parallel-algo", "'ulysses_cp_algo'"], "context_parallel_algo", "ulysses_cp_algo"),
        (['--lr="1e-5"'], "lr", 1e-5),
        (["--data-path", "'a'"], "data_path", ("'a'",)),
        (["--load=x=y"], "load", "x=y"),
        (["--load", "your", "model", "ckpt", "path"], "load", "your model ckpt path"),
    ],
)
def test_ways_of_writing_a_value(words: list[str], field: str, value: object) -> None:
    assert parse_words(words, grammar("posttrain")).values[field] == value
