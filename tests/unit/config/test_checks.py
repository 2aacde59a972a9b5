from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from mindspeed_lora.config.checks import check_interleaving, check_layout, check_recompute, reconcile
from mindspeed_lora.config.model import ModelConfig
from mindspeed_lora.config.parallel import ParallelConfig
from mindspeed_lora.config.shape import MLAShape, ModelShape, RopeScaling
from mindspeed_lora.config.shape_flags import shape_from_flags
from mindspeed_lora.config.stages import LayerPlacement
from mindspeed_lora.config.training import TrainingConfig
from mindspeed_lora.errors import Refused

SHAPE = ModelShape(
    family="llama",
    num_layers=30,
    hidden_size=576,
    ffn_hidden_size=1536,
    num_attention_heads=9,
    num_query_groups=3,
    kv_channels=64,
    vocab_size=49152,
    max_position_embeddings=8192,
    norm_epsilon=1e-5,
    rotary_base=100000.0,
    untie_embeddings_and_output_weights=False,
)


@pytest.mark.parametrize(
    ("tp", "pp", "changes", "message"),
    [
        (
            2,
            1,
            {},
            "--tensor-model-parallel-size 2 does not divide the model's 9 attention heads; use 1 or 3",
        ),
        (9, 1, {}, "does not divide the model's 3 query groups (key/value heads); use 1 or 3"),
        (3, 1, {"ffn_hidden_size": 1000}, "does not divide the model's 1000 columns of the MLP"),
        (
            1,
            4,
            {},
            "--pipeline-model-parallel-size 4 does not divide the model's 30 layers; use 1, 2, 3, 5, 6",
        ),
    ],
)
def test_degrees_that_do_not_divide(tp: int, pp: int, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(Refused) as error:
        check_layout(
            dataclasses.replace(SHAPE, **changes),
            ParallelConfig(tensor_model_parallel_size=tp, pipeline_model_parallel_size=pp),
        )
    assert message in str(error.value)


def test_groups_of_recomputation_divide_every_stage() -> None:
    two_stages = LayerPlacement.even(30, 2)
    uniform = {"recompute_granularity": "full", "recompute_method": "uniform"}
    check_recompute(two_stages, TrainingConfig(**uniform, recompute_num_layers=5))
    block = TrainingConfig(recompute_granularity="full", recompute_method="block", recompute_num_layers=4)
    check_recompute(two_stages, block)
    with pytest.raises(Refused) as error:
        check_recompute(two_stages, TrainingConfig(**uniform, recompute_num_layers=4))
    assert "--recompute-num-layers 4 does not divide the 15 layers" in str(error.value)
    assert "use 1, 3, 5 or 15" in str(error.value)
    uneven = LayerPlacement.of(30, ParallelConfig(pipeline_model_parallel_size=2, num_layer_list="18,12"))
    check_recompute(uneven, TrainingConfig(**uniform, recompute_num_layers=6))
    with pytest.raises(Refused) as error:
        check_recompute(uneven, TrainingConfig(**uniform, recompute_num_layers=9))
    assert "9 does not divide the 12 layers of a pipeline stage" in str(error.value)
    assert "use 1, 2, 3 or 6" in str(error.value)
    chunked = ParallelConfig(pipeline_model_parallel_size=3, num_virtual_stages_per_pipeline_rank=5)
    with pytest.raises(Refused, match="the 2 layers of a virtual pipeline stage"):
        check_recompute(LayerPlacement.of(30, chunked), TrainingConfig(**uniform, recompute_num_layers=5))


@pytest.mark.parametrize(("batch", "nearest"), [(4, 8), (12, 16), (36, 40), (28, 32)])
def test_interleaving_takes_whole_rounds_of_micro_batches(batch: int, nearest: int) -> None:
    chunked = ParallelConfig(pipeline_model_parallel_size=2, num_virtual_stages_per_pipeline_rank=3)
    placement, training = LayerPlacement.of(30, chunked), TrainingConfig(micro_batch_size=2)
    check_interleaving(placement, dataclasses.replace(training, global_batch_size=nearest), dp_size=2)
    with pytest.raises(Refused) as error:
        check_interleaving(placement, dataclasses.replace(training, global_batch_size=batch), dp_size=2)
    assert str(error.value).endswith(f"the nearest valid one is {nearest}")
    check_interleaving(LayerPlacement.even(30, 2), training, dp_size=1)


def test_no_ops_count_among_the_layers_that_are_given() -> None:
    assert reconcile(ModelConfig(num_layers=32), SHAPE, num_noops=2).num_layers == 30
    with pytest.raises(Refused, match=r"--num-layers 30 \(checkpoint: 32\) with the 2 of --noop-layers"):
        reconcile(ModelConfig(num_layers=30), SHAPE, num_noops=2)


def test_degrees_that_divide() -> None:
    check_layout(SHAPE, ParallelConfig(tensor_model_parallel_size=3, pipeline_model_parallel_size=5))


@pytest.mark.parametrize(
    "given",
    [
        {},
        {
            "num_layers": 30,
            "hidden_size": 576,
            "rotary_base": 100000.0,
            "norm_epsilon": 1e-5,
            "vocab_size": 49152,
        },
        {"max_position_embeddings": 4096, "init_method_std": 0.3},
        {"padded_vocab_size": 49200},
        {"swiglu": True, "disable_bias_linear": True, "group_query_attention": True},
    ],
)
def test_flags_that_agree_with_the_checkpoint(given: dict[str, Any]) -> None:
    assert reconcile(ModelConfig(**given), SHAPE) == SHAPE


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_layers": 32}, "--num-layers 32 (checkpoint: 30)"),
        ({"num_query_groups": 9}, "--num-query-groups 9 (checkpoint: 3)"),
        ({"rotary_base": 10000.0}, "--rotary-base 10000.0 (checkpoint: 100000.0)"),
        ({"norm_epsilon": 1e-6}, "--norm-epsilon 1e-06 (checkpoint: 1e-05)"),
        (
            {"untie_embeddings_and_output_weights": True},
            "--untie-embeddings-and-output-weights (checkpoint: off)",
        ),
        ({"add_qkv_bias": True}, "--add-qkv-bias (checkpoint: off)"),
        ({"qk_layernorm": True}, "--qk-layernorm (checkpoint: off)"),
        ({"vocab_size": 32000}, "--vocab-size 32000 (checkpoint: 49152)"),
        ({"padded_vocab_size": 32000}, "--padded-vocab-size 32000 (checkpoint: 49152 words)"),
        ({"rope_scaling_type": "llama3"}, "--rope-scaling-type llama3 (checkpoint: none)"),
        ({"sliding_window_size": 4096}, "--sliding-window-size 4096 (checkpoint: none)"),
        ({"num_layers": 32, "hidden_size": 8}, "--num-layers 32 (checkpoint: 30), --hidden-size 8"),
    ],
)
def test_flags_that_contradict_the_checkpoint(given: dict[str, Any], message: str) -> None:
    with pytest.raises(Refused) as error:
        reconcile(ModelConfig(**given), SHAPE)
    assert message in str(error.value)


