"""The forward kernel of ``linear_cross_entropy``, compiled for GPUs that need not be there."""

import re

import pytest

from tests.kernels.kernel_checks import (
    Compiled,
    assert_async_loads,
    assert_fits,
    assert_no_tensor_cores,
    assert_tensor_cores,
)
from tests.kernels.linear_cross_entropy_compiled import MODES, compile_forward


def assert_products(compiled: Compiled, dtype: str, precision: str) -> None:
    if (dtype, precision) == ("fp32", "exact"):
        assert_no_tensor_cores(compiled)
    else:
        assert_tensor_cores(compiled, "tf32" if precision == "tf32" else "fp16" if dtype == "fp16" else "bf16")


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("dtype", "precision"), MODES)
def test_everything_at_once_compiles_without_spills_to_the_right_instructions(
    capability: int, dtype: str, precision: str
) -> None:
    compiled = compile_forward(capability, dtype, precision, ids=True, kl=True)
    assert_fits(compiled)
    assert_async_loads(compiled)
    assert_products(compiled, dtype, precision)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("ids", [False, True])
@pytest.mark.parametrize(("dtype", "precision"), [("fp32", "bf16x3"), ("bf16", "exact")])
def test_without_divergence(capability: int, dtype: str, precision: str, ids: bool) -> None:
    compiled = compile_forward(capability, dtype, precision, ids=ids)
    assert_fits(compiled)
    assert_async_loads(compiled)
    assert_products(compiled, dtype, precision)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("kl", [False, True])
@pytest.mark.parametrize("ids", [False, True])
@pytest.mark.parametrize(("dtype", "precision"), [("bf16", "exact"), ("fp32", "exact")])
def test_transposed_unembedding(capability: int, dtype: str, precision: str, ids: bool, kl: bool) -> None:
    compiled = compile_forward(capability, dtype, precision, ids=ids, kl=kl, along_d=True)
    assert_fits(compiled)
    assert_async_loads(compiled)


def assert_wide_offsets(compiled: Compiled, strides: set[str]) -> None:
    """No stride is multiplied in 32 bits, where row * stride would wrap, and no operand has a 32-bit offset.

    ``strides`` may only be widened or spread over a tile before they are used.
    """
    signature = re.search(r"tt\.func public @\w+\((.*)", compiled.ttir)
    assert signature is not None
    values = re.findall(r"(%\w+): (?:!tt|i32|f32)", signature[1])
    assert len(values) == len(compiled.parameters)
    value_of = dict(zip(compiled.parameters, values))
    wide = {value_of[name] for name in strides}
    extended = set()
    for line in compiled.ttir.splitlines():
        used = set(re.findall(r"%\w+", line.split("=", 1)[-1])) & wide
        # The number of targets bounds a loop, too.
        if used and "tt.func" not in line and "scf.for" not in line:
            assert "arith.extsi" in line or "tt.splat" in line, line
            extended |= used
    assert extended == wide
    products = re.findall(r"arith\.muli .*: (tensor<\S+>)", compiled.ttir)
    assert products
    assert all(kind.endswith("xi64>") for kind in products), products
    offsets = re.findall(r"tt\.addptr .*: tensor<\d+x\d+x!tt\.ptr<\w+>>, (tensor<\S+>)", compiled.ttir)
    assert offsets
    assert all(kind.endswith("xi64>") for kind in offsets), offsets
    bases = re.findall(r"tt\.addptr .*: !tt\.ptr<\w+>, (\w+)", compiled.ttir)
    assert set(bases) == {"i64"}


def test_offsets_are_computed_in_64_bits() -> None:
    compiled = compile_forward(90, "bf16", "exact", ids=True, kl=True)
    assert_wide_offsets(compiled, {"stride_x_row", "stride_w_d", "k"})
