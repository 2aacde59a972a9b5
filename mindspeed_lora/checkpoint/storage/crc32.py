"""CRC-32 of a whole from those of its parts, so that parts may be written in any order, by several threads.

A checksum is the remainder of a polynomial over GF(2) (bits reflected, polynomial 0xEDB88320, as zip has it).
Appending n bytes multiplies it by x^(8 n), which is formed by repeated squaring.
"""

from __future__ import annotations

import functools

_POLYNOMIAL = 0xEDB88320
_ONE = 1 << 31


def combine(first: int, second: int, second_bytes: int) -> int:
    """The checksum of A followed by B, from that of A, that of B and the length of B in bytes."""
    return _multiply(_power(second_bytes), first) ^ second


def _multiply(one: int, two: int) -> int:
    """The product of two polynomials modulo the polynomial of CRC-32."""
    product = 0
    while one:
        if one & _ONE:
            product ^= two
        one = (one << 1) & 0xFFFFFFFF
        two = (two >> 1) ^ _POLYNOMIAL if two & 1 else two >> 1
    return product


@functools.lru_cache(maxsize=1024)
def _power(count: int) -> int:
    """x^(8 · count)."""
    result, square = _ONE, _ONE >> 8
    while count:
        if count & 1:
            result = _multiply(square, result)
        square = _multiply(square, square)
        count >>= 1
    return result
