"""The checks of this folder do find the mistakes that sharded LoRA trainers are known for."""

from __future__ import annotations

from typing import Any

import pytest

from tests.support.differences import FACTOR, GRAD_NORM, GRADIENT
from tests.support.layouts import Layout
from tests.support.parity import Case, ParityBench
from tests.support.reference import Recipe
from tests.support.training import Breakage

CASE = Case(recipe=Recipe(steps=3, warmup_iters=0))
SP = Layout(tp=2, sequence_parallel=True)


def forget_to_sum_partial_gradients(session: Any) -> None:
    """Each TP rank keeps the gradient of its own part of the sequence for the factors that it replicates."""
    session.runner.finalizer.partial = []


def sum_shards_over_tp(session: Any) -> None:
    """Gradients of factors that are cut over TP are summed as if every rank held the same factor."""
    over_tp, _ = session.runner.finalizer.partial[0]
    over_tp += [p.param for p in session.trained if p.axis is not None]


def forget_to_sum_over_data_parallel_ranks(session: Any) -> None:
    """Every rank trains on its own rows."""
    for chunk in session.model:
        chunk.finish_grad_sync = lambda: None


def forget_the_later_chunks(session: Any) -> None:
    """Only the first model chunk of each pipeline rank is reduced over data-parallel ranks."""
    for chunk in session.model[1:]:
        chunk.finish_grad_sync = lambda: None


def swap_the_layers_of_two_chunks(session: Any) -> None:
    """Each chunk computes the other one's layers."""
    first, second = (chunk.decoder for chunk in session.chunks)
    first.layers, second.layers = second.layers, first.layers


def cut_the_graph_below_the_layers(session: Any) -> None:
    """What full recomputation over a frozen embedding does when nobody asks for the input's gradient."""

    def detach(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "hidden_states": kwargs["hidden_states"].detach()}

    session.chunks[0].decoder.register_forward_pre_hook(detach, with_kwargs=True)


def divide_the_rank_by_tp(session: Any) -> None:
    """The scaling α / (r / t) in place of α / r."""
    for chunk in session.chunks:
        for module in chunk.modules():
            if hasattr(module, "scaling"):
                module.scaling *= 2


def count_positions_in_what_is_held(session: Any) -> None:
    """Rotary positions of a part of a row start from 0, wherever it begins."""

    def forget(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, "positions": None}

    for chunk in session.chunks:
        chunk.register_forward_pre_hook(forget, with_kwargs=True)


def count_every_copy_in_the_norm(session: Any) -> None:
    """A replicated factor enters the global norm once for every TP rank."""
    for owned in session.optimizer.slices:
        object.__setattr__(owned.parameter, "counted", True)


@pytest.mark.parametrize(
    ("breakage", "layout"),
    [
        (forget_to_sum_partial_gradients, SP),
        (sum_shards_over_tp, Layout(tp=2)),
        (forget_to_sum_over_data_parallel_ranks, Layout(dp=2)),
        (forget_the_later_chunks, Layout(pp=2, vpp=2, dp=2)),
        (forget_to_sum_over_data_parallel_ranks, Layout(cp=2, attention="ring")),
    ],
)
def test_broken_sums_of_gradients_are_found(breakage: Breakage, layout: Layout, bench: ParityBench) -> None:
    outcome = bench.train(CASE, layout, breakage=breakage)
    if breakage is sum_shards_over_tp:
        assert bench.compare(CASE, outcome).gradient > 1e4 * GRADIENT
    else:
        with pytest.raises(AssertionError, match="holds other bits|ranks differ"):
            bench.compare(CASE, outcome)


def test_a_cut_graph_is_found(bench: ParityBench) -> None:
    layout = Layout(recompute="uniform")
    outcome = bench.train(CASE, layout, breakage=cut_the_graph_below_the_layers)
    differences = bench.compare(CASE, outcome)
    assert differences.gradient > 1e4 * GRADIENT
    assert differences.factor > 10 * FACTOR


def test_layers_in_the_wrong_chunk_are_found(bench: ParityBench) -> None:
    outcome = bench.train(CASE, Layout(pp=2, vpp=2), breakage=swap_the_layers_of_two_chunks)
    with pytest.raises(AssertionError, match="above tolerance: logits, loss, grad_norm, gradient"):
        bench.compare(CASE, outcome).check()


def test_a_wrong_scaling_is_found(bench: ParityBench) -> None:
    outcome = bench.train(CASE, Layout(tp=2), breakage=divide_the_rank_by_tp)
    with pytest.raises(AssertionError, match="above tolerance: logits, loss, grad_norm, gradient"):
        bench.compare(CASE, outcome).check()


@pytest.mark.parametrize("attention", ["ring", "ulysses"])
def test_wrong_positions_of_cut_rows_are_found(attention: str, bench: ParityBench) -> None:
    layout = Layout(cp=2, attention=attention)
    outcome = bench.train(CASE, layout, breakage=count_positions_in_what_is_held)
    with pytest.raises(AssertionError, match="above tolerance: logits, loss, grad_norm, gradient"):
        bench.compare(CASE, outcome).check()


def test_replicas_counted_twice_in_the_norm_are_found(bench: ParityBench) -> None:
    outcome = bench.train(CASE, SP, breakage=count_every_copy_in_the_norm)
    differences = bench.compare(CASE, outcome)
    assert differences.gradient <= GRADIENT, "the gradients themselves are right"
    assert differences.grad_norm > 1e3 * GRAD_NORM
