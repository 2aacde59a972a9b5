"""Where masters and moments of the optimizer lie: on the device, or in memory that pages.

torch's AdamW is given *portions*: whole slices, or, of paged ones, parts of a slice that are small enough to be on the
device together with what comes next. Its arithmetic is element by element, so that portions change nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from mindspeed_lora.checkpoint.loading.local_parameters import LocalParameter
from mindspeed_lora.device import current_device
from mindspeed_lora.device.paged_memory import PagedMemory, Range

MOMENTS = ("exp_avg", "exp_avg_sq")
PORTION = 1 << 22
"""Elements of a slice that are updated at once where its state is paged."""
_ALIGNMENT = 16
"""Elements: 64 bytes, a line of the processor's cache."""

AdamState = dict[torch.Tensor, Any]
"""torch's, by portion."""


@dataclass(frozen=True)
class OwnedSlice:
    """Elements ``[start, stop)`` of a flattened local parameter, and their fp32 master copy."""

    parameter: LocalParameter
    start: int
    stop: int
    master: torch.nn.Parameter
    """``[stop − start]`` float32; the parameter's own storage where that is float32."""

    @property
    def gradient(self) -> torch.Tensor:
        """``[stop − start]`` float32, a view of the gradient buffer."""
        main_grad: torch.Tensor = self.parameter.param.main_grad  # type: ignore[attr-defined]
        return main_grad.view(-1)[self.start : self.stop]

    @property
    def rounded(self) -> bool:
        """Whether the parameter is not float32, and the master a tensor of its own."""
        return self.parameter.param.dtype is not torch.float32


@dataclass(frozen=True)
class Portion:
    """Elements ``[first, last)`` of an owned slice, which are updated at once."""

    owned: OwnedSlice
    first: int
    last: int
    master: torch.nn.Parameter
    """``[last − first]`` float32, on the device while its window is visited."""

    @property
    def gradient(self) -> torch.Tensor:
        """``[last − first]`` float32, a view of the gradient buffer."""
        return self.owned.gradient[self.first : self.last]

    @property
    def parameter_values(self) -> torch.Tensor:
        """``[last − first]``, a view of the parameter."""
        start = self.owned.start
        return self.owned.parameter.param.data.view(-1)[start + self.first : start + self.last]


class OptimizerStates(Protocol):
    """The state of a rank's slices."""

    slices: list[OwnedSlice]
    portions: list[Portion]
    """All of them, in the order of the slices."""

    def windows(self, state: AdamState) -> Iterator[list[Portion]]:
        """Portions whose masters and moments are on the device together; in ``state`` they are found meanwhile."""
        ...

    def of(self, owned: OwnedSlice, state: AdamState) -> dict[str, torch.Tensor]:
        """Both moments ``[stop − start]`` float32 of a slice, wherever they lie; zeros before the first step."""
        ...

    def restore(
        self, owned: OwnedSlice, values: dict[str, torch.Tensor], steps: int, state: AdamState
    ) -> None:
        """Sets master and moments of a slice, and the number of updates behind them."""
        ...

    def rest(self) -> None:
        """Nothing of it is needed for now."""
        ...


class ResidentStates:
    """On the device; torch makes the moments with the first step."""

    def __init__(self, ranges: Sequence[tuple[LocalParameter, int, int]]) -> None:
        self.slices = [_own(parameter, start, stop) for parameter, start, stop in ranges]
        self.portions = [Portion(owned, 0, owned.stop - owned.start, owned.master) for owned in self.slices]

    def windows(self, state: AdamState) -> Iterator[list[Portion]]:
        """All at once."""
        yield self.portions

    def of(self, owned: OwnedSlice, state: AdamState) -> dict[str, torch.Tensor]:
        """Both moments of a slice."""
        own = state.get(owned.master, {})
        return {key: own[key] if key in own else torch.zeros_like(owned.master.data) for key in MOMENTS}

    def restore(
        self, owned: OwnedSlice, values: dict[str, torch.Tensor], steps: int, state: AdamState
    ) -> None:
        """Sets master and moments of a slice."""
        owned.master.data.copy_(values["master"])
        device = owned.master.device
        state[owned.master] = {
            "step": torch.tensor(float(steps), device=device),
            **{key: values[key].to(device=device, dtype=torch.float32).clone() for key in MOMENTS},
        }

    def rest(self) -> None:
        """It stays."""


