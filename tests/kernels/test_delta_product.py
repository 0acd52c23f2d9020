"""``fastinterp_kernels.delta_product`` on the CPU against float64; the Triton kernels have a file of their own."""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from fastinterp_kernels.delta_product import blocked, delta_product, rounded_product
from tests.kernels.kernel_checks import allocations, assert_within_rule, largest_error, run_python

MODES = ["bf16", "tf32", "bf16x3", "exact"]

# Cases, the same for every backend --------------------------------------------------------------------------


class Case(NamedTuple):
    x: Tensor
    clean_x: Tensor
    W: Tensor
    clean_y: Tensor

    def to(self, device: str) -> "Case":
        """Views stay views: ``W`` may be transposed."""
        return Case(*(tensor.to(device) for tensor in self))


def random_case(n_variants: int, n_rows: int, n_in: int, n_out: int, size: float = 1.0) -> Case:
    """Edits of ``size`` beside activations of 1; outputs of about 1."""
    generator = torch.Generator().manual_seed(n_rows + n_in)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    clean_x, W = normal(n_rows, n_in), normal(n_in, n_out) / max(1, n_in) ** 0.5
    x = clean_x + size * normal(n_variants, n_rows, n_in)
    return Case(x, clean_x, W, clean_x @ W + normal(n_out))


def transposed_weight() -> Case:
    case = random_case(2, 31, 65, 48)
    return case._replace(W=case.W.T.contiguous().T)


def wide_transposed_weight() -> Case:
    case = random_case(2, 40, 576, 192)
    return case._replace(W=case.W.T.contiguous().T)


def strided_weight() -> Case:
    """Every other column of a matrix of which the others are NaN."""
    case = random_case(2, 31, 48, 65)
    wide = torch.full((48, 65, 2), math.nan)
    wide[..., 0] = case.W
    return case._replace(W=wide[..., 0])


def strided_inputs() -> Case:
    """``x`` with rows outside of variants, in slices; ``clean_x`` by columns; one clean output for all rows."""
    case = random_case(3, 31, 48, 64)
    wide = torch.full((31, 4, 50), math.nan)
    wide[:, 1:, 2:] = case.x.transpose(0, 1)
    clean_x = case.clean_x.T.contiguous().T
    return Case(wide.transpose(0, 1)[1:, :, 2:], clean_x, case.W, case.clean_y[:1].expand(31, -1))


def weight_in(dtype: torch.dtype) -> Case:
    case = random_case(2, 31, 65, 48)
    return case._replace(W=case.W.to(dtype))


def inputs_in(dtype: torch.dtype) -> Case:
    case = random_case(2, 31, 65, 48)
    return Case(case.x.to(dtype), case.clean_x.to(dtype), case.W, case.clean_y.to(dtype))


def small_edits() -> Case:
    """A thousandth of the activations, which are large."""
    case = random_case(3, 31, 48, 65, size=1e-3)
    return case._replace(clean_y=case.clean_y + 100.0)


def zero_edits() -> Case:
    case = random_case(3, 31, 65, 48)
    return case._replace(x=case.clean_x.expand(3, -1, -1))


def infinite() -> Case:
    """One row is infinite and one is NaN, in one variant each: others stay finite."""
    case = random_case(3, 31, 48, 65)
    case.x[1, 7, 5], case.x[2, 30, 0] = math.inf, math.nan
    return case


CASES: dict[str, Callable[[], Case]] = {
    **{f"rows_{n}": partial(random_case, 3, n, 48, 65) for n in (1, 31, 123)},
    **{
        f"{n_in}_to_{n_out}": partial(random_case, 2, 31, n_in, n_out)
        for n_in, n_out in ((1, 1), (1, 48), (48, 1), (65, 48), (48, 65), (576, 576), (576, 1536), (1536, 576))
    },
    **{
        case.__name__: case
        for case in (
            transposed_weight, wide_transposed_weight, strided_weight, strided_inputs, small_edits, zero_edits,
            infinite,
        )
    },
    "no_variants": partial(random_case, 0, 5, 8, 4),
    "no_rows": partial(random_case, 3, 0, 8, 4),
    "no_inputs": partial(random_case, 2, 3, 0, 4),
    "no_outputs": partial(random_case, 2, 3, 4, 0),
    **{f"weight_{name}": partial(weight_in, getattr(torch, name)) for name in ("bfloat16", "float16")},
    **{f"inputs_{name}": partial(inputs_in, getattr(torch, name)) for name in ("bfloat16", "float16")},
}  # fmt: skip


