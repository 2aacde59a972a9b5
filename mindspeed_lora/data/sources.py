"""The inputs of a preparation: files, folders and named data sets, each a source of rows."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mindspeed_lora.config.preprocess import PreprocessConfig
from mindspeed_lora.data.handlers import LLAMA_FACTORY, Handler
from mindspeed_lora.data.handlers.dataset_info import read_dataset_info
from mindspeed_lora.data.mixing import Mixing, mixed_rows
from mindspeed_lora.data.readers import BadRow, Row, input_files, read_rows
from mindspeed_lora.errors import Refused

Notice = Callable[[str], None]
_REFUSED_PARAMETERS = ("trust_remote_code", "data_dir_script", "builder_kwargs")


@dataclass(frozen=True)
class Source:
    """One input: rows of files, in their order, at most ``max_samples`` of them."""

    number: int
    name: str
    files: tuple[Path, ...] = ()
    max_samples: int | None = None
    handler: Handler | None = None
    """How its rows are to be read, where the input itself says so."""
    parameters: dict[str, Any] | None = None
    """Of ``datasets.load_dataset``, which gives the rows in place of files."""

    @property
    def size(self) -> int:
        """Bytes, by which sources share in the progress."""
        return max(sum(file.stat().st_size for file in self.files), 1)

    def rows(self) -> Iterator[Row | BadRow]:
        """The rows from the first on; ``fraction`` is of this source.

        Raises:
            Refused: a file cannot be read on.
        """
        return itertools.islice(self._all_rows(), self.max_samples)

    def _all_rows(self) -> Iterator[Row | BadRow]:
        if self.parameters is not None:
            yield from _rows_of_datasets(self.parameters, self.number)
        before, total = 0, self.size
        for file in self.files:
            size = file.stat().st_size
            for row in read_rows(file):
                yield row.at((before + row.fraction * size) / total, self.number)
            before += size


@dataclass(frozen=True)
class Inputs:
    """All inputs, and how they are mixed."""

    sources: tuple[Source, ...]
    mixing: Mixing

    @property
    def files(self) -> list[Path]:
        """Every file that is read."""
        return [file for source in self.sources for file in source.files]

    def rows(self) -> Iterator[Row | BadRow]:
        """All rows in the order in which they are prepared; ``fraction`` is of everything."""
        return mixed_rows([(source.rows, source.size) for source in self.sources], self.mixing)


def open_inputs(config: PreprocessConfig, notice: Notice = lambda text: None) -> Inputs:
    """The inputs that the flags name.

    Raises:
        Refused: one of them is not there, or the flags contradict each other.
    """
    names = _names(config)
    if config.hf_datasets_params is not None:
        sources = [Source(0, config.hf_datasets_params, parameters=_parameters(config.hf_datasets_params))]
    elif config.handler_name == LLAMA_FACTORY:
        sources = _described(config, names, notice)
    else:
        sources = [
            Source(number, name, tuple(input_files(name, notice))) for number, name in enumerate(names)
        ]
    limited = [
        replace(source, max_samples=_least(source.max_samples, config.max_samples)) for source in sources
    ]
    probabilities = _probabilities(config, len(limited))
    return Inputs(tuple(limited), Mixing(config.mix_strategy, probabilities, config.seed))


def input_paths(config: PreprocessConfig) -> list[str]:
    """The files and folders that the flags name; none where they name data sets."""
    by_name = config.handler_name == LLAMA_FACTORY or config.hf_datasets_params is not None
    return [] if by_name else _names(config)


def _names(config: PreprocessConfig) -> list[str]:
    given = config.input or ""
    # A path that has a comma in it is still one path.
    names = [given] if Path(given).exists() else [name.strip() for name in given.split(",")]
    return [name for name in (*names, *(config.datasets or ())) if name]


def _described(config: PreprocessConfig, names: list[str], notice: Notice) -> list[Source]:
    """``--input`` names data sets of a ``dataset_info.json``; with a folder before them, its own."""
    folder = config.dataset_dir
    if folder is None:
        folders = {str(Path(name).parent) for name in names}
        folder = folders.pop() if len(folders) == 1 else "."
    described = read_dataset_info(folder, [Path(name).name for name in names])
    return [
        Source(
            number,
            name,
            tuple(input_files(entry.path, notice, flag=f"--input {name}:")),
            entry.num_samples,
            entry.handler,
        )
        for number, (name, entry) in enumerate(zip(names, described, strict=True))
    ]


def _least(*limits: int | None) -> int | None:
    return min((limit for limit in limits if limit is not None), default=None)


def _probabilities(config: PreprocessConfig, num_sources: int) -> tuple[float, ...] | None:
    if config.interleave_probs is None:
        return None
    given = config.interleave_probs
    if config.mix_strategy == "concat":
        raise Refused(
            f"--interleave-probs {given} needs --mix-strategy interleave_under or interleave_over; give one"
        )
    probabilities = tuple(float(part) for part in given.split(","))
    if len(probabilities) != num_sources:
        raise Refused(
            f"--interleave-probs {given}: {len(probabilities)} numbers for {num_sources} inputs; give one for each"
        )
    if config.mix_strategy == "interleave_over" and min(probabilities) == 0:
        raise Refused(
            f"--interleave-probs {given}: an input that is never drawn never ends; leave it out, or take "
            "interleave_under"
        )
    if abs(sum(probabilities) - 1) > 1e-6:
        raise Refused(f"--interleave-probs {given}: the sum is {sum(probabilities):g}; expected 1")
    return probabilities


def _parameters(path: str) -> dict[str, Any]:
    try:
        parameters = json.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise Refused(f"--hf-datasets-params {path}: cannot be read ({error.strerror})") from error
    except (ValueError, RecursionError) as error:
        raise Refused(f"--hf-datasets-params {path}: not valid JSON ({error})") from error
    if not isinstance(parameters, dict) or not isinstance(parameters.get("path"), str):
        raise Refused(
            f"--hf-datasets-params {path}: expected an object with path, as datasets.load_dataset has it"
        )
    for key in _REFUSED_PARAMETERS:
        if parameters.get(key):
            raise Refused(f"--hf-datasets-params {path}: {key} is refused: code of data sets is not run")
    if parameters["path"].endswith(".py"):
        raise Refused(f"--hf-datasets-params {path}: path is a script, and code of data sets is not run")
    return {"split": "train", **parameters, "streaming": True}


def _rows_of_datasets(parameters: dict[str, Any], number: int) -> Iterator[Row]:
    try:
        import datasets
    except ImportError as error:
        raise Refused(
            "--hf-datasets-params needs the package datasets; install it, or give --input"
        ) from error
    path = parameters["path"]
    try:
        rows = enumerate(datasets.load_dataset(**parameters), 1)
        for count, values in rows:
            yield Row(f"data set {path}, row {count}", dict(values), 0.0, number)
    except Refused:
        raise
    except Exception as error:
        line = next(iter(str(error).splitlines()), type(error).__name__)
        raise Refused(f"--hf-datasets-params: the data set {path} cannot be read ({line})") from error
