"""Dropout masks as a function of what they are for, never of how the job is cut.

An element is dropped by a hash of (seed, step, sample of the run, position in it, the factor A that reads it, its
feature in the whole matrix): the same bits in every layout, micro-batch and packing, under recomputation and after
a resume in another layout. The hash is integer arithmetic alone, so that every device gives the same bits.

A token's key is made once a micro-batch by the finaliser of splitmix64 (Steele et al. 2014, doi
10.1145/2660193.2660195). Element-wise work is kept to few passes: token and feature are joined by an exclusive or,
mixed by two multiplications (as in murmur3's finaliser), and each 32-bit word decides on two features by 16 bits.
"""

from __future__ import annotations

import hashlib

import torch

Tensor = torch.Tensor

_GOLDEN = -7046029254386353131
"""2⁶⁴ / golden ratio, as int64."""
_MIX = (-4658895280553007687, -7723592293110705685)
"""Multipliers of splitmix64's finaliser, as int64."""
_WORD_MIX = (-2048144789, -1028477387)
"""Multipliers of murmur3's 32-bit finaliser, as int32."""


def token_keys(seed: int, step: int, samples: Tensor, positions: Tensor) -> Tensor:
    """Keys int64, of the shape of ``samples`` and ``positions``: the sample of the run, and the place in it."""
    start = torch.full((), seed, dtype=torch.int64, device=samples.device)
    key = _mixed(start * _GOLDEN + step)
    key = _mixed(key + samples.to(torch.int64) * _GOLDEN)
    return _mixed(key + positions.to(torch.int64) * _GOLDEN)


def stream_of(name: str) -> int:
    """The number that sets one factor A, by its canonical name, apart from all others."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little", signed=True)


def keep_mask(keys: Tensor, stream: int, features: tuple[int, int], p: float) -> Tensor:
    """Which elements stay: bool ``[T, stop − start]``, each True with probability ``1 − p`` (to 2⁻¹⁶).

    Args:
        keys: ``[T]`` int64.
        stream: of the factor that reads the elements.
        features: first feature of this rank's shard in the whole matrix, and the end.
        p: share of elements that are dropped.
    """
    start, stop = features
    first_word, last_word = start // 2, (stop + 1) // 2
    words = torch.arange(first_word, last_word, dtype=torch.int64, device=keys.device)
    rows, columns = _word(keys + stream), _word(words * _GOLDEN)
    word = (rows.unsqueeze(1) ^ columns).mul_(_WORD_MIX[0])
    # The shift brings in copies of the sign; without them the sign would cancel itself.
    word.bitwise_xor_((word >> 15).bitwise_and_(0x1FFFF)).mul_(_WORD_MIX[1])
    halves = word.view(torch.int16)
    # A product's low bits depend on few bits of its factors, its high bits on all.
    halves[:, 0::2].bitwise_xor_(halves[:, 1::2])
    halves = halves[:, start - 2 * first_word : stop - 2 * first_word]
    return halves >= round(p * 65536) - 32768


def kept_share(p: float) -> float:
    """The probability with which :func:`keep_mask` keeps an element."""
    return 1.0 - round(p * 65536) / 65536


def _mixed(key: Tensor) -> Tensor:
    """Every bit of int64 ``key`` spread over all bits."""
    key = (key ^ _shifted(key, 30)) * _MIX[0]
    key = (key ^ _shifted(key, 27)) * _MIX[1]
    return key ^ _shifted(key, 31)


def _shifted(key: Tensor, bits: int) -> Tensor:
    """int64 shifted to the right, zeros coming in."""
    return (key >> bits) & ((1 << (64 - bits)) - 1)


def _word(key: Tensor) -> Tensor:
    """32 mixed bits of int64 ``key``, int32."""
    return (_mixed(key) >> 32).to(torch.int32)
