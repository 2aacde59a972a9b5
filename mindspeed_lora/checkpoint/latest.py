"""What a thread made last, kept while it asks for the same again."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Generic, TypeVar

Made = TypeVar("Made")


class Latest(Generic[Made]):
    """One value for each thread: that of the name it asked for last, for all slices that it reads of it."""

    def __init__(self) -> None:
        self._kept = threading.local()

    def get(self, name: str, make: Callable[[], Made]) -> Made:
        """The value of a name; made anew where the thread asked for another one before."""
        kept: tuple[str, Made] | None = getattr(self._kept, "value", None)
        if kept is None or kept[0] != name:
            # The old value goes before the new one comes.
            self._kept.value = None
            self._kept.value = kept = (name, make())
        return kept[1]
