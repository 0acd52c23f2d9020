"""The Triton kernel of ``fastinterp_kernels.variant_residual``: interpreted, compiled for GPUs, and on a GPU."""

import math
import re
from collections.abc import Callable
from functools import partial

import numpy
import pytest
import torch
from torch import Tensor

from fastinterp_kernels.variant_residual import variant_residual
from tests.kernels.kernel_checks import (
    Compiled,
    assert_async_loads,
    assert_fits,
    assert_no_tensor_cores,
    assert_tensor_cores,
    compile_for,
    cuda_peak_bytes,
    fitted_tilings,
    largest_error,
    report_checks,
    run_interpreted,
)
from tests.kernels.test_variant_residual import (
    CASES,
    PRECISIONS,
    Case,
    check,
    mask_and_replacement,
    other_rows,
    plain,
    random_case,
)

# The Triton kernel, interpreted -----------------------------------------------------------------------------


def _triton_checks(device: str) -> dict[str, Callable[[], None]]:
    from fastinterp_kernels.variant_residual import triton_kernel
    from fastinterp_kernels.variant_residual.triton_kernel import VariantTiling, variant_residual_triton

    def run_case(case: Case, precision: str) -> Tensor:
        with (
            fitted_tilings(triton_kernel, row=len(case.resid), column=case.resid.shape[1]),
            numpy.errstate(invalid="ignore"),  # the interpreter is numpy, to which inf * 0 is worth a warning
        ):
            return variant_residual(*case.to(device), backend="triton", precision=precision)

    def run(name: str) -> None:
        case = CASES[name]()
        check(case, run_case(case, "exact"))

    def small_tiles() -> None:
        """Several programs along every axis, several launches, ragged in rows and columns, an ``out`` in slices."""
        case = mask_and_replacement()
        case = case._replace(resid=case.resid[:37, :75], z=case.z[:37], W_O=case.W_O[:, :, :75])
        wide = torch.full((5, 40, 80), 7.0, device=device)
        tiling = VariantTiling(row=16, column=32, d_head=16, num_warps=4, num_stages=2)
        variant_residual_triton(
            *case.to(device), wide[:, :37, :75], "exact", tiling=tiling, n_bytes=6 * 32 * 4 * 32
        )  # fmt: skip
        check(case, wide[:, :37, :75])
        assert bool((wide[:, 37:] == 7.0).all() & (wide[:, :, 75:] == 7.0).all())

    def precision(mode: str) -> None:
        low, high = PRECISIONS[mode]
        for case in (random_case(123), other_rows()):
            found = run_case(case, mode)
            assert 5 * low <= largest_error(found, plain(case, torch.float64)) <= high

    def refusal() -> None:
        with pytest.raises(ValueError, match=r"x\.float\(\)"):
            variant_residual(
                *(t.double() for t in random_case(3).to(device)[:3]), torch.tensor([0], device=device), backend="triton"
            )

    return {
        **{name: partial(run, name) for name in CASES},
        "small_tiles": small_tiles,
        **{mode: partial(precision, mode) for mode in PRECISIONS},
        "refusal": refusal,
    }  # fmt: skip


TRITON_CHECKS = [*CASES, "small_tiles", *PRECISIONS, "refusal"]


@pytest.fixture(scope="module")
def interpreted() -> dict[str, str | None]:
    return run_interpreted(__file__)


@pytest.mark.parametrize("name", TRITON_CHECKS)
def test_interpreted(name: str, interpreted: dict[str, str | None]) -> None:
    assert interpreted[name] is None, interpreted[name]


# The Triton kernel, compiled for GPUs that need not be there ------------------------------------------------


