"""The backward kernels of ``linear_cross_entropy``, compiled for GPUs that need not be there."""

import pytest

from tests.kernels.kernel_checks import assert_async_loads, assert_fits
from tests.kernels.linear_cross_entropy_compiled import MODES, compile_product, compile_slope
from tests.kernels.test_linear_cross_entropy_compiled import assert_products, assert_wide_offsets


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("dtype", "precision"), MODES)
@pytest.mark.parametrize("kl", [False, True])
def test_slopes(capability: int, dtype: str, precision: str, kl: bool) -> None:
    compiled = compile_slope(capability, dtype, precision, kl=kl)
    assert_fits(compiled)
    assert_async_loads(compiled)
    assert_products(compiled, dtype, precision)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("dtype", "precision"), MODES)
def test_products(capability: int, dtype: str, precision: str) -> None:
    compiled = compile_product(capability, dtype, precision)
    assert_fits(compiled)
    assert_async_loads(compiled)
    assert_products(compiled, "bf16" if dtype == "fp16" else dtype, precision)


@pytest.mark.parametrize("capability", [80, 90])
def test_transposed_unembedding(capability: int) -> None:
    for compiled in (
        compile_slope(capability, "bf16", "exact", along_d=True),
        compile_product(capability, "bf16", "exact", along_d=True),
    ):
        assert_fits(compiled)
        assert_async_loads(compiled)


def test_offsets_are_computed_in_64_bits() -> None:
    slope = compile_slope(90, "bf16", "exact", kl=True)
    assert_wide_offsets(slope, {"stride_x_row", "stride_w_d", "stride_out_row", "k"})
    assert_wide_offsets(compile_product(90, "bf16", "exact"), {"stride_g_row", "stride_w_d", "stride_dx_row"})
