"""Mixture-of-experts flags: the experts' architecture, and how a job routes and moves tokens."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass

from mindspeed_lora.config.flags import AT_LEAST_ONE, NOT_NEGATIVE, POSITIVE, Check, Section, flag
from mindspeed_lora.config.shape import ModelShape, MoEShape
from mindspeed_lora.errors import Refused

_PATTERN = re.compile(
    r"\(?\s*\[[01\s,]*\]\s*(\*\s*\d+\s*)?\)?(\s*\+\s*\(?\s*\[[01\s,]*\]\s*(\*\s*\d+\s*)?\)?)*"
)
_LAYER_FREQ = Check(
    "a number of layers (1: all have experts, 2: every second), or a list of a 0 or 1 for each layer such as "
    "'[0]*1+[1]*26'",
    lambda text: (
        re.fullmatch(r"-?\d+", text.strip()) is not None or _PATTERN.fullmatch(text.strip()) is not None
    ),
)


@dataclass(frozen=True, kw_only=True)
class ExpertsConfig(Section):
    """The experts' architecture as flags; what is left out is as the checkpoint says."""

    num_experts: int | None = flag("experts of a layer", check=AT_LEAST_ONE)
    moe_router_topk: int | None = flag(
        "experts that each token goes to; another number than the checkpoint's is taken with a notice",
        check=AT_LEAST_ONE,
    )
    moe_ffn_hidden_size: int | None = flag(
        "inner width of one expert",
        names=("--moe-ffn-hidden-size", "--moe-intermediate-size"),
        check=AT_LEAST_ONE,
    )
    n_shared_experts: int | None = flag(
        "experts that every token goes through, each of --moe-ffn-hidden-size", check=NOT_NEGATIVE
    )
    moe_shared_expert_intermediate_size: int | None = flag(
        "inner width of the shared experts together", check=NOT_NEGATIVE
    )
    shared_expert_gate: bool | None = flag(
        "a sigmoid gate on the shared experts' output",
        names=("--shared-expert-gate", "--moe-shared-expert-gate", "--moe-use-shared-expert-gate"),
    )
    moe_layer_freq: str | None = flag("which layers have experts", check=_LAYER_FREQ, metavar="N|LIST")
    first_k_dense_replace: int | None = flag("first layers that have an ordinary MLP (-1: none)")
    expert_interval: int | None = flag("layers from one with experts to the next", check=AT_LEAST_ONE)
    norm_topk_prob: bool | None = flag("divide the weights of a token's experts by their sum")
    moe_router_pre_softmax: bool | None = flag(
        "take the softmax over all experts, then the best: without --norm-topk-prob the weights do not sum to one"
    )
    moe_router_score_function: str | None = flag(
        "what makes scores of the router's logits", choices=("softmax", "sigmoid")
    )
    moe_router_num_groups: int | None = flag(
        "groups of neighbouring experts", names=("--moe-router-num-groups", "--n-group"), check=AT_LEAST_ONE
    )
    moe_router_group_topk: int | None = flag(
        "groups that each token takes its experts from",
        names=("--moe-router-group-topk", "--topk-group"),
        check=AT_LEAST_ONE,
    )
    moe_router_topk_scaling_factor: float | None = flag(
        "factor on the weights of a token's experts",
        names=("--moe-router-topk-scaling-factor", "--routed-scaling-factor"),
        check=POSITIVE,
    )
    moe_router_enable_expert_bias: bool | None = flag(
        "a bias on the scores that decides which experts are taken"
    )


