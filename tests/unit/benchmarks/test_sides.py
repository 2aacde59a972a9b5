import pytest
from comparison.process import Ended
from comparison.setting import Inputs, Setting
from comparison.sides import Step, checked, ours_flags

from mindspeed_lora.config.commands import parse
from mindspeed_lora.errors import Failed

SETTING = Setting(model="m", data="d", warmup=0, steps=2, global_batch_size=2)
INPUTS = Inputs(data_prefix="p", rows_file="r", start_adapter="a", lengths=((5, 4), (7, 2), (3, 1)))
STEPS = [Step(1.0, 10.0, 12, 6), Step(1.0, 10.0, 8, 5)]


def test_rows_come_in_file_order_and_start_again() -> None:
    run = checked("ours", SETTING, INPUTS, STEPS, Ended(seconds=3.0, peak_memory_bytes=9))
    assert run.steps == tuple(STEPS)
    assert (run.peak_memory_bytes, run.seconds) == (9, 3.0)


@pytest.mark.parametrize(
    "steps", [STEPS[:1], [STEPS[0], Step(1.0, 10.0, 9, 5)], [STEPS[0], Step(1.0, 10.0, 8, 4)]]
)
def test_a_side_that_trained_other_rows_is_refused(steps: list[Step]) -> None:
    with pytest.raises(Failed, match="ours: .* expected 2|ours: step 2 had"):
        checked("ours", SETTING, INPUTS, steps, Ended(seconds=3.0, peak_memory_bytes=9))


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