# What is meant, written once more without the operation's helpers -------------------------------------------


def _rounded(tensor: Tensor, n_bits: int) -> Tensor:
    """float64 rounded to ``n_bits`` fraction bits; halves as the hardware does: tf32 away from 0, bfloat16 to even."""
    mantissa, exponent = torch.frexp(tensor)
    units = mantissa * 2.0 ** (n_bits + 1)
    units = units.round() if n_bits == 7 else (units.abs() + 0.5).floor().copysign(units)
    return torch.where(tensor.isfinite(), torch.ldexp(units / 2.0 ** (n_bits + 1), exponent), tensor)


def _product(x: Tensor, W: Tensor, mode: str, dtype: torch.dtype) -> Tensor:
    x, W = x.double(), W.double()
    if mode == "exact":
        return x.to(dtype) @ W.to(dtype)
    bits = 10 if mode == "tf32" else 7
    x_high, W_high = _rounded(x, bits).to(dtype), _rounded(W, bits).to(dtype)
    found = x_high @ W_high
    if mode == "bf16x3":
        x_low = _rounded(torch.where(x.isfinite(), x - x_high, 0.0), bits).to(dtype)
        found += x_low @ W_high + x_high @ _rounded(W - W_high, bits).to(dtype)
    return found


def literal(case: Case, mode: str, dtype: torch.dtype) -> Tensor:
    """The expression that a user would write, with products and sums in ``dtype``."""
    return case.clean_y.to(dtype) + _product(case.x.float() - case.clean_x.float(), case.W, mode, dtype)


def check(case: Case, found: Tensor, mode: str) -> None:
    assert found.dtype == torch.float32
    assert_within_rule(found, literal(case, mode, torch.float64), literal(case, mode, torch.float32))


# Reference and blocked --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CASES)
def test_reference(name: str, mode: str) -> None:
    case = CASES[name]()
    found = delta_product(*case, precision=mode, backend="reference")
    assert found.dtype == torch.float64
    assert largest_error(found, literal(case, mode, torch.float64)) <= 1e-9


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CASES)
def test_blocked(name: str, mode: str, poisoned: None) -> None:
    case = CASES[name]()
    check(case, delta_product(*case, precision=mode), mode)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("fewest_rows", [7, 70])
def test_many_blocks(name: str, mode: str, fewest_rows: int, monkeypatch: pytest.MonkeyPatch, poisoned: None) -> None:
    """Several blocks of rows in a variant, or several variants in a block; several panels."""
    monkeypatch.setattr(blocked, "BLOCK_BYTES", 1)
    monkeypatch.setattr(blocked, "FEWEST_ROWS", fewest_rows)
    monkeypatch.setattr(blocked, "FEWEST_COLUMNS", 20)
    case = CASES[name]()
    check(case, delta_product(*case, precision=mode), mode)


@pytest.mark.parametrize("mode", MODES)
def test_the_default_is_bf16(mode: str) -> None:
    case = random_case(2, 31, 48, 65)
    found = delta_product(*case)
    assert torch.equal(found, delta_product(*case, precision=mode)) == (mode == "bf16")
    assert torch.equal(rounded_product(*case[::2]), rounded_product(*case[::2], precision=mode)) == (mode == "bf16")


ERRORS = {"exact": (0.0, 3e-6), "bf16x3": (3e-6, 1e-4), "tf32": (3e-4, 5e-3), "bf16": (3e-3, 4e-2)}
"""The largest error of a mode lies between these: not exact (the mode is used), not coarser."""


@pytest.mark.parametrize("mode", MODES)
def test_precision(mode: str) -> None:
    """The error is relative to the edit."""
    low, high = ERRORS[mode]
    for size in (1.0, 1e-2):
        case = random_case(3, 123, 48, 65, size)
        error = largest_error(delta_product(*case, precision=mode), literal(case, "exact", torch.float64))
        assert low * size <= error <= high * size + 3e-6


