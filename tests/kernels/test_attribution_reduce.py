"""``fastinterp_kernels.attribution_reduce``: every backend against float64, interpreted and compiled."""

import math
import re
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from fastinterp_kernels.attribution_reduce import attribution_reduce
from tests.kernels.kernel_checks import (
    Compiled,
    allocations,
    assert_fits,
    assert_within_rule,
    compile_for,
    cuda_peak_bytes,
    largest_error,
    loops,
    report_checks,
    run_interpreted,
    run_python,
)

# Cases, the same for every backend --------------------------------------------------------------------------


class Case(NamedTuple):
    a: Tensor
    b: Tensor | None
    grad: Tensor

    def to(self, device: str) -> "Case":
        return Case(*(None if tensor is None else tensor.to(device) for tensor in self))


def _random(*shape: int, b_shape: tuple[int, ...] | None = (), seed: int = 0) -> Case:
    """``b_shape``: () for that of ``a``, None for no ``b``."""
    generator = torch.Generator().manual_seed(seed)
    a, grad = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
    b = None if b_shape is None else torch.randn(b_shape or shape, generator=generator)
    return Case(a, b, grad)


def rows(n_rows: int, d: int) -> Case:
    return _random(n_rows, d)


def axes() -> Case:
    return _random(3, 7, 12, 64)


def no_b() -> Case:
    return _random(5, 11, 80, b_shape=None)


def one_b_for_all() -> Case:
    return _random(5, 11, 80, b_shape=(80,))


def one_b_per_prompt() -> Case:
    return _random(5, 11, 2, 80, b_shape=(5, 1, 1, 80))


def b_without_batch() -> Case:
    return _random(5, 11, 2, 80, b_shape=(11, 2, 80))


def one_row() -> Case:
    return _random(300)


def permuted() -> Case:
    """Axes in another order in memory in each tensor, and more of them than the kernel takes at once."""
    case = _random(4, 2, 3, 5, 2, 32)
    return Case(
        case.a.permute(4, 2, 0, 3, 1, 5).contiguous().permute(2, 4, 1, 3, 0, 5),
        case.b.permute(1, 0, 3, 2, 4, 5).contiguous().permute(1, 0, 3, 2, 4, 5),
        case.grad,
    )


def last_axis_strided() -> Case:
    case = _random(9, 48, 13)
    return Case(*(tensor.transpose(1, 2) for tensor in case))


def part_of_a_larger_tensor() -> Case:
    """NaN all around."""

    def inside(tensor: Tensor) -> Tensor:
        wide = torch.full((tensor.shape[0] + 2, tensor.shape[1] + 3, tensor.shape[2] + 50), math.nan)
        wide[1:-1, 1:-2, 20:-30] = tensor
        return wide[1:-1, 1:-2, 20:-30]

    return Case(*(inside(tensor) for tensor in _random(6, 5, 96)))


def small_difference() -> Case:
    """``a`` and ``b`` of size 1000 and 1e-3 apart: two sums of products would lose all of it."""
    case = _random(20, 768)
    b = case.a * 1000
    return Case(b + 1e-3 * case.b, b, case.grad)


def large() -> Case:
    case = _random(33, 200)
    return Case(case.a * 1e18, case.b * 1e18, case.grad * 1e15)


def reduced(dtype: torch.dtype) -> Case:
    return Case(*(tensor.to(dtype) for tensor in _random(31, 3, 96)))


def mixed_dtypes() -> Case:
    case = _random(31, 3, 96)
    return Case(case.a.bfloat16(), case.b, case.grad.half())


CASES: dict[str, Callable[[], Case]] = {
    **{f"rows_{n}_{d}": partial(rows, n, d) for n, d in ((1, 576), (31, 32), (123, 80), (255, 768), (507, 1), (9, 75))},
    **{
        case.__name__: case
        for case in (
            axes, no_b, one_b_for_all, one_b_per_prompt, b_without_batch, one_row, permuted, last_axis_strided,
            part_of_a_larger_tensor, small_difference, large, mixed_dtypes,
        )
    },
    "bfloat16": partial(reduced, torch.bfloat16),
    "float16": partial(reduced, torch.float16),
}  # fmt: skip


def _plain(case: Case, dtype: torch.dtype) -> Tensor:
    """The expression that a user would write."""
    a, b, grad = (None if tensor is None else tensor.to(dtype) for tensor in case)
    return ((a if b is None else a - b) * grad).sum(-1)


def check(case: Case, found: Tensor) -> None:
    assert found.dtype == torch.float32
    exact = _plain(case, torch.float64)
    scale = max(1.0, float(exact.abs().max()))
    assert_within_rule(found.cpu() / scale, exact / scale, _plain(case, torch.float32) / scale)


