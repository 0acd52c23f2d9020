"""FactoredMatrix against TransformerLens's, and against the product itself."""

import pytest
import torch

from fastinterp import FactoredMatrix
from fastinterp.errors import OptionError, SiteRangeError

SHAPES = {
    "thin": ((2, 3, 12, 4), (2, 3, 4, 12)),
    "wide inside": ((3, 5, 9), (3, 9, 6)),
    "broadcast": ((2, 1, 8, 3), (3, 3, 8)),
    "plain": ((7, 2), (2, 5)),
}


@pytest.fixture(params=SHAPES)
def factors(request):
    torch.manual_seed(0)
    return tuple(torch.randn(shape, dtype=torch.float64) for shape in SHAPES[request.param])


@pytest.fixture
def theirs(factors):
    from transformer_lens import FactoredMatrix as Theirs

    return Theirs(*factors)


def close(a, b):
    assert a.shape == b.shape
    return torch.allclose(a, b, atol=1e-10)


def test_what_it_is(factors, theirs):
    ours = FactoredMatrix(*factors)
    assert ours.shape == theirs.shape
    for name in ("ldim", "mdim", "rdim", "ndim", "has_leading_dims"):
        assert getattr(ours, name) == getattr(theirs, name), name
    for name in ("A", "B", "AB"):
        assert torch.equal(getattr(ours, name), getattr(theirs, name)), name
    assert close(ours.T.AB, theirs.T.AB)
    assert all(torch.equal(a, b) for a, b in zip(ours.pair, theirs.pair, strict=True))
    assert close(ours.get_corner(2), theirs.get_corner(2))


def test_decompositions(factors, theirs):
    ours = FactoredMatrix(*factors)
    U, S, V = ours.svd()
    assert torch.allclose(U @ torch.diag_embed(S) @ V.mT, ours.AB, atol=1e-10)
    rank = min(S.shape[-1], theirs.S.shape[-1])
    assert close(S[..., :rank], theirs.S[..., :rank])
    assert close(U.mT @ U, torch.eye(U.shape[-1], dtype=U.dtype).expand(*U.shape[:-2], -1, -1))
    assert torch.equal(ours.Vh, V)
    assert close(ours.norm(), theirs.norm())
    assert close(ours.norm(), torch.linalg.matrix_norm(ours.AB))
    assert torch.allclose(ours.make_even().AB, ours.AB, atol=1e-10)
    assert close(ours.collapse_r() @ ours.collapse_r().mT, ours.AB @ ours.AB.mT)
    assert close(ours.collapse_l().mT @ ours.collapse_l(), ours.AB.mT @ ours.AB)


def test_square_matrices(factors, theirs):
    ours = FactoredMatrix(*factors)
    if ours.ldim != ours.rdim:
        for ask in (lambda: ours.eigenvalues, ours.trace, lambda: ours.BA):
            with pytest.raises(OptionError, match="square"):
                ask()
        return
    assert close(ours.BA, theirs.BA)
    assert close(ours.trace(), ours.AB.diagonal(dim1=-2, dim2=-1).sum(-1))
    assert close(ours.eigenvalues.sum(-1).real, ours.trace())
    assert close(ours.eigenvalues.abs().sort(-1).values, theirs.eigenvalues.abs().sort(-1).values)


def test_products(factors):
    ours = FactoredMatrix(*factors)
    left, right = torch.randn(3, ours.ldim).double(), torch.randn(ours.rdim, 11).double()
    assert torch.allclose((ours @ right).AB, ours.AB @ right)
    assert torch.allclose((left @ ours).AB, left @ ours.AB)
    assert close(ours @ right[:, 0], ours.AB @ right[:, 0])
    assert close(left[0] @ ours, left[0] @ ours.AB)
    assert torch.allclose((ours @ ours.T).AB, ours.AB @ ours.AB.mT)
    assert torch.allclose((2.0 * ours * torch.tensor(3.0)).AB, 6 * ours.AB)
    with pytest.raises(OptionError, match="no product"):
        ours @ torch.randn(ours.rdim + 1, 2).double()
    with pytest.raises(OptionError, match="written @"):
        ours * right


INDICES = [0, -1, (0, 1), (..., 2), (..., slice(1, 3), 1), (slice(None), 0), (0, ..., -1)]


@pytest.mark.parametrize("index", INDICES)
def test_parts(factors, theirs, index):
    part = FactoredMatrix(*factors)[index]
    assert close(part.AB, theirs[index].AB)


def test_parts_are_those_of_the_product():
    M = FactoredMatrix(torch.randn(2, 3, 4, 2), torch.randn(2, 3, 2, 5))
    assert torch.allclose(M[1, 2].AB, M.AB[1, 2])
    assert torch.allclose(M[[1, 0]].AB, M.AB[[1, 0]])
    assert torch.allclose(M[1, 2, 3].AB, M.AB[1, 2, 3:4])
    assert torch.allclose(M[1, 2, 3, -1].AB, M.AB[1, 2, 3:4, -1:])
    assert M.unsqueeze(0).shape == (1, 2, 3, 4, 5)
    for index in (2, (0, 3), (0, 0, 4), (0, 0, 0, -6)):
        with pytest.raises(SiteRangeError, match="out of range"):
            M[index]
    with pytest.raises(OptionError, match="does not index"):
        M[0, 0, 0, 0, 0]


def test_factors_that_do_not_fit():
    for A, B in (((3, 4), (5, 6)), ((2, 3, 4), (3, 4, 2)), ((4,), (4,))):
        with pytest.raises(OptionError, match="no product"):
            FactoredMatrix(torch.randn(A), torch.randn(B))


def test_half_precision_is_decomposed_in_float32():
    M = FactoredMatrix(torch.randn(6, 2).bfloat16(), torch.randn(2, 6).bfloat16())
    assert M.S.dtype == torch.float32
    assert M.eigenvalues.dtype == torch.complex64
