"""megatron-core's ``TransformerConfig`` for a model shape and a job."""

from __future__ import annotations

import torch
from megatron.core.transformer import TransformerConfig

from mindspeed_lora.config.parallel import ParallelConfig
from mindspeed_lora.config.shape import ModelShape
from mindspeed_lora.config.stages import LayerPlacement
from mindspeed_lora.config.training import TrainingConfig
from mindspeed_lora.models.swiglu import activation
from mindspeed_lora.parallel.groups import ParallelGroups


def transformer_config(
    shape: ModelShape,
    parallel: ParallelConfig,
    groups: ParallelGroups,
    dtype: torch.dtype,
    training: TrainingConfig | None = None,
    variable_seq_lengths: bool = False,
) -> TransformerConfig:
    """The configuration of every module of the model.

    Sequence parallelism needs TP > 1 (at TP 1 it is accepted and has no effect). ``use_cpu_initialization``
    makes the modules without touching a device; they are made on the meta device anyway.
    """
    recompute = _recompute(training)
    placement = LayerPlacement.of(shape.num_layers, parallel)
    divisor = shape.feature("query_pre_attn_scalar")
    return TransformerConfig(
        num_layers=placement.num_slots,
        hidden_size=shape.hidden_size,
        ffn_hidden_size=shape.ffn_hidden_size,
        num_attention_heads=shape.num_attention_heads,
        num_query_groups=shape.num_query_groups,
        kv_channels=shape.kv_channels,
        softmax_scale=None if divisor is None else divisor**-0.5,
        layernorm_epsilon=shape.norm_epsilon,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=activation(shape),
        add_bias_linear=shape.add_proj_bias or shape.add_mlp_bias,
        add_qkv_bias=shape.add_qkv_bias,
        qk_layernorm=shape.qk_layernorm,
        hidden_dropout=shape.hidden_dropout,
        attention_dropout=shape.attention_dropout,
        tensor_model_parallel_size=groups.tp_size,
        pipeline_model_parallel_size=groups.pp_size,
        virtual_pipeline_model_parallel_size=placement.vp_size if placement.vp_size > 1 else None,
        context_parallel_size=groups.context.size,
        sequence_parallel=parallel.sequence_parallel and groups.tp_size > 1,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        fp16=dtype is torch.float16,
        variable_seq_lengths=variable_seq_lengths,
        moe_token_dispatcher_type="alltoall",  # the default refuses variable lengths, MoE or not
        calculate_per_token_loss=True,
        use_cpu_initialization=True,
        perform_initialization=True,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        batch_p2p_comm=False,
        deallocate_pipeline_outputs=False,
        **recompute,
    )


def _recompute(training: TrainingConfig | None) -> dict[str, object]:
    if training is None or training.recompute_granularity is None:
        return {}
    if training.recompute_granularity == "selective":
        return {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]}
    return {
        "recompute_granularity": "full",
        "recompute_method": training.recompute_method or "uniform",
        "recompute_num_layers": training.recompute_num_layers or 1,
    }
