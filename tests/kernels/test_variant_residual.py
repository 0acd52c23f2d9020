"""``fastinterp_kernels.variant_residual`` on the CPU against float64; the Triton kernel has a file of its own."""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from fastinterp_kernels.variant_residual import variant_residual
from fastinterp_kernels.variant_residual.blocked import head_runs
from tests.kernels.kernel_checks import allocations, assert_within_rule, largest_error, run_python

# Cases, the same for every backend --------------------------------------------------------------------------


class Case(NamedTuple):
    resid: Tensor
    z: Tensor
    W_O: Tensor
    edits: Tensor
    replacement: Tensor | None = None

    def to(self, device: str) -> "Case":
        return Case(*(None if tensor is None else tensor.to(device) for tensor in self))


def random_case(n_rows: int, n_heads: int = 3, d_head: int = 32, d_model: int = 96) -> Case:
    """Edits the size of the residual; every head on its own."""
    generator = torch.Generator().manual_seed(n_rows)
    resid = torch.randn(n_rows, d_model, generator=generator)
    z = torch.randn(n_rows, n_heads, d_head, generator=generator)
    W_O = torch.randn(n_heads, d_head, d_model, generator=generator) / d_head**0.5
    return Case(resid, z, W_O, torch.arange(n_heads))


def _like_z(case: Case, n_rows: int) -> Tensor:
    return torch.randn(n_rows, *case.z.shape[1:], generator=torch.Generator().manual_seed(7))


def rows(n_rows: int) -> Case:
    return random_case(n_rows)


def d_head(n: int) -> Case:
    return random_case(33, n_heads=2, d_head=n)


def one_head() -> Case:
    return random_case(40, n_heads=1)


def ragged() -> Case:
    return random_case(37, n_heads=5, d_head=20, d_model=75)


def repeated_heads() -> Case:
    return random_case(20)._replace(edits=torch.tensor([2, 2, 0, 1, 2], dtype=torch.int32))


def mean() -> Case:
    case = random_case(123)
    return case._replace(replacement=case.z.mean(0, keepdim=True))


def other_rows() -> Case:
    case = random_case(123)
    return case._replace(replacement=_like_z(case, 123))


def mask() -> Case:
    """Runs of neighbours, single heads, all and none."""
    case = random_case(50, n_heads=6)
    chosen = ["110000", "011010", "000001", "000000", "111111"]
    return case._replace(edits=torch.tensor([[c == "1" for c in heads] for heads in chosen]))


def mask_and_replacement() -> Case:
    case = mask()
    return case._replace(replacement=_like_z(case, 1))


def many_variants() -> Case:
    """More edited heads than there are heads: each one's output is formed once."""
    case = random_case(50, n_heads=4)
    return case._replace(edits=torch.rand(40, 4, generator=torch.Generator().manual_seed(3)) > 0.5)


def no_variants() -> Case:
    return random_case(5)._replace(edits=torch.zeros(0, 3, dtype=torch.bool))


def infinite_head() -> Case:
    """One row of one head is infinite: variants that leave that head alone stay finite."""
    case = many_variants()
    case.z[7, 2, 5] = math.inf
    return case


def far_larger_residual() -> Case:
    case = random_case(60)
    return case._replace(resid=case.resid * 1e4)


def transposed_weight() -> Case:
    """``W_O`` as a view of ``[d_model, head * d_head]``, and ``z`` as one of ``[head, row, d_head]``."""
    case = random_case(30)
    weight = case.W_O.flatten(0, 1).T.contiguous()
    return case._replace(W_O=weight.T.unflatten(0, (3, 32)), z=case.z.transpose(0, 1).contiguous().transpose(0, 1))


def reduced(dtype: torch.dtype) -> Case:
    case = random_case(40)._replace(replacement=_like_z(random_case(40), 40))
    return Case(*(t.to(dtype) if t.is_floating_point() else t for t in case))


def mixed_dtypes() -> Case:
    case = random_case(40)
    return case._replace(z=case.z.half(), W_O=case.W_O.bfloat16())


