"""Rotary position embedding: which angle each dimension turns by, and the turn itself."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from fastinterp.model.spec import Rope, RopeScaling


def inverse_frequencies(rope: Rope, device: torch.device | str = "cpu") -> Float[Tensor, " half"]:
    """Returns the angle per position of every rotated pair, in float32 as the checkpoints were trained."""
    exponent = torch.arange(0, rope.dims, 2, dtype=torch.int64).float() / rope.dims
    frequencies = 1.0 / (rope.base**exponent)
    match rope.scaling:
        case RopeScaling(kind="linear", factor=factor):
            frequencies = frequencies / factor
        case RopeScaling(kind="llama3") as scaling:
            frequencies = _llama3(frequencies, scaling)
        case RopeScaling(kind="yarn") as scaling:
            frequencies = _yarn(frequencies, rope, scaling)
    return frequencies.to(device)


def _llama3(frequencies: Float[Tensor, " half"], scaling: RopeScaling) -> Float[Tensor, " half"]:
    """Long wavelengths are stretched, short ones kept, those between interpolated."""
    wavelengths = 2 * math.pi / frequencies
    low = scaling.original_n_ctx / scaling.low_freq_factor
    high = scaling.original_n_ctx / scaling.high_freq_factor
    smooth = (scaling.original_n_ctx / wavelengths - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    between = (1 - smooth) * frequencies / scaling.factor + smooth * frequencies
    stretched = torch.where(wavelengths > low, frequencies / scaling.factor, frequencies)
    return torch.where((wavelengths <= low) & (wavelengths >= high), between, stretched)


def _yarn(frequencies: Float[Tensor, " half"], rope: Rope, scaling: RopeScaling) -> Float[Tensor, " half"]:
    """As llama3, but the transition is linear in the dimension, between two numbers of turns (Peng et al. 2023)."""

    def dimension_turning(times: float) -> float:
        return rope.dims * math.log(scaling.original_n_ctx / (times * 2 * math.pi)) / (2 * math.log(rope.base))

    low, high = dimension_turning(scaling.beta_fast), dimension_turning(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rope.dims - 1)
    width = high - low if high != low else 0.001
    stretched = ((torch.arange(rope.dims // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    return frequencies / scaling.factor * stretched + frequencies * (1 - stretched)


def rope_tables(
    rope: Rope, positions: Int[Tensor, "*rows"], *, dtype: torch.dtype
) -> tuple[Float[Tensor, "*rows 1 half"], Float[Tensor, "*rows 1 half"]]:
    """Returns cosine and sine of every (position, pair); angles are float32 in every dtype, as in Hugging Face."""
    angles = positions.float()[..., None, None] * inverse_frequencies(rope, positions.device)
    cos, sin = angles.cos(), angles.sin()
    if rope.scaling is not None and rope.scaling.attention_factor != 1.0:
        cos, sin = cos * rope.scaling.attention_factor, sin * rope.scaling.attention_factor
    return cos.to(dtype), sin.to(dtype)


def rotate(
    rope: Rope,
    x: Float[Tensor, "*rows head d_head"],
    cos: Float[Tensor, "*#rows 1 half"],
    sin: Float[Tensor, "*#rows 1 half"],
) -> Float[Tensor, "*rows head d_head"]:
    """Turns the first of every pair of dimensions against the second; dimensions beyond ``rope.dims`` stay."""
    turning, rest = x[..., : rope.dims], x[..., rope.dims :]
    if rope.layout == "interleaved":
        first, second = turning[..., ::2], turning[..., 1::2]
        turned = torch.stack([first * cos - second * sin, second * cos + first * sin], dim=-1).flatten(-2)
        return torch.cat([turned, rest], dim=-1) if rest.shape[-1] else turned
    first, second = turning.chunk(2, dim=-1)
    parts = [first * cos - second * sin, second * cos + first * sin]
    return torch.cat([*parts, rest] if rest.shape[-1] else parts, dim=-1)
