"""The Triton kernels of ``fastinterp_kernels.delta_product`` compiled for other weights and sizes."""

import pytest

from tests.kernels.test_delta_product_compiled import check_compiled, compile_product


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("mode", "prepared", "weight"),
    [("exact", False, "fp32"), *((mode, True, "fp32") for mode in ("bf16x3", "tf32", "bf16")), ("bf16", True, "bf16")],
)
def test_transposed_weights(capability: int, mode: str, prepared: bool, weight: str) -> None:
    compiled = compile_product(capability, mode, prepared=prepared, weight=weight, transposed=True)
    print(f"delta_product {mode} prepared={prepared} W {weight} transposed: {compiled}")
    check_compiled(compiled, mode)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("mode", "weight"), [*((mode, "fp32") for mode in ("exact", "bf16x3", "tf32", "bf16")), ("bf16", "bf16")]
)
def test_few_rows(capability: int, mode: str, weight: str) -> None:
    compiled = compile_product(capability, mode, prepared=False, weight=weight, few=True)
    print(f"delta_product {mode} W {weight} few rows: {compiled}")
    check_compiled(compiled, mode)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("mode", "prepared"), [*((mode, True) for mode in ("bf16x3", "tf32", "bf16")), ("bf16", False)]
)
def test_a_rest_of_the_depth(capability: int, mode: str, prepared: bool) -> None:
    compiled = compile_product(capability, mode, prepared=prepared, tail=True)
    print(f"delta_product {mode} prepared={prepared} with a rest: {compiled}")
    check_compiled(compiled, mode)
