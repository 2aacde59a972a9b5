"""Layers of experts on this expert-parallel rank, and one training step of them, by turns or not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from mindspeed_lora.checkpoint.canonical import LINEARS
from mindspeed_lora.checkpoint.loading.model import build_model
from mindspeed_lora.checkpoint.loading.random_weights import RandomSource
from mindspeed_lora.checkpoint.peft.plan import plan_adapter
from mindspeed_lora.config.lora import LoraConfig
from mindspeed_lora.config.parallel import ParallelConfig
from mindspeed_lora.config.shape import ModelShape, MoEShape
from mindspeed_lora.models.forward_context import ForwardContext
from mindspeed_lora.models.layer import interleave_layers
from mindspeed_lora.models.layers_by_turns import decode_by_turns, goes_by_turns
from mindspeed_lora.models.rope import rotary_tables
from mindspeed_lora.models.transformer_config import transformer_config
from mindspeed_lora.parallel.collectives import start_all_to_all
from mindspeed_lora.parallel.groups import ParallelGroups


@dataclass(frozen=True)
class ExpertSizes:
    """Layers of SmolLM2's sizes with experts in place of the MLP, and the micro-batch that goes through them."""

    hidden_size: int = 576
    ffn_hidden_size: int = 1536
    num_experts: int = 4
    topk: int = 2
    layers: int = 4
    seq_length: int = 512
    micro_batch_size: int = 2
    rank: int = 16

    @property
    def tokens(self) -> int:
        """Of a rank's micro-batch."""
        return self.seq_length * self.micro_batch_size

    @property
    def shape(self) -> ModelShape:
        """The model."""
        heads = self.hidden_size // 64
        return ModelShape(
            family="mixtral",
            num_layers=self.layers,
            hidden_size=self.hidden_size,
            ffn_hidden_size=self.ffn_hidden_size,
            num_attention_heads=heads,
            num_query_groups=heads // 3 if heads % 3 == 0 else heads,
            kv_channels=64,
            vocab_size=64,
            max_position_embeddings=self.seq_length,
            moe=MoEShape(num_experts=self.num_experts, topk=self.topk, ffn_hidden_size=self.ffn_hidden_size),
        )


class ExpertLayers:
    """The layers of one rank, their input and the gradient of their output."""

    def __init__(self, sizes: ExpertSizes, groups: ParallelGroups) -> None:
        self.sizes, self.groups, shape = sizes, groups, sizes.shape
        parallel = ParallelConfig(expert_model_parallel_size=groups.experts.ep_size)
        config = transformer_config(shape, parallel, groups, torch.float32)
        lora = LoraConfig(lora_r=sizes.rank, lora_alpha=2 * sizes.rank, lora_target_modules=tuple(LINEARS))
        adapter = plan_adapter(lora, shape, 1)
        self.model, _ = build_model(shape, config, groups, RandomSource(shape, 1, 0.02), adapter)
        self.factors = []
        for name, parameter in self.model.named_parameters():
            is_factor = name.endswith((".lora_a", ".lora_b"))
            parameter.requires_grad_(is_factor)
            if is_factor:
                self.factors.append(parameter)
        self.decoder: Any = self.model.decoder
        generator = torch.Generator().manual_seed(groups.experts.ep_rank)
        size = (sizes.seq_length, sizes.micro_batch_size, sizes.hidden_size)
        self.x = torch.randn(size, generator=generator).requires_grad_()
        self.grad = torch.randn(size, generator=generator)
        positions = torch.arange(sizes.seq_length)
        self.rotary = rotary_tables(self.model.rotary.frequencies, positions, torch.float32)

    def use(self, interleave: str | None) -> None:
        """Halves of what go through the layers by turns; None: they wait for what travels."""
        interleave_layers(self.model, interleave)

    def step(self) -> None:
        """Forward and backward."""
        self.output().backward(self.grad)
        for tensor in (self.x, *self.factors):
            tensor.grad = None

    def output(self) -> torch.Tensor:
        """Of the layers and the final norm, ``[s, b, h]``."""
        context = ForwardContext()
        if goes_by_turns(self.decoder, self.x.size(1)):
            return decode_by_turns(self.decoder, self.x, self.rotary, context)
        output: torch.Tensor = self.decoder(
            hidden_states=self.x,
            attention_mask=None,
            rotary_pos_emb=self.rotary,
            packed_seq_params=context,
        )
        return output

    def communicate(self) -> None:
        """Tokens to the experts and back, forward and backward, evenly spread, one after the other."""
        place = self.groups.experts
        assert place.group is not None
        rows = self.x.detach().new_zeros(self._rows, self.sizes.hidden_size)
        counts = [self._rows // place.size] * place.size
        for _ in range(4 * self.sizes.layers):
            _, work = start_all_to_all(rows, counts, counts, place.group)
            work.wait()

    @property
    def bytes_sent(self) -> int:
        """By one rank in :meth:`communicate`."""
        place = self.groups.experts
        elsewhere = self._rows // place.size * (place.size - 1)
        return 4 * self.sizes.layers * elsewhere * self.sizes.hidden_size * self.x.element_size()

    @property
    def _rows(self) -> int:
        return self.sizes.tokens * self.sizes.topk