# Reference and blocked --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CASES)
def test_reference(name: str) -> None:
    case = CASES[name]()
    found = attribution_reduce(*case, backend="reference")
    assert found.dtype == torch.float64
    a, b, grad = (None if tensor is None else tensor.double().expand(case.a.shape) for tensor in case)
    expected = torch.einsum("...d,...d->...", a if b is None else a - b, grad)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_blocked(name: str, poisoned: None) -> None:
    case = CASES[name]()
    check(case, attribution_reduce(*case))


def test_blocked_computes_float64_in_float64() -> None:
    case = axes()
    found = attribution_reduce(case.a.double(), case.b, case.grad)
    torch.testing.assert_close(found, _plain(case, torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(0, 5), (4, 0), (3, 0, 2, 7)])
def test_empty(shape: tuple[int, ...]) -> None:
    found = attribution_reduce(torch.zeros(shape), None, torch.zeros(shape))
    torch.testing.assert_close(found, torch.zeros(shape[:-1]))


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_infinity_and_nan_stay_in_their_row(value: float) -> None:
    case = _random(6, 300)
    case.a[2, 7] = value
    found = attribution_reduce(*case, backend="blocked")
    assert (~found.isfinite()).nonzero().tolist() == [[2]]


@pytest.mark.parametrize("name", ["contiguous", "permuted", "bfloat16"])
def test_blocked_holds_one_piece(name: str) -> None:
    case = _random(60, 70, 5, 64)  # 5 MB each
    if name == "permuted":
        case = Case(*(tensor.transpose(0, 2) for tensor in case))
    if name == "bfloat16":
        case = Case(*(tensor.bfloat16() for tensor in case))
    held = allocations(lambda: attribution_reduce(*case, backend="blocked"))
    n_bytes = 60 * 70 * 5 * 64 * 4
    pieces = 2 if name == "bfloat16" else 1  # torch widens an operand in a temporary
    assert 0 < held.peak <= pieces * 2**20 + n_bytes // 64 + 2**14
    assert allocations(lambda: _plain(case, torch.float32)).largest == n_bytes


def test_imports_and_runs_without_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, fastinterp_kernels.attribution_reduce as op\n"
        "for backend in ('auto', 'blocked', 'reference'):\n"
        "    print(float(op.attribution_reduce(torch.ones(2, 4), None, torch.ones(2, 4), backend=backend)[0]))\n"
        "print([m for m in sys.modules if m.split('.')[0] in ('fastinterp', 'transformers', 'zarr')])"
    )
    assert run_python(code).split("\n")[:4] == ["4.0", "4.0", "4.0", "[]"]


# Errors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"grad": torch.zeros(2, 4)}, ValueError, "same shape"),
        ({"a": torch.tensor(1.0), "b": None, "grad": torch.tensor(1.0)}, ValueError, "at least one axis"),
        ({"b": torch.zeros(2, 3, 1)}, ValueError, r"b\[:, None\]"),
        ({"b": torch.zeros(3, 2, 4)}, ValueError, r"b\[:, None\]"),
        ({"b": torch.zeros(1, 2, 3, 4)}, ValueError, "left out"),
        ({"a": torch.zeros(2, 3, 4, dtype=torch.int64)}, TypeError, r"a\.float\(\)"),
        ({"grad": torch.zeros(2, 3, 4, device="meta")}, ValueError, "meta"),
        ({"grad": torch.zeros(2, 3, 4, requires_grad=True)}, ValueError, "no_grad"),
        ({"backend": "cuda"}, ValueError, "'blocked' or 'triton'"),
        ({"backend": "triton"}, ValueError, r"backend='blocked'.*TRITON_INTERPRET=1"),
    ],
)
def test_errors(change: dict, error: type[Exception], message: str) -> None:
    good = {"a": torch.zeros(2, 3, 4), "b": torch.zeros(3, 4), "grad": torch.zeros(2, 3, 4)}
    attribution_reduce(**good)
    with pytest.raises(error, match=message):
        attribution_reduce(**(good | change))


# The Triton kernel, interpreted -----------------------------------------------------------------------------


