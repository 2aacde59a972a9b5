"""Core attention against a softmax written out, head by head and position by position."""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass, field

import pytest
import torch
from megatron.core.transformer import TransformerConfig

from mindspeed_lora.models.attention import CoreAttention
from mindspeed_lora.models.forward_context import ForwardContext
from mindspeed_lora.parallel.groups import ParallelGroups

Tensor = torch.Tensor


def attention(
    window: int | None = None, dropout: float = 0.0, scale: float | None = None, heads: int = 4
) -> CoreAttention:
    config = TransformerConfig(
        num_layers=1, hidden_size=8 * heads, num_attention_heads=heads, attention_dropout=dropout
    )
    return CoreAttention(
        config,
        layer_number=1,
        attn_mask_type=None,
        attention_type="self",
        softmax_scale=scale,
        sliding_window=window,
        cp_comm_type=None,
    )


def random_qkv(
    s: int = 7, b: int = 2, n: int = 4, g: int = 4, d: int = 8, value_width: int = 8
) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(s * 100 + n * 10 + g)
    sizes = ((n, d), (g, d), (g, value_width))
    make = [torch.randn(s, b, *size, generator=generator, dtype=torch.float64) for size in sizes]
    return make[0].requires_grad_(), make[1].requires_grad_(), make[2].requires_grad_()