CASES: dict[str, Callable[[], Case]] = {
    **{f"rows_{n}": partial(rows, n) for n in (1, 31, 123, 255, 507)},
    **{f"d_head_{n}": partial(d_head, n) for n in (64, 80, 128, 256)},
    **{
        case.__name__: case
        for case in (
            one_head, ragged, repeated_heads, mean, other_rows, mask, mask_and_replacement, many_variants,
            no_variants, infinite_head, far_larger_residual, transposed_weight, mixed_dtypes,
        )
    },
    "bfloat16": partial(reduced, torch.bfloat16),
    "float16": partial(reduced, torch.float16),
}  # fmt: skip


def plain(case: Case, dtype: torch.dtype) -> Tensor:
    """The expression that a user would write."""
    resid, z, W_O = (tensor.to(dtype) for tensor in case[:3])
    change = -z if case.replacement is None else case.replacement.to(dtype) - z
    variants = []
    for heads in case.edits.tolist():
        chosen = [heads] if isinstance(heads, int) else [i for i, edited in enumerate(heads) if edited]
        variants.append(resid + sum((change[:, i] @ W_O[i] for i in chosen), torch.zeros_like(resid)))
    return torch.stack(variants) if variants else torch.empty(0, *resid.shape, dtype=dtype)


def check(case: Case, found: Tensor) -> None:
    assert found.dtype == case.resid.dtype
    # Rounded to the dtype of the residual by both.
    assert_within_rule(found, plain(case, torch.float64), plain(case, torch.float32).to(case.resid.dtype))


# Reference and blocked --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in CASES if name != "infinite_head"])
def test_reference(name: str) -> None:
    case = CASES[name]()
    found = variant_residual(*case, backend="reference")
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, plain(case, torch.float64), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_blocked(name: str, poisoned: None) -> None:
    case = CASES[name]()
    check(case, variant_residual(*case))


@pytest.mark.parametrize("backend", ["blocked", "reference"])
@pytest.mark.parametrize("name", ["mask", "rows_123", "many_variants", "bfloat16"])
def test_out_is_filled_and_returned(name: str, backend: str) -> None:
    case = CASES[name]()
    wide = torch.full((2 + len(case.edits), *case.resid.shape), 7.0, dtype=case.resid.dtype)
    assert variant_residual(*case, out=wide[1:-1], backend=backend).data_ptr() == wide[1].data_ptr()
    check(case, wide[1:-1])
    assert bool((wide[0] == 7.0).all() & (wide[-1] == 7.0).all())
    apart = torch.full((*case.resid.shape, len(case.edits)), 7.0, dtype=case.resid.dtype).permute(2, 0, 1)
    check(case, variant_residual(*case, out=apart, backend=backend))


def test_many_row_blocks() -> None:
    for case in (random_case(3000, d_model=300), many_variants()._replace(edits=torch.ones(40, 4, dtype=torch.bool))):
        check(case, variant_residual(*case))


def test_blocked_computes_float64_in_float64() -> None:
    case = mask()
    found = variant_residual(case.resid, case.z.double(), case.W_O, case.edits)
    assert found.dtype == torch.float32
    found = variant_residual(case.resid.double(), *case[1:])
    torch.testing.assert_close(found, plain(case, torch.float64), rtol=0, atol=1e-12)


PRECISIONS = {"bf16x3": (2e-6, 1e-4), "tf32": (2e-4, 1e-2), "bf16": (2e-3, 1e-1)}
"""The largest error of a mode lies between these: not exact (the mode is used), not coarser."""


@pytest.mark.parametrize("name", ["rows_123", "many_variants", "other_rows"])
@pytest.mark.parametrize("mode", PRECISIONS)
def test_precision(mode: str, name: str) -> None:
    case = CASES[name]()
    low, high = PRECISIONS[mode]
    exact = plain(case, torch.float64)
    found = variant_residual(*case, precision=mode)
    assert 5 * low <= largest_error(found, exact) <= high
    # The error is relative to the edit: variants are as exact when the residual is large.
    large = case._replace(resid=case.resid + 512.0)
    assert largest_error(variant_residual(*large, precision=mode), plain(large, torch.float64)) <= high + 2e-4


