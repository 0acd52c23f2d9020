"""The Triton kernels of ``fastinterp_kernels.direct_effect_loss``: interpreted, and on a GPU."""

import math
from collections.abc import Callable
from functools import partial
from unittest import mock

import numpy
import pytest
import torch

from fastinterp_kernels.direct_effect_loss import DirectEffect, edits
from tests.kernels.kernel_checks import cuda_peak_bytes, fitted_tilings, largest_error, report_checks, run_interpreted
from tests.kernels.test_direct_effect_loss import (
    CASES,
    PRECISIONS,
    Case,
    check,
    layers,
    many_targets,
    mean,
    other_rows,
    plain,
    ragged,
    random_case,
    softcap_and_more,
)

# Interpreted ------------------------------------------------------------------------------------------------


def _run(case: Case, device: str, *, pairs: bool = False, **options: object) -> DirectEffect:
    """By sums over tiles, or for ``pairs`` by edited residuals, whatever would be less work."""
    from fastinterp_kernels.direct_effect_loss import triton_kernel

    with (
        mock.patch.object(edits, "_explicit_is_less_work", return_value=pairs),
        fitted_tilings(triton_kernel, row=len(case.x), column=case.W_U.shape[1]),
        numpy.errstate(over="ignore", invalid="ignore"),  # the interpreter is numpy, which warns of infinities
    ):
        found = case.to(device).run(**{"backend": "triton", "precision": "exact"} | options)
    return DirectEffect(*(None if tensor is None else tensor.cpu() for tensor in found))


FEWER_COLUMNS = {f"ragged_{n}": partial(ragged, n, 3001) for n in (1, 123, 255, 507)}
"""Interpreted instead of those with 50257 columns, of which one case is enough: two tiles, the second ragged."""


def _triton_checks(device: str) -> dict[str, Callable[[], None]]:
    from fastinterp_kernels.direct_effect_loss import triton_kernel
    from fastinterp_kernels.direct_effect_loss.triton_kernel import Plan, SumTiling

    cases = CASES | (FEWER_COLUMNS if device == "cpu" else {})

    def run(name: str) -> None:
        case = cases[name]()
        found = _run(case, device)
        assert found.logsumexp.dtype == found.target_logit.dtype == torch.float32
        # Operands that are all in a reduced dtype are multiplied as they are, and so is W_O @ W_U.
        check(case, found, case.x.dtype if name in ("bfloat16", "float16") else torch.float32)

    def pairs(name: str) -> None:
        case = CASES[name]()
        check(case, _run(case, device, pairs=True))

    def small_tiles(unroll: bool) -> None:
        """Several programs, tiles, head groups and row chunks, ragged in all; heads of a tile shared by programs."""
        step = 32 if unroll else 16
        tiling = SumTiling(row=32, column=64, d_model=32, d_head=step, unroll=unroll, num_warps=4, num_stages=2)
        with (
            mock.patch.object(triton_kernel, "default_tiling", return_value=tiling),
            mock.patch.object(triton_kernel, "make_plan", return_value=Plan(64, 4, 128)),
            mock.patch.object(triton_kernel, "_PROGRAMS", 8),
        ):
            for make in (mean, softcap_and_more, many_targets):
                case = make()
                case = case._replace(W_U=case.W_U[:, :150], b_U=None if case.b_U is None else case.b_U[:150])
                case = case._replace(targets=case.targets % 150)
                check(case, _run(case, device))

    def precision(mode: str) -> None:
        low, high = PRECISIONS[mode]
        for name in ("layers", "softcap"):
            case = CASES[name]()
            exact, found = plain(case, torch.float64), _run(case, device, precision=mode)
            assert low <= largest_error(found.logsumexp, exact.logsumexp) <= high
            assert largest_error(found.kl, exact.kl) <= 2 * high
            assert largest_error(found.target_logit, exact.target_logit) <= 2e-5

    def only_what_is_asked_for() -> None:
        case = other_rows()
        found = _run(case, device, kl=False, rank=False)
        assert found.rank is found.kl is None
        torch.testing.assert_close(found[:2], _run(case, device)[:2], rtol=0, atol=2e-6)

    def no_rows() -> None:
        case = layers()
        empty = case._replace(x=case.x[:0], z=[z[:0] for z in case.z], targets=case.targets[:0])
        assert [tuple(t.shape) for t in _run(empty, device)] == [(0, 6, 2), (0, 6), (0, 6, 2), (0, 6)]

    def refusal() -> None:
        with pytest.raises(ValueError, match=r"x\.float\(\)"):
            _run(layers()._replace(x=layers().x.double()), device, precision=None)

    return {
        **{name: partial(run, name) for name in CASES},
        **{f"pairs_{name}": partial(pairs, name) for name in PAIRS},
        "small_tiles": partial(small_tiles, True), "small_tiles_along_d_head": partial(small_tiles, False),
        **{mode: partial(precision, mode) for mode in PRECISIONS},
        "only_what_is_asked_for": only_what_is_asked_for, "no_rows": no_rows, "refusal": refusal,
    }  # fmt: skip


