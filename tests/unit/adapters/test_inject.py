"""Injection: which linears get an adapter, that all else is frozen, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig

from mindspeed_lora.adapters.inject import AdapterSpec, inject_adapters
from mindspeed_lora.adapters.lora import ColumnParallelLora, LoraPart, RowParallelLora
from mindspeed_lora.checkpoint.load_model import AdapterPlan, build_model
from mindspeed_lora.checkpoint.random_weights import RandomSource
from mindspeed_lora.config.parallel import ParallelConfig
from mindspeed_lora.config.shape import ModelShape
from mindspeed_lora.errors import Refused
from mindspeed_lora.models.gpt import GPTModel
from mindspeed_lora.models.transformer_config import transformer_config
from mindspeed_lora.parallel.groups import ParallelGroups

ALL = ("linear_qkv", "linear_proj", "linear_fc1", "linear_fc2")
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
    return AdapterSpec(rank=3, alpha=12, dropout=0.1, target_modules=targets, use_rslora=rslora)


@pytest.fixture
def model(groups: ParallelGroups) -> Callable[[], GPTModel]:
    config = transformer_config(SHAPE, ParallelConfig(), groups, torch.float32)

    def build() -> GPTModel:
        with torch.device("meta"):
            return GPTModel(SHAPE, config, groups, SHAPE.vocab_size)

    return build


def test_every_target_of_every_layer(model: Callable[[], GPTModel]) -> None:
    gpt = model()
    replaced = inject_adapters(gpt, spec())
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
    inject_adapters(gpt, spec(rslora=rslora))
    scalings = [module.scaling for module in gpt.modules() if isinstance(module, LoraPart)]
    assert scalings == [pytest.approx(scaling)] * (2 * 4)


@pytest.mark.parametrize("targets", [("linear_proj",), ("linear_fc2", "linear_qkv")])
def test_a_subset_leaves_the_others_alone(model: Callable[[], GPTModel], targets: tuple[str, ...]) -> None:
    gpt = model()
    replaced = inject_adapters(gpt, spec(targets))
    assert {name.rpartition(".")[2] for name in replaced} == set(targets)
    assert len(replaced) == 2 * len(targets)


def test_everything_but_the_factors_is_frozen(model: Callable[[], GPTModel]) -> None:
    gpt = model()
    inject_adapters(gpt, spec())
    trained = [name for name, parameter in gpt.named_parameters() if parameter.requires_grad]
    assert len(trained) == 2 * 4 * 2
    assert all(name.endswith((".parts.0.lora_a", ".parts.0.lora_b")) for name in trained)


@pytest.mark.parametrize(
    "target", ["linear_kqv", "q_proj", "self_attention", "core_attention", "output_layer", ""]
)
def test_what_is_no_linear_of_a_layer_is_refused_with_what_there_is(
    model: Callable[[], GPTModel], target: str
) -> None:
    with pytest.raises(Refused) as caught:
        inject_adapters(model(), spec(("linear_qkv", target)))
    text = str(caught.value)
    assert "--lora-target-modules" in text and f"no module {target}" in text
    assert "linear_fc1, linear_fc2, linear_proj, linear_qkv" in text


def test_frozen_weights_get_no_gradient_and_no_gradient_buffer(groups: ParallelGroups) -> None:
    config = transformer_config(SHAPE, ParallelConfig(), groups, torch.float32)
    source = RandomSource(SHAPE, seed=1, std=0.02)
    gpt, _ = build_model(SHAPE, config, groups, source, AdapterPlan(spec=spec(), source=None))
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
