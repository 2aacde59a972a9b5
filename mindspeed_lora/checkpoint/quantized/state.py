"""bitsandbytes' form of a quantised weight in files: its tensors beside ``<name>``, and the state that describes them.

Of four bits ``<name>`` is uint8 ``[ceil(n / 2), 1]``, and beside it lie ``.absmax``, ``.quant_map`` (the code's
values), with nested statistics ``.nested_absmax`` and ``.nested_quant_map``, and the state, a JSON text in uint8:
``.quant_state.bitsandbytes__nf4`` or ``…__fp4``.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

import torch

from mindspeed_lora.checkpoint.storage.tensor_writer import TensorSpec
from mindspeed_lora.config.quantization import BLOCK_SIZES, QuantSettings
from mindspeed_lora.errors import Refused
from mindspeed_lora.quantization.codebooks import dynamic_values, four_bit_values
from mindspeed_lora.quantization.runs import NESTED_BLOCK

ABSMAX, QUANT_MAP = ".absmax", ".quant_map"
NESTED_ABSMAX, NESTED_QUANT_MAP = ".nested_absmax", ".nested_quant_map"
STATE = ".quant_state.bitsandbytes__"
"""What a weight's name has behind it in those of its tensors; the kind follows the last."""
FOUR_BITS = ("nf4", "fp4")

MAX_STATE_BYTES = 1 << 16
"""A state of one matrix takes less than 200 bytes, one of a shard of several some more."""
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_OFFSET_CHARACTERS = 24
"""The longest text of a float32 as JSON has it."""
_CPU = torch.device("cpu")


@dataclass(frozen=True)
class State:
    """What the JSON text of a quantised weight says."""

    settings: QuantSettings
    dtype: torch.dtype
    """Of the weight before it was quantised, and of the values that it stands for."""
    shape: tuple[int, int]
    offsets: tuple[float, ...] = ()
    """With nested statistics the mean of the largest magnitudes, of each matrix that the weight is made of."""

    @property
    def num_values(self) -> int:
        """Values of the weight."""
        return math.prod(self.shape)


def num_blocks(shape: tuple[int, int], settings: QuantSettings) -> int:
    """Blocks of a matrix."""
    return -(-math.prod(shape) // settings.block_size)


def num_nested(shape: tuple[int, int], settings: QuantSettings) -> int:
    """Nested statistics of a matrix."""
    return -(-num_blocks(shape, settings) // NESTED_BLOCK)


def four_bit_specs(
    settings: QuantSettings, num_values: int, blocks: int, nested: int, state_bytes: int
) -> dict[str, TensorSpec]:
    """Dtype and shape of each tensor of a four-bit weight, by what its name has behind the weight's."""
    specs: dict[str, TensorSpec] = {
        "": (torch.uint8, (-(-num_values // 2), 1)),
        ABSMAX: (torch.uint8 if settings.double else torch.float32, (blocks,)),
        QUANT_MAP: (torch.float32, (16,)),
    }
    if settings.double:
        specs[NESTED_ABSMAX] = (torch.float32, (nested,))
        specs[NESTED_QUANT_MAP] = (torch.float32, (256,))
    return {**specs, f"{STATE}{settings.kind}": (torch.uint8, (state_bytes,))}


def code_tables(settings: QuantSettings) -> dict[str, torch.Tensor]:
    """The tables that lie beside each weight."""
    # Files have FP4's second zero without its sign.
    tables = {QUANT_MAP: four_bit_values(settings.kind, _CPU) + 0.0}
    return {**tables, NESTED_QUANT_MAP: dynamic_values(_CPU)} if settings.double else tables


def state_bytes(settings: QuantSettings, dtype: torch.dtype, shape: tuple[int, int], offsets: int = 1) -> int:
    """Bytes that a state takes, whatever its offsets are."""
    return len(_text(settings, dtype, shape, ["x" * (_OFFSET_CHARACTERS - 2)] * offsets))


def state_tensor(state: State) -> torch.Tensor:
    """A state as it lies in a file, uint8; blanks bring it to the length that :func:`state_bytes` told."""
    size = state_bytes(state.settings, state.dtype, state.shape, len(state.offsets) or 1)
    text = _text(state.settings, state.dtype, state.shape, list(state.offsets))
    return torch.frombuffer(bytearray(text.ljust(size).encode()), dtype=torch.uint8)


def _text(settings: QuantSettings, dtype: torch.dtype, shape: tuple[int, int], offsets: list[Any]) -> str:
    content: dict[str, Any] = {
        "quant_type": settings.kind,
        "blocksize": settings.block_size,
        "dtype": _DTYPE_NAMES[dtype],
        "shape": list(shape),
    }
    if settings.double:
        content["nested_blocksize"] = NESTED_BLOCK
        content["nested_dtype"] = "float32"
        # bitsandbytes knows weights of one matrix, and one number.
        content["nested_offset"] = offsets[0] if len(offsets) == 1 else offsets
    return json.dumps(content)


def parse_state(data: bytes, kind: str, name: str) -> State:
    """The state that a file holds; ``kind`` is the one in the tensor's name, ``name`` says file and tensor.

    Raises:
        Refused: it is no such text, or says what is not known.
    """
    try:
        content = json.loads(data.decode("utf-8"))
    except ValueError as error:
        raise Refused(f"{name} is not valid JSON ({error}).") from error
    if not isinstance(content, dict):
        raise Refused(f"{name}: found {type(content).__name__}; expected a JSON object.")
    _expect(name, content, "quant_type", content.get("quant_type") == kind, kind)
    block_size, dtype, shape = (content.get(key) for key in ("blocksize", "dtype", "shape"))
    _expect(
        name, content, "blocksize", block_size in BLOCK_SIZES, f"one of {', '.join(map(str, BLOCK_SIZES))}"
    )
    _expect(name, content, "dtype", dtype in _DTYPES, f"one of {', '.join(_DTYPES)}")
    _expect(name, content, "shape", _is_shape(shape), "two sizes above 0")
    double = any(key.startswith("nested_") for key in content)
    offsets: tuple[float, ...] = ()
    if double:
        found = content.get("nested_offset")
        listed: list[Any] = found if isinstance(found, list) else [found]
        offsets = tuple(listed)
        _expect(
            name, content, "nested_offset", bool(offsets) and all(map(_is_finite, offsets)), "finite numbers"
        )
        _expect(
            name, content, "nested_blocksize", content.get("nested_blocksize") == NESTED_BLOCK, NESTED_BLOCK
        )
        _expect(name, content, "nested_dtype", content.get("nested_dtype") == "float32", "float32")
    settings = QuantSettings(kind, int(block_size), double)  # type: ignore[arg-type]
    return State(settings, _DTYPES[str(dtype)], (shape[0], shape[1]), offsets)  # type: ignore[index]


def _expect(name: str, content: dict[str, Any], key: str, holds: bool, expected: object) -> None:
    if not holds:
        raise Refused(f"{name}: {key} is {content.get(key)!r}; expected {expected}.")


def _is_shape(value: Any) -> bool:
    sizes = isinstance(value, list) and len(value) == 2
    return sizes and all(type(size) is int and 0 < size < 1 << 31 for size in value)


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and abs(value) < 3.4e38