@dataclass(frozen=True, kw_only=True)
class RoutingConfig(Section):
    """How tokens get to the experts and back, and the losses that balance them."""

    moe_token_dispatcher_type: str = flag(
        "collective that brings tokens to their experts; the numbers are the same",
        "alltoall",
        choices=("allgather", "alltoall", "alltoall_seq"),
    )
    moe_router_load_balancing_type: str = flag(
        "what balances the experts: a loss over the micro-batch (aux_loss), one a row (seq_aux_loss), or nothing; "
        "softmax_topk and group_limited_greedy mean aux_loss, noaux_tc seq_aux_loss",
        "aux_loss",
        choices=("none", "aux_loss", "seq_aux_loss", "softmax_topk", "group_limited_greedy", "noaux_tc"),
        same_as={"pai_megatron_aux_loss": "aux_loss"},
    )
    moe_aux_loss_coeff: float = flag("weight of the load-balancing loss", 0.0, check=NOT_NEGATIVE)
    seq_aux: bool = flag("balance each row by itself, as seq_aux_loss does", False)
    moe_z_loss_coeff: float = flag("weight of the loss on large router logits", 0.0, check=NOT_NEGATIVE)
    moe_router_dtype: str | None = flag(
        "dtype of the router's logits; left out: the model's", choices=("fp32", "fp64")
    )
    router_gating_in_fp32: bool = flag("the same as --moe-router-dtype fp32", False)
    moe_expert_capacity_factor: float | None = flag(
        "tokens that an expert takes of one rank's, in multiples of an equal share; the rest are dropped",
        check=POSITIVE,
    )
    moe_pad_expert_input_to_capacity: bool = flag("fill every expert up to its capacity", False)
    moe_token_drop_policy: str = flag(
        "tokens that stay: those with the largest weights, or the first ones",
        "probs",
        choices=("probs", "position"),
    )
    moe_alltoall_overlap_comm: bool = flag("compute while tokens travel to the experts and back", False)
    moe_allgather_overlap_comm: bool = flag("the same for --moe-token-dispatcher-type allgather", False)
    moe_shared_expert_overlap: bool = flag("compute the shared experts while tokens travel", False)
    moe_zero_memory: str = flag(
        "compute again in the backward pass, rather than keep: the experts' activation (level0), and the tokens "
        "that they got too (level1)",
        "disable",
        choices=("disable", "level0", "level1"),
    )
    moe_zero_memory_num_layers: int | None = flag(
        "layers of a stage that --moe-zero-memory is for; left out: all", check=NOT_NEGATIVE
    )

    @property
    def balances_rows(self) -> bool:
        """Whether the load-balancing loss is one a row."""
        return self.seq_aux or self.moe_router_load_balancing_type in ("seq_aux_loss", "noaux_tc")

    @property
    def aux_loss_coeff(self) -> float:
        """Weight of the load-balancing loss; 0: none."""
        return 0.0 if self.moe_router_load_balancing_type == "none" else self.moe_aux_loss_coeff

    @property
    def notices(self) -> list[str]:
        """What is done otherwise than a flag says, with the same numbers."""
        told = {
            "--moe-token-dispatcher-type allgather: tokens go to their experts by one all-to-all all the same": (
                self.moe_token_dispatcher_type == "allgather"
            ),
            "--moe-pad-expert-input-to-capacity: nothing is padded, since products take any number of tokens": (
                self.moe_pad_expert_input_to_capacity
            ),
            "--moe-zero-memory level1: the experts' activation is computed again, as level0 has it": (
                self.moe_zero_memory == "level1"
            ),
            "--moe-zero-memory-num-layers: --moe-zero-memory is for all layers": (
                self.moe_zero_memory_num_layers is not None
            ),
        }
        return [text for text, holds in told.items() if holds]

    @property
    def overlaps(self) -> bool:
        """Whether other work is done while tokens travel."""
        return self.moe_alltoall_overlap_comm or self.moe_allgather_overlap_comm


def dense_layers(config: ExpertsConfig, num_layers: int) -> tuple[int, ...] | None:
    """Numbers of the layers without experts that the flags tell; None where no flag does.

    Raises:
        Refused: a list of ``--moe-layer-freq`` is not of the model's number of layers.
    """
    given, first, interval = config.moe_layer_freq, config.first_k_dense_replace, config.expert_interval
    if given is None and first is None and interval is None:
        return None
    pattern = [1] * num_layers
    if interval is not None:
        pattern = [int(layer % interval == 0) for layer in range(num_layers)]
    if given is not None and re.fullmatch(r"-?\d+", given.strip()):
        step = max(1, int(given))
        pattern = [int(layer % step == 0) for layer in range(num_layers)]
    elif given is not None:
        pattern = _listed(given)
        if len(pattern) != num_layers:
            raise Refused(
                f"--moe-layer-freq {given}: tells {len(pattern)} layers; the model has {num_layers}"
            )
    dense = max(0, first or 0)
    return tuple(layer for layer, has in enumerate(pattern) if not has or layer < dense)


def _listed(text: str) -> list[int]:
    """The numbers of a sum of lists and multiples of lists."""
    numbers: list[int] = []
    for entries, times in re.findall(r"\[([01\s,]*)\]\s*(?:\*\s*(\d+))?", text):
        numbers += [int(word) for word in entries.replace(",", " ").split()] * int(times or 1)
    return numbers


