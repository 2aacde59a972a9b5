"""What the pickle of a ``torch.save`` file may name, and reading it with nothing but that.

Every global that the pickle names must be on one of three short lists: what tensors and plain values are made of,
``argparse.Namespace``, and names of real Megatron files that nothing here needs, for which inert objects stand in.
The list is shorter than torch's own for ``weights_only``, which also holds constructors that allocate what a file asks
for (``bytearray``, ``torch.FloatTensor``). What is left on it makes meta tensors, whatever sizes a file claims.
"""

from __future__ import annotations

import argparse
import io
import re
import threading
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch._weights_only_unpickler import get_globals_in_pkl

from mindspeed_lora.errors import Refused

_NEEDED = re.compile(
    r"torch\._utils\._rebuild_(tensor|tensor_v2|parameter)|torch\.nn\.parameter\.Parameter"
    r"|torch(\.cuda)?\.\w+Storage|torch\.Size|torch\.device"
    r"|torch\.(b?float|u?int|q?u?int|complex|bool|bfloat)\w*"  # dtypes in args
    r"|collections\.OrderedDict|builtins\.(set|complex)|_codecs\.encode|argparse\.Namespace"
)
_INERT = re.compile(
    r"(megatron\.core|mindspeed\.core|transformer_engine)(\.\w+)*\.\w*enums?\.\w+"  # enums in args
    r"|megatron\.core\.transformer\.(enums|cuda_graphs|moe)(\.\w+)*"
    r"|numpy(\._?core)?\.multiarray\._reconstruct|numpy\.ndarray|numpy\.dtype"  # rng_state
    r"|signal\.Signals|pathlib\.(Posix|PurePosix)?Path|_io\.BytesIO|builtins\.bytes"  # exit_signal, _extra_state
    r"|datetime\.timedelta|torch_npu\.npu\._format\.Format"
)
"""Names in real Megatron files that nothing here needs; an inert object stands in for whatever they make."""


class Inert:
    """Stands in for an object of a file that is not needed; making it does nothing."""

    def __init__(self, *_: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        pass


def _rebuild_npu_tensor(storage: Any, offset: int, size: Any, stride: Any, *_: object) -> torch.Tensor:
    """What ``torch.save`` of an Ascend machine calls for a tensor; its bytes lie there as any other's."""
    rebuilt: torch.Tensor = torch._utils._rebuild_tensor(storage, offset, size, stride)
    return rebuilt


_LOCK = threading.Lock()
"""torch's list is the process's."""

_OF_OTHERS = {"torch_npu.utils.storage._rebuild_npu_tensor": _rebuild_npu_tensor}
"""Functions of packages that are not here, by name, with what does the same."""


def check_globals(names: Collection[str], path: Path) -> None:
    """Refuse a pickle that names anything else than what is on the lists."""
    for name in sorted(names):
        if not (_NEEDED.fullmatch(name) or _INERT.fullmatch(name) or name in _OF_OTHERS):
            raise Refused(
                f"{path}: refused, since its pickle uses {name}, which could run code or take memory; allowed are "
                "tensors, plain values and argparse.Namespace."
            )


@contextmanager
def only_allowed(names: Collection[str]) -> Iterator[None]:
    """Makes torch's weights-only loading know ``argparse.Namespace``, what stands in for these names, and no more.

    What other packages of this process have registered with torch is put away meanwhile.
    """
    inert: list[Any] = [(Inert, name) for name in names if _INERT.fullmatch(name)]
    functions: list[Any] = [(function, name) for name, function in _OF_OTHERS.items()]
    with _LOCK:
        others = torch.serialization.get_safe_globals()
        torch.serialization.clear_safe_globals()
        try:
            torch.serialization.add_safe_globals([argparse.Namespace, *functions, *inert])
            yield
        finally:
            torch.serialization.clear_safe_globals()
            torch.serialization.add_safe_globals(others)


def load_archive(path: Path) -> Any:
    """The content of a ``torch.save`` archive (zip), its tensors on the meta device."""
    try:
        names = get_globals_in_pkl(io.BytesIO(torch._C.PyTorchFileReader(str(path)).get_record("data.pkl")))
    except Exception as error:
        raise unreadable(path, error) from error
    check_globals(names, path)
    try:
        with only_allowed(names):
            return torch.load(path, map_location="meta", weights_only=True)
    except Exception as error:
        raise not_safe(path, error) from error


def unreadable(path: Path, error: Exception) -> Refused:
    """The error for a pickle that cannot even be taken apart."""
    return Refused(f"{path}: the pickle inside cannot be read ({_first_line(error)}).")


def not_safe(path: Path, error: Exception) -> Refused:
    """The error for a pickle that asks for something that it may not have."""
    return Refused(f"{path}: refused to load safely ({_first_line(error)}).")


def _first_line(error: Exception) -> str:
    text = str(error).strip().replace("Weights only load failed. ", "")
    return text.splitlines()[0][:200] if text else type(error).__name__
