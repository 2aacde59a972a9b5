from __future__ import annotations

from dataclasses import dataclass

import pytest

from mindspeed_lora.config.flags import AT_LEAST_ONE, PROBABILITY, Section, flag, options
from mindspeed_lora.errors import Refused


@dataclass(frozen=True, kw_only=True)
class Oven(Section):
    """A section with one field of each kind."""

    heat: int = flag("degrees", 180, check=AT_LEAST_ONE)
    fan: bool = flag("blow", False)
    mode: str | None = flag("way of heating", choices=("top", "bottom"))
    racks: tuple[int, ...] | None = flag("racks in use", names=("--racks", "--shelves"), check=AT_LEAST_ONE)
    humidity: float = flag("share of steam", 0.0, check=PROBABILITY)
    labels: tuple[str, ...] = flag("names", (), nargs="*")


def test_options_come_from_fields() -> None:
    by_dest = {option.dest: option for option in options(Oven)}
    assert [by_dest[name].arity for name in ("heat", "fan", "mode", "racks", "labels")] == [
        "1",
        "0",
        "1",
        "+",
        "*",
    ]
    assert by_dest["racks"].names == ("--racks", "--shelves")
    assert by_dest["heat"].names == ("--heat",)
    assert by_dest["racks"].item_type is int
    assert by_dest["mode"].item_type is str
    assert by_dest["heat"].default == 180


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"heat": 0}, "--heat 0: expected an integer of at least 1"),
        ({"mode": "side"}, "--mode side: expected one of top, bottom"),
        ({"racks": (1, 0)}, "--racks 0: expected an integer of at least 1"),
        ({"humidity": float("nan")}, "--humidity nan: expected a number from 0 to below 1"),
    ],
)
def test_values_are_checked_when_a_section_is_made(values: dict[str, object], message: str) -> None:
    with pytest.raises(Refused, match=message):
        Oven(**values)


def test_left_out_values_pass_the_checks() -> None:
    assert Oven(mode=None, racks=None).heat == 180
