"""Pickles that run code, lie about sizes or ask for memory: each refused by name, in every file that is pickled."""

from __future__ import annotations

import io
import json
import pickle
import resource
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from mindspeed_lora.checkpoint.formats.hf import shape_of
from mindspeed_lora.checkpoint.peft.source import AdapterSource
from mindspeed_lora.checkpoint.source import open_source
from mindspeed_lora.checkpoint.storage.pt_file import PtFile
from mindspeed_lora.checkpoint.storage.pt_legacy import MAGIC
from mindspeed_lora.errors import Refused
from tests.unit.checkpoint.storage.test_pt_file import Command, Evaluated, rewrite

HUGE = 1 << 50


class Called:
    """An object whose unpickling calls one of torch's own functions, or any other."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> Any:
        return self.call


class PersistentIds(pickle.Pickler):
    """Writes persistent ids of any content for :class:`Persistent`."""

    def persistent_id(self, obj: Any) -> Any:
        return obj.saved_id if isinstance(obj, Persistent) else None


class Persistent:
    """Stands for a persistent id."""

    def __init__(self, *saved_id: Any) -> None:
        self.saved_id = saved_id


def pickled(content: Any) -> bytes:
    buffer = io.BytesIO()
    PersistentIds(buffer, 2).dump(content)
    return buffer.getvalue()


def zipped(path: Path, content: Any) -> None:
    """A torch.save archive with this pickle, and one real storage of 16 bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"w": torch.zeros(4)}, path)
    rewrite(path, pickled(content))


def unzipped(path: Path, content: Any) -> None:
    """The older form, with no storages."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(
        MAGIC + pickle.dumps(1001, 2) + pickle.dumps({}, 2) + pickled(content) + pickle.dumps([], 2)
    )


FORMS = {"zip": zipped, "older": unzipped}
Write = Callable[[Path, Any], None]


def as_megatron(models: Any, tmp_path: Path, write: Write, attack: Any) -> Path:
    path = tmp_path / "mg" / "iter_0000001" / "mp_rank_00" / "model_optim_rng.pt"
    write(path, {"model": {"w": 1}, "args": attack})
    open_source(tmp_path / "mg")
    return path


def as_model(models: Any, tmp_path: Path, write: Write, attack: Any) -> Path:
    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "config.json").write_text((models("llama").path / "config.json").read_text())
    write(folder / "pytorch_model.bin", {"model.norm.weight": attack})
    open_source(folder)
    return folder


def as_adapter(models: Any, tmp_path: Path, write: Write, attack: Any) -> Path:
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    write(tmp_path / "adapter" / "adapter_model.bin", {"lora_A.weight": attack})
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    AdapterSource(tmp_path / "adapter", shape_of(models("llama").path))
    return tmp_path


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("load", [as_megatron, as_model, as_adapter])
@pytest.mark.parametrize("kind", ["command", "expression", "in a persistent id", "as a storage's type"])
def test_code_is_refused_and_does_not_run(models: Any, tmp_path: Path, form: str, load: Any, kind: str):
    marker = tmp_path / "marker"
    command, expression = Command(f"touch {marker}"), Evaluated(f"open({str(marker)!r}, 'w')")
    attack = {
        "command": command,
        "expression": expression,
        "in a persistent id": Persistent("storage", command, "0", "cpu", 4),
        "as a storage's type": Persistent("module", expression, "0", "cpu", 4),
    }[kind]
    with pytest.raises(
        Refused, match=r"refused, since its pickle uses (posix\.system|builtins\.eval|__builtin__\.eval)"
    ):
        load(models, tmp_path, FORMS[form], attack)
    assert not marker.exists()
    # The attack itself works: unpickled without care it leaves its mark.
    pickle.loads(pickle.dumps(expression if "type" in kind or kind == "expression" else command))
    assert marker.exists()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "attack",
    [
        Called(bytearray, HUGE),
        Called(torch.Tensor, HUGE),
        Called(torch.FloatTensor, HUGE),
        Called(torch._utils._rebuild_device_tensor_from_numpy, [], torch.float32, "cpu", False),
        Called(torch.storage.UntypedStorage, HUGE),
        Called(torch.load, "/nowhere"),
        Called(getattr, "text", "upper"),
    ],
    ids=lambda attack: attack.call[0].__name__,
)
def test_torchs_own_functions_beyond_tensors(tmp_path: Path, form: str, attack: Any):
    path = tmp_path / "file.pt"
    FORMS[form](path, {"model": attack})
    with pytest.raises(Refused, match="refused, since its pickle uses"):
        PtFile(path)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "saved_id", [("module", 1, 2), ("storage",), ("storage", 1, "0", "cpu", 4), (), ("x",)]
)
def test_persistent_ids_that_are_no_storages(tmp_path: Path, form: str, saved_id: Any):
    path = tmp_path / "file.pt"
    FORMS[form](path, {"model": Persistent(*saved_id)})
    with pytest.raises(Refused, match=str(path)):
        PtFile(path)


class RealStorage(Persistent):
    """The persistent id of the archive's one storage, of as many elements as it says."""

    def __init__(self, numel: int = 4) -> None:
        super().__init__("storage", torch.FloatStorage, "0", "cpu", numel)


