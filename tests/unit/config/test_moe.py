"""Flags of experts against a checkpoint's shape, and degrees of expert parallelism."""

from __future__ import annotations

import dataclasses

import pytest

from mindspeed_lora.config.checks import check_expert_files, check_experts
from mindspeed_lora.config.moe import ExpertsConfig, RoutingConfig, dense_layers, reconcile_experts
from mindspeed_lora.config.parallel import ParallelConfig
from mindspeed_lora.config.shape import ModelShape, MoEShape
from mindspeed_lora.errors import Refused

DENSE = ModelShape(
    family="llama",
    num_layers=4,
    hidden_size=16,
    ffn_hidden_size=24,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=4,
    vocab_size=11,
    max_position_embeddings=32,
)
MOE = MoEShape(
    num_experts=8, topk=2, ffn_hidden_size=12, dense_layers=(0,), shared_ffn_hidden_size=24, num_groups=4
)
SHAPE = dataclasses.replace(DENSE, moe=MOE)


@pytest.mark.parametrize(
    "flags, expected",
    [
        ({}, None),
        ({"moe_layer_freq": "1"}, ()),
        ({"moe_layer_freq": "-1"}, ()),
        ({"moe_layer_freq": "2"}, (1, 3)),
        ({"moe_layer_freq": "[0]*1+[1]*3"}, (0,)),
        ({"moe_layer_freq": "([0] * 2 + [1] * 2)"}, (0, 1)),
        ({"moe_layer_freq": "[1,0,1,0]"}, (1, 3)),
        ({"first_k_dense_replace": 2}, (0, 1)),
        ({"first_k_dense_replace": -1}, ()),
        ({"first_k_dense_replace": 1, "moe_layer_freq": "2"}, (0, 1, 3)),
        ({"expert_interval": 2}, (1, 3)),
    ],
)
def test_layers_without_experts(flags, expected):
    assert dense_layers(ExpertsConfig(**flags), 4) == expected


@pytest.mark.parametrize("text", ["x", "[2]*4", "__import__('os')", "[1]*2;[0]"])
def test_a_pattern_of_layers_is_no_program(text):
    with pytest.raises(Refused, match="--moe-layer-freq"):
        ExpertsConfig(moe_layer_freq=text)


def test_what_agrees_with_the_checkpoint_changes_nothing():
    flags = ExpertsConfig(
        num_experts=8,
        moe_router_topk=2,
        moe_ffn_hidden_size=12,
        n_shared_experts=2,
        moe_layer_freq="[0]*1+[1]*3",
        first_k_dense_replace=1,
        norm_topk_prob=True,
        moe_router_num_groups=4,
    )
    assert reconcile_experts(flags, SHAPE) == (SHAPE, [])


@pytest.mark.parametrize(
    "flags, told",
    [
        ({"num_experts": 4}, r"--num-experts 4 \(checkpoint: 8\)"),
        ({"moe_ffn_hidden_size": 16}, r"--moe-ffn-hidden-size 16 \(checkpoint: 12\)"),
        ({"n_shared_experts": 1}, r"--n-shared-experts 1 \(checkpoint: 2\)"),
        ({"shared_expert_gate": True}, r"--shared-expert-gate on \(checkpoint: off\)"),
        ({"first_k_dense_replace": 2}, r"0, 1 \(checkpoint: 0\)"),
        ({"moe_router_score_function": "sigmoid"}, "--moe-router-score-function sigmoid"),
        ({"moe_router_topk": 9}, "--moe-router-topk 9: the model has 8 experts"),
        ({"moe_layer_freq": "[1]*3"}, "tells 3 layers; the model has 4"),
    ],
)
def test_what_contradicts_the_checkpoint_is_refused(flags, told):
    with pytest.raises(Refused, match=told):
        reconcile_experts(ExpertsConfig(**flags), SHAPE)


def test_routing_may_be_another_than_the_checkpoints():
    shape, notices = reconcile_experts(ExpertsConfig(moe_router_topk=1, moe_router_pre_softmax=True), SHAPE)
    assert shape.moe == dataclasses.replace(MOE, topk=1, normalise=False)
    assert ["--moe-router-topk 1" in notices[0], "--moe-router-pre-softmax" in notices[1]] == [True, True]


def test_flags_of_experts_on_a_dense_model():
    with pytest.raises(Refused, match=r"--num-experts: the model \(llama\) has no experts"):
        reconcile_experts(ExpertsConfig(num_experts=8), DENSE)
    assert reconcile_experts(ExpertsConfig(), DENSE) == (DENSE, [])


def test_degrees_of_expert_parallelism():
    def parallel(**flags):
        return ParallelConfig(**flags)

    assert parallel(tensor_model_parallel_size=2).expert_tensor_size == 2
    extended = parallel(tensor_model_parallel_size=2, expert_model_parallel_size=2, moe_tp_extend_ep=True)
    assert (extended.expert_parallel_size, extended.expert_tensor_size) == (4, 1)
    check_experts(SHAPE, extended)
    with pytest.raises(Refused, match="--expert-model-parallel-size 3 does not divide the model's 8 experts"):
        check_experts(SHAPE, parallel(expert_model_parallel_size=3))
    with pytest.raises(Refused, match="--expert-tensor-parallel-size 5 does not divide the 12 columns"):
        check_experts(SHAPE, parallel(expert_tensor_parallel_size=5))
    with pytest.raises(Refused, match="has no experts"):
        check_experts(DENSE, parallel(expert_model_parallel_size=2))
    cut = parallel(expert_model_parallel_size=4, tensor_model_parallel_size=2, expert_tensor_parallel_size=1)
    assert cut.data_parallel_size(4) == 2
    with pytest.raises(Refused, match="world size 6 is not divisible by expert-parallel size 4"):
        cut.data_parallel_size(6)


def test_what_balances():
    assert RoutingConfig(moe_aux_loss_coeff=0.1).aux_loss_coeff == 0.1
    assert RoutingConfig(moe_aux_loss_coeff=0.1, moe_router_load_balancing_type="none").aux_loss_coeff == 0.0
    assert RoutingConfig(moe_router_load_balancing_type="seq_aux_loss").balances_rows
    assert RoutingConfig(seq_aux=True).balances_rows
    assert not RoutingConfig().balances_rows


def test_what_is_done_otherwise_is_told():
    assert RoutingConfig().notices == []
    assert len(RoutingConfig(moe_token_dispatcher_type="allgather", moe_zero_memory="level1").notices) == 2


def test_a_layout_whose_files_have_no_names():
    cut = ParallelConfig(expert_tensor_parallel_size=2)
    with pytest.raises(Refused, match="--expert-tensor-parallel-size 2 does not divide --tensor-model"):
        check_expert_files(SHAPE, cut)
    check_expert_files(DENSE, cut)
    check_expert_files(SHAPE, ParallelConfig(tensor_model_parallel_size=2, expert_tensor_parallel_size=1))
