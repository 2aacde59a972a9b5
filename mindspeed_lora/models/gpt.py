"""The GPT model, or a chunk of its layers: megatron-core's ``GPTModel`` with our rotary positions and loss."""

from __future__ import annotations

import math

import torch
from megatron.core.models.gpt import GPTModel as MegatronGPTModel
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
    gather_from_tensor_model_parallel_region,
)
from megatron.core.transformer import TransformerConfig

from mindspeed_lora.config.model_features import refuse_unbuilt
from mindspeed_lora.config.shape import ModelShape
from mindspeed_lora.config.stages import ModelChunk
from mindspeed_lora.models.forward_context import ForwardContext
from mindspeed_lora.models.layer_spec import block_spec
from mindspeed_lora.models.layers_by_turns import decode_by_turns, goes_by_turns
from mindspeed_lora.models.moe.settings import MoESettings
from mindspeed_lora.models.rope import RotaryPositions
from mindspeed_lora.models.token_rows import TokenRows
from mindspeed_lora.models.vocab_loss import vocab_parallel_loss
from mindspeed_lora.parallel.groups import ParallelGroups

Tensor = torch.Tensor


def embedding_scale(shape: ModelShape, dtype: torch.dtype) -> float | None:
    """What multiplies embeddings of this dtype, if anything does; Gemma's root is rounded to that dtype."""
    if shape.feature("input_embeds_norm"):
        return torch.tensor(math.sqrt(shape.hidden_size), dtype=dtype).item()
    scale: float | None = shape.feature("scale_emb")
    return scale


