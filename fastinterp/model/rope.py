"""Rotary position embedding: which angle each dimension turns by, and the turn itself."""

import math

import torch
from jaxtyping import Float
from torch import Tensor

from fastinterp.model.spec import Position, RopeScaling


def inverse_frequencies(position: Position, device: torch.device | str = "cpu") -> Float[Tensor, " half"]:
    """Returns the angle per position of every rotated pair, in float32 as the checkpoints were trained."""
    exponent = torch.arange(0, position.rotary_dims, 2, dtype=torch.int64).float() / position.rotary_dims
    frequencies = 1.0 / (position.base**exponent)
    if position.scaling is not None:
        frequencies = _scaled(frequencies, position.scaling)
    return frequencies.to(device)


def _scaled(frequencies: Float[Tensor, " half"], scaling: RopeScaling) -> Float[Tensor, " half"]:
    if scaling.kind == "linear":
        return frequencies / scaling.factor
    # Llama 3: long wavelengths are stretched, short ones kept, those between interpolated.
    wavelengths = 2 * math.pi / frequencies
    low = scaling.original_n_ctx / scaling.low_freq_factor
    high = scaling.original_n_ctx / scaling.high_freq_factor
    smooth = (scaling.original_n_ctx / wavelengths - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    between = (1 - smooth) * frequencies / scaling.factor + smooth * frequencies
    stretched = torch.where(wavelengths > low, frequencies / scaling.factor, frequencies)
    return torch.where((wavelengths <= low) & (wavelengths >= high), between, stretched)


def rope_tables(
    position: Position, n_pos: int, *, device: torch.device, dtype: torch.dtype
) -> tuple[Float[Tensor, "pos 1 half"], Float[Tensor, "pos 1 half"]]:
    """Returns cosine and sine of every (position, pair); angles are float32 in every dtype, as in Hugging Face."""
    positions = torch.arange(n_pos, dtype=torch.float32, device=device)
    angles = positions[:, None] * inverse_frequencies(position, device)[None, :]
    return angles.cos().to(dtype)[:, None, :], angles.sin().to(dtype)[:, None, :]


def rotate(
    x: Float[Tensor, "batch pos head d_head"],
    cos: Float[Tensor, "pos 1 half"],
    sin: Float[Tensor, "pos 1 half"],
) -> Float[Tensor, "batch pos head d_head"]:
    """Turns dimension ``i`` against ``i + half``; dimensions beyond ``2 * half`` stay."""
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    turned = [first * cos - second * sin, second * cos + first * sin]
    return torch.cat([*turned, rest] if rest.shape[-1] else turned, dim=-1)