def experts_from_flags(config: ExpertsConfig, shape: ModelShape) -> ModelShape:
    """A shape that flags alone tell, with their experts and Megatron's defaults, and the family that has such.

    Without ``--moe-router-pre-softmax`` the softmax is over the chosen experts, which is a normalised one.

    Raises:
        Refused: a token cannot take so many experts, or the groups do not divide them.
    """
    if config.num_experts is None:
        reconcile_experts(config, shape)
        return shape
    inner = config.moe_ffn_hidden_size or shape.ffn_hidden_size
    moe = MoEShape(
        num_experts=config.num_experts,
        topk=config.moe_router_topk or 2,
        ffn_hidden_size=inner,
        dense_layers=dense_layers(config, shape.num_layers) or (),
        shared_ffn_hidden_size=config.moe_shared_expert_intermediate_size
        or (config.n_shared_experts or 0) * inner,
        shared_expert_gate=bool(config.shared_expert_gate),
        score_function=config.moe_router_score_function or "softmax",
        normalise=bool(config.norm_topk_prob) or not config.moe_router_pre_softmax,
        scaling_factor=config.moe_router_topk_scaling_factor or 1.0,
        expert_bias=bool(config.moe_router_enable_expert_bias),
        num_groups=config.moe_router_num_groups or 1,
        group_topk=config.moe_router_group_topk or 1,
        group_score="top2" if config.moe_router_enable_expert_bias else "max",
    )
    if moe.num_experts % moe.num_groups or moe.topk > moe.group_topk * (moe.num_experts // moe.num_groups):
        raise Refused(
            f"--moe-router-topk {moe.topk} of --num-experts {moe.num_experts} in --moe-router-num-groups "
            f"{moe.num_groups}, --moe-router-group-topk {moe.group_topk}: expected equal groups that hold enough"
        )
    return dataclasses.replace(shape, moe=moe, family=_family(shape, moe))


def _family(shape: ModelShape, moe: MoEShape) -> str:
    """The family whose Hugging Face form has the switches that are on."""
    if shape.mla is not None:
        return shape.family
    if moe.expert_bias or moe.score_function == "sigmoid":
        return "glm4_moe"
    if moe.shared_ffn_hidden_size or shape.add_qkv_bias:
        return "qwen2_moe"
    return "qwen3_moe" if shape.qk_layernorm or moe.dense_layers else "mixtral"


def reconcile_experts(config: ExpertsConfig, shape: ModelShape) -> tuple[ModelShape, list[str]]:
    """The checkpoint's shape with the routing that the flags ask for, and notices.

    What tells tensors must agree with the checkpoint. How many experts a token goes to, and whether their weights are
    normalised, may be another: adapters are trained for what the flags say.

    Raises:
        Refused: a flag contradicts the checkpoint.
    """
    moe, given = shape.moe, _given(config, shape)
    if moe is None:
        if given:
            raise Refused(f"{', '.join(given)}: the model ({shape.family}) has no experts; leave it out")
        return shape, []
    told = {
        "--num-experts": moe.num_experts,
        "--moe-ffn-hidden-size": moe.ffn_hidden_size,
        "--moe-shared-expert-intermediate-size": moe.shared_ffn_hidden_size,
        "--n-shared-experts": moe.shared_ffn_hidden_size // moe.ffn_hidden_size,
        "--shared-expert-gate": moe.shared_expert_gate,
        "--moe-router-score-function": moe.score_function,
        "--moe-router-num-groups": moe.num_groups,
        "--moe-router-group-topk": moe.group_topk,
        "--moe-router-topk-scaling-factor": moe.scaling_factor,
        "--moe-router-enable-expert-bias": moe.expert_bias,
        "layers without experts by --moe-layer-freq and --first-k-dense-replace": moe.dense_layers,
    }
    wrong = [
        f"{name} {_words(given[name])} (checkpoint: {_words(told[name])})"
        for name in given
        if name in told and given[name] != told[name]
    ]
    if wrong:
        raise Refused(
            f"contradicting the checkpoint: {', '.join(wrong)}; leave out what the checkpoint tells"
        )
    topk, normalise = config.moe_router_topk or moe.topk, _normalises(config, moe)
    if topk > moe.num_experts:
        raise Refused(f"--moe-router-topk {topk}: the model has {moe.num_experts} experts; lower it")
    notices = []
    if topk != moe.topk:
        notices.append(f"--moe-router-topk {topk}: the checkpoint has {moe.topk}, and the flag is taken")
    if normalise != moe.normalise:
        name = "--norm-topk-prob" if normalise else "--moe-router-pre-softmax without --norm-topk-prob"
        notices.append(f"{name}: the checkpoint says otherwise, and the flag is taken")
    return dataclasses.replace(shape, moe=dataclasses.replace(moe, topk=topk, normalise=normalise)), notices


def _normalises(config: ExpertsConfig, moe: MoEShape) -> bool:
    """Whether weights are divided by their sum; a sigmoid's always are as the checkpoint says."""
    if config.norm_topk_prob:
        return True
    if config.moe_router_pre_softmax and moe.score_function == "softmax":
        return False
    return moe.normalise


def _given(config: ExpertsConfig, shape: ModelShape) -> dict[str, object]:
    """What the flags tell, by the flag's first name."""
    values: dict[str, object] = {
        "--num-experts": config.num_experts,
        "--moe-router-topk": config.moe_router_topk,
        "--moe-ffn-hidden-size": config.moe_ffn_hidden_size,
        "--moe-shared-expert-intermediate-size": config.moe_shared_expert_intermediate_size,
        "--n-shared-experts": config.n_shared_experts or None,
        "--shared-expert-gate": config.shared_expert_gate or None,
        "--moe-router-score-function": config.moe_router_score_function,
        "--moe-router-num-groups": config.moe_router_num_groups,
        "--moe-router-group-topk": config.moe_router_group_topk,
        "--moe-router-topk-scaling-factor": config.moe_router_topk_scaling_factor,
        "--moe-router-enable-expert-bias": config.moe_router_enable_expert_bias or None,
    }
    layers = dense_layers(config, shape.num_layers) if shape.moe is not None else None
    values["layers without experts by --moe-layer-freq and --first-k-dense-replace"] = layers
    return {name: value for name, value in values.items() if value is not None}


def _words(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return (", ".join(map(str, value)) or "none") if isinstance(value, tuple) else f"{value}"
