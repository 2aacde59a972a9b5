"""The cost model sends what the schedules send, and chooses what its numbers say."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mindspeed_lora.adapters.schedules import Family, SchedulePlan
from mindspeed_lora.adapters.schedules.choice import FusionRequest, Scheduler
from mindspeed_lora.adapters.schedules.cost import Device, LinearShape, best, candidates, linear_time
from mindspeed_lora.adapters.schedules.plan import UNFUSED
from tests.unit.adapters.test_collective_counts import EXPECTED, IN, OUT, RANK, TOKENS, TP

DEVICE = Device(flops=1e11, memory=1e11, link=1e8, latency=1e-4)
SHAPE = LinearShape(True, 1024, 1024, 1536, 16, 2, True, 4)


@pytest.mark.parametrize("sp", [False, True], ids=["", "sp"])
@pytest.mark.parametrize("kind", ["column", "row"])
def test_it_sends_what_the_schedules_send(kind: str, sp: bool) -> None:
    column = kind == "column"
    sizes = (IN, OUT // TP) if column else (IN // TP, OUT)
    shape = LinearShape(column, TOKENS, *sizes, RANK, TP, sp, 1)
    for (family, merge), logical in EXPECTED[kind, sp].items():
        plan = SchedulePlan(family, 0 if merge else None)
        calls = linear_time(plan, shape, Device(1e30, 1e30, 1e30, 1.0)).travelling
        assert calls == pytest.approx(sum(logical.values())), (family, merge)
        # To the one other rank goes half of the tokens; an all-reduce sends a half of them twice.
        rows = {"all-reduce": TOKENS, "all-gather": TOKENS // TP, "reduce-scatter": TOKENS // TP}
        sent = sum(count * rows[what] * width for (what, width), count in logical.items())
        travelled = linear_time(plan, shape, Device(1e30, 1e30, 1.0, 0.0)).travelling
        assert travelled == pytest.approx(sent), (family, merge)


@pytest.mark.parametrize("column", [True, False])
@pytest.mark.parametrize("sp", [True, False])
@pytest.mark.parametrize("chunks", [0, 1, 2, 5])
def test_chunks_change_neither_work_nor_bytes(column: bool, sp: bool, chunks: int) -> None:
    shape, no_latency = replace(SHAPE, column=column, sequence_parallel=sp), replace(DEVICE, latency=0.0)
    whole = linear_time(SchedulePlan(Family.ONE_COLLECTIVE), shape, no_latency)
    cut = linear_time(SchedulePlan(Family.ONE_COLLECTIVE, chunks=chunks), shape, no_latency)
    assert cut.travelling == pytest.approx(whole.travelling, rel=0.01)
    assert cut.computing == pytest.approx(whole.computing, rel=0.1)
    assert max(cut.computing, cut.travelling) <= cut.now <= whole.now * 1.001


def test_a_slow_link_is_hidden_and_a_fast_one_left_alone() -> None:
    plans = candidates(None, None, None)
    slow, fast = best(plans, SHAPE, DEVICE), best(plans, SHAPE, replace(DEVICE, link=1e13, latency=0.0))
    assert slow.family is Family.ONE_COLLECTIVE and slow.chunks >= 1
    assert fast.family is Family.ONE_COLLECTIVE and fast.chunks == 0
    assert linear_time(slow, SHAPE, DEVICE).now < linear_time(UNFUSED, SHAPE, DEVICE).now


def test_many_tokens_on_a_small_weight_are_merged() -> None:
    small = replace(SHAPE, tp=1, sequence_parallel=False, in_features=64, out_features=64, tokens=65536)
    plan = best(candidates(None, None, None), small, DEVICE)
    assert plan.merge_from is not None and 0 < plan.merge_from <= small.tokens
    assert plan.merges(small.tokens) and not plan.merges(plan.merge_from - 1)
    few = replace(SHAPE, tp=1, sequence_parallel=False, in_features=8192, out_features=8192, tokens=16)
    assert best(candidates(None, None, None), few, DEVICE).merge_from is None


@pytest.mark.parametrize("family", [Family.ONE_COLLECTIVE, Family.OVERLAPPED])
@pytest.mark.parametrize("merge", [True, False])
def test_flags_leave_no_choice(family: Family, merge: bool) -> None:
    plans = candidates(family, merge, 3)
    assert plans == [SchedulePlan(family, 0 if merge else None, 3 if family is Family.ONE_COLLECTIVE else 0)]


def test_merge_by_flag_merges_whatever_the_tokens() -> None:
    scheduler = Scheduler(FusionRequest(merge=True), tokens=4, tp=1, speeds=DEVICE)
    assert scheduler.plan("linear_qkv", torch.empty(4096, 4096, device="meta"), True, 16).merges(1)


def test_linears_of_one_kind_are_told_once() -> None:
    scheduler = Scheduler(FusionRequest(), tokens=512, tp=2, sequence_parallel=True, speeds=DEVICE)
    weight = torch.empty(96, 64, device="meta")
    assert scheduler.plan("linear_qkv", weight, True, 8) is scheduler.plan("linear_qkv", weight, True, 8)
    scheduler.plan("linear_fc1", weight, True, 8)
    assert [line.split()[1] for line in scheduler.lines] == ["linear_qkv", "linear_fc1"]
    assert "ms predicted for 512 tokens" in scheduler.lines[0]


def test_how_busy_the_link_is() -> None:
    def share(link: float) -> float:
        scheduler = Scheduler(
            FusionRequest(), tokens=1024, tp=2, sequence_parallel=True, speeds=replace(DEVICE, link=link)
        )
        scheduler.plan("linear_fc1", torch.empty(1536, 1024, device="meta"), True, 16)
        return scheduler.link_share

    assert Scheduler().link_share == 0.0
    assert share(1e6) > 10 > 1 > share(1e10) > 0


def test_without_a_request_everything_is_unfused() -> None:
    assert Scheduler().plan("linear_qkv", torch.empty(4, 4), True, 1) is UNFUSED
