"""Rotary position embedding: frequencies of the supported scalings, and angles for given positions.

RoFormer (Su et al. 2021, arXiv 2104.09864), equation 15, with rotated halves as in Llama. The ``llama3``
scaling is the one of Llama 3.1: wavelengths above ``original / low_freq_factor`` are stretched by ``factor``,
those below ``original / high_freq_factor`` kept, those between blended linearly. ``dynamic`` stretches rows that are
longer than ``max_position_embeddings`` only, and such rows are refused before.

``yarn`` (Peng et al. 2023, arXiv 2309.00071, section 3.2): a frequency that turns ``beta_fast`` times or more over the
original positions is kept, one that turns ``beta_slow`` times or less is divided by ``factor``, those between are
blended linearly by their number; cosine and sine are enlarged, which sharpens attention (section 3.4).

``longrope`` (Ding et al. 2024, arXiv 2402.13753, as Phi-3.5 has it): every frequency is divided by a factor of its own,
by one of two lists: which one, says the length of the row. Cosine and sine are enlarged by
``√(1 + ln(factor) / ln(original))`` whatever the length.
"""

from __future__ import annotations

import math

import torch

from mindspeed_lora.config.rotary_flags import rotary_width
from mindspeed_lora.config.shape import ModelShape, RopeScaling


class RotaryPositions:
    """Turns positions into cosine and sine, as one model does.

    Where the frequencies of a row depend on its length (``longrope``), each document has those that it has alone: a
    document is what one run of positions 0, 1, 2 … numbers. What lies beside it in a packed row or a batch, and what
    it is padded to, changes nothing.
    """

    def __init__(self, shape: ModelShape) -> None:
        scaling = shape.rope_scaling
        with torch.device("cpu"):
            self.frequencies = rotary_frequencies(shape)
            """``[d / 2]`` float32, on the device of the last positions."""
        self.amplitude = rotary_amplitude(scaling)
        self.switch: int | None = None
        """The length beyond which a document has other frequencies; None: there is none."""
        if scaling is not None and scaling.rope_type == "longrope":
            self.switch = scaling.original_max_position_embeddings
            self.long_amplitude = rotary_amplitude(scaling, long=True)
            with torch.device("cpu"):
                self.long_frequencies = rotary_frequencies(shape, long=True)

    def tables(
        self, positions: torch.Tensor, dtype: torch.dtype, lengths: torch.Tensor | None = None
    ) -> torch.Tensor:
        """See :func:`rotary_tables`.

        Args:
            positions: ``[s]`` or ``[b, s]``.
            dtype: of the result.
            lengths: ``[b, s]``, ``[b, 1]`` or ``[1]`` int64, how long the document of each position is; None: as
                long as the positions of its row say.
        """
        self.frequencies = self.frequencies.to(positions.device)
        if self.switch is None:
            return rotary_tables(self.frequencies, positions, dtype, self.amplitude)
        self.long_frequencies = self.long_frequencies.to(positions.device)
        if lengths is None:
            lengths = positions.amax(-1, keepdim=True) + 1
        is_long = (lengths > self.switch).unsqueeze(-1)
        if is_long.dim() == 3 and positions.dim() == 1:
            positions = positions.expand(is_long.size(0), -1)
        frequencies = torch.where(is_long, self.long_frequencies, self.frequencies)
        if self.amplitude == self.long_amplitude:
            return rotary_tables(frequencies, positions, dtype, self.amplitude)
        tables = rotary_tables(frequencies, positions, torch.float32)
        # [s or 1, b or 1, 1, 1], as the tables lie.
        is_long = is_long.unsqueeze(1) if is_long.dim() == 2 else is_long.transpose(0, 1)
        return (tables * torch.where(is_long.unsqueeze(-1), self.long_amplitude, self.amplitude)).to(dtype)


