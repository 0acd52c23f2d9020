"""The Triton kernels of ``fastinterp_kernels.head_logits``, compiled for GPUs that need not be there.

``python -m tests.kernels.test_head_logits_compiled`` prints registers and shared memory of every mode.
"""

import re

import pytest
import torch

from tests.kernels.kernel_checks import (
    TENSOR_CORE,
    Compiled,
    assert_async_loads,
    assert_fits,
    assert_no_tensor_cores,
    assert_tensor_cores,
    compile_for,
)

MODES = ["exact", "bf16x3", "tf32", "bf16", "fp16"]
"""Precisions of float32 operands, and float16 operands; bfloat16 operands are multiplied as in ``bf16``."""

EXTREMES = {"maximum_ptr": "*fp32", "minimum_ptr": "*fp32"}
RANKS = {"target_ptr": "*i32", "threshold_ptr": "*fp32", "count_ptr": "*i32"}
WANTED = {
    "logsumexp": {"total_ptr": "*fp32"},
    "online": {"total_ptr": "*fp32", "shift_ptr": "*fp32"},
    "top": {"maximum_ptr": "*fp32"},
    "top, bottom": EXTREMES,
    "rank": RANKS,
    "everything": {**EXTREMES, "total_ptr": "*fp32", **RANKS},
}
"""What a launch asks for: pointers that are not None."""

OPERANDS = ("x_ptr", "w_ptr", "x_low_ptr", "w_low_ptr")


def _operands(mode: str, d: int) -> tuple[dict[str, str], dict[str, object], dict[str, object]]:
    """Types, constants and launch options that the two kernels with products on tensor cores share."""
    from fastinterp_kernels.head_logits.triton_kernel import default_tiling

    kind = {"bf16x3": "bf16", "bf16": "bf16", "fp16": "fp16"}.get(mode, "fp32")
    stored = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[kind]
    n_parts = 2 if mode == "bf16x3" else 1
    tiling = default_tiling(d, stored, n_parts, "exact" if mode == "fp16" else mode)
    types = dict.fromkeys(OPERANDS[: 2 * n_parts], f"*{kind}")
    constants: dict[str, object] = dict.fromkeys(OPERANDS[2 * n_parts :])
    constants |= {
        "HOIST": d == tiling.d, "WIDEN": False, "ROUND_TF32": False, "DOT": "tf32" if mode == "tf32" else "ieee",
        "BLOCK_ROW": tiling.row, "BLOCK_COLUMN": tiling.column, "BLOCK_D": tiling.d,
    }  # fmt: skip
    options: dict[str, object] = {
        "num_warps": tiling.num_warps, "num_stages": tiling.num_stages, "max_registers": tiling.max_registers,
    }  # fmt: skip
    return types, constants, options


def compile_first(capability: int, mode: str, d: int = 64, wanted: str = "everything", n_targets: int = 4) -> Compiled:
    """``head_logits_kernel``; ``d`` is the padded length of the vectors."""
    from fastinterp_kernels.head_logits.triton_kernel import GROUP, head_logits_kernel

    types, constants, options = _operands(mode, d)
    outputs = ("maximum_ptr", "minimum_ptr", "total_ptr", "shift_ptr", *RANKS)
    constants |= {name: None for name in outputs if name not in WANTED[wanted]}
    constants |= {"UNIT": 1.0, "N_TARGETS": n_targets if "count_ptr" in WANTED[wanted] else 0, "GROUP": GROUP}
    return compile_for(
        head_logits_kernel, types | WANTED[wanted], constants, capability,
        divisible=["chunk_columns", "d", "stride_x_head", "stride_w_head"], **options,
    )  # fmt: skip


def compile_diagonal(capability: int, mode: str, d: int = 64) -> Compiled:
    """``diagonal_kernel``, as ``triton_engine`` launches it: no more columns than rows."""
    from fastinterp_kernels.head_logits.triton_kernel import diagonal_kernel

    types, constants, options = _operands(mode, d)
    constants["BLOCK_COLUMN"] = min(constants["BLOCK_ROW"], constants["BLOCK_COLUMN"])
    return compile_for(
        diagonal_kernel, types | {"out_ptr": "*fp32"}, constants, capability,
        divisible=["d", "stride_x_head", "stride_w_head"], **options,
    )  # fmt: skip


def compile_second(capability: int, mode: str, d: int = 64) -> Compiled:
    """``group_logits_kernel``."""
    from fastinterp_kernels.head_logits.triton_kernel import GROUP, group_logits_kernel, group_tiling

    tiling = group_tiling(d)
    types, constants, _ = _operands(mode, d)
    constants = {name: value for name, value in constants.items() if name in OPERANDS}
    constants |= {"GROUP": GROUP, "BLOCK_ROW": tiling.row, "BLOCK_D": tiling.d}
    types |= {"group_ptr": "*i64", "out_ptr": "*fp32", "missing": "fp32"}
    return compile_for(
        group_logits_kernel, types, constants, capability, divisible=["d", "stride_x_head", "stride_w_head"],
        num_warps=tiling.num_warps, num_stages=tiling.num_stages,
    )  # fmt: skip


