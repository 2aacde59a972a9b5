"""Blends among the rows of a run: splits, evaluation, order in every layout, what is told of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mindspeed_lora.config.commands import parse
from mindspeed_lora.data.batch import Batch
from mindspeed_lora.data.prepared_info import PreparedInfo, info_path, to_json
from mindspeed_lora.errors import Refused
from mindspeed_lora.training.raw_data import with_prepared_rows
from mindspeed_lora.training.rows import TrainingRows, open_rows
from tests.support.rows import Row, write_rows

VOCABULARY = 2000


@pytest.fixture
def sets(tmp_path: Path) -> tuple[str, str]:
    """Six and ten rows; row i of set k is the token 100 k + i."""
    made = []
    for number, size in ((1, 6), (2, 10)):
        rows = [Row([100 * number + i] * 6, [-100, *[100 * number + i] * 5]) for i in range(size)]
        made.append(str(write_rows(tmp_path / f"set{number}", rows)))
    return made[0], made[1]


def rows(*words: object) -> TrainingRows:
    sizes = ["--micro-batch-size", 1, "--global-batch-size", 4, "--lora-r", 4, "--train-iters", 5]
    job = parse("posttrain", [str(word) for word in [*sizes, *words]])
    return open_rows(job, 16, VOCABULARY, None)


def tokens(batches: list[Batch]) -> list[int]:
    return [int(row[0]) for batch in batches for row in batch.tokens if int(row[0])]


@pytest.mark.parametrize("words", ["0.3 {} 0.7 {}", "{} {}", "5 {} 1 {}"])
@pytest.mark.parametrize("flags", [["--no-shuffle"], ["--seed", 5], ["--packing"]], ids=str)
def test_a_step_has_the_same_rows_in_every_layout(sets: Any, words: str, flags: list[object]) -> None:
    given = ["--data-path", *words.format(*sets).split(), *flags]
    expected = rows(*given).train_batches(0, 1, None)
    for micro, dp in ((1, 4), (2, 2), (4, 1)):
        found = rows(*given, "--micro-batch-size", micro)
        for step in (9, 1, 2, 7):  # any step can be asked for, as after a resume
            ranks = [tokens(found.train_batches(rank, dp, None).step(step)) for rank in range(dp)]
            if "--packing" not in flags:
                assert sorted(sum(ranks, [])) == sorted(tokens(expected.step(step)))
            of_samples = {
                int(n)
                for rank in range(dp)
                for b in found.train_batches(rank, dp, None).step(step)
                for n in b.tokens.flatten()
                if int(n)
            }
            assert of_samples == {int(n) for b in expected.step(step) for n in b.tokens.flatten() if int(n)}


def test_an_epoch_is_all_rows(sets: Any) -> None:
    found = rows("--data-path", *sets)
    assert len(found.train) == 16
    batches = found.train_batches(0, 1, None)
    epoch = sorted(token for step in range(1, 5) for token in tokens(batches.step(step)))
    assert epoch == [100 + i for i in range(6)] + [200 + i for i in range(10)]
    assert found.blend == [6, 10] and rows("--data-path", 3, sets[0], 1, sets[1]).blend == [3, 1]
    assert rows("--data-path", sets[0]).blend is None


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--prompt-type", "qwn"], r"--prompt-type qwn: unknown; expected one of .*; did you mean qwen"),
        (["--handler-name", "AlpacaStyleInstructionHandlr"], "did you mean AlpacaStyleInstructionHandler"),
    ],
)
def test_a_misspelt_name_is_refused_beside_prepared_data(sets: Any, flags: list[str], message: str) -> None:
    job = parse(
        "posttrain", ["--data-path", sets[0], "--lora-r", "4", "--lora-target-modules", "linear_qkv", *flags]
    )
    with pytest.raises(Refused, match=message):
        with_prepared_rows(job, 16, None)


def test_names_in_a_dataset_info_are_not_taken_for_prefixes(sets: Any) -> None:
    flags = ["--handler-name", "LlamaFactoryInstructionHandler", "--lora-r", "4"]
    flags += ["--lora-target-modules", "linear_qkv", "--data-path", sets[0]]
    job, _ = with_prepared_rows(parse("posttrain", flags), 16, None)
    assert job.data.data_path == (sets[0],)
    with pytest.raises(
        Refused, match=r"--data-path faq_en: .* names in a dataset_info.json, which preprocess_data"
    ):
        with_prepared_rows(parse("posttrain", [*flags, "faq_en"]), 16, None)


def test_the_third_share_is_tested(sets: Any) -> None:
    flags = ["--no-shuffle", "--eval-iters", -1]
    found = rows("--data-path", *sets, "--split", "50,25,25", *flags)
    batches = found.test_batches(0, 1, None)
    assert batches is not None
    # Of 6 and 10 rows: 3, 1 and 2, and 5, 3 and 2, where Megatron-core cuts.
    assert [token for step in batches for token in tokens(step)] == [104, 105, 208, 209]
    assert found.test is not None and len(found.train) == 8
    assert rows("--data-path", *sets, "--split", "50,50", *flags).test is None
    assert rows("--data-path", *sets, "--split", "949,50,1", *flags[:1], "--eval-iters", 0).test is None
    own = rows("--data-path", sets[1], "--split", "50,25,25", "--test-data-path", sets[0], *flags)
    assert own.test is not None and len(own.test) == 6, "data of their own come first"
    rounded = rows("--data-path", sets[1], "--split", "849,150,1", *flags)
    assert rounded.test is None and rounded.valid is not None


def test_the_split_cuts_every_set(sets: Any) -> None:
    found = rows("--data-path", *sets, "--split", "50,50", "--eval-iters", -1, "--no-shuffle")
    assert found.valid is not None
    assert (len(found.train), len(found.valid)) == (8, 8)
    batches = found.eval_batches(0, 1, None)
    assert batches is not None
    assert sorted(t for batch in batches for t in tokens(batch)) == [103, 104, 105, 205, 206, 207, 208, 209]


def test_a_small_set_may_leave_nothing_for_validation(sets: Any) -> None:
    found = rows("--data-path", 1, sets[0], 1, sets[1], "--split", "94,6", "--eval-iters", 1)
    assert found.valid is not None and len(found.valid) == 1
    with pytest.raises(Refused, match="leaves no row for validation"):
        rows("--data-path", *sets, "--split", "99,1", "--eval-iters", 1)


def test_data_of_their_own(sets: Any) -> None:
    first, second = sets
    flags = ["--valid-data-path", second, "--test-data-path", 1, first, 1, second, "--eval-iters", 1]
    found = rows("--train-data-path", first, "--split", "50,50", *flags)
    assert len(found.train) == 6, "the split is of --data-path"
    assert found.valid is not None and found.test is not None
    assert (len(found.valid), len(found.test)) == (10, 16)
    batches = found.test_batches(0, 1, None)
    assert batches is not None
    assert [tokens(batch) for batch in batches] == [[100, 200, 101, 201]]


def test_templates_that_differ_are_told(sets: Any) -> None:
    for prefix, template in zip(sets, ("one", "two"), strict=True):
        info = PreparedInfo(
            tokenizer_fingerprint="f", handler_name="h", chat_template=template, prompt_type=template
        )
        info_path(prefix).write_text(to_json(info))
    found = rows("--data-path", *sets)
    assert found.chat_template == "one"
    assert any("another chat template" in notice for notice in found.notices)
    with pytest.raises(Refused, match=f"contradicts --data-path {sets[1]}"):
        rows("--data-path", *sets, "--prompt-type", "one")


def test_flags_of_preparing_that_contradict_the_data(sets: Any) -> None:
    info_path(sets[0]).write_text(to_json(PreparedInfo(tokenizer_fingerprint="f", handler_name="h")))
    rows("--data-path", sets[0], "--loss-on", "assistant")
    with pytest.raises(Refused, match="--loss-on all contradicts .* prepared with --loss-on assistant"):
        rows("--data-path", sets[0], "--loss-on", "all")
    with pytest.raises(Refused, match="--pack contradicts"):
        rows("--data-path", sets[0], "--pack")


def test_a_missing_set_is_named(sets: Any) -> None:
    with pytest.raises(Refused, match="--data-path /nowhere/rows: there is no"):
        rows("--data-path", 1, sets[0], 1, "/nowhere/rows")
