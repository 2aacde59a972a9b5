"""The shortest names by which PEFT means a set of modules or parameters, and none besides, on one model."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import TypeVar

from mindspeed_lora.checkpoint.peft.rules import ends

Number = TypeVar("Number", int, float)
_IN_A_LAYER = re.compile(r".*?\.\d+\.(?P<place>.+)")


def shortest_names(chosen: Iterable[str], everything: Iterable[str]) -> tuple[str, ...]:
    """Ends of names that mean chosen ones alone, in whatever layer; full names of what has no such end.

    Args:
        chosen: full names.
        everything: all full names that the model has, the chosen ones among them.
    """
    place_of = {name: _place(name) for name in chosen}
    of_all, of_chosen = _counts(map(_place, everything)), _counts(place_of.values())
    ends_of = {
        place: next((end for end in _ends_in_a_layer(place) if of_all[end] == of_chosen[end]), None)
        for place in set(place_of.values())
    }
    return tuple(dict.fromkeys(ends_of[place] or name for name, place in place_of.items()))


def places(chosen: Iterable[str], everything: Iterable[str]) -> tuple[str, ...]:
    """Full places in a layer (``mlp.experts.down_proj``), where that of every layer is chosen; else full names."""
    wanted = dict.fromkeys(chosen)
    of_all, of_chosen = Counter(map(_place, everything)), Counter(map(_place, wanted))
    return tuple(
        dict.fromkeys(
            _place(name) if of_all[_place(name)] == of_chosen[_place(name)] else name for name in wanted
        )
    )


def pattern_of(
    values: Mapping[str, Number], default: Number, everything: Collection[str]
) -> dict[str, Number]:
    """A rank or alpha pattern that gives these modules their values, where they are not the default.

    Args:
        values: by full name.
        default: of what no key of the pattern means.
        everything: all full names that the model has.
    """
    by_value: dict[Number, list[str]] = {}
    for name, value in values.items():
        if value != default:
            by_value.setdefault(value, []).append(name)
    return {key: value for value, names in by_value.items() for key in shortest_names(names, everything)}


def _place(name: str) -> str:
    match = _IN_A_LAYER.fullmatch(name)
    return name if match is None else match["place"]


def _counts(places: Iterable[str]) -> Counter[str]:
    """How many of these have an end; layers share their places, so that each is cut into its ends once."""
    counts: Counter[str] = Counter()
    for place, times in Counter(places).items():
        for end in _ends_in_a_layer(place):
            counts[end] += times
    return counts


def _ends_in_a_layer(place: str) -> Iterator[str]:
    """Ends of a place that do not begin with the number of an expert."""
    return (end for end in ends(place) if not end[0].isdigit())
