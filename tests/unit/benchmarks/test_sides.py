import pytest
from comparison.process import Ended
from comparison.setting import Inputs, Setting
from comparison.sides import Ours, Step, Trl, checked, ours_flags, side_of

from mindspeed_lora.config.commands import parse
from mindspeed_lora.errors import Failed, Refused

SETTING = Setting(model="m", data="d", warmup=0, steps=2, global_batch_size=2)
INPUTS = Inputs(data_prefix="p", rows_file="r", start_adapter="a", lengths=((5, 4), (7, 2), (3, 1)))
STEPS = [Step(1.0, 10.0, 12, 6), Step(1.0, 10.0, 8, 5)]


def test_rows_come_in_file_order_and_start_again() -> None:
    run = checked(Ours(1), SETTING, INPUTS, STEPS, Ended(seconds=3.0, peak_memory_bytes=9))
    assert run.steps == tuple(STEPS)
    assert (run.peak_memory_bytes, run.seconds) == (9, 3.0)


@pytest.mark.parametrize(
    "steps", [STEPS[:1], [STEPS[0], Step(1.0, 10.0, 9, 5)], [STEPS[0], Step(1.0, 10.0, 8, 4)]]
)
def test_a_side_that_trained_other_rows_is_refused(steps: list[Step]) -> None:
    with pytest.raises(Failed, match="ours, batch 1: .* expected 2|ours, batch 1: step 2 had"):
        checked(Ours(1), SETTING, INPUTS, steps, Ended(seconds=3.0, peak_memory_bytes=9))


def test_our_flags_are_those_of_the_trainer() -> None:
    job = parse("posttrain", ours_flags(SETTING, INPUTS, 2))
    assert (job.training.micro_batch_size, job.training.global_batch_size, job.training.train_iters) == (
        2,
        2,
        2,
    )
    assert (job.training.lr, job.training.lr_warmup_iters) == (SETTING.lr, 0)
    assert job.training.lr_decay_style == "constant"
    assert job.training.recompute_granularity is None
    assert not job.training.bf16
    assert job.data.no_shuffle
    assert job.data.variable_seq_lengths
    assert job.data.pad_to_multiple_of == SETTING.pad_to_multiple_of
    assert not job.data.packing
    assert parse("posttrain", ours_flags(SETTING, INPUTS, None)).data.packing


def test_a_side_by_its_word() -> None:
    assert side_of("ours:packed") == Ours(None)
    assert side_of("ours:2") == Ours(2)
    assert side_of("trl:8") == Trl(8)
    assert side_of("trl:packed+kept") == Trl(None, kept_memory=True)
    assert side_of("ours:4+nf4") == Ours(4, quantised=True)
    assert side_of("trl:4+nf4+kept") == Trl(4, kept_memory=True, quantised=True)
    assert [side_of(word).name for word in ("trl:1+kept", "ours:packed", "ours:4+nf4", "trl:4+nf4+kept")] == [
        "TRL, batch 1, memory kept",
        "ours, packed",
        "ours, batch 4, 4 bits",
        "TRL, batch 4, 4 bits, memory kept",
    ]


@pytest.mark.parametrize(
    "word", ["ours", "trl:3", "ours:8+kept", "ours:8+nf4+kept", "peft:1", "trl:8+more", ""]
)
def test_a_word_that_means_no_side(word: str) -> None:
    with pytest.raises(Refused, match="no such side"):
        side_of(word)


def test_other_rows_a_step_are_no_error_where_a_side_packs() -> None:
    steps = [Step(1.0, 10.0, 99, 9), Step(1.0, 10.0, 98, 8)]
    assert checked(Trl(None), SETTING, INPUTS, steps, Ended(1.0, 9)).steps == tuple(steps)
