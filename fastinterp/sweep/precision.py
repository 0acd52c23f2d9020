"""How a sweep's matrix products are done.

``exact``: in the model's own dtype. ``bf16``, ``tf32``: operands are rounded, those of the clean run as those of the
edited ones; sums, the residual stream, attention and everything elementwise stay float32. ``delta``: the clean run is
exact, and of the edited runs only the difference from it goes through products in bfloat16, so that rounding is
relative to the effect and not to the activations. Where a run leaves the clean one (what the edited heads write
differently), products are exact with each.
"""

from dataclasses import replace
from typing import Literal

import torch

from fastinterp.errors import OptionError, check_choice
from fastinterp.model.model import Model
from fastinterp.model.products import EXACT, SWIFT, Products, Rounded
from fastinterp.model.weights import Weights

Precision = Literal["exact", "delta", "tf32", "bf16"]

PRECISIONS: tuple[Precision, ...] = ("exact", "delta", "tf32", "bf16")


def check_precision(precision: Precision, dtype: torch.dtype) -> None:
    """Raises :class:`OptionError` for a precision that there is not, or that a model in ``dtype`` does not have."""
    check_choice("precision", precision, PRECISIONS)
    if precision != "exact" and dtype != torch.float32:
        raise OptionError(
            f"precision={precision!r} is for float32 models, this one computes in {str(dtype).removeprefix('torch.')}: "
            "load it with dtype=torch.float32, or leave precision='exact'"
        )


def clean_products(precision: Precision) -> Products:
    """How the clean run is multiplied, and the one that ``SOURCE`` stands for."""
    if precision == "bf16" or precision == "tf32":
        return Rounded(precision)
    return SWIFT if precision == "exact" else EXACT


def clean_weights(model: Model, precision: Precision) -> Weights:
    """The weights with those products."""
    products = clean_products(precision)
    return replace(model.weights, blocks=tuple(w.multiplied_by(products) for w in model.weights.blocks))
