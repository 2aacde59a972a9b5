"""Injection: which linears get an adapter, that all else is frozen, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

from mindspeed_lora.adapters.inject import inject_adapters, local_rows
from mindspeed_lora.adapters.lora import ColumnParallelLora, LoraPart, RowParallelLora
from mindspeed_lora.adapters.side_branch import RowBlock
from mindspeed_lora.adapters.spec import AdapterSpec
from mindspeed_lora.checkpoint.loading.model import build_model
from mindspeed_lora.checkpoint.loading.random_weights import RandomSource
from mindspeed_lora.config.parallel import ParallelConfig
from mindspeed_lora.config.shape import ModelShape
from mindspeed_lora.models.gpt import GPTModel
from mindspeed_lora.models.transformer_config import transformer_config
from mindspeed_lora.parallel.groups import ParallelGroups
from tests.support.adapters import ALL, new_adapter

SHAPE = ModelShape(
    family="llama",
    num_layers=2,
    hidden_size=16,
    ffn_hidden_size=24,
    num_attention_heads=4,
    num_query_groups=2,
    kv_channels=6,
    vocab_size=19,
    max_position_embeddings=32,
)
LORA_NUMBERS = 2 * 3 * ((16 + 48) + (24 + 16) + (16 + 48) + (24 + 16))


def spec(targets: tuple[str, ...] = ALL, rslora: bool = False) -> AdapterSpec:
    flags = {"lora_dropout": 0.1, "lora_target_modules": targets, "use_rslora": rslora}
    return new_adapter(SHAPE, 3, 12, **flags).spec


def inject(gpt: GPTModel, adapter: AdapterSpec) -> list[str]:
    return inject_adapters(gpt, adapter, lambda name: name)


@pytest.fixture
def model(groups: ParallelGroups) -> Callable[[], GPTModel]:
    config = transformer_config(SHAPE, ParallelConfig(), groups, torch.float32)

    def build() -> GPTModel:
        with torch.device("meta"):
            return GPTModel(SHAPE, config, groups, SHAPE.vocab_size)

    return build


def test_every_target_of_every_layer(model: Callable[[], GPTModel]) -> None:
    gpt = model()
    replaced = inject(gpt, spec())
    assert sorted(replaced) == sorted(
        f"decoder.layers.{layer}.{place}"
        for layer in range(2)
        for place in (
            "self_attention.linear_qkv",
            "self_attention.linear_proj",
            "mlp.linear_fc1",
            "mlp.linear_fc2",
        )
    )
    layer = gpt.decoder.layers[1]
    assert isinstance(layer.self_attention.linear_qkv, ColumnParallelLora)
    assert isinstance(layer.mlp.linear_fc1, ColumnParallelLora)
    assert isinstance(layer.self_attention.linear_proj, RowParallelLora)
    assert isinstance(layer.mlp.linear_fc2, RowParallelLora)
    part = layer.mlp.linear_fc1.parts[0]
    assert (part.rows.start, part.rows.stop) == (0, 48)
    assert part.lora_a.shape == (3, 16) and part.lora_b.shape == (48, 3)
    assert layer.mlp.linear_fc1.dropout == 0.1


@pytest.mark.parametrize(("rslora", "scaling"), [(False, 4.0), (True, 12 / math.sqrt(3))])
def test_scaling(model: Callable[[], GPTModel], rslora: bool, scaling: float) -> None:
    gpt = model()
    inject(gpt, spec(rslora=rslora))
    scalings = [module.scaling for module in gpt.modules() if isinstance(module, LoraPart)]
    assert scalings == [pytest.approx(scaling)] * (2 * 4)


@pytest.mark.parametrize("targets", [("linear_proj",), ("linear_fc2", "linear_qkv")])
def test_a_subset_leaves_the_others_alone(model: Callable[[], GPTModel], targets: tuple[str, ...]) -> None:
    gpt = model()
    replaced = inject(gpt, spec(targets))
    assert {name.rpartition(".")[2] for name in replaced} == set(targets)
    assert len(replaced) == 2 * len(targets)


def test_everything_but_the_factors_is_frozen(model: Callable[[], GPTModel]) -> None:
    gpt = model()
    inject(gpt, spec())
    trained = [name for name, parameter in gpt.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * 4 * 2
    assert all(name.endswith((".parts.0.lora_a", ".parts.0.lora_b")) for name in trained)


def test_matrices_of_a_fused_linear_by_themselves(model: Callable[[], GPTModel]) -> None:
    gpt = model()
    inject(gpt, spec(("v_proj", "q_proj", "up_proj")))
    layer = gpt.decoder.layers[1]
    q, v = layer.self_attention.linear_qkv.parts
    assert (q.rows, v.rows) == (RowBlock(0, 12, 2, 24), RowBlock(18, 24, 2, 24))
    assert q.lora_b.shape == (24, 3) and v.lora_b.shape == (12, 3)
    (up,) = layer.mlp.linear_fc1.parts
    assert up.rows == RowBlock(24, 48)
    assert up.lora_a.canonical_name == "decoder.layers.1.mlp.linear_fc1.up_proj.lora_a"


def test_rows_of_a_rank_are_those_of_its_query_groups() -> None:
    parts = {part.label: part for part in spec(("k_proj", "gate_proj", "linear_fc2")).parts}
    assert local_rows(parts["k_proj"], SHAPE, 24, tp_size=2) == RowBlock(12, 18)
    assert local_rows(parts["k_proj"], SHAPE, 48, tp_size=1) == RowBlock(12, 18, 2, 24)
    assert local_rows(parts["gate_proj"], SHAPE, 24, tp_size=2) == RowBlock(0, 12)
    assert local_rows(parts[""], SHAPE, 16, tp_size=2) == RowBlock(0, 16)


def test_layers_of_other_stages_are_passed_over(model: Callable[[], GPTModel]) -> None:
    gpt = model()
    replaced = inject_adapters(gpt, spec(("o_proj",)), lambda name: name.replace("layers.0", "layers.7"))
    assert replaced == ["decoder.layers.1.self_attention.linear_proj"]


def test_frozen_weights_get_no_gradient_and_no_gradient_buffer(groups: ParallelGroups) -> None:
    config = transformer_config(SHAPE, ParallelConfig(), groups, torch.float32)
    source = RandomSource(SHAPE, seed=1, std=0.02)
    gpt, _ = build_model(SHAPE, config, groups, source, new_adapter(SHAPE, 3))
    ddp = DistributedDataParallel(
        config=config, ddp_config=DistributedDataParallelConfig(grad_reduce_in_fp32=True), module=gpt
    )
    assert sum(buffer.grad_data.numel() for buffer in ddp.buffers) < LORA_NUMBERS + 64 * 16
    assert sum(parameter.numel() for parameter in gpt.parameters() if parameter.requires_grad) == LORA_NUMBERS
    tokens = torch.randint(0, 19, (2, 8))
    ddp(tokens, labels=tokens).backward()
    for name, parameter in gpt.named_parameters():
        assert parameter.grad is None, "summed into the buffer instead"
        assert hasattr(parameter, "main_grad") is parameter.requires_grad, name
