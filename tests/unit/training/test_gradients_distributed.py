"""What is summed over which ranks, and that the rest is left alone."""

from __future__ import annotations

import pytest

from mindspeed_lora.parallel.groups import destroy_groups
from tests.support.pool import WorkerPool
from tests.support.tiny import Tiny, join, open_session


def finalized(words: list[str], tp: int, pp: int, normaliser: float) -> dict[str, float]:
    """Every gradient after the finalizer, where rank r left the constant r + 1 in all of its own."""
    groups = join(tp, pp)
    session = open_session(words, groups)
    session.optimizer.zero_grad()
    for parameter in session.trained:
        parameter.param.main_grad.fill_(groups.rank + 1.0)
    finalizer = session.config.finalize_model_grads_func
    finalizer.normaliser = normaliser
    finalizer(session.model, None)
    found = {}
    for parameter in session.trained:
        values = parameter.param.main_grad.unique()
        assert values.numel() == 1, parameter.name
        found[parameter.name] = values.item()
    destroy_groups()
    return found


def by_kind(found: dict[str, float]) -> dict[str, set[float]]:
    """Values by the last two words of the names."""
    kinds: dict[str, set[float]] = {}
    for name, value in found.items():
        kinds.setdefault(".".join(name.split(".")[-2:]), set()).add(value)
    return kinds


@pytest.mark.parametrize("flags", [{}, {"lora_r": None}], ids=["adapter", "all"])
def test_data_parallel_ranks_are_summed_and_normalised_once(
    workers: WorkerPool, tiny: Tiny, flags: dict[str, object]
) -> None:
    for found in workers.run(2, finalized, tiny.words(**flags), 1, 1, 12.0):
        assert set(found.values()) == {3.0 / 12}


@pytest.mark.parametrize(
    ("flags", "partial"),
    [
        ({}, False),
        ({"sequence_parallel": True}, True),
        ({"lora_fusion": True, "lora_fusion_plan": ("one-collective",)}, True),
        ({"lora_fusion": True, "lora_fusion_plan": ("overlapped",)}, False),
        ({"sequence_parallel": True, "lora_fusion": True, "lora_fusion_plan": ("overlapped",)}, True),
    ],
    ids=["", "sp", "one-collective", "overlapped", "overlapped sp"],
)
def test_replicated_factors_are_summed_over_tp_where_they_are_partial(
    workers: WorkerPool, tiny: Tiny, flags: dict[str, object], partial: bool
) -> None:
    words = tiny.words(tensor_model_parallel_size=2, **flags)
    for rank, found in enumerate(workers.run(2, finalized, words, 2, 1, 1.0)):
        own = {rank + 1.0}
        summed = {3.0} if partial else own
        assert by_kind(found) == {
            "linear_qkv.lora_a": summed,
            "linear_qkv.lora_b": own,
            "linear_fc1.lora_a": summed,
            "linear_fc1.lora_b": own,
            "linear_proj.lora_a": own,
            "linear_proj.lora_b": summed,
            "linear_fc2.lora_a": own,
            "linear_fc2.lora_b": summed,
        }


def test_under_sp_norms_are_summed_over_tp(workers: WorkerPool, tiny: Tiny) -> None:
    words = tiny.words(tensor_model_parallel_size=2, sequence_parallel=True, lora_r=None)
    for rank, found in enumerate(workers.run(2, finalized, words, 2, 1, 1.0)):
        norms = {name for name, value in found.items() if value == 3.0}
        assert norms == {name for name in found if "layernorm" in name}
        assert {found[name] for name in set(found) - norms} == {rank + 1.0}


def test_tied_embeddings_are_summed_over_the_first_and_the_last_stage(
    workers: WorkerPool, tiny_tied: Tiny
) -> None:
    words = tiny_tied.words(pipeline_model_parallel_size=2, lora_r=None)
    for rank, found in enumerate(workers.run(2, finalized, words, 1, 2, 1.0)):
        shared = found.pop("embedding.word_embeddings.weight")
        assert shared == 3.0
        assert set(found.values()) == {rank + 1.0}


def test_a_frozen_tied_embedding_is_no_matter(workers: WorkerPool, tiny_tied: Tiny) -> None:
    words = tiny_tied.words(pipeline_model_parallel_size=2)
    for rank, found in enumerate(workers.run(2, finalized, words, 1, 2, 1.0)):
        assert set(found.values()) == {rank + 1.0}


def replicas_after(words: list[str], tp: int) -> dict[str, bytes]:
    """Bits of every replicated factor after training."""
    from mindspeed_lora.training.loop import TrainingLoop
    from mindspeed_lora.training.signals import StopRequest
    from tests.support.training import RankRecord, Recorder

    groups = join(tp)
    session = open_session(words, groups)
    with StopRequest() as stop:
        TrainingLoop(session, Recorder(RankRecord()), stop).run()  # type: ignore[arg-type]
    found = {p.name: p.param.detach().numpy().tobytes() for p in session.trained if p.axis is None}
    destroy_groups()
    return found


@pytest.mark.parametrize(
    "sequence_parallel", [pytest.param(False, marks=pytest.mark.slow), True], ids=["", "sp"]
)
def test_replicated_factors_are_the_same_bits_after_20_steps(
    workers: WorkerPool, tiny: Tiny, sequence_parallel: bool
) -> None:
    words = tiny.words(
        tensor_model_parallel_size=2, sequence_parallel=sequence_parallel, train_iters=20, seq_length=40
    )
    first, second = workers.run(2, replicas_after, words, 2)
    assert len(first) == 4 * 4
    assert first == second
    untrained = ["--lr", "0", "--min-lr", "0", "--train-iters", "1"]
    start = workers.run(2, replicas_after, [*words, *untrained], 2)[0]
    assert all(first[name] != bits for name, bits in start.items()), "all of them were trained"