@pytest.mark.parametrize("mode", MODES)
def test_an_edit_is_not_rounded_away(mode: str) -> None:
    """Against products of rounded activations: the error of an effect of a thousandth."""
    case = random_case(3, 123, 48, 65, size=1e-3)
    exact = literal(case, "exact", torch.float64)
    clean = rounded_product(case.clean_x, case.W, precision=mode)
    plain = largest_error(rounded_product(case.x, case.W, precision=mode) - clean + case.clean_y, exact)
    found = largest_error(delta_product(*case, precision=mode), exact)
    assert found <= (plain / 50 if mode == "bf16" else plain + 1e-6)


@pytest.mark.parametrize("backend", ["blocked", "reference"])
@pytest.mark.parametrize("mode", MODES)
def test_no_difference_gives_the_clean_output(mode: str, backend: str) -> None:
    case = zero_edits()
    found = delta_product(*case, precision=mode, backend=backend)
    assert torch.equal(found.float(), case.clean_y.expand(3, -1, -1))


@pytest.mark.parametrize("mode", MODES)
def test_a_row_of_nan_stays_alone(mode: str) -> None:
    found = delta_product(*infinite(), precision=mode)
    bad = torch.zeros(3, 31, dtype=torch.bool)
    bad[1, 7] = bad[2, 30] = True
    assert torch.equal(~found.isfinite().all(2), bad)
    assert bool(found[2, 30].isnan().all())


@pytest.mark.parametrize("mode", MODES)
def test_float64_is_rounded_as_well(mode: str, poisoned: None) -> None:
    case = random_case(2, 31, 65, 48)
    exact = delta_product(*case, precision=mode, backend="reference")
    wide = Case(*(tensor.double() for tensor in case))
    # The difference is formed in float64: of these inputs, where it is float32, by about 1e-7 another.
    found = delta_product(*wide, precision=mode)
    assert found.dtype == torch.float64
    change = wide.x - wide.clean_x
    torch.testing.assert_close(
        found, wide.clean_y + _product(change.float() if mode != "exact" else change, wide.W, mode, torch.float64),
        rtol=0, atol=1e-12,
    )  # fmt: skip
    assert largest_error(delta_product(case.x.double(), *case[1:], precision=mode), exact) <= 1e-2


# rounded_product --------------------------------------------------------------------------------------------


def product_case(name: str) -> tuple[Tensor, Tensor, Tensor]:
    case = CASES[name]()
    return case.x, case.W, torch.randn(case.W.shape[1], generator=torch.Generator().manual_seed(5))


def literal_product(x: Tensor, W: Tensor, b: Tensor | None, mode: str, dtype: torch.dtype) -> Tensor:
    return _product(x, W, mode, dtype) + (0 if b is None else b.to(dtype))


def check_product(x: Tensor, W: Tensor, b: Tensor | None, found: Tensor, mode: str) -> None:
    assert found.dtype == torch.float32
    exact = literal_product(x, W, b, mode, torch.float64)
    assert_within_rule(found, exact, literal_product(x, W, b, mode, torch.float32))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", CASES)
def test_rounded_product(name: str, mode: str, poisoned: None) -> None:
    x, W, b = product_case(name)
    check_product(x, W, b, rounded_product(x, W, b, precision=mode), mode)
    exact = rounded_product(x, W, b, precision=mode, backend="reference")
    assert largest_error(exact, literal_product(x, W, b, mode, torch.float64)) <= 1e-9


@pytest.mark.parametrize("shape", [(48,), (7, 48), (2, 3, 4, 48), (0, 48)])
def test_rows_of_any_rank(shape: tuple[int, ...], poisoned: None) -> None:
    W = torch.randn(48, 65)
    x = torch.randn(shape)
    found = rounded_product(x, W)
    assert found.shape == (*shape[:-1], 65)
    check_product(x, W, None, found, "bf16")


def test_many_blocks_of_a_rounded_product(monkeypatch: pytest.MonkeyPatch, poisoned: None) -> None:
    monkeypatch.setattr(blocked, "BLOCK_BYTES", 1)
    monkeypatch.setattr(blocked, "FEWEST_ROWS", 20)
    for mode in MODES:
        x, W, b = product_case("rows_123")
        check_product(x, W, b, rounded_product(x, W, b, precision=mode), mode)


