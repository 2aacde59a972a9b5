"""Grouped LoRA against a loop over the experts by autograd; what travels and what is kept."""

from __future__ import annotations

import pytest
import torch

from mindspeed_lora.adapters.dropout import keep_mask, kept_share, token_keys
from mindspeed_lora.adapters.grouped import GroupedLora, GroupedLoraPart
from mindspeed_lora.adapters.side_branch import RowBlock
from mindspeed_lora.models.moe.experts import GroupedLinear, weighted_swiglu

Tensor = torch.Tensor
EXPERTS, IN, OUT = 4, 6, 10
OFFSETS = torch.tensor([3, 3, 8, 9], dtype=torch.int32)
"""The second expert has no rows."""
EXPERT_OF_ROW = torch.tensor([0, 0, 0, 2, 2, 2, 2, 2, 3])
ROWS = EXPERT_OF_ROW.numel()
PARTS = [(2, RowBlock(0, 4), 2.0), (3, RowBlock(4, 10), 0.5)]
EXACT = 1e-12


def drawn(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def adapted(shared: bool, dropout: float = 0.0, dtype: torch.dtype = torch.float64) -> GroupedLora:
    base = GroupedLinear(EXPERTS, OUT, IN, dtype).requires_grad_(False)
    base.weight.copy_(drawn(EXPERTS, OUT, IN))
    parts = []
    for number, (rank, rows, scaling) in enumerate(PARTS):
        count = None if shared else EXPERTS
        part = GroupedLoraPart(rank, count, IN, rows, scaling, dtype, torch.device("cpu"))
        part.streams = [10 * number + expert for expert in range(1 if shared else EXPERTS)]
        with torch.no_grad():
            part.lora_a.copy_(drawn(*part.lora_a.shape, seed=2 * number + 1))
            part.lora_b.copy_(drawn(*part.lora_b.shape, seed=2 * number + 2))
        parts.append(part)
    return GroupedLora(base, parts, dropout, column=True)


def looped(layer: GroupedLora, x: Tensor, keys: Tensor | None = None) -> Tensor:
    """Row by row, each part apart."""
    outputs = []
    for row, expert in enumerate(EXPERT_OF_ROW.tolist()):
        output = layer.base_layer.weight[expert] @ x[row]
        for part in layer.parts:
            assert isinstance(part, GroupedLoraPart)
            number = 0 if part.is_shared else expert
            a = part.lora_a if part.is_shared else part.lora_a[expert]
            b = part.lora_b if part.is_shared else part.lora_b[expert]
            seen = x[row]
            if keys is not None:
                mask = keep_mask(keys[row : row + 1], part.streams[number], (0, IN), layer.dropout)[0]
                seen = seen * mask / kept_share(layer.dropout)
            places = torch.arange(part.rows.start, part.rows.stop)
            output = output.index_add(0, places, part.scaling * (b @ (a @ seen)))
        outputs.append(output)
    return torch.stack(outputs)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("shared", [False, True], ids=["", "shared"])
def test_it_is_the_loop(shared: bool, dropout: float) -> None:
    layer = adapted(shared, dropout)
    places = torch.arange(ROWS)
    keys = token_keys(7, 1, places, places) if dropout else None
    x, grad = drawn(ROWS, IN, seed=20).requires_grad_(), drawn(ROWS, OUT, seed=21)
    factors = [p for p in layer.parameters() if p.requires_grad]
    assert len(factors) == 4
    expected = looped(layer, x, keys)
    expected_grads = torch.autograd.grad((expected * grad).sum(), [x, *factors])
    found = layer(x, OFFSETS, keys)
    found_grads = torch.autograd.grad((found * grad).sum(), [x, *factors])
    torch.testing.assert_close(found, expected, rtol=EXACT, atol=EXACT)
    for ours, theirs in zip(found_grads, expected_grads, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=EXACT, atol=EXACT)
    if not shared:
        assert not found_grads[1][1].any(), "an expert without rows has a gradient of zero"


def test_no_rows_at_all() -> None:
    layer = adapted(shared=False)
    x = torch.empty(0, IN, dtype=torch.float64, requires_grad=True)
    layer(x, torch.zeros(EXPERTS, dtype=torch.int32)).sum().backward()
    for factor in (p for p in layer.parameters() if p.requires_grad):
        assert factor.grad is not None and not factor.grad.any()


def test_the_input_gradient_comes_before_the_factors() -> None:
    """What sends it on must not wait for the weight gradients of a call that was begun earlier."""
    told: list[str] = []
    layer = adapted(shared=False)
    x = drawn(ROWS, IN).requires_grad_()
    run = layer.begin()
    sent = x * 1.0  # made after the call was begun: stands for the end of the exchange
    sent.register_hook(lambda grad: told.append("input"))
    factor = layer.parts[0].lora_a
    factor.register_post_accumulate_grad_hook(lambda p: told.append("factor"))
    run(sent, OFFSETS).sum().backward()
    assert told == ["input", "factor"]


def test_the_input_is_computed_again_rather_than_kept() -> None:
    layer = adapted(shared=False)
    x, kept = drawn(ROWS, IN), []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.data_ptr())
        return tensor

    asked = []

    def again() -> Tensor:
        asked.append(1)
        return x.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = layer(x, OFFSETS, None, again)
    assert x.data_ptr() not in kept
    output.sum().backward()
    found = [p.grad.clone() for p in layer.parameters() if p.grad is not None]
    assert asked == [1] and len(found) == 4
    layer.zero_grad()
    layer(x, OFFSETS).sum().backward()
    for ours, theirs in zip(found, (p.grad for p in layer.parameters() if p.grad is not None), strict=True):
        assert torch.equal(ours, theirs)


def test_a_trained_weight_has_its_gradient() -> None:
    linear = GroupedLinear(EXPERTS, OUT, IN, torch.float64)
    with torch.no_grad():
        linear.weight.copy_(drawn(EXPERTS, OUT, IN))
    x, grad = drawn(ROWS, IN, seed=1).requires_grad_(), drawn(ROWS, OUT, seed=2)
    expected = torch.autograd.grad(
        (torch.einsum("rn,rmn->rm", x, linear.weight[EXPERT_OF_ROW]) * grad).sum(), [x, linear.weight]
    )
    found = torch.autograd.grad((linear(x, OFFSETS) * grad).sum(), [x, linear.weight])
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=EXACT, atol=EXACT)


def test_weighted_swiglu() -> None:
    gate_up, weights = drawn(ROWS, 8).requires_grad_(), drawn(ROWS, seed=3).requires_grad_()
    assert torch.autograd.gradcheck(weighted_swiglu, (gate_up, weights))
    gate, up = gate_up.chunk(2, dim=-1)
    expected = weights.unsqueeze(1) * gate * gate.sigmoid() * up
    torch.testing.assert_close(weighted_swiglu(gate_up, weights), expected, rtol=EXACT, atol=EXACT)