def _compile(capability: int, mode: str, d_head: int = 64) -> Compiled:
    from fastinterp_kernels.direct_effect_loss.triton_operands import Stored
    from fastinterp_kernels.variant_residual.triton_kernel import default_tiling, variant_residual_kernel

    narrow = mode in ("bf16", "bf16x3")
    stored = Stored(torch.bfloat16 if narrow else torch.float32, 1 + (mode == "bf16x3"), mode)
    tiling = default_tiling(stored, d_head)
    constants = {
        "WIDEN": False, "ROUND_TF32": False, "DOT": "tf32" if mode == "tf32" else "ieee", "D_HEAD": d_head,
        "BLOCK_ROW": tiling.row, "BLOCK_COLUMN": tiling.column, "BLOCK_D_HEAD": tiling.d_head,
        "stride_resid_column": 1, "stride_out_column": 1,
        "stride_w_depth" if mode == "tf32" else "stride_w_column": 1,
    } | ({} if mode == "bf16x3" else {"z_low_ptr": None, "w_low_ptr": None})  # fmt: skip
    operands = ("z_ptr", "w_ptr") + (("z_low_ptr", "w_low_ptr") if mode == "bf16x3" else ())
    types = dict.fromkeys(operands, "*bf16" if narrow else "*fp32")
    types |= {"resid_ptr": "*fp32", "out_ptr": "*fp32", "start_ptr": "*i32", "head_ptr": "*i32"}
    strides = ("resid_row", "w_head", "w_depth", "w_column", "out_variant", "out_row")
    divisible = ["n_columns", "n_padded_rows", *(f"stride_{name}" for name in strides)]
    return compile_for(
        variant_residual_kernel, types, constants, capability, divisible=[n for n in divisible if n not in constants],
        num_warps=tiling.num_warps, num_stages=tiling.num_stages,
    )  # fmt: skip


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("mode", "d_head"),
    [("exact", 64), ("bf16x3", 64), ("tf32", 64), ("bf16", 64), *(("bf16x3", n) for n in (32, 96, 128, 256))],
)
def test_compiles_without_spills_to_the_right_instructions(capability: int, mode: str, d_head: int) -> None:
    compiled = _compile(capability, mode, d_head)
    print(f"variant_residual {mode} d_head {d_head}: {compiled}")
    assert_fits(compiled)
    assert_async_loads(compiled)
    if mode == "exact":
        assert_no_tensor_cores(compiled)
    else:
        assert_tensor_cores(compiled, "tf32" if mode == "tf32" else "bf16")
    stores = set(re.findall(r"\bSTG\S*", compiled.sass))
    assert stores == {"STG.E.128"}


def test_offsets_are_computed_in_64_bits() -> None:
    compiled = _compile(90, "exact")
    offsets = re.findall(r"tt\.addptr .*: tensor<\S+x!tt\.ptr<\w+>>, (tensor<\S+>)", compiled.ttir)
    assert offsets
    assert all(kind.endswith("xi64>") for kind in offsets), offsets
    products = re.findall(r"arith\.muli .*: tensor<\S+x(\w+)>", compiled.ttir)
    assert products
    assert set(products) == {"i64"}


# The Triton kernel on a GPU ---------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("name", TRITON_CHECKS)
def test_on_a_gpu(name: str) -> None:
    stale = [torch.full((n,), math.nan, device="cuda") for n in (64, 512, 4096, 2**15, 2**18)]
    del stale
    _triton_checks("cuda")[name]()


@pytest.mark.gpu
def test_memory_and_wide_offsets_on_a_gpu() -> None:
    """An output of 2^31 elements and more."""
    case = random_case(40000, n_heads=2, d_head=64, d_model=768).to("cuda")
    edits = torch.zeros(72, dtype=torch.int32, device="cuda")
    edits[-1] = 1
    out = torch.empty(72, 40000, 768, device="cuda")  # 8.8 GB
    held = cuda_peak_bytes(lambda: variant_residual(*case[:3], edits, out=out, precision="exact"))
    assert held <= 64 * 2**20
    check(case._replace(edits=edits[-1:]).to("cpu"), out[-1:].cpu())


if __name__ == "__main__":
    report_checks(_triton_checks("cpu"))
