"""The Triton kernels of ``fastinterp_kernels.delta_product``, compiled for GPUs that need not be there."""

import re

import pytest

from tests.kernels.kernel_checks import (
    TENSOR_CORE,
    Compiled,
    assert_fits,
    assert_no_tensor_cores,
    assert_tensor_cores,
    compile_for,
    loops,
)

MODES = ["exact", "bf16x3", "tf32", "bf16"]

LAUNCHED = [("exact", False), *((mode, prepared) for mode in MODES[1:] for prepared in (False, True))]
"""Modes, with differences formed in the product or before it; exact ones never are."""


def compile_product(
    capability: int, mode: str, *, prepared: bool = True, weight: str = "fp32", transposed: bool = False,
    few: bool = False, tail: bool = False,
) -> Compiled:  # fmt: skip
    """The kernel as it is launched for 576 inputs (with a ``tail``, 592), 1536 columns and enough rows (or ``few``)."""
    from fastinterp_kernels.delta_product.triton_kernel import GROUP_ROWS, default_tiling, product_kernel

    tiling = default_tiling(
        mode, 64 if few else 10_000, 1536, prepared=prepared, w_rounded=weight == "bf16", hopper=capability == 90
    )
    constants: dict[str, object] = {
        "PRECISION": mode, "PREPARED": prepared, "TAIL": tail, "NARROW": False, "ALIGNED": True, "WIDEN": False,
        "DOT": "tf32" if mode == "tf32" else "ieee", "GROUP": GROUP_ROWS, "BLOCK_ROW": tiling.row,
        "BLOCK_COLUMN": tiling.column, "BLOCK_DEPTH": tiling.depth,
        "stride_x_in": 1, "stride_base_out": 1, "stride_w_in" if transposed else "stride_w_out": 1,
    }  # fmt: skip
    constants |= {"clean_x_ptr": None} if prepared else {"stride_clean_in": 1}
    constants |= {} if prepared and mode == "bf16x3" else {"x_low_ptr": None}
    narrow = prepared and mode in ("bf16", "bf16x3")
    types = {"x_ptr": "*bf16" if narrow else "*fp32", "x_low_ptr": "*bf16", "clean_x_ptr": "*fp32"}
    types |= {"w_ptr": f"*{weight}", "base_ptr": "*fp32", "out_ptr": "*fp32"}
    strides = ("x_variant", "x_row", "clean_row", "clean_in", "w_in", "w_out", "base_row")
    divisible = ["n_in", "n_out", *(f"stride_{name}" for name in strides)]
    return compile_for(
        product_kernel, {n: t for n, t in types.items() if n not in constants}, constants, capability,
        divisible=[n for n in divisible if n not in constants],
        num_warps=tiling.num_warps, num_stages=tiling.num_stages, max_registers=tiling.max_registers,
    )  # fmt: skip


def _assert_main_loop(compiled: Compiled) -> None:
    """One loop of products, whose operands all come ahead, 16 bytes at a time."""
    product = TENSOR_CORE[compiled.capability] if compiled.count(TENSOR_CORE[compiled.capability]) else "FFMA"
    (main,) = (loop for loop in loops(compiled) if re.search(rf"\b{product}\b", loop))
    copies = re.findall(r"\bLDGSTS\S*", main)
    assert copies
    assert all(copy.endswith(".128") for copy in copies), copies
    assert not re.search(r"\bLDG\b", main)


def check_compiled(compiled: Compiled, mode: str) -> None:
    assert_fits(compiled)
    _assert_main_loop(compiled)
    if mode == "exact":
        assert_no_tensor_cores(compiled)
    else:
        assert_tensor_cores(compiled, "tf32" if mode == "tf32" else "bf16")
    stores = set(re.findall(r"\bSTG\S*", compiled.sass))
    assert stores == {"STG.E.128"}


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("mode", "prepared", "weight"),
    [*((mode, prepared, "fp32") for mode, prepared in LAUNCHED), ("bf16", False, "bf16"), ("bf16", True, "bf16")],
)
def test_compiles_without_spills(capability: int, mode: str, prepared: bool, weight: str) -> None:
    compiled = compile_product(capability, mode, prepared=prepared, weight=weight)
    print(f"delta_product {mode} prepared={prepared} W {weight}: {compiled}")
    check_compiled(compiled, mode)
    if prepared and capability == 90:
        assert compiled.registers <= 128  # two programs of 256 threads on a multiprocessor


def _compile_difference(capability: int, mode: str, clean: bool = True) -> Compiled:
    from fastinterp_kernels.delta_product.triton_kernel import difference_kernel

    constants: dict[str, object] = {
        "PRECISION": mode, "WIDEN": False, "BLOCK_ROW": 32, "BLOCK_COLUMN": 128, "stride_x_in": 1,
    }  # fmt: skip
    constants |= {"stride_clean_in": 1} if clean else {"clean_x_ptr": None}
    constants |= {} if mode == "bf16x3" else {"low_ptr": None}
    narrow = mode in ("bf16", "bf16x3")
    types = {"x_ptr": "*fp32", "clean_x_ptr": "*fp32", "high_ptr": "*bf16" if narrow else "*fp32", "low_ptr": "*bf16"}
    divisible = ["n_in", *(f"stride_{name}" for name in ("x_variant", "x_row", "clean_row", "clean_in", "out_row"))]
    return compile_for(
        difference_kernel, {n: t for n, t in types.items() if n not in constants}, constants, capability,
        divisible=[n for n in divisible if n not in constants], num_warps=4,
    )  # fmt: skip


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("mode", "clean"), [*((mode, True) for mode in MODES[1:]), ("bf16x3", False)])
def test_differences_are_formed_in_wide_accesses(capability: int, mode: str, clean: bool) -> None:
    compiled = _compile_difference(capability, mode, clean)
    print(f"delta_product difference {mode} clean={clean}: {compiled}")
    assert_fits(compiled)
    assert set(re.findall(r"\bLDG\S*", compiled.sass)) == {"LDG.E.128"}
    assert set(re.findall(r"\bSTG\S*", compiled.sass)) <= {"STG.E.128", "STG.E.64"}


def test_offsets_are_computed_in_64_bits() -> None:
    for compiled in (compile_product(90, "bf16", prepared=False, tail=True), _compile_difference(90, "bf16")):
        offsets = re.findall(r"tt\.addptr .*: tensor<\S+x!tt\.ptr<\w+>>, (tensor<\S+>)", compiled.ttir)
        assert offsets
        assert all(kind.endswith("xi64>") for kind in offsets), offsets
        products = re.findall(r"arith\.muli .*: tensor<\S+x(\w+)>", compiled.ttir)
        assert products
        assert set(products) == {"i64"}
