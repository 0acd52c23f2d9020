"""The Triton kernels of ``fastinterp_kernels.delta_product``, interpreted, and on a GPU."""

import math
from collections.abc import Callable
from functools import partial

import numpy
import pytest
import torch

from fastinterp_kernels.delta_product import delta_product, rounded_product
from tests.kernels.kernel_checks import cuda_peak_bytes, largest_error, report_checks, run_interpreted
from tests.kernels.test_delta_product import (
    CASES,
    ERRORS,
    MODES,
    check,
    check_product,
    infinite,
    literal,
    product_case,
    random_case,
    zero_edits,
)


def _triton_checks(device: str) -> dict[str, Callable[[], None]]:
    from fastinterp_kernels.delta_product.triton_kernel import (
        ProductTiling,
        delta_product_triton,
        rounded_product_triton,
    )

    small = ProductTiling(row=16, column=32, depth=16, num_warps=4, num_stages=2)

    def run(name: str, mode: str) -> None:
        case = CASES[name]()
        inputs = case.to(device)
        with numpy.errstate(invalid="ignore"):  # the interpreter is numpy, to which inf - inf is worth a warning
            check(case, delta_product(*inputs, precision=mode, backend="triton"), mode)
            # Differences formed once.
            check(case, delta_product_triton(*inputs, mode, prepare=True), mode)

    def product(name: str, mode: str) -> None:
        x, W, b = product_case(name)
        for bias in (b, None):
            of_device = (x.to(device), W.to(device), None if bias is None else bias.to(device))
            check_product(x, W, bias, rounded_product(*of_device, precision=mode, backend="triton"), mode)
            check_product(x, W, bias, rounded_product_triton(*of_device, mode, prepare=True), mode)

    def small_tiles(mode: str) -> None:
        """Several programs along every axis, steps with a rest, groups of tiles; several launches of 16 rows."""
        for n_in, n_out in ((40, 65), (16, 40), (48, 20)):
            case = random_case(2, 27, n_in, n_out)
            for prepare in (False, True):
                found = delta_product_triton(*case.to(device), mode, tiling=small, prepare=prepare, n_bytes=1)
                check(case, found, mode)

    def no_difference(mode: str) -> None:
        case = zero_edits()
        for prepare in (False, True):
            found = delta_product_triton(*case.to(device), mode, prepare=prepare)
            assert torch.equal(found.cpu(), case.clean_y.expand(3, -1, -1))

    def rows_stay_alone(mode: str) -> None:
        case = infinite()
        bad = torch.zeros(3, 31, dtype=torch.bool)
        bad[1, 7] = bad[2, 30] = True
        for prepare in (False, True):
            with numpy.errstate(invalid="ignore"):
                found = delta_product_triton(*case.to(device), mode, prepare=prepare)
            assert torch.equal(~found.cpu().isfinite().all(2), bad)
            assert bool(found[2, 30].isnan().all())

    def precision(mode: str) -> None:
        low, high = ERRORS[mode]
        case = random_case(3, 123, 48, 65)
        found = delta_product(*case.to(device), precision=mode, backend="triton")
        assert low <= largest_error(found, literal(case, "exact", torch.float64)) <= high

    def refusal() -> None:
        case = random_case(1, 2, 3, 4).to(device)
        for run in (lambda x: delta_product(x, *case[1:], backend="triton"),
                    lambda x: rounded_product(x, case.W, backend="triton")):  # fmt: skip
            with pytest.raises(ValueError, match=r"x\.float\(\)"):
                run(case.x.double())

    checks: dict[str, Callable[[], None]] = {"refusal": refusal}
    for mode in MODES:
        checks |= {f"{name}-{mode}": partial(run, name, mode) for name in CASES}
        checks |= {f"product-{name}-{mode}": partial(product, name, mode) for name in PRODUCT_CASES}
        checks |= {
            f"{check.__name__}-{mode}": partial(check, mode)
            for check in (small_tiles, no_difference, rows_stay_alone, precision)
        }
    names = INTERPRETED if device == "cpu" else TRITON_CHECKS
    return {name: checks[name] for name in names}