@pytest.mark.parametrize(
    ("numel", "offset", "size", "stride"),
    [
        (4, 0, (HUGE, 1), (1, 1)),
        (4, 0, (5,), (1,)),
        (4, 1, (4,), (1,)),
        (4, HUGE, (1,), (1,)),
        (4, -1, (4,), (1,)),
        (4, 0, (2, 2), (1, 2)),
        (4, 0, (1 << 30, 1 << 30), (0, 0)),
        (4, 0, (2, -2), (2, 1)),
        (4, 0, (1 << 62, 1 << 62), (1, 1)),
        (HUGE, 0, (HUGE,), (1,)),
        (8, 0, (8,), (1,)),
    ],
)
def test_tensors_that_lie(tmp_path: Path, numel: int, offset: int, size: Any, stride: Any):
    """Sizes, strides and offsets that do not fit the storage, and a storage that does not fit its record."""
    path = tmp_path / "file.pt"
    tensor = Called(torch._utils._rebuild_tensor_v2, RealStorage(numel), offset, size, stride, False, {})
    zipped(path, {"w": tensor})
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(Refused, match=str(path)):
        file = PtFile(path)
        file.entry("w", file.content["w"])
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 50_000, (
        "memory was taken for the claim"
    )


def test_a_tensor_that_tells_the_truth_is_read(tmp_path: Path):
    path = tmp_path / "file.pt"
    zipped(path, {"w": Called(torch._utils._rebuild_tensor_v2, RealStorage(), 1, (3,), (1,), False, {})})
    file = PtFile(path)
    assert file.entry("w", file.content["w"]).num_bytes == 12


def test_a_negated_view(tmp_path: Path):
    path, bits = tmp_path / "file.pt", {"neg": True}
    zipped(
        path, {"w": Called(torch._utils._rebuild_tensor_v2, RealStorage(), 0, (4,), (1,), False, {}, bits)}
    )
    with pytest.raises(Refused, match="negated or conjugated"):
        file = PtFile(path)
        file.entry("w", file.content["w"])


def test_records_beyond_the_file(tmp_path: Path):
    """An archive whose list of records claims more than there is, with a pickle that claims the same."""
    path = tmp_path / "file.pt"
    torch.save({"w": torch.zeros(4)}, path)
    data = bytearray(path.read_bytes())
    for signature, place in ((b"PK\x01\x02", 20), (b"PK\x03\x04", 18)):
        start = data.index(signature)
        while start >= 0:
            name = 46 if signature == b"PK\x01\x02" else 30
            if b"data/0" in data[start + name : start + name + 20]:
                data[start + place : start + place + 8] = struct.pack("<II", 1 << 30, 1 << 30)
            start = data.find(signature, start + 4)
    path.write_bytes(data)
    with pytest.raises(Refused, match=str(path)):
        PtFile(path)


