"""Numbers to codes: four bits in blocks, eight bits in rows.

Work goes tile by tile over buffers of a fixed size, so that what is between numbers and codes stays in the cache; on
CPUs with a C compiler by one function (:mod:`~mindspeed_lora.quantization.native`).

A number divided by its block's magnitude, ``v`` in [-1, 1], takes the code of as many midpoints as are below it. For
NF4 that is looked up (:class:`_FixedPoint`), since a search among fifteen midpoints costs ten times as much.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch

from mindspeed_lora.quantization.codebooks import four_bit_bounds, four_bit_codes
from mindspeed_lora.quantization.native import block_encoder

Tensor = torch.Tensor

_SMALLEST = 1e-38
"""A magnitude below this is taken for it where it divides."""

_TILE = 1 << 18
"""Numbers that are encoded at a time, a multiple of every block size; with fewer, calls take longer than work."""

_WORTH_BUILDING = 1 << 20
"""Numbers of a matrix from where on the C function is built, which takes a second, once on a machine."""


def encode_four_bits(numbers: Tensor, kind: str, block_size: int) -> tuple[Tensor, Tensor]:
    """Of ``numbers [n]`` the codes, uint8 ``[ceil(n / 2), 1]``, and magnitudes, float32 ``[ceil(n / block)]``."""
    size = numbers.numel()
    codes = torch.empty((size + 1) // 2, dtype=torch.uint8, device=numbers.device)
    absmax = torch.empty((size + block_size - 1) // block_size, dtype=torch.float32, device=numbers.device)
    whole = size // block_size * block_size
    on_cpu = numbers.device.type == "cpu"
    native = block_encoder(kind) if on_cpu and numbers.is_contiguous() and size >= _WORTH_BUILDING else None

    def encode(tiles: range) -> None:
        encoder = None if native else _FourBits(kind, block_size, numbers.device, min(_TILE, size))
        for first in tiles:
            last = min(first + _TILE, whole)
            tile, magnitudes = numbers[first:last], absmax[first // block_size : last // block_size]
            halves = codes[first // 2 : last // 2]
            if encoder is not None:
                encoder.encode(tile, magnitudes, halves)
            elif native is not None:
                native(tile.float() if tile.dtype == torch.float16 else tile, block_size, magnitudes, halves)

    tiles = range(0, whole, _TILE)
    workers = min(torch.get_num_threads(), len(tiles)) if on_cpu else 1
    _in_threads(encode, [tiles[first::workers] for first in range(workers)])
    if whole < size:
        _encode_last(numbers[whole:], kind, absmax[-1], codes[whole // 2 :])
    return codes.unsqueeze(1), absmax


def _in_threads(work: Callable[[range], None], parts: Sequence[range]) -> None:
    """Each part in a thread of its own, which is twice as fast as the threads inside of each small call."""
    if len(parts) < 2:
        for part in parts:
            work(part)
        return
    threads = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(len(parts), "encoding", torch.set_num_threads, (1,)) as pool:
            deque(pool.map(work, parts), maxlen=0)
    finally:
        torch.set_num_threads(threads)  # of the products' library, which has one number for all threads


def encode_rows(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Codes ``int8 [out, in]`` and magnitudes ``float32 [out]`` of ``matrix [out, in]``."""
    codes = torch.empty(matrix.shape, dtype=torch.int8, device=matrix.device)
    absmax = torch.empty(matrix.size(0), dtype=torch.float32, device=matrix.device)
    step = max(1, _TILE // max(1, matrix.size(1)))
    for first in range(0, matrix.size(0), step):
        some = slice(first, first + step)
        rows = matrix[some].float()
        torch.amax(rows.abs(), 1, out=absmax[some])
        # Reciprocal, then 127: rounded twice, as bitsandbytes does. A row of zeros makes NaN, and is zero.
        factors = (absmax[some].reciprocal() * 127.0).unsqueeze(1)
        codes[some] = (rows * factors).round_().nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
    return codes, absmax


class _FourBits:
    """Encodes tiles; its buffers are used again for each."""

    def __init__(self, kind: str, block_size: int, device: torch.device, size: int) -> None:
        self.kind, self.block_size = kind, block_size
        self.numbers, self.scaled = (torch.empty(size, dtype=torch.float32, device=device) for _ in range(2))
        self.lookup = _FixedPoint(size, device) if kind == "nf4" else None

    def encode(self, numbers: Tensor, absmax: Tensor, codes: Tensor) -> None:
        """Whole blocks: ``numbers [n]`` to ``absmax [n / block]`` and ``codes [n / 2]``."""
        size = numbers.numel()
        scaled = self.scaled[:size].view(-1, self.block_size)
        if numbers.dtype != torch.float32:
            numbers = self.numbers[:size].copy_(numbers)
        blocks = numbers.view(-1, self.block_size)
        torch.amax(blocks, 1, out=absmax)
        torch.maximum(absmax, blocks.amin(1).neg_(), out=absmax).abs_()  # minus zero is zero
        factors = absmax.clamp(min=_SMALLEST).reciprocal_()
        if self.lookup is not None and self.lookup.takes(absmax):
            torch.mul(blocks, self.lookup.factors(factors).unsqueeze(1), out=scaled)
            self.lookup.encode(scaled.view(-1), codes)
        else:
            torch.mul(blocks, factors.unsqueeze(1), out=scaled)
            _search(scaled.view(-1), self.kind, codes)


def _encode_last(numbers: Tensor, kind: str, absmax: Tensor, codes: Tensor) -> None:
    """Less than a block: bitsandbytes divides it by its magnitude, which it keeps at the smallest at least."""
    numbers = numbers.float()
    torch.clamp(numbers.abs().amax(), min=_SMALLEST, out=absmax)
    scaled = numbers / absmax
    _search(torch.nn.functional.pad(scaled, (0, scaled.numel() % 2)), kind, codes)


def _search(scaled: Tensor, kind: str, codes: Tensor) -> None:
    """Codes ``uint8 [n / 2]`` of ``scaled [n]`` by comparison with each midpoint."""
    below = torch.zeros(scaled.shape, dtype=torch.uint8, device=scaled.device)
    for bound in four_bit_bounds(kind).tolist():
        below.add_(scaled > bound)
    order = torch.tensor(four_bit_codes(kind), dtype=torch.uint8, device=scaled.device)
    found = order.index_select(0, below.int()).view(-1, 2)
    torch.bitwise_or(found[:, 0] << 4, found[:, 1], out=codes)


class _FixedPoint:
    """NF4's codes by integers: ``t = v · 2²⁹``, exact wherever a midpoint is near.

    The midpoints' magnitudes are above 2⁻⁶, where floats are multiples of 2⁻²⁹. The upper bits of t name one of about
    a thousand cells, which has at most one midpoint m; what the cell's table entry adds to t carries into the uppermost
    byte when t is above m, so that this byte is the code.
    """

    _SCALE = 2.0**29
    _CELL = 20
    """Bits of t that do not name the cell."""
    _OFFSET = (1 << 29) + (1 << _CELL)
    """Makes t positive, also where v is a rounding below -1."""
    _TINY = 2.0**-97
    """Magnitudes below it (but for zero) have no finite factor."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.steps, self.cells, self.added = (
            torch.empty(size, dtype=torch.int32, device=device) for _ in range(3)
        )
        self.table = self._table().to(device)

    @classmethod
    @cache
    def _table(cls) -> Tensor:
        """int32, one entry for each cell: what carries t past the codes of the midpoints below it."""
        midpoints = (four_bit_bounds("nf4").double() * cls._SCALE).long() + cls._OFFSET
        cells = torch.arange((2 * cls._OFFSET >> cls._CELL) + 1)
        last = ((cells + 1) << cls._CELL) - 1
        below = torch.bucketize(cells << cls._CELL, midpoints)
        within = torch.nn.functional.pad(midpoints, (0, 1), value=2**40)[below].minimum(last)
        return (((below + 1) << 24) - 1 - within).int()

    def takes(self, absmax: Tensor) -> bool:
        """Whether blocks with these magnitudes, which may be NaN or infinite, can be divided so."""
        smallest, largest = (magnitude.item() for magnitude in absmax.aminmax())
        if smallest == 0.0:
            smallest = absmax.masked_fill(absmax == 0.0, math.inf).amin().item()
        return smallest >= self._TINY and largest < math.inf

    def factors(self, reciprocals: Tensor) -> Tensor:
        """What blocks are multiplied by in place of ``reciprocals``."""
        return reciprocals.clamp_(max=1 / self._TINY).mul_(self._SCALE)

    def encode(self, scaled: Tensor, codes: Tensor) -> None:
        """``t [n]`` as floats to ``codes [n / 2]``."""
        size = scaled.numel()
        steps, cells, added = self.steps[:size], self.cells[:size], self.added[:size]
        steps.copy_(scaled).add_(self._OFFSET)
        torch.bitwise_right_shift(steps, self._CELL, out=cells)
        torch.index_select(self.table, 0, cells, out=added)
        pairs = steps.add_(added).view(torch.int64).bitwise_and_(0x0F0000000F000000)
        # The even number's code is in bits 24 to 27, the odd one's in 56 to 59; bytes keep what comes to bits 0 to 7.
        odd = torch.bitwise_right_shift(pairs, 56, out=added.view(torch.int64))
        codes.copy_(pairs.bitwise_right_shift_(20).bitwise_or_(odd))
