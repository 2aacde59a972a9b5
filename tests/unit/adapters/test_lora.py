"""Column- and row-parallel LoRA on one rank against the dense formula by autograd, in float64."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from mindspeed_lora.adapters.dropout import token_keys
from mindspeed_lora.adapters.lora import ColumnParallelLora, LoraPart
from mindspeed_lora.adapters.schedules import Family, SchedulePlan
from mindspeed_lora.adapters.side_branch import RowBlock
from mindspeed_lora.models.forward_context import ForwardContext
from mindspeed_lora.parallel.groups import ParallelGroups
from tests.unit.adapters.dense import PROBLEMS, Problem, dense, linear, sharded


@pytest.mark.parametrize("kind", ["column", "row"])
@pytest.mark.parametrize("name", PROBLEMS)
def test_output_and_every_gradient(groups: ParallelGroups, kind: str, name: str) -> None:
    problem = PROBLEMS[name]
    found, expected = sharded(problem, kind, groups), dense(problem)
    torch.testing.assert_close(found.output, expected.output, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.grad_x, expected.grad_x, rtol=1e-12, atol=1e-12)
    for part, want in zip(found.grad_a, expected.grad_a, strict=True):
        torch.testing.assert_close(part, want, rtol=1e-12, atol=1e-12)
    for part, want in zip(found.grad_b, expected.grad_b, strict=True):
        torch.testing.assert_close(part, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["column", "row"])
def test_a_bias_is_left_to_the_caller(groups: ParallelGroups, kind: str) -> None:
    problem = Problem(parts=((0, 12, 3, 2.0),), bias=True)
    layer, x = linear(problem, kind, groups)
    output, bias = layer(x)
    assert bias is layer.base_layer.bias
    torch.testing.assert_close(output, dense(problem).output, rtol=1e-12, atol=1e-12)


def test_the_base_is_frozen_and_gets_no_gradient(groups: ParallelGroups) -> None:
    layer, x = linear(PROBLEMS["shared"], "column", groups)
    layer(x)[0].sum().backward()
    assert layer.base_layer.weight.grad is None


@pytest.mark.parametrize("kind", ["column", "row"])
def test_half_precision_stays_what_it_is(groups: ParallelGroups, kind: str) -> None:
    layer, x = linear(PROBLEMS["two parts"], kind, groups, dtype=torch.bfloat16)
    output, _ = layer(x)
    expected = dense(PROBLEMS["two parts"]).output
    assert output.dtype is torch.bfloat16
    assert (output.double() - expected).norm() < 0.02 * expected.norm()


@pytest.mark.parametrize("delta", [1.0, 0.1, 0.01, 0.001])
@pytest.mark.parametrize("kind", ["column", "row"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_merging_in_half_precision_costs_nothing(
    groups: ParallelGroups, dtype: torch.dtype, kind: str, delta: float
) -> None:
    """W + BA rounds once, as the base's output does before the branch is added to it."""
    problem = Problem(((0, 256, 16, 2.0),), 1, 256, 256, s=64, b=2, delta=delta, rounded_to=dtype)
    expected = dense(problem)

    def error(merge_from: int | None) -> tuple[float, float]:
        plan = SchedulePlan(Family.ONE_COLLECTIVE, merge_from)
        found = sharded(problem, kind, groups, plan=plan, dtype=dtype)
        of_output, of_input = found.output.double() - expected.output, found.grad_x.double() - expected.grad_x
        return float(of_output.norm()), float(of_input.norm())

    # Both errors are sums of some thousand independent roundings: they differ by a few percent by chance.
    for merged, split in zip(error(0), error(None), strict=True):
        assert merged <= 1.1 * split


def dropping_layer(
    groups: ParallelGroups, dropout: float, parts: Sequence[tuple[int, int]] = ((0, 12),)
) -> ColumnParallelLora:
    """``y = dropout(x)``: a zero base, and parts whose factors are the identity, each with a mask of its own."""
    problem = Problem(parts=tuple((start, stop, 12, 1.0) for start, stop in parts), in_features=12)
    layer, _ = linear(problem, "column", groups, dropout=dropout)
    with torch.no_grad():
        layer.base_layer.weight.zero_()
        for number, part in enumerate(layer.parts):
            part.lora_a.copy_(torch.eye(12))
            part.lora_b.copy_(torch.eye(12)[: part.rows.count])
            part.stream = number
    return layer


def context(s: int, b: int, step: int = 1) -> ForwardContext:
    places = torch.arange(s * b).view(s, b)
    return ForwardContext(token_keys=token_keys(1, step, places, places))


def test_dropout_drops_the_share_and_keeps_the_mean(groups: ParallelGroups) -> None:
    layer = dropping_layer(groups, 0.3).train()
    x = torch.ones(500, 4, 12, dtype=torch.float64)
    out = layer(x, context(500, 4))[0]
    assert out.unique().tolist() == [0.0, pytest.approx(1 / 0.7, rel=1e-4)]
    assert (out == 0).double().mean().item() == pytest.approx(0.3, abs=0.01)
    assert out.mean().item() == pytest.approx(1.0, abs=0.015)
    assert torch.equal(layer(x, context(500, 4))[0], out), "the same token, the same mask"
    assert not torch.equal(layer(x, context(500, 4, step=2))[0], out), "another mask each step"


def test_the_gradient_goes_where_the_mask_keeps(groups: ParallelGroups) -> None:
    layer = dropping_layer(groups, 0.5).train()
    x = torch.randn(9, 2, 12, dtype=torch.float64, requires_grad=True)
    out = layer(x, context(9, 2))[0]
    out.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad != 0, out != 0)
    torch.testing.assert_close(x.grad * x.detach(), out.detach())


def test_each_factor_has_a_mask_of_its_own(groups: ParallelGroups) -> None:
    layer = dropping_layer(groups, 0.5, parts=((0, 6), (6, 12))).train()
    out = layer(torch.ones(50, 2, 12, dtype=torch.float64), context(50, 2))[0]
    assert not torch.equal(out[..., :6], out[..., 6:])


@pytest.mark.parametrize(("dropout", "training"), [(0.0, True), (0.5, False)])
def test_nothing_is_dropped_without_dropout_or_in_evaluation(
    groups: ParallelGroups, dropout: float, training: bool
) -> None:
    layer = dropping_layer(groups, dropout).train(training)
    x = torch.randn(5, 2, 12, dtype=torch.float64)
    torch.testing.assert_close(layer(x, context(5, 2))[0], x)


def test_a_new_part_adds_nothing(groups: ParallelGroups) -> None:
    part = LoraPart(3, 8, RowBlock(2, 7), 1.5, torch.bfloat16, torch.device("cpu"))
    assert part.lora_a.shape == (3, 8) and part.lora_b.shape == (5, 3)
    assert part.lora_a.dtype is part.lora_b.dtype is torch.bfloat16
    assert not part.lora_b.any()
    assert "rank=3, rows=2:7, scaling=1.5" in repr(part)


def test_a_part_of_repeating_rows() -> None:
    rows = RowBlock(2, 5, repeats=3, stride=7)
    part = LoraPart(4, 8, rows, 1.5, torch.float32, torch.device("cpu"))
    assert part.lora_b.shape == (9, 4)
    assert "rows=2:5 ×3 every 7" in repr(part)
    assert rows.of(torch.arange(21)).tolist() == [[2, 3, 4], [9, 10, 11], [16, 17, 18]]
