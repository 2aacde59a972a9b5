"""Rotary position embedding: frequencies of the supported scalings, and angles for given positions.

RoFormer (Su et al. 2021, arXiv 2104.09864), equation 15, with rotated halves as in Llama. The ``llama3``
scaling is the one of Llama 3.1: wavelengths above ``original / low_freq_factor`` are stretched by ``factor``,
those below ``original / high_freq_factor`` kept, those between blended linearly.
"""

from __future__ import annotations

import math

import torch

from mindspeed_lora.config.shape import ModelShape, RopeScaling


def rotary_frequencies(shape: ModelShape) -> torch.Tensor:
    """Inverse frequencies ``[kv_channels / 2]``, float32: ``base^(-2i/d)``, scaled as the model says."""
    exponents = torch.arange(0, shape.kv_channels, 2, dtype=torch.int64).float() / shape.kv_channels
    frequencies = 1.0 / (shape.rotary_base**exponents)
    scaling = shape.rope_scaling
    if scaling is None:
        return frequencies
    if scaling.rope_type == "linear":
        return frequencies / scaling.factor
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


def rotary_tables(frequencies: torch.Tensor, positions: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Cosine and sine of every position's angles, computed in float32.

    Args:
        frequencies: ``[d / 2]`` float32.
        positions: ``[s]``, or ``[b, s]`` where the rows of a batch stand at different positions.
        dtype: of the result.

    Returns:
        ``[2, s, 1, 1, d/2]`` or ``[2, s, b, 1, d/2]``.
    """
    angles = positions.to(frequencies.device).unsqueeze(-1).float() * frequencies
    angles = angles.unsqueeze(1) if positions.dim() == 1 else angles.transpose(0, 1)
    return torch.stack((angles.cos(), angles.sin())).to(dtype).unsqueeze(3)
