"""Reading a mixture of experts from config.json: what the families of experts have in common."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from mindspeed_lora.config.shape import MoEShape
from mindspeed_lora.errors import Refused
from mindspeed_lora.models.families.config_json import Config, required
from mindspeed_lora.models.families.table import EXPERT

STACKED = {
    f"{EXPERT}.linear_fc1.weight": "model.layers.{layer}.mlp.experts.gate_up_proj",
    f"{EXPERT}.linear_fc2.weight": "model.layers.{layer}.mlp.experts.down_proj",
}
"""Names that transformers 5 gives the experts in memory, and that some files have."""


def number_of_experts(config: Config, *keys: str) -> int:
    """The number of experts under the first of some keys that is given."""
    found = next((config[key] for key in keys if config.get(key) is not None), None)
    if found is None:
        raise Refused(
            f"config.json: {' or '.join(keys)} is missing; the file does not describe a whole model."
        )
    return int(found)


def moe_shape(config: Config, *, num_experts: int, width_key: str, topk: int, **values: Any) -> MoEShape:
    """The experts of a config.json, checked.

    Args:
        config: the file.
        num_experts: how many.
        width_key: the key of an expert's inner width.
        topk: ``num_experts_per_tok`` where it is not given.
        values: the other fields of the shape.

    Raises:
        Refused: a token cannot take so many experts, or the groups do not divide them.
    """
    topk = int(config.get("num_experts_per_tok") or topk)
    shape = MoEShape(
        num_experts=num_experts,
        topk=topk,
        ffn_hidden_size=int(required(config, width_key)),
        aux_loss_coeff=float(config.get("router_aux_loss_coef", values.pop("aux_loss_coeff", 0.0)) or 0.0),
        **values,
    )
    groups, taken = shape.num_groups, shape.group_topk
    if num_experts < 1 or not 1 <= topk <= num_experts:
        raise Refused(
            f"config.json: num_experts_per_tok {topk} of {num_experts} experts; expected between 1 and all of them."
        )
    if (
        groups < 1
        or num_experts % groups
        or not 1 <= taken <= groups
        or topk > taken * (num_experts // groups)
    ):
        raise Refused(
            f"config.json: n_group {groups} with topk_group {taken} does not fit {num_experts} experts of which a "
            f"token takes {topk}; expected groups of equal size that hold enough of them."
        )
    return shape


def layers_without_experts(config: Config, step: int, named: Iterable[int]) -> tuple[int, ...]:
    """Layers with an ordinary MLP: the named ones, and all but every ``step``-th."""
    if step < 1:
        raise Refused(f"config.json: decoder_sparse_step {step}; expected a positive number.")
    dense, count = {int(layer) for layer in named}, int(required(config, "num_hidden_layers"))
    return tuple(layer for layer in range(count) if layer in dense or (layer + 1) % step)
