"""Rotary position embedding: frequencies of the supported scalings, and angles for given positions.

RoFormer (Su et al. 2021, arXiv 2104.09864), equation 15, with rotated halves as in Llama. The ``llama3``
scaling is the one of Llama 3.1: wavelengths above ``original / low_freq_factor`` are stretched by ``factor``,
those below ``original / high_freq_factor`` kept, those between blended linearly. ``dynamic`` stretches rows that are
longer than ``max_position_embeddings`` only, and such rows are refused before.

``yarn`` (Peng et al. 2023, arXiv 2309.00071, section 3.2): a frequency that turns ``beta_fast`` times or more over the
original positions is kept, one that turns ``beta_slow`` times or less is divided by ``factor``, those between are
blended linearly by their number; cosine and sine are enlarged, which sharpens attention (section 3.4).
"""

from __future__ import annotations

import math

import torch

from mindspeed_lora.config.shape import ModelShape, RopeScaling


def rotary_frequencies(shape: ModelShape) -> torch.Tensor:
    """Inverse frequencies ``[d / 2]``, float32: ``base^(-2i/d)``, scaled as the model says.

    d is the width of what is rotated of a head.
    """
    width = int(shape.kv_channels * shape.rotary_percent)
    if shape.mla is not None:
        width = shape.mla.qk_pos_emb_head_dim
    exponents = torch.arange(0, width, 2, dtype=torch.int64).float() / width
    periods = shape.rotary_base**exponents
    frequencies = 1.0 / periods
    scaling = shape.rope_scaling
    if scaling is None or scaling.rope_type == "dynamic":
        return frequencies
    if scaling.rope_type == "linear":
        return frequencies / scaling.factor
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


def rotary_amplitude(scaling: RopeScaling | None) -> float:
    """What multiplies cosine and sine; with both ``mscale`` given, the ratio of their magnitudes (DeepSeek-V2)."""
    if scaling is None or scaling.rope_type != "yarn":
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        over = yarn_magnitude(scaling.factor, scaling.mscale)
        return over / yarn_magnitude(scaling.factor, scaling.mscale_all_dim)
    return yarn_magnitude(scaling.factor, 1.0)


def yarn_magnitude(factor: float, mscale: float) -> float:
    """``0.1 · mscale · ln(factor) + 1`` (YaRN, equation 22), 1 where nothing is stretched."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def rotary_tables(
    frequencies: torch.Tensor, positions: torch.Tensor, dtype: torch.dtype, amplitude: float = 1.0
) -> torch.Tensor:
    """Cosine and sine of every position's angles, computed in float32.

    Args:
        frequencies: ``[d / 2]`` float32.
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
