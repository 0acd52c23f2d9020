"""Layer norm and RMS norm, with the scale that direct effects are frozen at."""

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from fastinterp.model.intervene import NO_TAPS, Taps
from fastinterp.model.spec import ModelSpec, Norm
from fastinterp.model.weights import NormWeights


def norm_scale(norm: Norm, x: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows 1"]:
    """Returns what the (centred) residual is divided by: ``sqrt(mean(x^2) + eps)``, as ``hook_scale``.

    At least float32: the square of a residual of ordinary size overflows float16.
    """
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    if norm.kind == "layer":
        x = x - x.mean(-1, keepdim=True)
    mean_square = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / x.shape[-1]
    # Dividing by an overflown scale would give zeros, which look like numbers; NaN is seen at the end.
    mean_square = mean_square.masked_fill(mean_square == torch.inf, torch.nan)
    scale: Tensor = (mean_square + norm.eps).sqrt()
    return scale


def divide(x: Float[Tensor, "*rows d_model"], scale: Float[Tensor, "*rows 1"]) -> Float[Tensor, "*rows d_model"]:
    """Returns ``x / scale`` in the dtype of ``x``."""
    return (x / scale).to(x.dtype)


def center(norm: Norm, x: Float[Tensor, "*rows d_model"]) -> Float[Tensor, "*rows d_model"]:
    """Subtracts the mean over ``d_model`` where the norm does (layer norm); linear, so it may act on components."""
    return x - x.mean(-1, keepdim=True) if norm.kind == "layer" else x


def apply_affine(x: Float[Tensor, "*rows d_model"], weights: NormWeights) -> Float[Tensor, "*rows d_model"]:
    """Applies the norm's own weight and bias where they have not been folded into the next matrix."""
    if weights.w is not None:
        x = x * weights.w
    if weights.b is not None:
        x = x + weights.b
    return x


def normalize(norm: Norm, x: Float[Tensor, "*rows d_model"], weights: NormWeights) -> Float[Tensor, "*rows d_model"]:
    """Returns the norm of ``x``: in front of a sublayer, or of the unembedding."""
    if norm.kind == "layer":
        return F.layer_norm(x, x.shape[-1:], weights.w, weights.b, norm.eps)
    return apply_affine(divide(x, norm_scale(norm, x)), weights)


def tapped_norm(
    spec: ModelSpec,
    name: str,
    layer: int | None,
    resid: Float[Tensor, "*rows d_model"],
    weights: NormWeights,
    taps: Taps,
) -> Float[Tensor, "*rows d_model"]:
    """Normalises the residual; its scale and its normalised value (before the affine part) can be tapped."""
    if not (taps.wants(f"{name}_scale", layer) or taps.wants(f"{name}_normalized", layer)):
        return normalize(spec.norm, resid, weights)
    scale = taps(f"{name}_scale", layer, norm_scale(spec.norm, resid))
    return apply_affine(taps(f"{name}_normalized", layer, divide(center(spec.norm, resid), scale)), weights)


def write_norm(
    spec: ModelSpec,
    name: str,
    layer: int,
    written: Float[Tensor, "*rows d_model"],
    weights: NormWeights | None,
    taps: Taps = NO_TAPS,
) -> Float[Tensor, "*rows d_model"]:
    """Returns what a sublayer adds to the residual: its output, through the post-norm where there is one."""
    return written if weights is None else tapped_norm(spec, name, layer, written, weights, taps)


def rms_norm(
    norm: Norm, x: Float[Tensor, "*rows d_head"], w: Float[Tensor, " d_head"]
) -> Float[Tensor, "*rows d_head"]:
    """Returns the RMS norm of every query or key by itself, with the model's ``eps``."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = (wide.square().mean(-1, keepdim=True) + norm.eps).sqrt()
    return (wide / scale).to(x.dtype) * w
