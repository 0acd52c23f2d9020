"""How the activations of a block are multiplied with its matrices.

Exactly, unless somebody asks for less: ``BlockWeights.products`` holds what does it, and the forward calls that for its
four products per block. Reduced precision, and the propagation of differences, are other ways to do the same products.
"""

from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F

from fastinterp_kernels.delta_product import delta_product, rounded_product

Product = Literal["W_QKV", "W_O", "W_gate_in", "W_out"]

STEADY_ROWS = 8
"""Rows that a product of more than one has at least on a CPU, with rows of zeros."""

FEW_ROWS = 16
"""Rows that a piece of a product has at most, where there are few of them."""


@runtime_checkable
class Products(Protocol):
    """Multiplies the rows of a block with one of its matrices."""

    def __call__(
        self,
        name: Product,
        x: Float[Tensor, "*rows n_in"],
        W: Float[Tensor, "n_in n_out"],
        b: Float[Tensor, " n_out"] | None,
    ) -> Float[Tensor, "*rows n_out"]:
        """Returns ``x @ W + b``."""
        ...

    def at(self, rows: Int[Tensor, " row"] | None) -> "Products":
        """Returns the products of some rows of ``[variant, row, ...]`` alone; None: of all."""
        ...


def affine(
    x: Float[Tensor, "*rows n_in"], W: Float[Tensor, "n_in n_out"], b: Float[Tensor, " n_out"] | None
) -> Float[Tensor, "*rows n_out"]:
    """Returns ``x @ W + b``.

    On the CPU, a few rows go through the matrix product together with rows of zeros: the product of fewer than
    ``STEADY_ROWS`` rows is no faster, and sums in another order, so that a row's value would depend on its company.
    """
    n_rows = x.shape[:-1].numel()
    if x.device.type != "cpu" or not 1 < n_rows < STEADY_ROWS:
        return F.linear(x, W.t(), b)
    padded = F.pad(x.reshape(n_rows, -1), (0, 0, 0, STEADY_ROWS - n_rows))
    return F.linear(padded, W.t(), b)[:n_rows].view(*x.shape[:-1], -1)


class Exact:
    """Products in the dtype of the operands."""

    def __call__(
        self,
        name: Product,
        x: Float[Tensor, "*rows n_in"],
        W: Float[Tensor, "n_in n_out"],
        b: Float[Tensor, " n_out"] | None,
    ) -> Float[Tensor, "*rows n_out"]:
        """Returns ``x @ W + b``."""
        return affine(x, W, b)

    def at(self, rows: Int[Tensor, " row"] | None) -> "Exact":
        """The same."""
        return self


EXACT = Exact()


class Swift(Exact):
    """Exact products whose sums are added up in another order, by oneDNN, where that is faster: of large matrices.

    Errors against float64 are about twice those of ``EXACT``: all terms of a sum are added up one after the other. From
    2 rows on a row's bits do not depend on its company; the matrix alone decides which library multiplies, since they
    would if the number of rows did. oneDNN keeps code for every shape: see ``_pieces``.
    """

    def __call__(
        self,
        name: Product,
        x: Float[Tensor, "*rows n_in"],
        W: Float[Tensor, "n_in n_out"],
        b: Float[Tensor, " n_out"] | None,
    ) -> Float[Tensor, "*rows n_out"]:
        """Returns ``x @ W + b``."""
        n_rows = x.shape[:-1].numel()
        if not n_rows or not _suits_onednn(x, W, b):
            return affine(x, W, b)
        rows = x.reshape(n_rows, -1)
        pieces = _pieces(n_rows, *W.shape)
        if len(pieces) == 1:
            full = F.pad(rows, (0, 0, 0, pieces[0] - n_rows)) if pieces[0] > n_rows else rows
            return _onednn(full, W, b)[:n_rows].view(*x.shape[:-1], -1)
        y = rows.new_empty(n_rows, W.shape[1])
        first = 0
        for size in pieces:
            piece = rows[first : first + size]
            full = piece if len(piece) == size else F.pad(piece, (0, 0, 0, size - len(piece)))
            y[first : first + size] = _onednn(full, W, b)[: len(piece)]
            first += size
        return y.view(*x.shape[:-1], -1)

    def at(self, rows: Int[Tensor, " row"] | None) -> "Swift":
        """The same."""
        return self


SWIFT = Swift()


def _find_onednn() -> Any:
    """What torch's compiler calls for a linear layer; None where torch has no oneDNN, or is older than was tried."""
    usable = torch.backends.mkldnn.is_available() and torch.__version__ >= "2.13"
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None) if usable else None


_ONEDNN = _find_onednn()
# The first product of every shape costs some milliseconds, so that small matrices are not worth it.
_ONEDNN_NUMBERS = 1 << 17
# Code of about 0.65 MB per shape is kept for the life of the process, which no plan of memory knows of.
_MOST_SHAPES = 64
_WHOLE_ROWS = 128
_PIECES = (256, 64, FEW_ROWS)
_known: set[tuple[int, int, int]] = set()