def _triton_checks(device: str) -> dict[str, Callable[[], None]]:
    from fastinterp_kernels.attribution_reduce import triton_kernel

    def run(name: str) -> None:
        case = CASES[name]()
        check(case, attribution_reduce(*case.to(device), backend="triton"))

    def many_programs() -> None:
        """Several programs, the last of them ragged, with whole blocks and a masked rest along ``d``."""
        before, triton_kernel._TILE_ELEMENTS = triton_kernel._TILE_ELEMENTS, 2048
        try:
            case = _random(37, 2, 75)
            check(case, attribution_reduce(*case.to(device), backend="triton"))
        finally:
            triton_kernel._TILE_ELEMENTS = before

    def empty() -> None:
        found = attribution_reduce(*(torch.zeros(3, 0, device=device) for _ in range(3)), backend="triton")
        assert found.tolist() == [0.0] * 3

    def merged_axes() -> None:
        merged = triton_kernel.merged_axes
        assert merged((2, 3, 4), [(12, 4, 1), (120, 40, 10)]) == ((24,), [(1,), (10,)])
        assert merged((2, 3, 4), [(12, 4, 1), (0, 4, 1)]) == ((2, 12), [(12, 1), (0, 1)])
        assert merged((2, 1, 4), [(4, 99, 1)]) == ((8,), [(1,)])

    def refusal() -> None:
        with pytest.raises(ValueError, match=r"x\.float\(\)"):
            attribution_reduce(*(t.double() for t in axes().to(device)), backend="triton")

    return {
        **{name: partial(run, name) for name in CASES},
        "many_programs": many_programs, "empty": empty, "merged_axes": merged_axes, "refusal": refusal,
    }  # fmt: skip


TRITON_CHECKS = [*CASES, "many_programs", "empty", "merged_axes", "refusal"]


@pytest.fixture(scope="module")
def interpreted() -> dict[str, str | None]:
    return run_interpreted(__file__)


@pytest.mark.parametrize("name", TRITON_CHECKS)
def test_interpreted(name: str, interpreted: dict[str, str | None]) -> None:
    assert interpreted[name] is None, interpreted[name]


# The Triton kernel, compiled for GPUs that need not be there ------------------------------------------------


def _compile(capability: int, dtype: str = "fp32", *, b: bool = True, block_d: int = 64) -> Compiled:
    from fastinterp_kernels.attribution_reduce.triton_kernel import _TILE_ELEMENTS, attribution_reduce_kernel

    constants = {"BLOCK_ROW": _TILE_ELEMENTS // block_d, "BLOCK_D": block_d, "a_d": 1, "grad_d": 1}
    constants |= {"b_d": 1} if b else {"b_ptr": None}
    types = {"a_ptr": f"*{dtype}", "grad_ptr": f"*{dtype}", "out_ptr": "*fp32"} | ({"b_ptr": f"*{dtype}"} if b else {})
    divisible = ["d", *(f"{name}_{axis}" for name in ("a", "b", "grad") for axis in range(3))]
    return compile_for(
        attribution_reduce_kernel, types, constants, capability, divisible=divisible, num_warps=4, num_stages=3
    )


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("block_d", [64, 512])
@pytest.mark.parametrize("b", [True, False])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_compiles_without_spills_to_wide_loads(capability: int, dtype: str, b: bool, block_d: int) -> None:
    compiled = _compile(capability, dtype, b=b, block_d=block_d)
    print(f"attribution_reduce {dtype} b {b} block {block_d}: {compiled}")
    assert_fits(compiled)
    main = [loop for loop in loops(compiled) if "LDG" in loop]
    assert len(main) == 1
    loads = re.findall(r"\bLDG\S*", main[0])
    assert len(loads) >= 4
    assert all(load.endswith(".128") for load in loads), loads


def test_offsets_are_computed_in_64_bits() -> None:
    compiled = _compile(90)
    offsets = re.findall(r"tt\.addptr .*: tensor<\S+x!tt\.ptr<\w+>>, (tensor<\S+>)", compiled.ttir)
    assert offsets
    assert all(kind.endswith("xi64>") for kind in offsets), offsets
    products = re.findall(r"arith\.muli .*: tensor<\d+x(\w+)>", compiled.ttir)
    assert products
    assert set(products) == {"i64"}


# The Triton kernel on a GPU ---------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("name", TRITON_CHECKS)
def test_on_a_gpu(name: str) -> None:
    stale = [torch.full((n,), math.nan, device="cuda") for n in (64, 512, 4096)]
    del stale
    _triton_checks("cuda")[name]()


@pytest.mark.gpu
def test_no_memory_and_wide_offsets_on_a_gpu() -> None:
    """4.3e9 elements: a broadcast view of one batch, so that offsets pass 2^31 in nothing but the large ``a``."""
    a = torch.zeros(2**16, 2**16, dtype=torch.bfloat16, device="cuda")  # 8.6 GB
    a[-1] = 1.0
    grad = torch.ones(2**16, dtype=torch.bfloat16, device="cuda").expand(2**16, -1)
    held = cuda_peak_bytes(lambda: attribution_reduce(a, None, grad))
    assert held <= 2**20
    found = attribution_reduce(a, None, grad)
    assert largest_error(found[-1:], torch.tensor([2.0**16])) == 0.0
    assert not bool(found[:-1].any())


if __name__ == "__main__":
    report_checks(_triton_checks("cpu"))