PRODUCT_CASES = ["rows_123", "65_to_48", "576_to_576", "transposed_weight", "weight_bfloat16", "no_rows", "no_inputs"]
OTHERS = ["small_tiles", "no_difference", "rows_stay_alone", "precision"]
TRITON_CHECKS = [
    "refusal",
    *(
        f"{name}-{mode}"
        for mode in MODES
        for name in (*CASES, *(f"product-{name}" for name in PRODUCT_CASES), *OTHERS)
    ),
]  # fmt: skip
# tf32 and bf16 differ from the two others in how an operand is rounded alone.
ROUNDED_ONCE = {
    "rows_1", "rows_31", "65_to_48", "576_to_576", "strided_inputs", "small_edits", "zero_edits", "weight_float16",
    "inputs_bfloat16", "no_inputs", "product-65_to_48", "product-weight_bfloat16", "no_difference", "precision",
}  # fmt: skip
INTERPRETED = [
    name
    for name in TRITON_CHECKS
    if not name.endswith(("-tf32", "-bf16")) or name.rpartition("-")[0] in ROUNDED_ONCE
]  # fmt: skip


@pytest.fixture(scope="module")
def interpreted() -> dict[str, str | None]:
    return run_interpreted(__file__)


@pytest.mark.parametrize("name", INTERPRETED)
def test_interpreted(name: str, interpreted: dict[str, str | None]) -> None:
    assert interpreted[name] is None, interpreted[name]


# On a GPU ---------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("name", TRITON_CHECKS)
def test_on_a_gpu(name: str) -> None:
    stale = [torch.full((n,), math.nan, device="cuda") for n in (64, 512, 4096, 2**15, 2**18)]
    del stale
    _triton_checks("cuda")[name]()


@pytest.mark.gpu
@pytest.mark.parametrize("weight", ["float32", "transposed", "bfloat16"])
@pytest.mark.parametrize("mode", MODES)
def test_large_tiles_on_a_gpu(mode: str, weight: str) -> None:
    """Enough rows for tiles of 128 rows, whole and ragged; the differences formed once and for every tile."""
    for n_in, n_out in ((576, 1536), (1536, 192), (600, 500)):
        case = random_case(30, 123, n_in, n_out)
        if weight == "transposed":
            case = case._replace(W=case.W.T.contiguous().T)
        if weight == "bfloat16":
            case = case._replace(W=case.W.bfloat16())
        check(case, delta_product(*case.to("cuda"), precision=mode, backend="triton"), mode)


@pytest.mark.gpu
@pytest.mark.parametrize("allow_tf32", [False, True])
@pytest.mark.parametrize("name", PRODUCT_CASES)
def test_the_product_of_cublas(name: str, allow_tf32: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What ``auto`` is in ``bf16``."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", allow_tf32)
    x, W, b = product_case(name)
    for mode in MODES:
        for bias in (b, None):
            found = rounded_product(x.cuda(), W.cuda(), None if bias is None else bias.cuda(), precision=mode)
            check_product(x, W, bias, found, mode)


@pytest.mark.gpu
def test_memory_and_wide_offsets_on_a_gpu() -> None:
    """An output of 2^31 elements and more; an input of 2^30."""
    case = random_case(1, 4000, 768, 1536).to("cuda")
    x = case.clean_x.repeat(360, 1, 1)
    x[-1] = case.x[0]  # 4.4 GB; the output takes 8.8 GB
    n_out = 360 * 4000 * 1536 * 4
    found = []
    for mode in MODES:
        held = cuda_peak_bytes(lambda: found.append(delta_product(x, *case[1:], precision=mode)))  # noqa: B023
        assert held - n_out <= 33 * 2**20
        last = found.pop()
        check(case.to("cpu"), last[-1:].cpu(), mode)
        assert torch.equal(last[-2], case.clean_y)
        del last


if __name__ == "__main__":
    report_checks(_triton_checks("cpu"))
