"""``preprocess_data.py --merge-group-keys``: indexed data sets that were prepared apart become one."""

from __future__ import annotations

from pathlib import Path

from mindspeed_lora.config.jobs import PreprocessJob
from mindspeed_lora.data.atomic_output import output_folder, publish
from mindspeed_lora.data.indexed_dataset import IndexedDataset, IndexedDatasetBuilder
from mindspeed_lora.data.sft_dataset import WEIGHTS_KEY, packed_prefix
from mindspeed_lora.errors import Refused

_LABELS, _WEIGHTS = packed_prefix("", "labels"), packed_prefix("", WEIGHTS_KEY)


def merge(job: PreprocessJob) -> None:
    """The pairs of files in ``--input`` whose names hold a key, by name, become ``{prefix}_{key}``.

    Raises:
        Refused: there is no such pair, one lacks its other half, or their numbers are of different kinds.
    """
    config = job.preprocess
    assert config.output_prefix is not None
    groups = merge_groups(job)
    builders: list[IndexedDatasetBuilder] = []
    with output_folder(Path(config.output_prefix).parent):
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


def merge_groups(job: PreprocessJob) -> dict[str, list[Path]]:
    """The prefixes of the data sets that each key merges; what an earlier run merged is none of them.

    Raises:
        Refused: ``--input`` is no folder, has none for a key, one that lacks its other half, or one with weights of
            the loss, which would be lost.
    """
    config = job.preprocess
    folder = Path(config.input or "")
    if not folder.is_dir():
        raise Refused(
            f"--input {folder}: not a folder; --merge-group-keys merges the indexed data sets in one"
        )
    keys = config.merge_group_keys or ()
    made = {Path(f"{config.output_prefix}_{key}").resolve() for key in keys}
    found = sorted({file.with_suffix("") for file in folder.iterdir() if file.suffix in (".bin", ".idx")})
    found = [prefix for prefix in found if prefix.resolve() not in made]
    groups = {key: _pairs(folder, found, key) for key in keys}
    _check_weights(found, {prefix for prefixes in groups.values() for prefix in prefixes})
    return groups


def _check_weights(found: list[Path], merged: set[Path]) -> None:
    """Labels of which some are weighed go together with the weights of all of them, or not at all."""
    labels = {str(prefix).removesuffix(_LABELS) for prefix in merged if prefix.name.endswith(_LABELS)}
    weights = {prefix for prefix in found if prefix.name.endswith(_WEIGHTS)}
    weighed = {str(prefix).removesuffix(_WEIGHTS): prefix for prefix in weights}
    for name in sorted(labels & weighed.keys()):
        if weighed[name] not in merged:
            raise Refused(
                f"--merge-group-keys: {weighed[name].name} weighs labels that are merged, and would be left behind; "
                f"name packed_{WEIGHTS_KEY} too"
            )
    if labels & weighed.keys() and labels - weighed.keys():
        raise Refused(
            f"--merge-group-keys: {sorted(labels - weighed.keys())[0]} has no weights of its labels, and others have; "
            "prepare them together"
        )


def _pairs(folder: Path, found: list[Path], key: str) -> list[Path]:
    """The prefixes of the data sets whose names hold the key, by name."""
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
