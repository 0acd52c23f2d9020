"""The Triton kernels of ``fastinterp_kernels.direct_effect_loss``, compiled for GPUs that need not be there."""

import re

import pytest
import torch

from tests.kernels.kernel_checks import (
    TENSOR_CORE,
    Compiled,
    assert_fits,
    assert_no_tensor_cores,
    assert_tensor_cores,
    compile_for,
    loops,
)


def _compile(
    capability: int, mode: str, d_head: int = 64, *, softcap: bool = False, kl: bool = False, n_targets: int = 0
) -> Compiled:
    """The kernel as it is launched for operands of a mode: ``fp16`` and ``bf16`` operands are one tensor each."""
    from fastinterp_kernels.direct_effect_loss.triton_kernel import default_tiling
    from fastinterp_kernels.direct_effect_loss.triton_operands import Stored
    from fastinterp_kernels.direct_effect_loss.triton_sums import sum_heads_kernel

    kind = {"bf16x3": "bf16", "bf16": "bf16", "fp16": "fp16"}.get(mode, "fp32")
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[kind]
    stored = Stored(dtype, 1 + (mode == "bf16x3"), "exact" if mode == "fp16" else mode)
    drop = kl and softcap
    tiling = default_tiling(
        stored, 576, d_head, drop=drop, rank=n_targets > 0, capability=(capability // 10, capability % 10)
    )
    constants: dict[str, object] = {
        "WIDEN": False, "ROUND_TF32": False, "DOT": "tf32" if mode == "tf32" else "ieee", "D_HEAD": d_head,
        "UNROLL": tiling.unroll, "N_TARGETS": n_targets, "CLEAN": kl, "BLOCK_ROW": tiling.row,
        "BLOCK_COLUMN": tiling.column, "BLOCK_D": tiling.d_model, "BLOCK_D_HEAD": tiling.d_head,
    }  # fmt: skip
    constants |= dict.fromkeys(
        ("stride_u_d", "stride_w_depth") if mode == "tf32" else ("stride_u_column", "stride_w_column"), 1
    )
    constants |= {} if softcap else {"twice_softcap": None}
    constants |= {} if drop else {"mean_ptr": None}
    constants |= {} if n_targets else {"threshold_ptr": None}
    constants |= {} if mode == "bf16x3" else {f"{name}_low_ptr": None for name in "xuzw"}
    types = {f"{name}{part}_ptr": f"*{kind}" for name in "xuzw" for part in ("", "_low")}
    types |= dict.fromkeys(("bias_ptr", "offset_ptr", "total_ptr", "mean_ptr", "threshold_ptr"), "*fp32")
    types |= {"scale": "fp32", "twice_softcap": "fp32", "own_ptr": "*i32", "larger_ptr": "*i32"}
    strides = ("u_d", "u_column", "w_head", "w_depth", "w_column")
    divisible = ["d_model", "n_padded_rows", *(f"stride_{name}" for name in strides)]
    return compile_for(
        sum_heads_kernel, {n: t for n, t in types.items() if n not in constants}, constants, capability,
        divisible=[n for n in divisible if n not in constants],
        num_warps=tiling.num_warps, num_stages=tiling.num_stages,
    )  # fmt: skip


def _assert_loops(compiled: Compiled, n_exponentials: int) -> None:
    """Two loops of products, over ``d_model`` and over heads, whose operands all come ahead, 16 bytes at a time."""
    product = TENSOR_CORE[compiled.capability] if compiled.count(TENSOR_CORE[compiled.capability]) else "FFMA"
    main = [loop for loop in loops(compiled) if re.search(rf"\b{product}\b", loop)]
    assert len(main) == 2
    for loop in main:
        copies = re.findall(r"\bLDGSTS\S*", loop)
        assert copies
        assert all(copy.endswith(".128") for copy in copies), copies
    if n_exponentials:
        assert len(re.findall(r"\bMUFU\.EX2\b", main[1])) == n_exponentials


MODES = ["exact", "bf16x3", "tf32", "bf16", "fp16"]


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("mode", "d_head"), [*((m, 64) for m in MODES), *(("bf16x3", n) for n in (32, 96, 128, 256))])
def test_compiles_without_spills_to_the_right_instructions(capability: int, mode: str, d_head: int) -> None:
    compiled = _compile(capability, mode, d_head)
    print(f"direct_effect_loss {mode} d_head {d_head}: {compiled}")
    assert_fits(compiled)
    _assert_loops(compiled, 0)
    if mode == "exact":
        assert_no_tensor_cores(compiled)
    else:
        assert_tensor_cores(compiled, {"bf16x3": "bf16"}.get(mode, mode))


