"""``FactoredMatrix``: a product of two thin matrices, whose properties are computed without forming it."""

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from fastinterp.errors import OptionError, SiteRangeError


class FactoredMatrix:
    """The matrix ``A @ B``, ``[..., ldim, rdim]``, held as ``A [..., ldim, mdim]`` and ``B [..., mdim, rdim]``.

    Leading axes broadcast. Indexing, transposing, multiplying, singular values, eigenvalues, norm and trace work on the
    factors; only ``AB`` forms the product. Indexing keeps the two matrix axes: ``M[0, 3]`` is the matrix of layer 0,
    head 3, and ``M[0, 3, 5]`` its row 5 as ``[1, rdim]``. Half precision is decomposed in float32.

    Example:
        >>> M = FactoredMatrix(torch.randn(12, 768, 64), torch.randn(12, 64, 768))
        >>> M.shape, M[3].eigenvalues.shape, M.norm().shape
        (torch.Size([12, 768, 768]), torch.Size([64]), torch.Size([12]))
    """

    def __init__(self, A: Tensor, B: Tensor) -> None:
        """Takes the factors, without copies; raises :class:`OptionError` for shapes that do not go together."""
        try:
            if A.shape[-1] != B.shape[-2]:
                raise RuntimeError
            leading = torch.broadcast_shapes(A.shape[:-2], B.shape[:-2])
        except (RuntimeError, IndexError):
            raise OptionError(
                f"A of shape {tuple(A.shape)} and B of shape {tuple(B.shape)} have no product: give [..., ldim, mdim] "
                "and [..., mdim, rdim]"
            ) from None
        self.ldim, self.mdim, self.rdim = A.shape[-2], A.shape[-1], B.shape[-1]
        self.A = A.expand(*leading, self.ldim, self.mdim)
        self.B = B.expand(*leading, self.mdim, self.rdim)
        self.shape = torch.Size((*leading, self.ldim, self.rdim))
        self.has_leading_dims = bool(leading)

    def __repr__(self) -> str:
        """Says its shape and inner dimension."""
        return f"FactoredMatrix(shape {tuple(self.shape)}, inner dimension {self.mdim})"

    # Products -------------------------------------------------------------------------------------------------------

    @property
    def AB(self) -> Tensor:
        """The product itself, ``[..., ldim, rdim]``."""
        return self.A @ self.B

    @property
    def BA(self) -> Tensor:
        """The product the other way round, ``[..., mdim, mdim]``; raises :class:`OptionError` if it is not square."""
        self._check_square("BA")
        return self.B @ self.A

    @property
    def T(self) -> "FactoredMatrix":
        """The transposed matrix."""
        return FactoredMatrix(self.B.transpose(-2, -1), self.A.transpose(-2, -1))

    @property
    def ndim(self) -> int:
        """How many axes the product has."""
        return len(self.shape)

    @property
    def pair(self) -> tuple[Tensor, Tensor]:
        """Both factors."""
        return self.A, self.B

    def __matmul__(self, other: Any) -> Any:
        """Returns ``self @ other``: factored, or a vector ``[..., ldim]`` for a vector ``[rdim]``."""
        if isinstance(other, FactoredMatrix):
            return (self @ other.A) @ other.B
        self._check_product(self.rdim, other.shape[-1 if other.ndim < 2 else -2], other)
        if other.ndim < 2:
            return (self.A @ (self.B @ other.unsqueeze(-1))).squeeze(-1)
        return FactoredMatrix(self.A, self.B @ other) if self.rdim > self.mdim else FactoredMatrix(self.AB, other)

    def __rmatmul__(self, other: Any) -> Any:
        """Returns ``other @ self``: factored, or a vector ``[..., rdim]`` for a vector ``[ldim]``."""
        self._check_product(self.ldim, other.shape[-1], other)
        if other.ndim < 2:
            return ((other.unsqueeze(-2) @ self.A) @ self.B).squeeze(-2)
        return FactoredMatrix(other @ self.A, self.B) if self.ldim > self.mdim else FactoredMatrix(other, self.AB)

    def __mul__(self, scalar: Any) -> "FactoredMatrix":
        """Returns the matrix times a number."""
        if isinstance(scalar, Tensor) and scalar.numel() != 1:
            raise OptionError(f"* takes a number, not a tensor of shape {tuple(scalar.shape)}: products are written @")
        return FactoredMatrix(self.A * scalar, self.B)

    __rmul__ = __mul__

    def _check_product(self, size: int, given: int, other: Tensor) -> None:
        if size != given:
            raise OptionError(f"a matrix of {tuple(self.shape)} has no product with {tuple(other.shape)}")

    def _check_square(self, what: str) -> None:
        if self.ldim != self.rdim:
            raise OptionError(f"{what} is of square matrices, this one is {self.ldim} x {self.rdim}")

    # Decompositions -------------------------------------------------------------------------------------------------

    @cached_property
    def _decomposed(self) -> tuple[Tensor, Tensor, Tensor]:
        # The product of two orthogonal matrices around a small one, whose singular values are those of the whole.
        Q_A, R_A = torch.linalg.qr(_wide(self.A))
        Q_B, R_B = torch.linalg.qr(_wide(self.B).transpose(-2, -1))
        U, S, Vh = torch.linalg.svd(R_A @ R_B.transpose(-2, -1), full_matrices=False)
        return Q_A @ U, S, Q_B @ Vh.transpose(-2, -1)

    def svd(self) -> tuple[Tensor, Tensor, Tensor]:
        """Returns ``(U, S, V)`` with ``U @ diag(S) @ V.T`` the matrix; ``S`` falls, ``mdim`` entries at most."""
        return self._decomposed

    @property
    def U(self) -> Tensor:
        """Left singular vectors, ``[..., ldim, rank]``."""
        return self.svd()[0]

    @property
    def S(self) -> Tensor:
        """Singular values, ``[..., rank]``, from the largest."""
        return self.svd()[1]

    @property
    def V(self) -> Tensor:
        """Right singular vectors as columns, ``[..., rdim, rank]``."""
        return self.svd()[2]

    @property
    def Vh(self) -> Tensor:
        """The same as ``V``, columns included: what TransformerLens has under this name. ``V.mT`` is the transposed."""
        return self.V

    @property
    def eigenvalues(self) -> Tensor:
        """Eigenvalues of a square matrix, complex, ``[..., mdim]``: all that can be other than zero."""
        found: Tensor = torch.linalg.eigvals(_wide(self.BA))
        return found

    def norm(self) -> Tensor:
        """Returns the Frobenius norm, ``[...]``."""
        norm: Tensor = torch.linalg.vector_norm(self.S, dim=-1)
        return norm

    def trace(self) -> Tensor:
        """Returns the trace of a square matrix, ``[...]``: the sum of its eigenvalues."""
        self._check_square("trace()")
        return (self.A * self.B.transpose(-2, -1)).sum((-2, -1))

    def make_even(self) -> "FactoredMatrix":
        """Returns the same matrix with factors of orthogonal columns and rows that share the singular values."""
        U, S, V = self.svd()
        root = S.sqrt()
        return FactoredMatrix(U * root[..., None, :], root[..., :, None] * V.transpose(-2, -1))

    def collapse_l(self) -> Tensor:
        """Returns ``diag(S) @ V.T``, ``[..., rank, rdim]``: the matrix without the rotation on its left."""
        return self.S[..., :, None] * self.V.transpose(-2, -1)

    def collapse_r(self) -> Tensor:
        """Returns ``U @ diag(S)``, ``[..., ldim, rank]``: the matrix without the rotation on its right."""
        return self.U * self.S[..., None, :]

    # Parts ----------------------------------------------------------------------------------------------------------

    def __getitem__(self, index: Any) -> "FactoredMatrix":
        """Returns a part; integers in place of rows or columns keep their axis.

        Raises :class:`SiteRangeError` for what is not there, and :class:`OptionError` for too many indices.
        """
        given = index if isinstance(index, tuple) else (index,)
        if any(item is Ellipsis for item in given):
            at = next(place for place, item in enumerate(given) if item is Ellipsis)
            given = (*given[:at], *[slice(None)] * (self.ndim - len(given) + 1), *given[at + 1 :])
        if len(given) > self.ndim or any(item is None for item in given):
            raise OptionError(f"{index!r} does not index a matrix of shape {tuple(self.shape)}")
        n_leading = self.ndim - 2
        leading = given[:n_leading]
        row, column = (*given[n_leading:], slice(None), slice(None))[:2]
        try:
            A, B = self.A[leading], self.B[leading]
            return FactoredMatrix(A[..., _kept(row, self.ldim), :], B[..., _kept(column, self.rdim)])
        except IndexError as error:
            raise SiteRangeError(f"{index!r} is out of range of a matrix of shape {tuple(self.shape)}") from error

    def unsqueeze(self, dim: int) -> "FactoredMatrix":
        """Returns it with one more leading axis."""
        return FactoredMatrix(self.A.unsqueeze(dim), self.B.unsqueeze(dim))

    def get_corner(self, k: int = 3) -> Tensor:
        """Returns the first ``k`` of every axis of the product."""
        corner = self.A[..., :k, :] @ self.B[..., :, :k]
        return corner[tuple(slice(k) for _ in range(corner.ndim))]


def _wide(x: Tensor) -> Tensor:
    """Returns it in float32 at least, as decompositions want it."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _kept(index: Any, size: int) -> Any:
    """Makes one integer a slice of one, so that its axis stays."""
    if not isinstance(index, int) or isinstance(index, bool):
        return index
    if not -size <= index < size:
        raise IndexError
    return slice(index % size, index % size + 1)