def _pieces(n_rows: int, n_in: int, n_out: int) -> list[int]:
    """Returns how many rows go through one product each, the last one perhaps filled up with zeros.

    Few rows go 16 at a time and the last ones 8 where they are no more, so that sweeps in little memory, whose steps
    are of many sizes, have two shapes; more go as they are until ``_MOST_SHAPES`` are known in this process, and then
    in pieces too.
    """
    sizes: tuple[int, ...] = _PIECES[-1:]
    if n_rows >= _WHOLE_ROWS:
        shape = n_rows, n_in, n_out
        if shape in _known or len(_known) < _MOST_SHAPES:
            _known.add(shape)
            return [n_rows]
        sizes = _PIECES
    found, rest = [], n_rows
    for size in sizes:
        found += [size] * (rest // size)
        rest %= size
    if rest:
        found.append(STEADY_ROWS if rest <= STEADY_ROWS else _PIECES[-1])
    return found


def piece_rows(n_rows: int) -> int:
    """The most rows of a product that are multiplied beside others, 0 where all go together."""
    if n_rows <= FEW_ROWS:
        return 0
    return FEW_ROWS if n_rows < _WHOLE_ROWS else next(size for size in _PIECES if size < n_rows)


def _onednn(x: Float[Tensor, "row n_in"], W: Float[Tensor, "n_in n_out"], b: Tensor | None) -> Tensor:
    y: Tensor = _ONEDNN(x, W.t(), b, "none", [], "")
    return y


def _suits_onednn(x: Tensor, W: Tensor, b: Tensor | None) -> bool:
    """Whether oneDNN multiplies faster than what ``F.linear`` takes, and is able to.

    Measured for AVX-512. It reads a matrix in either order, but is slow with columns of a wider one. It has no
    derivatives, and autocast does not know it.
    """
    operands = (x, W) if b is None else (x, W, b)
    return (
        _ONEDNN is not None
        and W.numel() >= _ONEDNN_NUMBERS
        and all(each.dtype == torch.float32 and each.device.type == "cpu" for each in operands)
        and torch.backends.cpu.get_cpu_capability().startswith("AVX512")
        and (W.is_contiguous() or W.t().is_contiguous())
        # It reads as many numbers as there are columns, whatever the strides are.
        and (b is None or b.is_contiguous())
        and not (torch.is_grad_enabled() and any(each.requires_grad for each in operands))
        and torch._C._get_mkldnn_enabled()
        and not torch.is_autocast_enabled("cpu")
        and not torch._C._are_functorch_transforms_active()
        and forward_ad._current_level < 0
    )


class Rounded:
    """Products of operands rounded to ``bf16`` or ``tf32``, summed in float32."""

    def __init__(self, precision: Literal["bf16", "tf32"]) -> None:
        self.precision: Literal["bf16", "tf32"] = precision

    def __call__(
        self,
        name: Product,
        x: Float[Tensor, "*rows n_in"],
        W: Float[Tensor, "n_in n_out"],
        b: Float[Tensor, " n_out"] | None,
    ) -> Float[Tensor, "*rows n_out"]:
        """Returns ``round(x) @ round(W) + b``."""
        product: Tensor = rounded_product(x, W, b, precision=self.precision)
        return product

    def at(self, rows: Int[Tensor, " row"] | None) -> "Rounded":
        """The same."""
        return self


class Recorded:
    """Exact products of the clean run ``[1, row, ...]``, which keeps what went in and what came out."""

    def __init__(self) -> None:
        self.kept: dict[Product, tuple[Tensor, Tensor]] = {}

    def __call__(
        self,
        name: Product,
        x: Float[Tensor, "1 row n_in"],
        W: Float[Tensor, "n_in n_out"],
        b: Float[Tensor, " n_out"] | None,
    ) -> Float[Tensor, "1 row n_out"]:
        """Returns ``x @ W + b``."""
        y = affine(x, W, b)
        self.kept[name] = x[0], y[0]
        return y

    def at(self, rows: Int[Tensor, " row"] | None) -> "Recorded":
        """Not defined: differences need the clean run at all its rows."""
        raise AssertionError("the clean run is recorded at all rows")


class Difference:
    """Products of edited runs as the clean run's plus that of the difference, which alone is rounded to bfloat16.

        y = y_clean + round(x - x_clean) @ round(W)

    So rounding is relative to what the edit changes, not to the activation. Rows that an edit leaves smaller than it
    makes the difference (zeros, most of all, whose product has to be zero in front of a norm) are ``round(x) @
    round(W) + b`` instead, relative to themselves. Everything between the products stays as it is, in float32, and
    evaluated on the sum.
    """

    def __init__(self, clean: Recorded, rows: Int[Tensor, " row"] | None = None) -> None:
        self.clean, self.rows = clean, rows
        self._here: dict[Product, tuple[Tensor, Tensor]] = {}

    def __call__(
        self,
        name: Product,
        x: Float[Tensor, "variant row n_in"],
        W: Float[Tensor, "n_in n_out"],
        b: Float[Tensor, " n_out"] | None,
    ) -> Float[Tensor, "variant row n_out"]:
        """Returns ``x @ W + b``; ``b`` is in the clean run's product already, where that is added."""
        if name not in self._here:
            kept = self.clean.kept[name]
            self._here[name] = (
                kept if self.rows is None else (kept[0].index_select(0, self.rows), kept[1].index_select(0, self.rows))
            )
        clean_x, clean_y = self._here[name]
        product: Tensor = delta_product(x, clean_x, W, clean_y, precision="bf16")
        # |x| < |x - x_clean|, without a difference of the size of x.
        smaller = 2 * torch.einsum("vri,ri->vr", x, clean_x) < clean_x.square().sum(-1)
        if bool(smaller.any()):
            product[smaller] = rounded_product(x[smaller], W, b, precision="bf16")
        return product

    def at(self, rows: Int[Tensor, " row"] | None) -> "Difference":
        """Returns the products of some rows alone."""
        if rows is None:
            return self
        return Difference(self.clean, rows if self.rows is None else self.rows[rows])
