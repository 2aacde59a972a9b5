import pytest
from comparison.setting import Inputs, Setting
from comparison.sides import Ours, SideRun, Step, Trl, computed_positions
from comparison.summary import Summary, comparison_table, loss_difference, ratios, summarise

SETTING = Setting(model="m", data="d", warmup=1, steps=2, global_batch_size=4)
LENGTHS = ((9, 5), (17, 7), (30, 20), (8, 3), (40, 30), (2, 1))


def inputs(lengths: tuple[tuple[int, int], ...] = LENGTHS) -> Inputs:
    return Inputs(data_prefix="p", rows_file="r", start_adapter="a", lengths=lengths)


def run(elapsed: list[float], peak: int = 1000, loss: float = 2.0) -> SideRun:
    steps = tuple(Step(loss - 0.1 * i, ms, 100, 50) for i, ms in enumerate(elapsed))
    return SideRun(steps, peak, 7.0)


def summary(rows: int, runs: list[SideRun], peer: bool = False) -> Summary:
    side = Trl(rows) if peer else Ours(rows)
    return summarise(SETTING, inputs(), side, runs)


def test_warm_up_is_left_out_and_the_median_is_over_the_steps_of_all_repetitions() -> None:
    found = summary(1, [run([9000.0, 100.0, 200.0]), run([9000.0, 400.0, 500.0], peak=3000)])
    assert found.tokens_per_second.lowest == pytest.approx(200.0)
    assert found.tokens_per_second.highest == pytest.approx(1000.0)
    assert found.tokens_per_second.median == pytest.approx((100 / 0.2 + 100 / 0.4) / 2)
    assert found.loss_tokens_per_second.median == pytest.approx(found.tokens_per_second.median / 2)
    assert found.step_ms.median == pytest.approx(300.0)
    assert found.peak_memory_bytes == 3000
    assert found.losses == pytest.approx((2.0, 1.9, 1.8))


@pytest.mark.parametrize(
    ("micro_batch_size", "expected"), [(1, 40 + 8 + 16 + 24 + 32 + 8 + 40 + 8), (4, 8 * 40)]
)
def test_positions_are_those_of_the_measured_rows_padded_by_micro_batch(
    micro_batch_size: int, expected: int
) -> None:
    """Samples 4 to 11 of rows that start again after the sixth."""
    assert computed_positions(SETTING, inputs(), micro_batch_size) == expected


def test_ratios_are_ours_by_the_peer() -> None:
    ours = summary(1, [run([1.0, 100.0, 100.0], peak=500)])
    peer = summary(4, [run([1.0, 300.0, 300.0], peak=2000)], peer=True)
    found = ratios(ours, peer)
    assert found["tokens_per_second"] == pytest.approx(3.0)
    assert found["loss_tokens_per_second"] == pytest.approx(3.0)
    assert found["step_ms"] == pytest.approx(1 / 3)
    assert found["peak_memory_bytes"] == pytest.approx(0.25)


def test_the_table_has_a_column_a_side_and_one_a_ratio() -> None:
    ours = summary(1, [run([1.0, 100.0, 100.0])])
    peers = [summary(m, [run([1.0, 300.0, 300.0], peak=4000)], peer=True) for m in (1, 4)]
    lines = comparison_table([ours, *peers]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert [cell.strip() for cell in lines[0].split("|")[1:-1]] == [
        "",
        "ours, batch 1",
        "TRL, batch 1",
        "TRL, batch 4",
        "ours / TRL, batch 1",
        "ours / TRL, batch 4",
    ]
    cells = [cell.strip() for cell in lines[2].split("|")[1:-1]]
    assert cells == ["real tokens/s", "1000 (1000–1000)", "333 (333–333)", "333 (333–333)", "3.00", "3.00"]
    assert [c.strip() for c in lines[5].split("|")[-3:-1]] == ["0.25", "0.25"]


def test_the_first_losses_are_compared() -> None:
    ours = summary(1, [run([1.0, 1.0, 1.0])])
    peer = summary(4, [run([1.0, 1.0, 1.0], loss=2.25)], peer=True)
    assert loss_difference(ours, peer) == pytest.approx(0.25)