def assert_products(compiled: Compiled, mode: str) -> None:
    """On the cores that the mode promises."""
    if mode == "exact":
        assert_no_tensor_cores(compiled)
    else:
        assert_tensor_cores(compiled, "bf16" if mode == "bf16x3" else mode)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("mode", "d"), [*((m, 64) for m in MODES), *((m, 768) for m in MODES), *(("bf16x3", n) for n in (32, 96, 128, 256))]
)
def test_everything_at_once_compiles_without_spills_to_the_right_instructions(
    capability: int, mode: str, d: int
) -> None:
    compiled = compile_first(capability, mode, d)
    assert_fits(compiled)
    assert_async_loads(compiled)
    assert_products(compiled, mode)


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("mode", ["exact", "bf16x3", "bf16"])
@pytest.mark.parametrize("wanted", [name for name in WANTED if name != "everything"])
def test_what_is_wanted_alone(capability: int, mode: str, wanted: str) -> None:
    compiled = compile_first(capability, mode, wanted=wanted, n_targets=1)
    assert_fits(compiled)
    assert_async_loads(compiled)
    assert_products(compiled, mode)


@pytest.mark.parametrize("capability", [80, 90])
def test_one_exponential_per_logit(capability: int) -> None:
    """No maximum and no factor: the shift is 0, and log2(e) rides on the weights."""
    compiled = compile_first(capability, "bf16x3", wanted="logsumexp")
    assert compiled.count("FMNMX") == 0
    # Two tiles of 128 x 64 in the code, whole and last, by 256 threads.
    assert len(re.findall(r"\bMUFU\.EX2\b", compiled.sass)) == 2 * 128 * 64 // 256
    assert compiled.count("FMUL") <= 2 * 128 * 64 // 256, "a product for every exponential, and no denormals' detour"


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("d", [64, 768])
@pytest.mark.parametrize("mode", MODES)
def test_the_diagonal_is_summed_as_the_tiles_are(capability: int, mode: str, d: int) -> None:
    compiled = compile_diagonal(capability, mode, d)
    assert_fits(compiled)
    if mode == "exact":  # what lies off the diagonal is not computed
        assert compiled.count(TENSOR_CORE[capability]) == 0
        assert compiled.count("FFMA") >= 64
    else:
        assert_products(compiled, mode)

    def products(kernel: Compiled) -> set[str]:
        """Kinds and shapes of tensor-core instructions, which decide the order of the sums."""
        return set(re.findall(r"\b(?:HMMA|HGMMA)\.\d+x\d+x\d+\S*", kernel.sass))

    assert products(compiled) == products(compile_first(capability, mode, d, wanted="rank", n_targets=1))


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("d", [64, 96, 768])
@pytest.mark.parametrize("mode", MODES)
def test_the_second_pass_of_top_k(capability: int, mode: str, d: int) -> None:
    compiled = compile_second(capability, mode, d)
    assert_fits(compiled)
    assert compiled.count(TENSOR_CORE[capability]) == 0
    assert compiled.count("FFMA") + compiled.count("FMUL") >= 32
    loads = re.findall(r"\bLDG\S*", compiled.sass)
    narrow = [load for load in loads if not load.endswith(".128")]
    # Nothing but the number of a group is read less than 16 bytes at a time.
    assert len(narrow) <= 1 < len(loads), loads


def test_offsets_are_computed_in_64_bits() -> None:
    """What grows with rows, heads or columns; offsets within a tile are below 2^31 by the size of the tile."""
    for compiled in (compile_first(90, "bf16x3", 768), compile_diagonal(90, "bf16x3", 768)):
        for line in compiled.ttir.splitlines():
            match = re.search(r"tt\.addptr .*: !tt\.ptr<\w+>, (\w+)", line)
            assert match is None or match[1] == "i64" or _steps_along_d(line, compiled.ttir), line
    for compiled in (compile_second(90, "bf16x3", 768), compile_second(80, "exact")):
        products = re.findall(r"arith\.muli .*: tensor<\S+x(\w+)>", compiled.ttir)
        assert products
        assert set(products) == {"i64"}
        arguments = r"%(?:n_rows|n_columns|k|d|stride_x_head|stride_w_head)\b"
        scalar = re.findall(rf"arith\.muli .*{arguments}.*: (\w+)", compiled.ttir)
        assert set(scalar) <= {"i64"}, scalar


def _steps_along_d(line: str, ttir: str) -> bool:
    """Whether a pointer is moved by a loop's own variable, the start of a block of ``d``."""
    offset = re.search(r"tt\.addptr %\w+, (%\w+)", line)
    return offset is not None and re.search(rf"scf\.for {offset[1]} ", ttir) is not None


if __name__ == "__main__":
    for mode in MODES:
        for capability in (80, 90):
            for label, compiled in (
                *((f"{wanted}, d 64", compile_first(capability, mode, wanted=wanted)) for wanted in WANTED),
                *((f"everything, d {d}", compile_first(capability, mode, d)) for d in (128, 256, 768)),
                *((f"diagonal, d {d}", compile_diagonal(capability, mode, d)) for d in (64, 768)),
                *((f"second pass, d {d}", compile_second(capability, mode, d)) for d in (64, 768)),
            ):
                print(f"{mode} {label}: {compiled} local {compiled.local_bytes}", flush=True)
