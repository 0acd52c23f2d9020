"""The kernels of ``linear_cross_entropy`` as they are launched for a model, compiled ahead of time.

``python -m tests.kernels.linear_cross_entropy_compiled`` prints registers and shared memory of every mode.
"""

import torch

from tests.kernels.kernel_checks import Compiled, compile_for

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
MODES = [("fp32", "exact"), ("fp32", "bf16x3"), ("fp32", "tf32"), ("bf16", "exact"), ("fp16", "exact")]
"""Operands and precision; ``bf16`` of float32 operands is the kernel of bfloat16 operands."""

Types = dict[str, str]


def _optional(types: Types, constants: dict[str, object], present: bool, **entries: str) -> None:
    """Arguments that are None where they are not wanted."""
    for name, kind in entries.items():
        if present:
            types[name] = kind
        else:
            constants[name] = None


def _tile(
    dtype: str, precision: str, tiling: object, kl: bool, along_d: bool
) -> tuple[Types, dict[str, object], list[str]]:
    """The arguments of ``tile_logits``: with a bias and a softcap."""
    split = (dtype, precision) == ("fp32", "bf16x3")
    operand = "*bf16" if split else f"*{dtype}"
    types = {"x_ptr": operand, "w_ptr": operand, "b_ptr": "*fp32", "softcap": "fp32"}
    constants: dict[str, object] = {
        "WIDEN": False, "ROUND_TF32": False, "DOT": "tf32" if precision == "tf32" else "ieee",
        "BLOCK_ROW": tiling.row, "BLOCK_VOCAB": tiling.vocab, "BLOCK_D": tiling.d_model,
        "stride_w_d" if along_d else "stride_w_vocab": 1,
    }  # fmt: skip
    _optional(types, constants, split, x_low_ptr=operand, w_low_ptr=operand)
    _optional(types, constants, kl, y_ptr=operand)
    _optional(types, constants, kl and split, y_low_ptr=operand)
    return types, constants, ["d_model", "stride_x_row", "stride_w_vocab" if along_d else "stride_w_d"]


def compile_forward(
    capability: int, dtype: str, precision: str, *, ids: bool = False, kl: bool = False, along_d: bool | None = None
) -> Compiled:
    """``ids``: with ranks and best tokens. ``along_d``: a transposed ``W_U``, or a slab for tf32."""
    from fastinterp_kernels.linear_cross_entropy.triton_kernel import reduce_logits_kernel
    from fastinterp_kernels.linear_cross_entropy.triton_tiles import default_tiling, register_limit

    tiling = default_tiling(DTYPES[dtype], precision, ids=ids, kl=kl)
    along_d = precision == "tf32" if along_d is None else along_d
    limit = register_limit(DTYPES[dtype], precision, ids=ids, kl=kl, along_d=along_d)
    types, constants, divisible = _tile(dtype, precision, tiling, kl, along_d)
    types |= {"maximum_ptr": "*fp32", "total_ptr": "*fp32"}
    _optional(types, constants, ids, best_ptr="*fp32", best_id_ptr="*i32")
    _optional(types, constants, ids, target_ptr="*i32", threshold_ptr="*fp32", count_ptr="*i32")
    _optional(types, constants, kl, y_maximum_ptr="*fp32", y_total_ptr="*fp32", cross_ptr="*fp32")
    return compile_for(
        reduce_logits_kernel, types, constants, capability, divisible=[*divisible, "chunk_columns"],
        num_warps=tiling.num_warps, num_stages=tiling.num_stages, max_registers=limit,
    )  # fmt: skip


def compile_slope(
    capability: int, dtype: str, precision: str, *, kl: bool = False, along_d: bool | None = None
) -> Compiled:
    """The first kernel of the backward pass, with targets."""
    from fastinterp_kernels.linear_cross_entropy.triton_backward import slope_kernel
    from fastinterp_kernels.linear_cross_entropy.triton_tiles import default_tiling

    tiling = default_tiling(DTYPES[dtype], precision, kl=kl)
    along_d = precision == "tf32" if along_d is None else along_d
    types, constants, divisible = _tile(dtype, precision, tiling, kl, along_d)
    split = dtype == "fp16" or (dtype, precision) == ("fp32", "bf16x3")
    slope = "*bf16" if split or dtype == "bf16" else "*fp32"
    types |= {"q_ptr": "*fp32", "logsumexp_ptr": "*fp32", "out_ptr": slope}
    types |= {"target_ptr": "*i32", "target_slope_ptr": "*fp32"}
    constants["ROUND_BF16"] = False
    _optional(types, constants, kl, p_ptr="*fp32", y_logsumexp_ptr="*fp32")
    _optional(types, constants, split, out_low_ptr=slope)
    return compile_for(
        slope_kernel, types, constants, capability, divisible=[*divisible, "stride_out_row"],
        num_warps=tiling.num_warps, num_stages=tiling.num_stages,
    )  # fmt: skip


def compile_product(capability: int, dtype: str, precision: str, *, along_d: bool = False) -> Compiled:
    """The second kernel of the backward pass; float16 operands are multiplied as ``bf16x3``."""
    from fastinterp_kernels.linear_cross_entropy.triton_backward import add_product_kernel, default_product_tiling

    if dtype == "fp16":
        dtype, precision = "fp32", "bf16x3"
    tiling = default_product_tiling(DTYPES[dtype], precision)
    split = (dtype, precision) == ("fp32", "bf16x3")
    operand = "*bf16" if split else f"*{dtype}"
    types = {"g_ptr": operand, "w_ptr": operand, "dx_ptr": "*fp32"}
    constants: dict[str, object] = {
        "WIDEN": False, "ROUND_TF32": False, "DOT": "tf32" if precision == "tf32" else "ieee",
        "BLOCK_ROW": tiling.row, "BLOCK_VOCAB": tiling.vocab, "BLOCK_D": tiling.d_model,
        "stride_w_d" if along_d else "stride_w_vocab": 1,
    }  # fmt: skip
    _optional(types, constants, split, g_low_ptr=operand, w_low_ptr=operand)
    divisible = ["d_model", "stride_g_row", "stride_dx_row", "stride_w_vocab" if along_d else "stride_w_d"]
    return compile_for(
        add_product_kernel, types, constants, capability, divisible=divisible,
        num_warps=tiling.num_warps, num_stages=tiling.num_stages,
    )  # fmt: skip


if __name__ == "__main__":
    for dtype, precision in MODES:
        for capability in (80, 90):
            for label, compiled in (
                ("logsumexp", compile_forward(capability, dtype, precision)),
                ("ids", compile_forward(capability, dtype, precision, ids=True)),
                ("all", compile_forward(capability, dtype, precision, ids=True, kl=True)),
                ("slope", compile_slope(capability, dtype, precision)),
                ("slope, kl", compile_slope(capability, dtype, precision, kl=True)),
                ("product", compile_product(capability, dtype, precision)),
            ):
                print(f"{dtype} {precision} {label:10} {compiled} local {compiled.local_bytes}", flush=True)
