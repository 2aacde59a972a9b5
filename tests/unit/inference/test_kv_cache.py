"""What the cache lets a token see, and that it holds every token once."""

from __future__ import annotations

import gc
import weakref

import torch

from mindspeed_lora.inference.kv_cache import KeyValueCache, LayerCache


def keys(first: int, count: int, rows: int = 2) -> torch.Tensor:
    """``[s, b, 1, 1]``: the number of the slot, plus 100 for each row."""
    slots = torch.arange(first, first + count).view(-1, 1, 1, 1)
    return (slots + 100 * torch.arange(rows).view(1, -1, 1, 1)).float()


def test_rows_of_equal_length_need_no_mask() -> None:
    cache = KeyValueCache(torch.zeros(2, dtype=torch.int64), capacity=5)
    layer = LayerCache(cache, None)
    assert cache.advance(3).tolist() == [0, 1, 2]
    layer.extend(keys(0, 3), keys(0, 3))
    assert cache.advance(1).tolist() == [3]
    found, values, mask = layer.extend(keys(3, 1), -keys(3, 1))
    assert torch.equal(found, keys(0, 4)) and mask is None
    assert values[3].tolist() == (-keys(3, 1))[0].tolist()


def test_padding_is_seen_by_itself_alone() -> None:
    cache = KeyValueCache(torch.tensor([0, 2]), capacity=4)
    layer = LayerCache(cache, None)
    assert cache.advance(3).tolist() == [[0, 1, 2], [0, 0, 0]]
    _, _, mask = layer.extend(keys(0, 3), keys(0, 3))
    assert mask is not None
    assert mask[0, 0].int().tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert mask[1, 0].int().tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
    assert cache.advance(1).tolist() == [[3], [1]]
    _, _, mask = layer.extend(keys(3, 1), keys(3, 1))
    assert mask is not None and mask[:, 0, 0].int().tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]


def test_one_token_of_a_windowed_layer_gets_the_window() -> None:
    cache = KeyValueCache(torch.tensor([0, 1]), capacity=6)
    layer = LayerCache(cache, sliding_window=3)
    cache.advance(4)
    found, _, _ = layer.extend(keys(0, 4), keys(0, 4))
    assert found.size(0) == 4
    cache.advance(1)
    found, _, mask = layer.extend(keys(4, 1), keys(4, 1))
    assert torch.equal(found, keys(2, 3))
    assert mask is not None and mask.shape == (2, 1, 1, 3)


def test_rows_that_begin_alike_share_their_beginning() -> None:
    beginning = KeyValueCache(torch.zeros(1, dtype=torch.int64), capacity=2)
    first = LayerCache(beginning, None)
    beginning.layers = [first]
    beginning.advance(2)
    first.extend(keys(0, 2, rows=1), keys(0, 2, rows=1))
    cache = beginning.branch(torch.tensor([0, 1]), capacity=6)
    (layer,) = cache.layers
    assert cache.advance(2).tolist() == [[2, 3], [2, 2]]
    found, _, mask = layer.extend(keys(2, 2), keys(2, 2))
    assert found[:2, :, 0, 0].tolist() == [[0, 0], [1, 1]]
    assert mask is not None
    assert mask[0, 0].int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]
    assert mask[1, 0].int().tolist() == [[1, 1, 1, 0], [1, 1, 0, 1]]
    cache.select(torch.tensor([1, 1, 0]))
    assert cache.advance(2).tolist() == [[3, 4], [3, 4], [4, 5]]
    found, _, mask = layer.extend(keys(4, 2, rows=3), keys(4, 2, rows=3))
    assert found[2, :, 0, 0].tolist() == [102, 102, 2] and mask is not None
    assert mask[1, 0].int().tolist() == [[1, 1, 0, 1, 1, 0], [1, 1, 0, 1, 1, 1]]


def test_several_tokens_behind_others_see_what_is_before_them() -> None:
    cache = KeyValueCache(torch.zeros(2, dtype=torch.int64), capacity=5)
    layer = LayerCache(cache, None)
    cache.advance(2)
    layer.extend(keys(0, 2), keys(0, 2))
    assert cache.advance(2).tolist() == [2, 3]
    _, _, mask = layer.extend(keys(2, 2), keys(2, 2))
    assert mask is not None and mask[0, 0].int().tolist() == [[1, 1, 1, 0], [1, 1, 1, 1]]


def test_a_cache_is_gone_with_its_last_reader() -> None:
    """Without the collector of cycles, which may come batches later."""
    cache = KeyValueCache(torch.zeros(2, dtype=torch.int64), capacity=3)
    cache.layers = [LayerCache(cache, None)]
    cache.advance(3)
    cache.layers[0].extend(keys(0, 3), keys(0, 3))
    gone = weakref.ref(cache)
    gc.disable()
    try:
        del cache
        assert gone() is None
    finally:
        gc.enable()
