"""Wording that the messages of all formats share."""

from __future__ import annotations

from collections.abc import Sequence


def first_few(names: Sequence[str], count: int = 3) -> str:
    """The first few of a list of names, and how many more there are."""
    shown = ", ".join(names[:count])
    return f"{shown} and {len(names) - count} more" if len(names) > count else shown