def test_a_bias_contradicts_no_bias() -> None:
    with pytest.raises(Refused, match="--disable-bias-linear"):
        reconcile(ModelConfig(disable_bias_linear=True), dataclasses.replace(SHAPE, add_mlp_bias=True))


def test_rotary_scaling_is_compared() -> None:
    scaled = dataclasses.replace(SHAPE, rope_scaling=RopeScaling(rope_type="llama3", factor=8.0))
    assert reconcile(ModelConfig(rope_scaling_type="llama3", rope_scaling_factor=8.0), scaled) == scaled
    with pytest.raises(Refused, match=r"--rope-scaling-factor 32.0 \(checkpoint: 8.0\)"):
        reconcile(ModelConfig(rope_scaling_factor=32.0), scaled)


def test_dropout_is_the_users_else_the_checkpoints() -> None:
    trained = dataclasses.replace(SHAPE, hidden_dropout=0.1, attention_dropout=0.1)
    found = reconcile(ModelConfig(attention_dropout=0.0), trained)
    assert (found.hidden_dropout, found.attention_dropout) == (0.1, 0.0)


NEEDED = {
    "num_layers": 2,
    "hidden_size": 192,
    "num_attention_heads": 6,
    "max_position_embeddings": 128,
    "vocab_size": 100,
}


def test_a_shape_from_flags_alone() -> None:
    found = shape_from_flags(ModelConfig(**NEEDED, swiglu=True))
    assert (found.family, found.num_query_groups, found.kv_channels) == ("llama", 6, 32)
    assert found.ffn_hidden_size == 512
    assert not found.untie_embeddings_and_output_weights
    assert shape_from_flags(ModelConfig(**NEEDED)).ffn_hidden_size == 768


@pytest.mark.parametrize(
    ("given", "family"),
    [
        ({"add_qkv_bias": True}, "qwen2"),
        ({"qk_layernorm": True}, "qwen3"),
        ({"sliding_window_size": 8}, "mistral"),
    ],
)
def test_switches_tell_the_family(given: dict[str, Any], family: str) -> None:
    assert shape_from_flags(ModelConfig(**NEEDED, **given)).family == family


