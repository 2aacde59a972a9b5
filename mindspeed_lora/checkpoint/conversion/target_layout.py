"""The layout that a conversion's flags ask of a Megatron checkpoint, checked against the model."""

from __future__ import annotations

from mindspeed_lora.checkpoint.canonical import padded_vocab_size
from mindspeed_lora.checkpoint.formats.mcore_experts import ExpertRanks
from mindspeed_lora.config.checks import mlp_columns
from mindspeed_lora.config.flags import options
from mindspeed_lora.config.jobs import ConversionJob
from mindspeed_lora.config.moe import reconcile_experts
from mindspeed_lora.config.parallel import ParallelConfig, StagesConfig
from mindspeed_lora.config.shape import ModelShape
from mindspeed_lora.config.stages import LayerPlacement, divisors
from mindspeed_lora.errors import Refused


def target_placement(job: ConversionJob, shape: ModelShape) -> LayerPlacement:
    """The stages that the flags ask for; refuses degrees that the model cannot be cut into."""
    tp_size = job.conversion.target_tensor_parallel_size
    for what, count in {
        "attention heads": shape.num_attention_heads,
        "KV heads (query groups)": shape.num_query_groups,
        **mlp_columns(shape),
    }.items():
        if count % tp_size:
            raise Refused(
                f"--target-tensor-parallel-size {tp_size} does not divide the model's {what} ({count}); "
                f"choose a divisor of {count}."
            )
    stages = {option.dest: getattr(job.stages, option.dest) for option in options(StagesConfig)}
    pp_size = job.conversion.target_pipeline_parallel_size
    try:
        return LayerPlacement.of(
            shape.num_layers, ParallelConfig(pipeline_model_parallel_size=pp_size, **stages)
        )
    except Refused as error:
        # Named as this command names it.
        raise Refused(str(error).replace("--pipeline-model", "--target-pipeline")) from error


def target_experts(job: ConversionJob, shape: ModelShape) -> ExpertRanks:
    """How the flags cut the experts over ranks.

    Raises:
        Refused: the degrees do not divide the experts or their columns, or ``mg`` has no names for such ranks.
    """
    conversion, moe = job.conversion, shape.moe
    tp_size, ep_size = conversion.target_tensor_parallel_size, conversion.target_expert_parallel_size
    extended = conversion.moe_tp_extend_ep
    etp_size = 1 if extended else conversion.expert_tensor_parallel_size or tp_size
    ranks = ExpertRanks(tp_size=tp_size, ep_size=ep_size, etp_size=etp_size, extended=extended)
    named = f"--target-expert-parallel-size {ep_size}"
    if moe is None:
        if ep_size > 1:
            raise Refused(f"{named}: the model ({shape.family}) has no experts; leave it out.")
        return ExpertRanks(tp_size=tp_size, etp_size=tp_size)
    if moe.num_experts % ranks.num_blocks:
        by = f" x --target-tensor-parallel-size {tp_size} of --moe-tp-extend-ep" if extended else ""
        raise Refused(
            f"{named}{by} does not divide the model's {moe.num_experts} experts; use "
            f"{divisors(moe.num_experts)}."
        )
    etp = f"--expert-tensor-parallel-size {etp_size}"
    if moe.ffn_hidden_size % etp_size:
        raise Refused(
            f"{etp} does not divide the {moe.ffn_hidden_size} columns of an expert; use "
            f"{divisors(moe.ffn_hidden_size)}."
        )
    if tp_size % etp_size and conversion.save_model_type != "torch_dist":
        raise Refused(
            f"{etp} does not divide --target-tensor-parallel-size {tp_size}: Megatron names files by the "
            "tensor- and the expert-parallel rank, and ranks with different parts of an expert would have one name; "
            "use --ckpt-format torch_dist, or a divisor."
        )
    return ranks


def check_expert_flags(job: ConversionJob, shape: ModelShape) -> None:
    """Refuse flags on the experts that the checkpoint contradicts; a conversion changes nothing of the model."""
    found, notices = reconcile_experts(job.experts, shape)
    if found != shape:
        raise Refused(
            f"contradicting the checkpoint: {'; '.join(notices).replace(', and the flag is taken', '')}; leave out "
            "what the checkpoint tells"
        )


def target_padded_vocab_size(job: ConversionJob, shape: ModelShape) -> int:
    """Rows of the vocabulary with its padding; the command line's rules saw to it that TP divides them."""
    wanted = job.conversion.pad_vocab_size_to
    if wanted is None:
        tp_size = job.conversion.target_tensor_parallel_size
        return padded_vocab_size(shape, job.model.make_vocab_size_divisible_by, tp_size)
    if wanted < shape.vocab_size:
        raise Refused(
            f"--pad-vocab-size-to {wanted} is less than the model's {shape.vocab_size} words; give at least as many."
        )
    return wanted
