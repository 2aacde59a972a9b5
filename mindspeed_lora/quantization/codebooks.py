"""The tables behind the codes: NF4 and FP4 (four bits), and the dynamic map of nested statistics (eight bits).

NF4: Dettmers et al., `QLoRA <https://arxiv.org/abs/2305.14314>`_, appendix E. FP4: sign, two bits of exponent, one of
mantissa, scaled to one. Dynamic map: Dettmers, `8-bit approximations for parallelism in deep learning
<https://arxiv.org/abs/1511.04561>`_, section 3. The values are those that bitsandbytes' files hold.
"""

from __future__ import annotations

from functools import cache

import torch

Tensor = torch.Tensor

NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
"""What each of the sixteen codes of NF4 stands for, in units of its block's largest magnitude."""

_FP4_TWELFTHS = (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
"""The magnitudes of FP4's codes 0 to 7; codes 8 to 15 are their negatives."""

_SORTED_FP4 = (11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3)
"""FP4's codes in the order of their values; of the two zeros, 0 takes what is not above zero and 8 what is."""

_DYNAMIC_EXPONENTS = 7
"""How many decades the dynamic map spans; each has twice as many values as the one below it."""


@cache
def four_bit_values(kind: str, device: torch.device) -> Tensor:
    """``float32 [16]``: what each code of ``kind`` (nf4, fp4) stands for.

    FP4's code 8 is minus zero, as bitsandbytes' kernels decode it; its files hold ``four_bit_values() + 0.0``.
    """
    if kind == "nf4":
        return torch.tensor(NF4, device=device)
    magnitudes = torch.tensor(_FP4_TWELFTHS) / 12.0
    return torch.cat([magnitudes, -magnitudes]).to(device)


@cache
def four_bit_codes(kind: str) -> tuple[int, ...]:
    """The codes of ``kind`` in ascending order of their values."""
    return tuple(range(16)) if kind == "nf4" else _SORTED_FP4


@cache
def four_bit_bounds(kind: str) -> Tensor:
    """``float32 [15]``: the midpoints of neighbouring values; a number on a midpoint takes the lower code."""
    ordered = four_bit_values(kind, torch.device("cpu"))[list(four_bit_codes(kind))]
    return (ordered[:-1] + ordered[1:]) / 2


@cache
def dynamic_values(device: torch.device) -> Tensor:
    """``float32 [256]``: what each code of the signed dynamic map stands for, ascending."""
    values = [0.0, 1.0]
    for decade in range(_DYNAMIC_EXPONENTS):
        boundaries = torch.linspace(0.1, 1, 2**decade + 1, dtype=torch.float32)
        means = (boundaries[:-1] + boundaries[1:]) / 2.0
        scale = 10 ** (decade - _DYNAMIC_EXPONENTS + 1)
        values += (scale * means).tolist() + (-scale * means).tolist()
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


@cache
def dynamic_lookup() -> Tensor:
    """``uint8 [65536]``: the code of the dynamic map for each of 65536 even steps from -1 to 1.

    bitsandbytes quantises on the CPU over this grid, and not to the nearest of the values: those below the grid's
    step share a code.
    """
    values = dynamic_values(torch.device("cpu"))
    midpoints = (values[:-1] + values[1:]) * 0.5
    steps = torch.arange(65536, dtype=torch.float32)
    return torch.bucketize((steps + steps) / 65535.0 - 1.0, midpoints).to(torch.uint8)