def test_given_values_are_taken() -> None:
    found = shape_from_flags(
        ModelConfig(
            **{**NEEDED, "vocab_size": None},
            padded_vocab_size=128,
            group_query_attention=True,
            num_query_groups=2,
            kv_channels=16,
            rope_scaling_type="llama3",
            rope_scaling_factor=8.0,
            low_freq_factor=2.0,
            attention_dropout=0.1,
        )
    )
    assert (found.vocab_size, found.num_query_groups, found.kv_channels) == (128, 2, 16)
    assert found.rope_scaling == RopeScaling(rope_type="llama3", factor=8.0, low_freq_factor=2.0)
    assert found.attention_dropout == 0.1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"num_layers": None, "vocab_size": None}, "--num-layers, --vocab-size missing"),
        ({"num_attention_heads": 5}, "--hidden-size 192 is not divisible by --num-attention-heads 5"),
        ({"num_query_groups": 2}, "--num-query-groups 2 needs --group-query-attention"),
        ({"num_query_groups": 4, "group_query_attention": True}, "--num-query-groups 4 does not divide"),
        ({"rope_scaling_type": "linear"}, "needs --rope-scaling-factor"),
        ({"rope_scaling_factor": 2.0}, "needs --rope-scaling-type"),
    ],
)
def test_shapes_that_cannot_be(given: dict[str, Any], message: str) -> None:
    with pytest.raises(Refused) as error:
        shape_from_flags(ModelConfig(**{**NEEDED, **given}))
    assert message in str(error.value)


MLA = MLAShape(q_lora_rank=1536, kv_lora_rank=512, qk_head_dim=128, qk_pos_emb_head_dim=64, v_head_dim=128)
DEEPSEEK = dataclasses.replace(
    SHAPE,
    family="deepseek_v3",
    num_query_groups=SHAPE.num_attention_heads,
    kv_channels=192,
    mla=MLA,
    rope_scaling=RopeScaling(
        rope_type="yarn", factor=40.0, original_max_position_embeddings=4096, mscale=1.0, mscale_all_dim=1.0
    ),
)
OF_LATENT: dict[str, Any] = {
    "multi_latent_attention": True,
    "q_lora_rank": 1536,
    "kv_lora_rank": 512,
    "qk_head_dim": 128,
    "qk_pos_emb_head_dim": 64,
    "v_head_dim": 128,
}
OF_YARN: dict[str, Any] = {
    "rope_scaling_type": "yarn",
    "rope_scaling_factor": 40.0,
    "original_max_position_embeddings": 4096,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "rope_scaling_mscale": 1.0,
    "rope_scaling_mscale_all_dim": 1.0,
}


def test_flags_of_latent_attention_that_agree() -> None:
    """A script's --kv-channels and --qk-layernorm say nothing of such a model."""
    given = ModelConfig(**OF_LATENT, **OF_YARN, kv_channels=128, qk_layernorm=True)
    assert reconcile(given, DEEPSEEK) == DEEPSEEK


@pytest.mark.parametrize(
    ("given", "shape", "message"),
    [
        ({"q_lora_rank": 1024}, DEEPSEEK, "--q-lora-rank 1024 (checkpoint: 1536)"),
        ({"v_head_dim": 64}, DEEPSEEK, "--v-head-dim 64 (checkpoint: 128)"),
        ({"multi_latent_attention": True}, SHAPE, "--multi-latent-attention (checkpoint: off)"),
        ({"kv_lora_rank": 512}, SHAPE, "--kv-lora-rank 512 (checkpoint: none)"),
        ({"rope_scaling_mscale": 0.7}, DEEPSEEK, "--rope-scaling-mscale 0.7 (checkpoint: 1.0)"),
        ({"beta_fast": 16.0}, SHAPE, "--beta-fast 16.0 (checkpoint: none)"),
    ],
)
def test_flags_of_latent_attention_that_contradict(
    given: dict[str, Any], shape: ModelShape, message: str
) -> None:
    with pytest.raises(Refused) as error:
        reconcile(ModelConfig(**given), shape)
    assert message in str(error.value)


def test_a_shape_of_latent_attention_from_flags() -> None:
    sizes = {"num_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 128}
    given = ModelConfig(**sizes, vocab_size=50, **OF_LATENT, **OF_YARN)
    shape = shape_from_flags(given)
    assert shape.mla == MLA and shape.rope_scaling == DEEPSEEK.rope_scaling
    assert (shape.family, shape.kv_channels, shape.num_query_groups) == ("deepseek_v3", 192, 4)
    with pytest.raises(Refused, match="--kv-lora-rank 512 needs --multi-latent-attention"):
        shape_from_flags(ModelConfig(**sizes, vocab_size=50, kv_lora_rank=512))


def test_heads_of_latent_attention_divide() -> None:
    check_layout(DEEPSEEK, ParallelConfig(tensor_model_parallel_size=3))
    with pytest.raises(Refused, match="does not divide the model's 9 attention heads"):
        check_layout(DEEPSEEK, ParallelConfig(tensor_model_parallel_size=2))
