"""What ``variant_residual`` means: its input checks and the literal float64 computation."""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from fastinterp_kernels.common import as_layers, check_float, check_same_device

Edits = Int[Tensor, " variant"] | Bool[Tensor, "variant head"]
"""Which heads each variant edits: one each, or any number by a mask."""


def check_inputs(
    resid: Tensor, z: Tensor, W_O: Tensor, edits: Tensor, replacement: Tensor | None, out: Tensor | None
) -> None:
    """Raise ``ValueError`` (shapes, ranges, devices) or ``TypeError`` (dtypes) for unusable inputs."""
    if resid.ndim != 2 or z.ndim != 3 or W_O.ndim != 3:
        raise ValueError(
            f"got resid {tuple(resid.shape)}, z {tuple(z.shape)} and W_O {tuple(W_O.shape)}; expected resid [row, "
            "d_model], z [row, head, d_head] and W_O [head, d_head, d_model] of one layer. Flatten batch and pos "
            "first: resid.flatten(0, 1), z.flatten(0, 1)."
        )
    as_layers(z, W_O)
    if z.shape[0] != resid.shape[0] or W_O.shape[2] != resid.shape[1]:
        raise ValueError(
            f"resid has shape {tuple(resid.shape)}, z has {z.shape[0]} rows and W_O has d_model {W_O.shape[2]}; "
            "expected the same rows in resid and z and the same d_model in resid and W_O."
        )
    if replacement is not None and (
        replacement.ndim != 3 or replacement.shape[1:] != z.shape[1:] or replacement.shape[0] not in (1, z.shape[0])
    ):
        raise ValueError(
            f"replacement has shape {tuple(replacement.shape)} for z {tuple(z.shape)}; expected that of z, or one row "
            "for all: for the mean over rows type z.mean(0, keepdim=True)."
        )
    check_float(resid=resid, replacement=replacement, out=out)
    _check_edits(edits, z.shape[1])
    shape = (edits.shape[0], *resid.shape)
    if out is not None and (out.shape != shape or out.dtype != resid.dtype):
        raise ValueError(
            f"out has shape {tuple(out.shape)} and dtype {out.dtype}; expected [variant, row, d_model] = "
            f"{list(shape)} and the dtype of resid, {resid.dtype}, or out=None."
        )
    check_same_device(resid=resid, z=z, W_O=W_O, edits=edits, replacement=replacement, out=out)


def _check_edits(edits: Tensor, n_heads: int) -> None:
    if edits.is_floating_point() or edits.is_complex():
        raise TypeError(f"edits has dtype {edits.dtype}; expected head ids, edits.long(), or a mask, edits.bool().")
    mask = edits.dtype == torch.bool
    if edits.ndim != 1 + mask or (mask and edits.shape[1] != n_heads):
        raise ValueError(
            f"edits has shape {tuple(edits.shape)} and dtype {edits.dtype}; expected one head id per variant, "
            f"[variant], or a bool mask [variant, head] with {n_heads} heads. For every head on its own type "
            f"torch.arange({n_heads})."
        )
    if not mask and edits.numel() and bool(((edits < 0) | (edits >= n_heads)).any()):
        raise ValueError(
            f"edits lie between {int(edits.min())} and {int(edits.max())}; expected head ids from 0 to {n_heads - 1}. "
            "For a variant without an edit pass a bool mask."
        )


def as_mask(edits: Edits, n_heads: int) -> Bool[Tensor, "variant head"]:
    """The mask that ``edits`` stands for."""
    if edits.dtype == torch.bool:
        return edits
    return edits[:, None] == torch.arange(n_heads, device=edits.device)


def variant_residual_reference(
    resid: Float[Tensor, "row d_model"],
    z: Float[Tensor, "row head d_head"],
    W_O: Float[Tensor, "head d_head d_model"],
    edits: Edits,
    replacement: Float[Tensor, "#row head d_head"] | None = None,
) -> Float[Tensor, "variant row d_model"]:
    """The definition in float64, holding every head's output ([row, head, d_model], 8 bytes each): for small inputs."""
    change = -z.double() if replacement is None else replacement.double() - z.double()
    by_head = torch.einsum("rhd,hdm->rhm", change, W_O.double())
    return resid.double() + torch.einsum("vh,rhm->vrm", as_mask(edits, z.shape[1]).double(), by_head)
