"""Layers that are measured by themselves."""

from __future__ import annotations

from dataclasses import dataclass

from mindspeed_lora.config.shape import ModelShape


@dataclass(frozen=True)
class Sizes:
    """Layers of Llama-2-7B's proportions, and the micro-batch that goes through them."""

    hidden_size: int = 1024
    ffn_hidden_size: int = 2752
    heads: int = 8
    layers: int = 2
    seq_length: int = 512
    micro_batch_size: int = 2
    rank: int = 16

    @property
    def tokens(self) -> int:
        """Of a micro-batch."""
        return self.seq_length * self.micro_batch_size

    @property
    def shape(self) -> ModelShape:
        """The model."""
        return ModelShape(
            family="llama",
            num_layers=self.layers,
            hidden_size=self.hidden_size,
            ffn_hidden_size=self.ffn_hidden_size,
            num_attention_heads=self.heads,
            num_query_groups=self.heads,
            kv_channels=self.hidden_size // self.heads,
            vocab_size=64,
            max_position_embeddings=self.seq_length,
        )
