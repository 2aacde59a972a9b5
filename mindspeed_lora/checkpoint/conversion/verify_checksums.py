"""What ``verify`` finds of the checksums that a checkpoint keeps of its own files."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mindspeed_lora.checkpoint.storage.manifest import check_files, manifest_folder, read_manifest
from mindspeed_lora.errors import Failed, Refused


@dataclass(frozen=True)
class Checksums:
    """The result for one folder."""

    folder: Path | None
    """Where the checksums are kept; None where there are none."""
    num_files: int = 0
    num_bytes: int = 0
    damage: str | None = None
    """The sentence on the first file and tensor that do not fit."""

    def describe(self) -> str:
        """In words."""
        if self.folder is None:
            return "none kept"
        return f"{self.num_files} files fit" if self.damage is None else "damaged"


def check_sums(path: Path) -> Checksums:
    """Read every file that the manifest of a checkpoint lists, and compare."""
    try:
        path = path.absolute()
        folder = manifest_folder(path)
        records = {} if folder is None else read_manifest(folder)
        # A manifest above may be of another checkpoint, within whose folder this one lies.
        if folder is None or not any((folder / one).is_relative_to(path) for one in records):
            return Checksums(None)
        return Checksums(folder, len(records), check_files(folder))
    except (Failed, Refused) as error:
        return Checksums(path, damage=str(error))
