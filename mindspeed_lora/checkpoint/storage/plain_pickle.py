"""Reading pickles as plain data: an object of an allowed class becomes a :class:`Plain`, nothing is run to make it.

Any other class or function is refused by name when the pickle first mentions it.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Iterable, Mapping
from typing import Any


class PickleRefused(ValueError):
    """The pickle uses a class or function that is not allowed, or is damaged; the message tells which."""


class Plain:
    """What a pickle tells of one object."""

    kind = ""
    """Name of its class or of the function that would make it."""

    args: tuple[Any, ...]
    """What that would be called with."""
    state: Any = None
    """What would be set on it."""

    def __new__(cls, *args: Any) -> Plain:
        """Keeps the arguments and does nothing with them."""
        made = super().__new__(cls)
        made.args = args
        return made

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def get(self, name: str) -> Any:
        """One attribute of the state; None where the state has no names or not this one."""
        return self.state.get(name) if isinstance(self.state, dict) else None


def plain(module: str, names: str | Iterable[str]) -> dict[tuple[str, str], type[Plain]]:
    """Stand-ins for some names of a module, for :func:`load_plain`."""
    listed = names.split() if isinstance(names, str) else names
    return {(module, name): type(name, (Plain,), {"kind": name}) for name in listed}


def load_plain(data: bytes, allowed: Mapping[tuple[str, str], Any]) -> Any:
    """What a pickle holds; ``allowed`` has a harmless object for each (module, name) that it may mention.

    A persistent id becomes a :class:`Plain` of the kind ``persistent``.

    Raises:
        PickleRefused: it mentions anything else, or cannot be read.
    """
    try:
        return _PlainUnpickler(io.BytesIO(data), allowed).load()
    except PickleRefused:
        raise
    except Exception as error:
        raise PickleRefused(f"the pickle cannot be read ({type(error).__name__}: {error})") from error


class _Persistent(Plain):
    kind = "persistent"


class _PlainUnpickler(pickle.Unpickler):
    def __init__(self, stream: io.BytesIO, allowed: Mapping[tuple[str, str], Any]) -> None:
        super().__init__(stream)
        self._allowed = allowed

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._allowed[module, name]
        except KeyError:
            raise PickleRefused(f"its pickle uses {module}.{name}, which could run code") from None

    def persistent_load(self, pid: Any) -> Any:
        return _Persistent(*pid) if isinstance(pid, tuple) else _Persistent(pid)
