"""The chunked cross entropy on one rank against torch's, in float64 where it can be."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from mindspeed_lora.models import vocab_loss
from mindspeed_lora.models.vocab_loss import IGNORED_LABEL, vocab_parallel_loss
from mindspeed_lora.parallel.groups import ParallelGroups

Tensor = torch.Tensor
VOCABULARY, HIDDEN = 23, 12


def make(
    n: int = 17, dtype: torch.dtype = torch.float64, rows: int = VOCABULARY, scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states ``[n, h]``, weight ``[rows, h]`` and labels ``[n]`` of which some carry no loss."""
    generator = torch.Generator().manual_seed(n)
    hidden = (torch.randn(n, HIDDEN, generator=generator, dtype=torch.float64) * scale).to(dtype)
    weight = torch.randn(rows, HIDDEN, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(0, VOCABULARY, (n,), generator=generator)
    labels[::4] = IGNORED_LABEL
    labels[1], labels[2] = 0, VOCABULARY - 1
    return hidden.requires_grad_(), weight.requires_grad_(), labels


def reference(hidden: Tensor, weight: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Loss and the gradients of hidden states and weight, in float64."""
    inputs = [tensor.detach().double().requires_grad_() for tensor in (hidden, weight[:VOCABULARY])]
    loss = F.cross_entropy(inputs[0] @ inputs[1].t(), labels, ignore_index=IGNORED_LABEL, reduction="sum")
    return loss.detach(), *torch.autograd.grad(loss, inputs)


def close(found: Tensor, expected: Tensor, tolerance: float = 2e-6) -> None:
    """Logits are taken to float32, so that float64 inputs agree to float32 rounding."""
    assert (found.double() - expected.double()).norm() <= tolerance * expected.double().norm()


def test_values_and_gradients(groups: ParallelGroups) -> None:
    hidden, weight, labels = make()
    loss = vocab_parallel_loss(hidden, weight, labels, (0, VOCABULARY), groups.tp_group)
    loss.backward()
    expected, grad_hidden, grad_weight = reference(hidden, weight, labels)
    assert loss.dtype is torch.float32 and loss.shape == ()
    close(loss, expected)
    close(hidden.grad, grad_hidden)
    close(weight.grad, grad_weight)
    assert torch.equal(hidden.grad[labels == IGNORED_LABEL], torch.zeros(5, HIDDEN, dtype=torch.float64))


def test_softcapped_logits(groups: ParallelGroups) -> None:
    hidden, weight, labels = make()
    loss = vocab_parallel_loss(hidden, weight, labels, (0, VOCABULARY), groups.tp_group, softcap=2.0)
    loss.backward()
    inputs = [tensor.detach().requires_grad_() for tensor in (hidden, weight)]
    capped = 2.0 * torch.tanh(inputs[0] @ inputs[1].t() / 2.0)
    expected = F.cross_entropy(capped, labels, ignore_index=IGNORED_LABEL, reduction="sum")
    close(loss, expected.detach())
    for found, right in zip((hidden.grad, weight.grad), torch.autograd.grad(expected, inputs), strict=True):
        close(found, right)


def test_the_gradient_is_scaled_by_what_comes_after(groups: ParallelGroups) -> None:
    hidden, weight, labels = make()
    (vocab_parallel_loss(hidden, weight, labels, (0, VOCABULARY), groups.tp_group) * 1024.0 / 3).backward()
    _, grad_hidden, grad_weight = reference(hidden, weight, labels)
    close(hidden.grad, grad_hidden * 1024 / 3)
    close(weight.grad, grad_weight * 1024 / 3)


@pytest.mark.parametrize("rows_of_a_chunk", [3, 100])
def test_weights_multiply_losses_and_gradients(
    groups: ParallelGroups, monkeypatch: pytest.MonkeyPatch, rows_of_a_chunk: int
) -> None:
    monkeypatch.setattr(vocab_loss, "LOGITS_BYTES", 4 * rows_of_a_chunk * VOCABULARY)
    hidden, weight, labels = make()
    weights = torch.linspace(0.2, 3, len(labels))
    loss = vocab_parallel_loss(hidden, weight, labels, (0, VOCABULARY), groups.tp_group, weights=weights)
    loss.backward()
    copy, matrix = (tensor.detach().clone().requires_grad_() for tensor in (hidden, weight))
    losses = torch.nn.functional.cross_entropy(
        copy @ matrix.t(), labels, ignore_index=IGNORED_LABEL, reduction="none"
    )
    (losses * weights).sum().backward()
    close(loss, (losses * weights).sum())
    close(hidden.grad, copy.grad)
    close(weight.grad, matrix.grad)


@pytest.mark.parametrize("rows_of_a_chunk", [1, 4, 13, 100])
def test_chunks_add_up(groups: ParallelGroups, monkeypatch: pytest.MonkeyPatch, rows_of_a_chunk: int) -> None:
    monkeypatch.setattr(vocab_loss, "LOGITS_BYTES", 4 * rows_of_a_chunk * VOCABULARY)
    hidden, weight, labels = make(n=18)
    loss = vocab_parallel_loss(hidden, weight, labels, (0, VOCABULARY), groups.tp_group)
    loss.backward()
    expected, grad_hidden, grad_weight = reference(hidden, weight, labels)
    close(loss, expected)
    close(hidden.grad, grad_hidden)
    close(weight.grad, grad_weight)


def test_a_chunk_never_holds_more_logits_than_it_may(
    groups: ParallelGroups, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []
    inner = vocab_loss._cross_entropy

    def watched(hidden: Tensor, *rest: object) -> tuple[Tensor, Tensor]:
        seen.append(len(hidden))
        return inner(hidden, *rest)

    monkeypatch.setattr(vocab_loss, "LOGITS_BYTES", 4 * (5 * VOCABULARY + 4))
    monkeypatch.setattr(vocab_loss, "_cross_entropy", watched)
    hidden, weight, labels = make()
    vocab_parallel_loss(hidden, weight, labels, (0, VOCABULARY), groups.tp_group)
    assert seen == [5, 5, 2], "12 of the 17 positions carry loss, and no other is computed"


def test_padding_rows_take_no_part(groups: ParallelGroups) -> None:
    hidden, weight, labels = make(rows=VOCABULARY + 9)
    with torch.no_grad():
        weight[VOCABULARY:] = 1e4
    loss = vocab_parallel_loss(hidden, weight, labels, (0, VOCABULARY), groups.tp_group)
    loss.backward()
    expected, grad_hidden, grad_weight = reference(hidden, weight, labels)
    close(loss, expected)
    close(hidden.grad, grad_hidden)
    close(weight.grad[:VOCABULARY], grad_weight)
    assert not weight.grad[VOCABULARY:].any()


def test_no_loss_carrying_position_is_zero_with_a_zero_gradient(groups: ParallelGroups) -> None:
    hidden, weight, _ = make()
    labels = torch.full((17,), IGNORED_LABEL)
    loss = vocab_parallel_loss(hidden, weight, labels, (0, VOCABULARY), groups.tp_group)
    loss.backward()
    assert loss.item() == 0.0 and loss.dtype is torch.float32
    assert torch.equal(hidden.grad, torch.zeros_like(hidden))
    assert torch.equal(weight.grad, torch.zeros_like(weight)), "other ranks may have one, and reduce it now"


def test_a_frozen_weight_gets_no_gradient(groups: ParallelGroups) -> None:
    hidden, weight, labels = make()
    weight.requires_grad_(False)
    vocab_parallel_loss(hidden, weight, labels, (0, VOCABULARY), groups.tp_group).backward()
    close(hidden.grad, reference(hidden, weight, labels)[1])
    assert weight.grad is None


def test_without_gradients_the_value_is_the_same(groups: ParallelGroups) -> None:
    hidden, weight, labels = make()
    with torch.no_grad():
        loss = vocab_parallel_loss(hidden, weight, labels, (0, VOCABULARY), groups.tp_group)
    close(loss, reference(hidden, weight, labels)[0])


def test_large_logits_do_not_overflow(groups: ParallelGroups) -> None:
    hidden, weight, labels = make(scale=300.0)
    loss = vocab_parallel_loss(hidden, weight, labels, (0, VOCABULARY), groups.tp_group)
    loss.backward()
    expected, grad_hidden, _ = reference(hidden, weight, labels)
    close(loss, expected)
    close(hidden.grad, grad_hidden, tolerance=1e-4)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
def test_half_precision_sums_in_float32(groups: ParallelGroups, dtype: torch.dtype, tolerance: float) -> None:
    hidden, weight, labels = make(n=400, dtype=dtype)
    loss = vocab_parallel_loss(hidden, weight, labels, (0, VOCABULARY), groups.tp_group)
    loss.backward()
    expected, grad_hidden, grad_weight = reference(hidden, weight, labels)
    assert loss.dtype is torch.float32, "1,000 and more would lose its fraction in half precision"
    assert hidden.grad.dtype is weight.grad.dtype is dtype
    close(loss, expected, tolerance / 5)
    close(hidden.grad, grad_hidden, tolerance)
    close(weight.grad, grad_weight, tolerance)


def test_the_sum_over_many_positions_keeps_float32_precision(groups: ParallelGroups) -> None:
    """Summed one after the other in float32, 200,000 losses would drift by 1e-4 and more."""
    labels = torch.zeros(200_000, dtype=torch.int64)
    hidden = torch.ones(200_000, 1)
    weight = torch.tensor([[0.1], [0.3]])
    loss = vocab_parallel_loss(hidden, weight, labels, (0, 2), groups.tp_group)
    one = F.cross_entropy(torch.tensor([[0.1, 0.3]]), torch.tensor([0])).item()
    assert loss.item() == pytest.approx(200_000 * one, rel=3e-7)