def test_head_runs() -> None:
    assert head_runs(3) == [slice(3, 4)]
    assert head_runs([True, True, False, True]) == [slice(0, 2), slice(3, 4)]
    assert head_runs([False, False]) == []


@pytest.mark.parametrize("form", ["ids", "mask", "bfloat16", "replacement"])
def test_blocked_holds_a_few_blocks(form: str) -> None:
    case = random_case(4000, n_heads=16, d_head=8, d_model=400)  # heads' outputs would be 102 MB
    if form == "mask":
        case = case._replace(edits=torch.rand(20, 16, generator=torch.Generator().manual_seed(1)) > 0.5)
    if form == "replacement":
        case = case._replace(replacement=case.z.mean(0, keepdim=True))
    if form == "bfloat16":
        case = Case(*(t.bfloat16() if t is not None and t.is_floating_point() else t for t in case))
    out = torch.empty(len(case.edits), *case.resid.shape, dtype=case.resid.dtype)
    held = allocations(lambda: variant_residual(*case, out=out, backend="blocked"))
    assert held.peak <= 6 * 2**20
    results = allocations(lambda: torch.einsum("rhd,hdm->rhm", case.z.float(), case.W_O.float()))
    assert results.largest == 4000 * 16 * 400 * 4


def test_imports_and_runs_without_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, fastinterp_kernels.variant_residual as op\n"
        "args = torch.ones(2, 4), torch.ones(2, 1, 3), torch.ones(1, 3, 4), torch.tensor([0])\n"
        "for backend in ('auto', 'blocked', 'reference'):\n"
        "    print(float(op.variant_residual(*args, backend=backend)[0, 0, 0]))\n"
        "print([m for m in sys.modules if m.split('.')[0] in ('fastinterp', 'transformers', 'zarr')])"
    )
    assert run_python(code).split("\n")[:4] == ["-2.0", "-2.0", "-2.0", "[]"]


# Errors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"resid": torch.zeros(2, 3, 8)}, ValueError, r"resid\.flatten"),
        ({"resid": torch.zeros(3, 8)}, ValueError, "same rows"),
        ({"resid": torch.zeros(2, 9)}, ValueError, "d_model 8"),
        ({"W_O": torch.zeros(5, 3, 8)}, ValueError, "same head"),
        ({"z": torch.zeros(2, 4, 3, dtype=torch.int64)}, TypeError, "float"),
        ({"edits": torch.tensor([0, 4])}, ValueError, "from 0 to 3"),
        ({"edits": torch.tensor([-1])}, ValueError, "bool mask"),
        ({"edits": torch.tensor([[0, 1]])}, ValueError, r"torch\.arange\(4\)"),
        ({"edits": torch.zeros(2, 3, dtype=torch.bool)}, ValueError, "4 heads"),
        ({"edits": torch.zeros(2)}, TypeError, r"edits\.long\(\)"),
        ({"replacement": torch.zeros(4, 3)}, ValueError, r"z\.mean\(0, keepdim=True\)"),
        ({"replacement": torch.zeros(5, 4, 3)}, ValueError, "one row"),
        ({"out": torch.zeros(2, 2, 8)}, ValueError, r"\[1, 2, 8\]"),
        ({"out": torch.zeros(1, 2, 8, dtype=torch.float64)}, ValueError, "dtype of resid"),
        ({"W_O": torch.zeros(4, 3, 8, device="meta")}, ValueError, "meta"),
        ({"W_O": torch.zeros(4, 3, 8, requires_grad=True)}, ValueError, "no_grad"),
        ({"precision": "fp8"}, ValueError, "'bf16x3'"),
        ({"backend": "cuda"}, ValueError, "'blocked' or 'triton'"),
        ({"backend": "triton"}, ValueError, r"backend='blocked'.*TRITON_INTERPRET=1"),
    ],
)
def test_errors(change: dict, error: type[Exception], message: str) -> None:
    good = {
        "resid": torch.zeros(2, 8), "z": torch.zeros(2, 4, 3), "W_O": torch.zeros(4, 3, 8),
        "edits": torch.tensor([3]), "replacement": None,
    }  # fmt: skip
    variant_residual(**good)
    with pytest.raises(error, match=message):
        variant_residual(**(good | change))