PAIRS = ["layers", "other_rows", "softcap", "ignored_targets"]
TRITON_CHECKS = [
    *CASES, *(f"pairs_{name}" for name in PAIRS), "small_tiles", "small_tiles_along_d_head", *PRECISIONS,
    "only_what_is_asked_for", "no_rows", "refusal",
]  # fmt: skip


@pytest.fixture(scope="module")
def interpreted() -> dict[str, str | None]:
    return run_interpreted(__file__)


@pytest.mark.parametrize("name", TRITON_CHECKS)
def test_interpreted(name: str, interpreted: dict[str, str | None]) -> None:
    assert interpreted[name] is None, interpreted[name]


@pytest.mark.parametrize("d_model", [576, 2304, 8192])
@pytest.mark.parametrize("n_rows", [16, 480, 100_000])
def test_a_plan_fits_its_memory_and_covers_whole_tiles(n_rows: int, d_model: int) -> None:
    from fastinterp_kernels.direct_effect_loss.triton_kernel import MEMORY_BYTES, default_tiling, make_plan
    from fastinterp_kernels.direct_effect_loss.triton_operands import Stored

    stored = Stored(torch.bfloat16, 2, "bf16x3")
    tiling = default_tiling(stored, d_model, 128)
    plan = make_plan(n_rows, 270, 128256, d_model, 128, n_bytes=4, n_sums=1, tiling=tiling)
    rows, heads, columns = plan
    assert rows % tiling.row == columns % tiling.column == 0
    assert min(plan) >= 1
    operands = (rows + columns) * (d_model + heads * 128) + heads * 128 * d_model
    assert operands * 4 + (heads + 1) * rows * columns // tiling.column * 4 <= MEMORY_BYTES


# On a GPU ---------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("name", TRITON_CHECKS)
def test_on_a_gpu(name: str) -> None:
    # Freed blocks of the sizes that are about to be allocated, filled with NaN.
    stale = [torch.full((n,), math.nan, device="cuda") for n in (64, 512, 4096, 2**15, 2**18, 2**21)]
    del stale
    _triton_checks("cuda")[name]()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_on_a_gpu(dtype: torch.dtype) -> None:
    case = random_case(6000, 50257, heads=((12, 64),) * 2, d_model=768).to("cuda")
    case = case._replace(
        x=case.x.to(dtype), W_U=case.W_U.to(dtype), z=[z.to(dtype) for z in case.z], W_O=[W.to(dtype) for W in case.W_O]
    )
    n_output = 6000 * 24 * (4 + 4 + 8 + 4)
    assert cuda_peak_bytes(lambda: case.run()) <= n_output + 64 * 2**20


if __name__ == "__main__":
    report_checks(_triton_checks("cpu"))
