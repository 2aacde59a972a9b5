"""The result of ``verify``, as text and as JSON.

The text ends with one line that starts with ``equal``, ``equal within``, ``different``, ``damaged`` or ``intact``.
``--json`` prints one object:

* ``verdict``: ``equal`` (bit by bit), ``within tolerance``, ``different``, ``damaged`` (a checksum does not fit; then
  nothing is compared), or ``intact`` (only one folder was given, and its checksums fit); ``damage``: the sentence;
* ``sides``: of each its ``path``, what it ``is``, and ``checksums``: the number of files whose checksum was compared,
  null where the folder keeps none;
* ``tensors`` compared, ``bit_equal`` of them, ``counts`` of the others by kind: ``missing``, ``shape``, ``values``,
  ``dtype`` (equal values in another dtype), ``bits`` (equal values, other bits: −0, NaN), and ``scaling``;
* ``largest``: the tensor with the largest relative difference (``name``, ``absolute``, ``relative``), or null;
* ``differences``: each tensor that is not bit-equal: ``name``, ``kind``, ``within_tolerance``, ``only_in``,
  ``shapes``, ``dtypes``, ``num_values``, ``num_nan``, ``absolute``, ``relative`` (null where infinite), ``position``;
* ``scalings``: modules of adapters that are scaled otherwise; ``notes``: what was left out or passed over.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mindspeed_lora.checkpoint.conversion.compare import Difference
from mindspeed_lora.checkpoint.conversion.verify_checksums import Checksums

_SHOWN = 10
EQUAL, WITHIN, DIFFERENT, DAMAGED, INTACT = "equal", "within tolerance", "different", "damaged", "intact"
_MEANS_ZERO = (EQUAL, WITHIN, INTACT)


@dataclass
class Comparison:
    """What was found of the tensors."""

    described: list[str]
    """What each side is."""
    num_tensors: int = 0
    differences: list[Difference] = field(default_factory=list)
    """In the order of the model."""
    scalings: list[str] = field(default_factory=list)
    """Modules of an adapter that the sides scale otherwise."""
    notes: list[str] = field(default_factory=list)

    @property
    def counts(self) -> dict[str, int]:
        """Differences by kind."""
        counts = Counter(one.kind for one in self.differences)
        if self.scalings:
            counts["scaling"] = len(self.scalings)
        return dict(counts)

    @property
    def largest(self) -> Difference | None:
        """The tensor with the largest relative difference of values."""
        return max(
            (one for one in self.differences if one.num_values), key=lambda one: one.relative, default=None
        )


@dataclass(frozen=True)
class Result:
    """Everything that is told."""

    paths: Sequence[Path]
    checks: Sequence[Checksums]
    found: Comparison | None
    """None where a damaged side was not compared."""
    tolerance: float | None

    @property
    def damage(self) -> str | None:
        """The first sentence on a damaged file."""
        return next((check.damage for check in self.checks if check.damage), None)

    @property
    def verdict(self) -> str:
        """One of the five words."""
        if self.damage is not None or self.found is None:
            return DAMAGED
        if len(self.paths) == 1:
            return INTACT
        if self.found.scalings or not all(one.is_within(self.tolerance) for one in self.found.differences):
            return DIFFERENT
        return WITHIN if self.found.differences else EQUAL

    @property
    def status(self) -> int:
        """The exit status."""
        return 0 if self.verdict in _MEANS_ZERO else 1


def result_lines(result: Result) -> list[str]:
    """The text; the verdict is the last line."""
    lines, found = [], result.found
    for number, (path, check) in enumerate(zip(result.paths, result.checks, strict=True)):
        described = f": {found.described[number]}" if found is not None else ""
        lines.append(f"{'AB'[number]}  {path}{described}; checksums: {check.describe()}")
    if found is not None:
        lines += [f"note: {note}" for note in found.notes]
        # What is not there at all, then the largest differences.
        ordered = sorted(
            found.differences, key=lambda one: (one.kind not in ("missing", "shape"), -one.relative)
        )
        lines += [f"  {_told(one)}" for one in ordered[:_SHOWN]]
        lines += [f"  {one}" for one in found.scalings[:_SHOWN]]
        hidden = max(0, len(found.differences) - _SHOWN) + max(0, len(found.scalings) - _SHOWN)
        lines += [f"  and {hidden} more"] if hidden else []
    return [*lines, _verdict_line(result)]


def _told(one: Difference) -> str:
    """One difference in words."""
    texts = []
    if one.only_in is not None:
        texts.append(f"only in {one.only_in}")
    if one.shapes is not None:
        texts.append(f"shapes {list(one.shapes[0])} and {list(one.shapes[1])}")
    if one.num_values:
        texts.append(
            f"{one.num_values:,} values differ, by {one.largest:.3g} at most (relative {one.relative:.3g}) "
            f"at {list(one.position or ())}"
        )
    if one.num_nan:
        texts.append(f"{one.num_nan:,} are NaN on one side only")
    if one.dtypes is not None:
        names = [str(dtype).removeprefix("torch.") for dtype in one.dtypes]
        equal = "" if one.num_values else "equal values, other dtype: "
        texts.append(f"{equal}{names[0]} and {names[1]}")
    return f"{one.name}: {'; '.join(texts) or 'equal values, other bits (-0 or NaN)'}"


def _verdict_line(result: Result) -> str:
    found = result.found
    if result.damage is not None or found is None:
        return f"damaged: {result.damage}"
    if result.verdict == INTACT:
        return f"intact: {result.checks[0].num_files} files fit their checksums"
    if result.verdict == EQUAL:
        return f"equal: all {found.num_tensors} tensors, bit by bit"
    counted = ", ".join(f"{count} {_KINDS[kind]}" for kind, count in found.counts.items())
    largest = found.largest
    most = (
        ""
        if largest is None
        else f"; largest difference {largest.largest:.3g} (relative {largest.relative:.3g}) in {largest.name}"
    )
    if result.verdict == WITHIN:
        return (
            f"equal within --tolerance {result.tolerance:g}: of {found.num_tensors} tensors {counted}{most}"
        )
    return f"different: of {found.num_tensors} tensors {counted}{most}"


_KINDS = {
    "missing": "only on one side",
    "shape": "of other shape",
    "values": "with other values",
    "dtype": "with equal values, other dtype",
    "bits": "with equal values, other bits",
    "scaling": "modules scaled otherwise",
}


def result_json(result: Result) -> dict[str, Any]:
    """The object of ``--json``."""
    found, largest = result.found, result.found.largest if result.found else None
    differences = found.differences if found else []
    return {
        "verdict": result.verdict,
        "damage": result.damage,
        "sides": [
            {
                "path": str(path),
                "is": found.described[number] if found else None,
                "checksums": None if check.folder is None else check.num_files,
            }
            for number, (path, check) in enumerate(zip(result.paths, result.checks, strict=True))
        ],
        "tensors": found.num_tensors if found else 0,
        "bit_equal": found.num_tensors - len(differences) if found else 0,
        "counts": found.counts if found else {},
        "largest": largest and {"name": largest.name, **_sizes(largest)},
        "differences": [_difference(one, result.tolerance) for one in differences],
        "scalings": found.scalings if found else [],
        "notes": found.notes if found else [],
    }


def _sizes(one: Difference) -> dict[str, float | None]:
    values = {"absolute": one.largest, "relative": one.relative}
    # JSON has no infinity.
    return {key: value if math.isfinite(value) else None for key, value in values.items()}


def _difference(one: Difference, tolerance: float | None) -> dict[str, Any]:
    return {
        "name": one.name,
        "kind": one.kind,
        "within_tolerance": one.is_within(tolerance),
        "only_in": one.only_in,
        "shapes": one.shapes and [list(shape) for shape in one.shapes],
        "dtypes": one.dtypes and [str(dtype).removeprefix("torch.") for dtype in one.dtypes],
        "num_values": one.num_values,
        "num_nan": one.num_nan,
        **_sizes(one),
        "position": one.position and list(one.position),
    }