def naive(q: Tensor, k: Tensor, v: Tensor, window: int | None = None, scale: float | None = None) -> Tensor:
    """``softmax(q kᵀ / √d) v`` for ``q [s, b, n, d]``, ``k [s, b, g, d]``, ``v [s, b, g, w]``.

    Query head i reads head i·g/n.
    """
    s, b, n, d = q.shape
    repeat = n // k.size(2)
    out = torch.zeros(s, b, n, v.size(-1), dtype=q.dtype)
    for head in range(n):
        for i in range(s):
            first = 0 if window is None else max(0, i - window + 1)
            keys, values = k[first : i + 1, :, head // repeat], v[first : i + 1, :, head // repeat]
            scores = torch.einsum("bd,tbd->tb", q[i, :, head], keys) * (scale or 1 / math.sqrt(d))
            out[i, :, head] = torch.einsum("tb,tbd->bd", scores.softmax(dim=0), values)
    return out.flatten(2)


@pytest.mark.parametrize("groups", [1, 2, 4], ids=["one KV head", "grouped", "as many KV heads"])
@pytest.mark.parametrize("window", [None, 1, 3, 7, 20])
def test_values_and_gradients(groups: int, window: int | None) -> None:
    inputs = random_qkv(g=groups)
    weights = torch.randn(7, 2, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = naive(*inputs, window=window)
    wanted = torch.autograd.grad((expected * weights).sum(), inputs)
    found = attention(window)(*inputs)
    gradients = torch.autograd.grad((found * weights).sum(), inputs)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for gradient, want in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("value_width", [3, 11])
@pytest.mark.parametrize(("s", "window"), [(7, None), (7, 3), (130, None)])
def test_values_of_another_width(s: int, window: int | None, value_width: int) -> None:
    """By one kernel call, by merged ones, and by blocks of queries."""
    inputs = random_qkv(s=s, b=1, value_width=value_width)
    expected = naive(*inputs, window=window)
    weights = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    wanted = torch.autograd.grad((expected * weights).sum(), inputs)
    found = attention(window)(*inputs)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    gradients = torch.autograd.grad((found * weights).sum(), inputs)
    for gradient, want in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, want, rtol=1e-10, atol=1e-12)


def test_scale_can_be_given() -> None:
    inputs = random_qkv()
    torch.testing.assert_close(attention(scale=0.3)(*inputs), naive(*inputs, scale=0.3))


def test_padding_on_the_right_does_not_reach_real_tokens() -> None:
    q, k, v = random_qkv(s=6)
    whole = attention()(q, k, v)
    changed = [tensor.detach().clone() for tensor in (q, k, v)]
    for tensor in changed:
        tensor[4:] = 1e3
    assert torch.equal(attention()(*changed)[:4], whole[:4])


def test_dropout_is_for_training_only(groups: ParallelGroups) -> None:
    inputs = random_qkv()
    module = attention(dropout=0.5)
    module.eval()
    torch.testing.assert_close(module(*inputs), naive(*inputs))
    module.train()
    torch.manual_seed(0)
    first = module(*inputs)
    assert not torch.allclose(first, naive(*inputs))
    assert not torch.equal(first, module(*inputs))


def test_one_token_attends_to_itself() -> None:
    q, k, v = random_qkv(s=1, g=2)
    torch.testing.assert_close(
        attention()(q, k, v), v.repeat_interleave(2, dim=2).reshape(1, 2, 32), rtol=1e-12, atol=0
    )


SUB_ROWS = ((3, 4, 2), (9,))


@pytest.mark.parametrize("groups", [1, 2, 4], ids=["one KV head", "grouped", "as many KV heads"])
@pytest.mark.parametrize("window", [None, 1, 2, 4, 20])
def test_packed_rows_are_the_rows_alone(groups: int, window: int | None) -> None:
    """Values and gradients; a key or query of another sub-row changes neither."""
    inputs = random_qkv(s=9, g=groups)
    weights = torch.randn(9, 2, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = torch.zeros_like(weights)
    for row, lengths in enumerate(SUB_ROWS):
        stops = list(itertools.accumulate(lengths, initial=0))
        for start, stop in itertools.pairwise(stops):
            alone = [tensor[start:stop, row : row + 1] for tensor in inputs]
            expected[start:stop, row] = naive(*alone, window=window)[:, 0]
    wanted = torch.autograd.grad((expected * weights).sum(), inputs)
    found = attention(window)(*inputs, packed_seq_params=ForwardContext(sub_rows=SUB_ROWS))
    gradients = torch.autograd.grad((found * weights).sum(), inputs)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    for gradient, want in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(gradient, want, rtol=1e-10, atol=1e-12)


def test_packed_rows_of_several_rows_are_the_same_bits() -> None:
    """The kernel is called for each sub-row as it would be for the row alone."""
    lengths = (70, 33, 150)
    inputs = [tensor.detach().float() for tensor in random_qkv(s=sum(lengths), b=1, g=2)]
    packed = attention()(*inputs, packed_seq_params=ForwardContext(sub_rows=(lengths,)))
    alone = [attention()(*parts) for parts in zip(*(t.split(lengths) for t in inputs), strict=True)]
    assert torch.equal(packed, torch.cat(alone))


def test_dropout_of_packed_rows_stays_inside(groups: ParallelGroups) -> None:
    """With values of 1, a row of weights that is dropped nowhere sums to 1; kept ones are scaled by 2."""
    q, k, _ = random_qkv(s=9)
    value = torch.zeros(9, 2, 4, 8, dtype=torch.float64)
    value[3:7, 0] = 1.0
    value.requires_grad_()
    module = attention(dropout=0.5)
    torch.manual_seed(0)
    found = module(q, k, value, packed_seq_params=ForwardContext(sub_rows=SUB_ROWS)).view(9, 2, 4, 8)
    assert not found[:3].any() and not found[7:].any() and not found[:, 1].any()
    assert 0.2 < float(found[3:7, 0].detach().mean()) < 1.8 and len(found[3:7, 0].unique()) > 5
    (grad,) = torch.autograd.grad(found.sum(), value)
    assert grad.any()


@dataclass
class GrowingCache:
    """Keys and values of all tokens so far; the mask is given where more than one token comes at once."""

    keys: list[Tensor] = field(default_factory=list)
    values: list[Tensor] = field(default_factory=list)

    def extend(self, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        before = sum(len(part) for part in self.keys)
        self.keys.append(key)
        self.values.append(value)
        new, total = key.size(0), before + key.size(0)
        mask = None
        if before and new > 1:
            seen = torch.arange(total) <= torch.arange(before, total).unsqueeze(1)
            mask = seen.expand(key.size(1), 1, new, total)
        return torch.cat(self.keys), torch.cat(self.values), mask


@pytest.mark.parametrize("window", [None, 1, 2, 4])
@pytest.mark.parametrize("pieces", [[1] * 7, [4, 1, 1, 1], [3, 4], [2, 3, 1, 1]], ids=str)
def test_tokens_that_come_in_pieces_attend_to_the_cache(pieces: list[int], window: int | None) -> None:
    q, k, v = random_qkv(g=2)
    module = attention(window)
    module.cache = GrowingCache()
    parts = [module(*three) for three in zip(q.split(pieces), k.split(pieces), v.split(pieces), strict=True)]
    torch.testing.assert_close(torch.cat(parts), naive(q, k, v, window=window), rtol=1e-12, atol=1e-12)


def test_without_the_cache_nothing_is_left_of_it() -> None:
    q, k, v = random_qkv()
    module = attention()
    module.cache = GrowingCache()
    module(q, k, v)
    module.cache = None
    torch.testing.assert_close(module(q, k, v), naive(q, k, v))


def test_dtype_is_the_query_s() -> None:
    q, k, v = (tensor.detach().bfloat16() for tensor in random_qkv())
    out = attention()(q, k, v)
    assert out.dtype is torch.bfloat16
    torch.testing.assert_close(out.double(), naive(q.double(), k.double(), v.double()), rtol=0, atol=0.03)
