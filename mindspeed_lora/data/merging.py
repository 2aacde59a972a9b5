"""``preprocess_data.py --merge-group-keys``: indexed data sets that were prepared apart become one."""

from __future__ import annotations

from pathlib import Path

from mindspeed_lora.config.jobs import PreprocessJob
from mindspeed_lora.data.atomic_output import prepare_folder, publish
from mindspeed_lora.data.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
from mindspeed_lora.errors import Refused


def merge(job: PreprocessJob) -> None:
    """The pairs of files in ``--input`` whose names hold a key, by name, become ``{prefix}_{key}``.

    Raises:
        Refused: there is no such pair, one lacks its other half, or their numbers are of different kinds.
    """
    config = job.preprocess
    assert config.input is not None and config.output_prefix is not None
    folder = Path(config.input)
    if not folder.is_dir():
        raise Refused(
            f"--input {folder}: not a folder; --merge-group-keys merges the indexed data sets in one"
        )
    groups = {key: _pairs(folder, key) for key in config.merge_group_keys or ()}
    prepare_folder(Path(config.output_prefix).parent)
    builders: list[IndexedDatasetBuilder] = []
    try:
        for key, prefixes in groups.items():
            builders.append(_merged(prefixes, Path(f"{config.output_prefix}_{key}")))
        publish([pair for builder in builders for pair in builder.finish()])
    except BaseException:
        for builder in builders:
            builder.discard()
        raise
    for key, prefixes in groups.items():
        names = ", ".join(prefix.name for prefix in prefixes)
        print(f"written       {config.output_prefix}_{key} from {len(prefixes)}: {names}")


def _pairs(folder: Path, key: str) -> list[Path]:
    """The prefixes of the data sets whose names hold the key, by name."""
    found = sorted({file.with_suffix("") for file in folder.iterdir() if file.suffix in (".bin", ".idx")})
    prefixes = [prefix for prefix in found if key in prefix.name and not prefix.name.startswith(".")]
    if not prefixes:
        names = ", ".join(prefix.name for prefix in found) or "no .bin and .idx files"
        raise Refused(
            f"--merge-group-keys {key}: no data set in {folder} has that in its name; found {names}"
        )
    for prefix in prefixes:
        for suffix in (".bin", ".idx"):
            if not Path(f"{prefix}{suffix}").is_file():
                raise Refused(f"--merge-group-keys {key}: {prefix}{suffix} is missing")
    return prefixes


def _merged(prefixes: list[Path], target: Path) -> IndexedDatasetBuilder:
    datasets = [IndexedDataset(prefix) for prefix in prefixes]
    for prefix, dataset in zip(prefixes, datasets, strict=True):
        if dataset.num_documents != len(dataset):
            raise Refused(f"{prefix}.idx: has documents of several sequences, which are not merged")
    kinds = {str(dataset.dtype) for dataset in datasets}
    if len(kinds) > 1:
        raise Refused(f"{target}: the data sets that would be merged hold {' and '.join(sorted(kinds))}")
    builder = IndexedDatasetBuilder(target, datasets[0].dtype.type)
    try:
        for dataset in datasets:
            for document in range(len(dataset)):
                builder.add_document(dataset[document])
    except BaseException:
        builder.discard()
        raise
    return builder