class GPTModel(MegatronGPTModel):
    """Embedding in the first chunk, this chunk's layers, final norm and output layer in the last.

    Parameter names are megatron-core's. Tied embeddings on more than one stage are held by both ends. Without
    ``chunk`` it is the whole model.
    """

    def __init__(
        self,
        shape: ModelShape,
        config: TransformerConfig,
        groups: ParallelGroups,
        padded_vocab_size: int,
        chunk: ModelChunk | None = None,
        experts: MoESettings | None = None,
    ) -> None:
        refuse_unbuilt(shape)
        assert chunk is not None or groups.pp_size == 1, "a pipeline stage is told its layers"
        chunk = chunk or ModelChunk.whole(shape.num_layers)
        super().__init__(
            config=config,
            transformer_layer_spec=block_spec(shape, chunk.slots, groups, experts or MoESettings()),
            vocab_size=padded_vocab_size,
            max_sequence_length=shape.max_position_embeddings,
            pre_process=chunk.is_first,
            post_process=chunk.is_last,
            share_embeddings_and_output_weights=not shape.untie_embeddings_and_output_weights,
            position_embedding_type="none",
            vp_stage=None if config.virtual_pipeline_model_parallel_size is None else chunk.vp_stage,
        )
        self.shape = shape
        self.chunk = chunk
        self.groups = groups
        vocab_rows = padded_vocab_size // groups.tp_size
        first = groups.tp_rank * vocab_rows
        self.vocab_range = first, max(first, min(first + vocab_rows, shape.vocab_size))
        self.output_rows: TokenRows | None = None
        """Of the output layer, where some tokens have trained rows."""
        with torch.device("cpu"):
            self.embedding_scale = embedding_scale(shape, config.params_dtype)
        self.rotary = RotaryPositions(shape)
        base_width = shape.feature("dim_model_base")
        self.logit_scale: float = 1.0 if base_width is None else base_width / shape.hidden_size
        self.softcap: float | None = shape.feature("output_logit_softcapping")

    def setup_embeddings_and_output_layer(self) -> None:
        """Marks tied embeddings; both copies are read from the checkpoint, so nothing is exchanged here."""
        if self.share_embeddings_and_output_weights and self.config.pipeline_model_parallel_size > 1:
            weight = self.shared_embedding_or_output_weight()
            if weight is not None:
                weight.shared_embedding = True
                weight.shared = not self.pre_process

    def forward(
        self,
        tokens: Tensor,
        labels: Tensor | None = None,
        positions: Tensor | None = None,
        last_only: bool = False,
        context: ForwardContext | None = None,
        loss_weights: Tensor | None = None,
        hidden_only: bool = False,
        lengths: Tensor | None = None,
    ) -> Tensor:
        """One micro-batch through this stage.

        Args:
            tokens: ``[b, s]`` int64.
            labels: ``[b, s]`` int64 on the host, the target of each position or −100; None asks for logits.
            positions: ``[s]`` or ``[b, s]`` int64; None means 0 … s − 1.
            last_only: logits of the last position only, ``[1, b, v]``.
            context: what else the layers must know of the micro-batch; None: rows are not packed.
            loss_weights: ``[b, s]`` float32 on the host, what each position's loss is multiplied by; None: 1.
            hidden_only: hidden states on the last stage too, as :meth:`logits` takes them.
            lengths: of the documents that the positions are of, where rotation depends on them
                (:meth:`~mindspeed_lora.models.rope.RotaryPositions.tables`).

        Returns:
            On the last stage the summed cross entropy (float32 scalar), or the logits ``[s, b, v]`` over the
            model's own vocabulary; on other stages the hidden states ``[s/t, b, h]`` for the next one.
        """
        hidden = None
        if self.pre_process:
            hidden = self.embedding(input_ids=tokens, position_ids=None)
            if self.embedding_scale is not None:
                hidden = hidden * self.embedding_scale
            if self.training and torch.is_grad_enabled() and self.config.recompute_granularity == "full":
                # A checkpointed block whose input wants no gradient is cut out of the graph, and with it every
                # adapter inside.
                hidden = hidden if hidden.requires_grad else hidden.requires_grad_()
        if positions is None:
            positions = torch.arange(tokens.size(1), device=tokens.device)
        rotary = self.rotary.tables(positions.to(tokens.device), self.config.params_dtype, lengths)
        if goes_by_turns(self.decoder, tokens.size(0)):
            entering: Tensor = self.decoder.input_tensor if hidden is None else hidden
            hidden = decode_by_turns(self.decoder, entering, rotary, context)
        else:
            hidden = self.decoder(
                hidden_states=hidden,
                attention_mask=None,
                rotary_pos_emb=rotary,
                packed_seq_params=context,
            )
        if not self.post_process:
            # The schedule runs backward from here, also where no parameter below is trained.
            return hidden.requires_grad_() if self.training and not hidden.requires_grad else hidden
        if self.logit_scale != 1.0:
            hidden = hidden * self.logit_scale
        if hidden_only:
            return hidden
        return self.logits(hidden, last_only) if labels is None else self._loss(hidden, labels, loss_weights)

    def _loss(self, hidden: Tensor, labels: Tensor, weights: Tensor | None) -> Tensor:
        group = self.groups.tp_group
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, group=group)
        else:
            hidden = copy_to_tensor_model_parallel_region(hidden, group=group)
        return vocab_parallel_loss(
            hidden.reshape(-1, hidden.size(-1)),
            self.output_weight(),
            labels.t().reshape(-1),
            self.vocab_range,
            group,
            self.output_rows,
            None if weights is None else weights.t().reshape(-1),
            self.softcap,
        )

    def logits(self, hidden: Tensor, last_only: bool = False) -> Tensor:
        """Logits ``[s, b, v]`` over the model's own vocabulary of ``hidden [s/t, b, h]``; last position or all."""
        group = self.groups.tp_group
        if self.config.sequence_parallel:
            hidden = gather_from_sequence_parallel_region(hidden, group=group)
        hidden = hidden[-1:] if last_only else hidden
        logits = hidden @ self.output_weight().t()
        if self.output_rows is not None:
            rows, columns = self.output_rows.in_output()
            logits[..., columns] = hidden @ rows.t()
        if self.groups.tp_size > 1:
            logits = gather_from_tensor_model_parallel_region(logits, group=group)
        logits = logits[..., : self.shape.vocab_size]
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)

    def output_weight(self) -> Tensor:
        """This rank's rows ``[v/t, h]`` of the output layer."""
        weight: Tensor = (
            self.shared_embedding_or_output_weight()
            if self.share_embeddings_and_output_weights
            else self.output_layer.weight
        )
        return weight