class PagedStates:
    """In paged memory, slice after slice, of each both moments and the master where that is a tensor of its own."""

    def __init__(
        self, ranges: Sequence[tuple[LocalParameter, int, int]], memory: Callable[[int], PagedMemory]
    ) -> None:
        """``memory`` gives room for so many numbers."""
        self.memory = memory(paged_elements(ranges))
        self.slices: list[OwnedSlice] = []
        self.portions: list[Portion] = []
        self._homes: dict[int, _Home] = {}
        """Of each slice, by its identity."""
        place = 0
        for parameter, start, stop in ranges:
            home = _Home(place, aligned(stop - start), state_names(parameter))
            place = home.stop
            self._add(parameter, start, stop, home)
        self._windows = [self._window(portions) for portions in _together(self.portions)]

    def _add(self, parameter: LocalParameter, start: int, stop: int, home: _Home) -> None:
        size = stop - start
        master = parameter.param.data.view(-1)[start:stop]
        if "master" in home.names:
            values, master = master, self.memory.values[home.place("master") :][:size]
            master.copy_(values)
        owned = OwnedSlice(parameter, start, stop, torch.nn.Parameter(master))
        self.slices.append(owned)
        self._homes[id(owned)] = home
        for first in range(0, size, PORTION):
            last = min(size, first + PORTION)
            self.portions.append(Portion(owned, first, last, torch.nn.Parameter(master[first:last])))

    def _window(self, portions: list[Portion]) -> _Window:
        """Neighbouring numbers become one run, so that they travel together."""
        runs: list[Range] = []
        places: list[dict[str, tuple[int, int]]] = []
        for portion in portions:
            home = self._homes[id(portion.owned)]
            place = {}
            for name in home.names:
                first = home.place(name) + portion.first
                last = first + aligned(portion.last - portion.first)
                if runs and runs[-1][1] == first:
                    runs[-1] = runs[-1][0], last
                else:
                    runs.append((first, last))
                place[name] = len(runs) - 1, first - runs[-1][0]
            places.append(place)
        return _Window(portions, runs, places)

    def windows(self, state: AdamState) -> Iterator[list[Portion]]:
        """Runs of portions of at most :data:`PORTION` elements in all."""
        for portion in self.portions:
            state.setdefault(portion.master, {}).setdefault("step", torch.zeros((), device=current_device()))
        visits = self.memory.visit([window.runs for window in self._windows])
        for window, near in zip(self._windows, visits, strict=True):
            for portion, place in zip(window.portions, window.places, strict=True):
                size = portion.last - portion.first
                _bind(portion, {name: near[run][at:][:size] for name, (run, at) in place.items()}, state)
            yield window.portions
            for portion in window.portions:
                home = self._of(portion.owned)
                _bind(
                    portion,
                    {name: all_of[portion.first : portion.last] for name, all_of in home.items()},
                    state,
                )

    def _of(self, owned: OwnedSlice) -> dict[str, torch.Tensor]:
        home, size = self._homes[id(owned)], owned.stop - owned.start
        return {name: self.memory.values[home.place(name) :][:size] for name in home.names}

    def of(self, owned: OwnedSlice, state: AdamState) -> dict[str, torch.Tensor]:
        """Both moments of a slice, where they stay."""
        found = self._of(owned)
        return {name: found[name] for name in MOMENTS}

    def restore(
        self, owned: OwnedSlice, values: dict[str, torch.Tensor], steps: int, state: AdamState
    ) -> None:
        """Sets master and moments of a slice, where they stay."""
        owned.master.data.copy_(values["master"])
        for name, moment in self.of(owned, state).items():
            moment.copy_(values[name])
        for portion in self.portions:
            if portion.owned is owned:
                state[portion.master] = {"step": torch.tensor(float(steps), device=current_device())}

    def rest(self) -> None:
        """Lets all of it leave the device."""
        if len(self._windows) > 1:
            self.memory.rest()


@dataclass(frozen=True)
class _Home:
    """Where the states of a slice lie in paged memory, one behind the other."""

    start: int
    length: int
    """Of each."""
    names: tuple[str, ...]

    def place(self, name: str) -> int:
        """Of the first number."""
        return self.start + self.names.index(name) * self.length

    @property
    def stop(self) -> int:
        """Behind the last number."""
        return self.start + len(self.names) * self.length


@dataclass(frozen=True)
class _Window:
    portions: list[Portion]
    runs: list[Range]
    """Of paged memory."""
    places: list[dict[str, tuple[int, int]]]
    """Of each portion, by name: number of the run, and the place in it."""


def _bind(portion: Portion, states: dict[str, torch.Tensor], state: AdamState) -> None:
    """Lets torch find the states of a portion there."""
    if "master" in states:
        portion.master.data = states["master"]
    state[portion.master].update({name: states[name] for name in MOMENTS})


def _together(portions: Sequence[Portion]) -> Iterator[list[Portion]]:
    """Runs of portions of at most :data:`PORTION` elements in all."""
    run: list[Portion] = []
    size = 0
    for portion in portions:
        length = portion.last - portion.first
        if run and size + length > PORTION:
            yield run
            run, size = [], 0
        run.append(portion)
        size += length
    if run:
        yield run


def _own(parameter: LocalParameter, start: int, stop: int) -> OwnedSlice:
    values = parameter.param.data.view(-1)[start:stop]
    master = values if values.dtype is torch.float32 else values.float().clone()
    return OwnedSlice(parameter, start, stop, torch.nn.Parameter(master))


def state_names(parameter: LocalParameter) -> tuple[str, ...]:
    """What is kept of a parameter beside itself."""
    return MOMENTS if parameter.param.dtype is torch.float32 else (*MOMENTS, "master")


def aligned(count: int) -> int:
    """Elements that ``count`` of them take with what stands behind them."""
    return -(-count // _ALIGNMENT) * _ALIGNMENT


def paged_elements(ranges: Sequence[tuple[LocalParameter, int, int]]) -> int:
    """Numbers of all states of these slices."""
    return sum(aligned(stop - start) * len(state_names(parameter)) for parameter, start, stop in ranges)