def rotary_frequencies(shape: ModelShape, long: bool = False) -> torch.Tensor:
    """Inverse frequencies ``[d / 2]``, float32: ``base^(-2i/d)``, scaled as the model says.

    d is the width of what is rotated of a head. ``long``: those of rows that are longer than the original positions.
    """
    width = rotary_width(shape)
    exponents = torch.arange(0, width, 2, dtype=torch.int64).float() / width
    periods = shape.rotary_base**exponents
    frequencies = 1.0 / periods
    scaling = shape.rope_scaling
    if scaling is None or scaling.rope_type == "dynamic":
        return frequencies
    if scaling.rope_type == "linear":
        return frequencies / scaling.factor
    if scaling.rope_type == "longrope":
        factors = torch.tensor(scaling.long_factor if long else scaling.short_factor, dtype=torch.float32)
        return 1.0 / (factors * periods)
    if scaling.rope_type == "yarn":
        kept = _yarn_kept(width, shape.rotary_base, scaling)
        return 1.0 / (scaling.factor * periods) * (1 - kept) + frequencies * kept
    return _llama3_frequencies(frequencies, scaling)


def _llama3_frequencies(frequencies: torch.Tensor, scaling: RopeScaling) -> torch.Tensor:
    original = scaling.original_max_position_embeddings
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    wavelength = 2 * math.pi / frequencies
    stretched = frequencies / scaling.factor
    smooth = (original / wavelength - low) / (high - low)
    blended = (1 - smooth) * stretched + smooth * frequencies
    scaled = torch.where(wavelength > original / low, stretched, blended)
    return torch.where(wavelength < original / high, frequencies, scaled)


def _yarn_kept(width: int, base: float, scaling: RopeScaling) -> torch.Tensor:
    """How much of each frequency is kept, ``[d / 2]`` from 1 (the fastest) to 0."""
    original = scaling.original_max_position_embeddings

    def number(turns: float) -> float:
        """Of the frequency that turns so often over the original positions."""
        return width * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    first, last = number(scaling.beta_fast), number(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    if first == last:
        last += 0.001  # a step, as in transformers, and not a division by zero
    numbers = torch.arange(width // 2, dtype=torch.float32)
    return 1 - ((numbers - first) / (last - first)).clamp(0, 1)


def rotary_amplitude(scaling: RopeScaling | None, long: bool = False) -> float:
    """What multiplies cosine and sine; with both ``mscale`` given, the ratio of their magnitudes (DeepSeek-V2).

    ``long``: in rows that are longer than the original positions.
    """
    if scaling is None or scaling.rope_type not in ("yarn", "longrope"):
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.rope_type == "longrope":
        told = scaling.long_mscale if long else scaling.short_mscale
        return longrope_magnitude(scaling) if told is None else told
    if scaling.mscale and scaling.mscale_all_dim:
        over = yarn_magnitude(scaling.factor, scaling.mscale)
        return over / yarn_magnitude(scaling.factor, scaling.mscale_all_dim)
    return yarn_magnitude(scaling.factor, 1.0)


def longrope_magnitude(scaling: RopeScaling) -> float:
    """``√(1 + ln(factor) / ln(original))``, 1 where nothing is stretched."""
    if scaling.factor <= 1:
        return 1.0
    return math.sqrt(1 + math.log(scaling.factor) / math.log(scaling.original_max_position_embeddings))


def yarn_magnitude(factor: float, mscale: float) -> float:
    """``0.1 · mscale · ln(factor) + 1`` (YaRN, equation 22), 1 where nothing is stretched."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def rotary_tables(
    frequencies: torch.Tensor, positions: torch.Tensor, dtype: torch.dtype, amplitude: float = 1.0
) -> torch.Tensor:
    """Cosine and sine of every position's angles, computed in float32.

    Args:
        frequencies: ``[d / 2]`` float32, or ``[s or 1, d / 2]`` and ``[b, s or 1, d / 2]`` by position.
        positions: ``[s]``, or ``[b, s]`` where the rows of a batch stand at different positions.
        dtype: of the result.
        amplitude: multiplies both.

    Returns:
        ``[2, s, 1, 1, d/2]`` or ``[2, s, b, 1, d/2]``.
    """
    angles = positions.to(frequencies.device).unsqueeze(-1).float() * frequencies
    angles = angles.unsqueeze(1) if positions.dim() == 1 else angles.transpose(0, 1)
    tables = torch.stack((angles.cos(), angles.sin()))
    if amplitude != 1.0:
        tables *= amplitude
    return tables.to(dtype).unsqueeze(3)
