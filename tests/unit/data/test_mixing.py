"""The order of several inputs."""

import itertools
from collections.abc import Callable, Iterator

import pytest

from mindspeed_lora.data.mixing import Mixing, Stream, mixed_rows
from mindspeed_lora.data.readers import BadRow, Row


def stream(name: str, count: int) -> Stream:
    def rows() -> Iterator[Row | BadRow]:
        for number in range(count):
            yield Row(f"{name}{number}", {"text": f"{name}{number}"}, (number + 1) / count)

    return rows, count


def order(lengths: dict[str, int], mixing: Mixing) -> list[str]:
    rows = list(mixed_rows([stream(name, count) for name, count in lengths.items()], mixing))
    fractions = [row.fraction for row in rows]
    assert fractions == sorted(fractions) and fractions[-1] <= 1.0 + 1e-9
    return [row.where for row in rows if isinstance(row, Row)]


def test_one_after_the_other() -> None:
    assert order({"a": 2, "b": 3}, Mixing()) == ["a0", "a1", "b0", "b1", "b2"]


def test_in_turn() -> None:
    assert order({"a": 2, "b": 3}, Mixing("interleave_under")) == ["a0", "b0", "a1", "b1"]
    assert order({"a": 3, "b": 2}, Mixing("interleave_over")) == ["a0", "b0", "a1", "b1", "a2", "b0"]
    assert order({"a": 5}, Mixing("interleave_under")) == ["a0", "a1", "a2", "a3", "a4"]


@pytest.mark.parametrize("lengths", [{"a": 3, "b": 5, "c": 1}, {"a": 700, "b": 30, "c": 900}])
@pytest.mark.parametrize("strategy", ["interleave_under", "interleave_over"])
@pytest.mark.parametrize("probabilities", [None, (0.5, 0.2, 0.3), (0.05, 0.05, 0.9)])
@pytest.mark.parametrize("seed", [1234, 7])
def test_as_datasets_interleaves(
    lengths: dict[str, int], strategy: str, probabilities: tuple[float, ...] | None, seed: int
) -> None:
    datasets = pytest.importorskip("datasets")
    sets = [
        datasets.Dataset.from_list([{"text": f"{name}{number}"} for number in range(count)])
        for name, count in lengths.items()
    ]
    expected = datasets.interleave_datasets(
        sets,
        probabilities=None if probabilities is None else list(probabilities),
        seed=seed,
        stopping_strategy="first_exhausted" if strategy == "interleave_under" else "all_exhausted",
    )
    assert order(lengths, Mixing(strategy, probabilities, seed)) == expected["text"][:]


def test_broken_rows_take_their_turn() -> None:
    def rows(source: int) -> Callable[[], Iterator[Row | BadRow]]:
        def given() -> Iterator[Row | BadRow]:
            for number in range(3):
                yield BadRow(f"{source}:{number}", (number + 1) / 3, source)

        return given

    mixed = mixed_rows([(rows(0), 1), (rows(1), 1)], Mixing("interleave_under"))
    problems = [row.problem for row in mixed if isinstance(row, BadRow)]
    assert problems == [f"{source}:{number}" for number, source in itertools.product(range(3), range(2))]
