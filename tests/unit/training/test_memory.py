"""Predicted memory: what a model really keeps for its backward pass, and how the parts move with every switch."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from mindspeed_lora.checkpoint.peft.plan import plan_adapter
from mindspeed_lora.config.lora import LoraConfig
from mindspeed_lora.config.parallel import ParallelConfig
from mindspeed_lora.config.shape import ModelShape
from mindspeed_lora.config.stages import LayerPlacement
from mindspeed_lora.config.training import TrainingConfig
from mindspeed_lora.models.rope import rotary_tables
from mindspeed_lora.parallel.groups import destroy_groups
from mindspeed_lora.training.dry_run import memory_question
from mindspeed_lora.training.layer_memory import MemoryQuestion, layer_bytes
from mindspeed_lora.training.memory import RankMemory, predict_memory
from mindspeed_lora.training.optimizer_states import PORTION
from tests.support.adapters import ALL, new_adapter
from tests.support.models import make_model
from tests.support.pool import WorkerPool
from tests.support.tiny import Tiny, join, open_session

SHAPE = ModelShape(
    family="llama",
    num_layers=8,
    hidden_size=32,
    ffn_hidden_size=64,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=8,
    vocab_size=100,
    max_position_embeddings=64,
)


def question(**changes: Any) -> MemoryQuestion:
    """Of one process with an adapter of rank 4 everywhere, four micro-batches of 50 tokens."""
    fields: dict[str, Any] = {
        "shape": SHAPE,
        "placement": LayerPlacement.even(8, 1),
        "adapter": new_adapter(SHAPE, 4).spec,
        "training": TrainingConfig(micro_batch_size=1, global_batch_size=4, train_iters=1),
        "tp": 1,
        "cp": 1,
        "dp": 1,
        "sequence_parallel": False,
        "distributed_optimizer": False,
        "seq_length": 50,
        "vocab_size": 100,
        "itemsize": 4,
    }
    return MemoryQuestion(**{**fields, **changes})


def predicted(pp_rank: int = 0, **changes: Any) -> RankMemory:
    return predict_memory(question(**changes), pp_rank)


def recompute(granularity: str, method: str | None = None, layers: int | None = None) -> TrainingConfig:
    return TrainingConfig(
        micro_batch_size=1,
        global_batch_size=4,
        train_iters=1,
        recompute_granularity=granularity,
        recompute_method=method,
        recompute_num_layers=layers,
    )


def placed(pp: int, **flags: Any) -> LayerPlacement:
    return LayerPlacement.of(8, ParallelConfig(pipeline_model_parallel_size=pp, **flags))


def kept_by_layers(words: list[str], tp: int) -> tuple[int, int]:
    """Bytes that the layers of a real model keep for the backward pass of one micro-batch, and the prediction."""
    groups = join(tp)
    session = open_session(words, groups)
    batch = max(session.batches.step(1), key=lambda batch: batch.tokens.size(1))
    own = {p.untyped_storage().data_ptr() for chunk in session.chunks for p in chunk.parameters()}
    storages: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage
        return tensor

    (chunk,) = session.chunks
    chunk.train()
    rotary = rotary_tables(chunk.rotary.frequencies, batch.position_ids, torch.float32)
    own.add(rotary.untyped_storage().data_ptr())
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        chunk.decoder(
            hidden_states=chunk.embedding(input_ids=batch.tokens, position_ids=None).requires_grad_(),
            attention_mask=None,
            rotary_pos_emb=rotary,
            packed_seq_params=session.runner.context(batch, step=1),
        )
    plan = session.plan
    asked = memory_question(plan, groups.world_size, 4)
    asked = MemoryQuestion(**{**vars(asked), "seq_length": batch.tokens.size(1)})
    expected = sum(layer_bytes(asked, layer) for layer in plan.placement.chunk(0).slots)
    final_norm = asked.residual_tokens * plan.shape.hidden_size * 4
    destroy_groups()
    return sum(s.nbytes() for s in storages.values()), expected + final_norm


@pytest.mark.parametrize(
    ("tp", "flags"),
    [
        (1, {}),
        (1, {"lora_target_modules": ("linear_proj", "linear_fc2")}),
        (1, {"lora_target_modules": ("q_proj", "v_proj", "down_proj")}),
        (1, {"lora_r": None}),
        (2, {}),
        (2, {"sequence_parallel": True}),
        (2, {"sequence_parallel": True, "lora_dropout": 0.1}),
    ],
    ids=["all", "rows", "matrices", "full", "tp2", "tp2 sp", "tp2 sp dropout"],
)
def test_layers_keep_what_is_predicted(
    workers: WorkerPool, tiny: Tiny, tp: int, flags: dict[str, Any]
) -> None:
    words = tiny.words(tensor_model_parallel_size=tp, **flags)
    for kept, expected in workers.run(tp, kept_by_layers, words, tp):
        # r of each norm, [s, b, 1], and what torch keeps of attention beside its tensors.
        assert kept == pytest.approx(expected, rel=0.04)


@pytest.mark.parametrize(
    ("model", "tp", "flags"),
    [
        ("deepseek-v3", 1, {"lora_dropout": 0.1}),
        ("deepseek-v3", 1, {"lora_r": None}),
        ("deepseek-v3", 2, {"sequence_parallel": True, "lora_target_modules": ("linear_q", "linear_kv")}),
        ("deepseek-v2", 2, {"sequence_parallel": True}),
    ],
    ids=["v3 dropout", "v3 full", "v3 tp2 sp up", "v2 tp2 sp"],
)
def test_layers_of_latent_attention(
    workers: WorkerPool, tiny: Tiny, tmp_path: Path, model: str, tp: int, flags: dict[str, Any]
) -> None:
    latent = dataclasses.replace(tiny, model=make_model(model, tmp_path / model))
    words = latent.words(tensor_model_parallel_size=tp, **flags)
    for kept, expected in workers.run(tp, kept_by_layers, words, tp):
        # Heads of eight features make what torch keeps beside the tensors a larger share.
        assert kept == pytest.approx(expected, rel=0.05)


def test_the_parts_by_hand() -> None:
    found = predicted()
    factors = 8 * 4 * ((32 + 64) + (32 + 32) + (32 + 128) + (64 + 32))
    base = 2 * 100 * 32 + 32 + 8 * (2 * 32 + 64 * 32 + 32 * 32 + 128 * 32 + 32 * 64)
    assert (found.trained, found.parameters) == (factors, factors + base)
    assert (found.weights, found.adapters) == (4 * base, 4 * factors)
    assert (found.gradients, found.optimizer) == (4 * factors, 8 * factors)
    assert found.total == sum(found.parts.values())


def test_half_precision_halves_weights_and_keeps_a_master() -> None:
    whole, half = predicted(), predicted(itemsize=2)
    assert half.weights * 2 == whole.weights
    assert half.gradients == whole.gradients
    assert half.optimizer == whole.optimizer * 3 // 2


def test_tensor_parallelism_cuts_and_sequence_parallelism_cuts_the_rest() -> None:
    one, two, sequence = predicted(), predicted(tp=2), predicted(tp=2, sequence_parallel=True)
    assert one.weights / 2 < two.weights < one.weights * 0.51
    assert one.activations / 2 < sequence.activations < two.activations < one.activations


def test_stages_hold_their_layers_and_the_first_most_micro_batches() -> None:
    stages = [predicted(rank, placement=placed(4)) for rank in range(4)]
    assert sum(stage.weights for stage in stages) == predicted().weights
    falling = [stage.activations for stage in stages]
    assert falling == sorted(falling, reverse=True)
    assert falling[0] == pytest.approx(4 * falling[2] / 2, rel=0.01)
    assert [stage.logits > 0 for stage in stages] == [False, False, False, True]
    uneven = [predicted(rank, placement=placed(2, num_layer_list="6,2")) for rank in range(2)]
    assert uneven[0].trained == 3 * uneven[1].trained


def test_interleaving_keeps_more_than_a_plain_pipeline() -> None:
    plain = predicted(0, placement=placed(2))
    interleaved = predicted(0, placement=placed(2, num_virtual_stages_per_pipeline_rank=2))
    assert interleaved.weights == plain.weights
    assert plain.activations < interleaved.activations < 2 * plain.activations


def test_recomputation_gives_up_activations() -> None:
    full = [predicted(training=recompute("full", "uniform", layers)).activations for layers in (1, 2, 8)]
    block = [predicted(training=recompute("full", "block", layers)).activations for layers in (1, 7, 8)]
    none, selective = predicted().activations, predicted(training=recompute("selective")).activations
    assert full[0] < full[1] < full[2] <= none + 32 * 50 * 4
    assert full[0] < selective < none
    assert none > block[0] > block[1]
    assert block[2] == full[0]


def test_the_distributed_optimizer_cuts_its_state() -> None:
    assert predicted(dp=4, distributed_optimizer=True).optimizer == predicted(dp=4).optimizer // 4


def test_paged_state_is_here_by_windows() -> None:
    plain = predicted()
    small = dataclasses.replace(recompute("selective"), recompute_granularity=None, paged_optimizer=True)
    found = predicted(training=small)
    assert (found.paged, found.optimizer) == (plain.optimizer, plain.optimizer), "one window holds it"
    assert found.total == plain.total
    many = {"adapter": None, "vocab_size": 1 << 20}
    assert predicted(**many).paged == 0 < predicted(**many).optimizer
    large = predicted(**many, training=small)
    assert large.paged == predicted(**many).optimizer > 2 * large.optimizer == 2 * PORTION * 2 * 4
    assert "paged" not in large.parts


def test_a_frozen_linear_keeps_its_input_for_an_adapter_alone() -> None:
    spec = new_adapter(SHAPE, 4, lora_target_modules=("linear_proj",)).spec
    asked, everywhere = question(adapter=spec), question()
    assert layer_bytes(everywhere, 0) - layer_bytes(asked, 0) == 50 * 4 * (2 * 32 + 64 + 3 * 4)
    assert layer_bytes(asked, None) == 0


def test_what_is_trained_with_the_adapter_has_gradients_and_state_too() -> None:
    tied = dataclasses.replace(SHAPE, untie_embeddings_and_output_weights=False)
    plain = predicted(shape=tied, adapter=new_adapter(tied, 4).spec)
    saved = new_adapter(tied, 4, lora_modules_to_save=("lm_head", "model.norm")).spec
    found = predicted(shape=tied, adapter=saved)
    assert found.trained == plain.trained + 100 * 32 + 32
    assert found.parameters == plain.parameters + 100 * 32, "the output layer is a tensor of its own"
    assert found.optimizer == 2 * found.gradients
    grown = plan_adapter(
        LoraConfig(lora_r=4, lora_alpha=8, lora_target_modules=ALL), tied, 1, new_tokens=(3, 100)
    )
    assert grown is not None
    rows = predicted(shape=grown.shape, adapter=grown.spec)
    assert rows.adapters == plain.adapters + 4 * 2 * 32 and rows.trained == plain.trained + 2 * 32