def test_records_that_overlap(tmp_path: Path):
    path = tmp_path / "file.pt"
    torch.save({"w": torch.zeros(4), "v": torch.ones(4)}, path)
    with zipfile.ZipFile(path) as archive:
        places = [info.header_offset for info in archive.infolist() if "/data/" in info.filename]
    data = path.read_bytes()
    # The central directory's entry of the second storage points at the first one.
    second = data.replace(struct.pack("<I", places[1]), struct.pack("<I", places[0]))
    path.write_bytes(second)
    with pytest.raises(Refused, match=str(path)):
        file = PtFile(path)
        for name, tensor in file.content.items():
            file.entry(name, tensor)


class TestOlderForm:
    """Files of pickles one after the other."""

    def saved(self, path: Path, content: Any) -> bytes:
        torch.save(content, path, _use_new_zipfile_serialization=False)
        return path.read_bytes()

    def test_truncated(self, tmp_path: Path):
        path = tmp_path / "file.pt"
        data = self.saved(path, {"w": torch.zeros(100)})
        path.write_bytes(data[:-1])
        with pytest.raises(Refused, match="it is truncated"):
            PtFile(path)
        path.write_bytes(data[:60])
        with pytest.raises(Refused, match="the pickle inside cannot be read"):
            PtFile(path)

    def test_counts_that_differ(self, tmp_path: Path):
        path = tmp_path / "file.pt"
        data = self.saved(path, {"w": torch.zeros(100)})
        at = len(data) - 400 - 8
        path.write_bytes(data[:at] + struct.pack("<q", 50) + data[at + 8 :])
        with pytest.raises(Refused, match="has 50 elements, its pickle another count"):
            PtFile(path)

    def test_a_storage_larger_than_the_file(self, tmp_path: Path):
        path = tmp_path / "file.pt"
        storage = Persistent("storage", torch.FloatStorage, "7", "cpu", HUGE, None)
        unzipped(path, {"w": storage})
        with pytest.raises(Refused, match=f"storage 7 claims {4 * HUGE} bytes of a file of"):
            PtFile(path)

    def test_a_storage_that_is_not_there(self, tmp_path: Path):
        path = tmp_path / "file.pt"
        storage = Persistent("storage", torch.FloatStorage, "7", "cpu", 1, None)
        unzipped(path, {"w": Called(torch._utils._rebuild_tensor_v2, storage, 0, (1,), (1,), False, {})})
        with pytest.raises(Refused, match="the storage of w does not fit its record"):
            file = PtFile(path)
            file.entry("w", file.content["w"])

    def test_a_view_of_a_storage(self, tmp_path: Path):
        path = tmp_path / "file.pt"
        unzipped(path, {"w": Persistent("storage", torch.FloatStorage, "7", "cpu", 4, ("8", 0, 2))})
        with pytest.raises(Refused, match="is a view of another one"):
            PtFile(path)


@pytest.mark.parametrize("key", ["items", "keys", "get"])
def test_attributes_put_over_a_dictionarys_methods(models: Any, tmp_path: Path, key: str):
    """``OrderedDict`` takes attributes from the pickle; none of them is called."""
    import collections

    class Odd:
        def __reduce__(self) -> Any:
            return (
                collections.OrderedDict,
                (),
                {key: "not to be called"},
                None,
                iter([("model.norm.weight", 1)]),
            )

    folder = tmp_path / "hf"
    folder.mkdir()
    (folder / "config.json").write_text((models("llama").path / "config.json").read_text())
    zipped(folder / "pytorch_model.bin", Odd())
    with pytest.raises(Refused, match="'model.norm.weight' is no tensor"):
        open_source(folder)