def test_rounding_an_operand_once_changes_nothing() -> None:
    case = random_case(2, 31, 48, 65)
    narrow = case._replace(W=case.W.bfloat16())
    assert torch.equal(delta_product(*narrow), delta_product(*case))
    assert torch.equal(rounded_product(case.x.bfloat16(), narrow.W), rounded_product(case.x, case.W))


# Memory -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["row_major", "transposed"])
@pytest.mark.parametrize("mode", MODES)
def test_blocked_holds_a_few_blocks(mode: str, layout: str) -> None:
    """Beside an output of 20 MB, an input of 10 MB and a weight of 8 MB."""
    case = random_case(10, 250, 1024, 2048)
    if layout == "transposed":
        case = case._replace(W=case.W.T.contiguous().T)
    n_out = case.x.shape[0] * case.x.shape[1] * 2048 * 4
    held = allocations(lambda: delta_product(*case, precision=mode))
    # A block and the next where nothing is rounded, otherwise the parts of these and those of a panel, being made.
    assert held.peak - n_out <= {"exact": 2, "bf16": 6, "tf32": 9, "bf16x3": 9}[mode] * 4 * 2**20
    assert held.largest == n_out
    held = allocations(lambda: rounded_product(case.x, case.W, case.W[0], precision=mode))
    assert held.peak - n_out <= {"exact": 0, "bf16": 6, "tf32": 9, "bf16x3": 9}[mode] * 4 * 2**20


def test_imports_and_runs_without_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, fastinterp_kernels.delta_product as op\n"
        "args = 2 * torch.ones(1, 2, 4), torch.ones(2, 4), torch.ones(4, 3), torch.ones(2, 3)\n"
        "for backend in ('auto', 'blocked', 'reference'):\n"
        "    print(float(op.delta_product(*args, backend=backend)[0, 0, 0]))\n"
        "print([m for m in sys.modules if m.split('.')[0] in ('fastinterp', 'transformers', 'zarr')])"
    )
    assert run_python(code).split("\n")[:4] == ["5.0", "5.0", "5.0", "[]"]


# Errors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 8)}, ValueError, r"x\.flatten\(1, -2\)"),
        ({"x": torch.zeros(2, 4, 8)}, ValueError, r"\[row, n_in\]"),
        ({"W": torch.zeros(5, 8)}, ValueError, r"n_in = 8.*weight\.T"),
        ({"clean_y": torch.zeros(5)}, ValueError, r"\[3, 5\]"),
        ({"x": torch.zeros(2, 3, 8, dtype=torch.int64)}, TypeError, r"x\.float\(\)"),
        ({"W": torch.zeros(8, 5, device="meta")}, ValueError, "meta"),
        ({"W": torch.zeros(8, 5, requires_grad=True)}, ValueError, "no_grad"),
        ({"precision": "fp8"}, ValueError, "'bf16x3'"),
        ({"backend": "cuda"}, ValueError, "'blocked' or 'triton'"),
        ({"backend": "triton"}, ValueError, r"backend='blocked'.*TRITON_INTERPRET=1"),
    ],
)
def test_errors(change: dict, error: type[Exception], message: str) -> None:
    good = {
        "x": torch.zeros(2, 3, 8), "clean_x": torch.zeros(3, 8), "W": torch.zeros(8, 5), "clean_y": torch.zeros(3, 5),
    }  # fmt: skip
    delta_product(**good)
    with pytest.raises(error, match=message):
        delta_product(**(good | change))


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.tensor(1.0)}, ValueError, "single number"),
        ({"W": torch.zeros(5, 8)}, ValueError, r"weight\.T"),
        ({"b": torch.zeros(8)}, ValueError, r"\[n_out\] = \[5\]"),
        ({"b": torch.zeros(5, dtype=torch.int64)}, TypeError, r"b\.float\(\)"),
        ({"x": torch.zeros(3, 8, requires_grad=True)}, ValueError, "no_grad"),
        ({"precision": "fp8"}, ValueError, "'bf16x3'"),
        ({"backend": "triton"}, ValueError, r"backend='blocked'.*TRITON_INTERPRET=1"),
    ],
)
def test_errors_of_a_rounded_product(change: dict, error: type[Exception], message: str) -> None:
    good = {"x": torch.zeros(3, 8), "W": torch.zeros(8, 5)}
    rounded_product(**good)
    with pytest.raises(error, match=message):
        rounded_product(**(good | change))