@pytest.mark.parametrize("capability", [80, 90])
def test_one_exponential_per_logit(capability: int) -> None:
    """And no maximum: the shift is fixed."""
    columns = 128 if capability == 90 else 64
    compiled = _compile(capability, "bf16x3")
    _assert_loops(compiled, 128 * columns // 256)
    assert compiled.count("FMNMX") == 0


EVERYTHING = {"softcap": True, "kl": True, "n_targets": 4}


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("bf16x3", {"softcap": True}), ("bf16x3", {"n_targets": 1}), ("bf16x3", {"kl": True}),
        ("bf16x3", {"softcap": True, "n_targets": 4}), ("bf16x3", EVERYTHING), ("exact", EVERYTHING),
        ("tf32", EVERYTHING), ("bf16", EVERYTHING),
    ],
)  # fmt: skip
def test_options_compile_without_spills(capability: int, mode: str, options: dict[str, int]) -> None:
    compiled = _compile(capability, mode, **options)
    print(f"direct_effect_loss {mode} {options}: {compiled}")
    assert_fits(compiled)
    _assert_loops(compiled, 0)


def _compile_build(capability: int, mode: str) -> Compiled:
    from fastinterp_kernels.direct_effect_loss.triton_kernel import default_tiling
    from fastinterp_kernels.direct_effect_loss.triton_operands import Stored
    from fastinterp_kernels.direct_effect_loss.triton_sums import build_kernel

    narrow, tf32 = mode in ("bf16", "bf16x3"), mode == "tf32"
    stored = Stored(torch.bfloat16 if narrow else torch.float32, 1 + (mode == "bf16x3"), mode)
    tiling = default_tiling(stored, 576, 64, capability=(capability // 10, capability % 10))
    constants: dict[str, object] = {
        "WIDEN": False, "ROUND_TF32": False, "DOT": "tf32" if tf32 else "ieee", "BLOCK_ROW": tiling.row,
        "BLOCK_COLUMN": tiling.column, "BLOCK_DEPTH": tiling.d_model,
        "stride_u_d" if tf32 else "stride_u_column": 1, "stride_row" if tf32 else "stride_column": 1,
    } | ({} if mode == "bf16x3" else {"o_low_ptr": None, "u_low_ptr": None, "low_ptr": None})  # fmt: skip
    operands = ("o_ptr", "u_ptr", "high_ptr", "o_low_ptr", "u_low_ptr", "low_ptr")
    types = {name: "*bf16" if narrow else "*fp32" for name in operands if name not in constants} | {"scale": "fp32"}
    divisible = ["d_model", "stride_u_d", "stride_u_column", "stride_row", "stride_column"]
    return compile_for(
        build_kernel, types, constants, capability, divisible=[n for n in divisible if n not in constants],
        num_warps=tiling.num_warps, num_stages=tiling.num_stages,
    )  # fmt: skip


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("mode", ["exact", "bf16x3", "tf32", "bf16"])
def test_the_build_of_w_ov_compiles_without_spills(capability: int, mode: str) -> None:
    compiled = _compile_build(capability, mode)
    print(f"direct_effect_loss build {mode}: {compiled}")
    assert_fits(compiled)
    product = TENSOR_CORE[capability] if mode != "exact" else "FFMA"
    (main,) = (loop for loop in loops(compiled) if re.search(rf"\b{product}\b", loop))
    assert all(copy.endswith(".128") for copy in re.findall(r"\bLDGSTS\S*", main))
    assert "LDGSTS" in main
    stores = set(re.findall(r"\bSTG\S*", compiled.sass))
    assert stores == {"STG.E.128"}


def test_offsets_are_computed_in_64_bits() -> None:
    for compiled in (_compile(90, "bf16x3", n_targets=1), _compile_build(90, "bf16x3")):
        offsets = re.findall(r"tt\.addptr .*: tensor<\S+x!tt\.ptr<\w+>>, (tensor<\S+>)", compiled.ttir)
        assert offsets
        assert all(kind.endswith("xi64>") for kind in offsets), offsets
        products = re.findall(r"arith\.muli .*: tensor<\S+x(\w+)>", compiled.ttir)
        assert products
        assert set(products) == {"i64"}
