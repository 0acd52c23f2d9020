"""``fastinterp_kernels.linear_logprob``: every backend against float64, interpreted and compiled.

Run as a script (``TRITON_INTERPRET=1 python -m tests.kernels.test_linear_logprob``), this file runs the cases
on the interpreted Triton kernel and prints what failed, as JSON: Triton reads that variable once, when it
decorates a kernel.
"""

import math
import re
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from fastinterp_kernels.linear_logprob import LinearLogprob, linear_logprob
from fastinterp_kernels.linear_logprob.blocked import linear_logprob_blocked
from tests.kernels.kernel_checks import (
    Compiled,
    allocations,
    assert_async_loads,
    assert_fits,
    assert_no_tensor_cores,
    assert_tensor_cores,
    assert_within_rule,
    compile_for,
    largest_error,
    report_checks,
    run_interpreted,
    run_python,
)

# Cases, the same for every backend --------------------------------------------------------------------------


class Case(NamedTuple):
    x: Tensor
    W_U: Tensor
    targets: Tensor
    b_U: Tensor | None = None
    softcap: float | None = None

    def to(self, device: str) -> "Case":
        return Case(*(v.to(device) if isinstance(v, Tensor) else v for v in self))


def _random(n_rows: int, d_vocab: int, d_model: int = 16, k: int = 1, scale: float = 3.0) -> Case:
    """Logits of standard deviation ``scale``."""
    generator = torch.Generator().manual_seed(n_rows)
    x = torch.randn(n_rows, d_model, generator=generator)
    W_U = torch.randn(d_model, d_vocab, generator=generator) * (scale / d_model**0.5)
    return Case(x, W_U, torch.randint(0, d_vocab, (n_rows, k), generator=generator))


def _bias(case: Case, *, seed: int = 0) -> Tensor:
    return torch.randn(case.W_U.shape[1], generator=torch.Generator().manual_seed(seed)) * 2


def ragged(n_rows: int) -> Case:
    return _random(n_rows, 50257)


def one_column() -> Case:
    return _random(5, 1)


def ragged_d_model() -> Case:
    return _random(33, 700, d_model=75)


def many_targets() -> Case:
    return _random(40, 1000, k=7)


def no_targets() -> Case:
    return _random(9, 300, k=0)


def peaked() -> Case:
    """Every row is a column of W_U, many times over: probability 1 on one token, in any tile."""
    case = _random(60, 5000, d_model=64)
    ids = torch.arange(60) * 83
    return case._replace(x=case.W_U.T[ids] * 40, targets=torch.stack([ids, (ids + 1) % 5000], dim=1))


def beyond_exp() -> Case:
    """Logits of several hundred of either sign that grow along the vocabulary, tile by tile."""
    case = _random(37, 9000, scale=100.0)
    growing = torch.linspace(-600.0, 600.0, 9000)
    return case._replace(b_U=growing, targets=torch.arange(37)[:, None] * 243)


def all_negative() -> Case:
    case = _random(20, 3000)
    return case._replace(b_U=torch.full((3000,), -5000.0))


def bias() -> Case:
    case = _random(50, 6000)
    return case._replace(b_U=_bias(case))


def masked_bias() -> Case:
    """-inf for the whole first tile of every backend, and for every third token after it."""
    case = _random(50, 9000, k=2)
    b_U = _bias(case)
    b_U[:2500] = -math.inf
    b_U[2500::3] = -math.inf
    return case._replace(b_U=b_U, targets=torch.tensor([[2501, 7]]).repeat(50, 1))


def all_masked() -> Case:
    case = _random(6, 300)
    return case._replace(b_U=torch.full((300,), -math.inf))


def softcap() -> Case:
    return _random(50, 6000, scale=30.0)._replace(softcap=30.0)


def softcap_and_bias() -> Case:
    case = _random(50, 6000, scale=12.0)
    return case._replace(b_U=_bias(case), softcap=5.0)


def ignored_targets() -> Case:
    case = _random(50, 2000, k=3)
    targets = case.targets.clone()
    targets[::2, 0] = -1
    targets[7] = -1
    return case._replace(targets=targets)


def transposed() -> Case:
    case = _random(30, 3000)
    return case._replace(W_U=case.W_U.T.contiguous().T)


def columns_of_a_larger_matrix() -> Case:
    case = _random(30, 3001)
    wide = torch.full((16, 4000), math.nan)
    wide[:, 500:3501] = case.W_U
    return case._replace(W_U=wide[:, 500:3501])


def bfloat16() -> Case:
    case = _random(50, 6000, d_model=64)
    return case._replace(x=case.x.bfloat16(), W_U=case.W_U.bfloat16(), b_U=_bias(case).bfloat16())


def float16() -> Case:
    case = _random(50, 6000, d_model=64)
    return case._replace(x=case.x.half(), W_U=case.W_U.half())


def mixed_dtypes() -> Case:
    case = _random(50, 6000, d_model=64)
    return case._replace(W_U=case.W_U.bfloat16())


CASES: dict[str, Callable[[], Case]] = {
    **{f"ragged_{n_rows}": partial(ragged, n_rows) for n_rows in (1, 31, 123, 255, 507)},
    **{
        case.__name__: case
        for case in (
            one_column, ragged_d_model, many_targets, no_targets, peaked, beyond_exp, all_negative, bias,
            masked_bias, all_masked, softcap, softcap_and_bias, ignored_targets, transposed,
            columns_of_a_larger_matrix, bfloat16, float16, mixed_dtypes,
        )
    },
}  # fmt: skip


def _plain(case: Case, dtype: torch.dtype) -> LinearLogprob:
    """The expression that a user would write."""
    logits = case.x.to(dtype) @ case.W_U.to(dtype)
    if case.b_U is not None:
        logits = logits + case.b_U.to(dtype)
    if case.softcap is not None:
        logits = case.softcap * torch.tanh(logits / case.softcap)
    target_logit = logits.gather(1, case.targets.clamp_min(0)).masked_fill(case.targets == -1, math.nan)
    return LinearLogprob(target_logit, logits.logsumexp(1))


def _logprob(out: LinearLogprob) -> Tensor:
    return out.target_logit - out.logsumexp[:, None]


def check(case: Case, found: LinearLogprob) -> None:
    """The error against float64 is at most 3 times that of the plain float32 expression, plus 1e-5."""
    exact, plain = _plain(case, torch.float64), _plain(case, torch.float32)
    assert found.target_logit.shape == case.targets.shape
    assert found.logsumexp.shape == case.x.shape[:1]
    for get in (lambda o: o.target_logit, lambda o: o.logsumexp, _logprob):
        assert_within_rule(get(found), get(exact), get(plain))


# Reference and blocked --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("ragged_255", "ragged_507")])
def test_reference_is_log_softmax_in_float64(name: str) -> None:
    case = CASES[name]()
    out = linear_logprob(*case[:4], softcap=case.softcap, backend="reference")
    assert out.logsumexp.dtype == out.target_logit.dtype == torch.float64
    logits = case.x.double() @ case.W_U.double() + (0.0 if case.b_U is None else case.b_U.double())
    if case.softcap is not None:
        logits = torch.tanh(logits / case.softcap) * case.softcap
    expected = torch.log_softmax(logits, 1).gather(1, case.targets.clamp_min(0))
    expected[case.targets == -1] = math.nan
    torch.testing.assert_close(_logprob(out), expected, rtol=0, atol=1e-10, equal_nan=True)


@pytest.mark.parametrize("name", CASES)
def test_blocked(name: str, poisoned: None) -> None:
    case = CASES[name]()
    out = linear_logprob(*case[:4], softcap=case.softcap)
    assert out.logsumexp.dtype == out.target_logit.dtype == torch.float32
    check(case, out)


def test_blocked_computes_float64_in_float64() -> None:
    case = ragged(123)
    out = linear_logprob(case.x.double(), case.W_U, case.targets)
    exact = _plain(case, torch.float64)
    assert out.logsumexp.dtype == torch.float64
    torch.testing.assert_close(tuple(out), tuple(exact), rtol=0, atol=1e-12)


def test_more_rows_than_a_chunk() -> None:
    case = _random(1300, 2500, k=2)
    check(case, linear_logprob(*case[:3], backend="blocked"))


@pytest.mark.parametrize(("where", "value"), [(0, math.inf), (2999, math.inf), (0, math.nan), (2999, math.nan)])
def test_infinity_and_nan_are_not_swallowed(where: int, value: float) -> None:
    case = _random(4, 3000)
    b_U = torch.zeros(3000)
    b_U[where] = value
    out = linear_logprob(case.x, case.W_U, case.targets, b_U, backend="blocked")
    expected = torch.full((4,), value)
    torch.testing.assert_close(out.logsumexp, expected, equal_nan=True)


def test_no_rows() -> None:
    out = linear_logprob(torch.zeros(0, 8), torch.zeros(8, 50), torch.zeros(0, 2, dtype=torch.long))
    assert out.target_logit.shape == (0, 2)
    assert out.logsumexp.shape == (0,)


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_blocked_never_holds_more_than_a_tile(softcap: float | None) -> None:
    case = _random(600, 9000)
    b_U = _bias(case)
    backend = partial(linear_logprob, backend="blocked")
    held = allocations(lambda: backend(case.x, case.W_U, case.targets, b_U, softcap=softcap))
    assert 0 < held.largest <= 2**20
    assert held.peak <= 2 * 2**20
    assert allocations(lambda: _plain(case, torch.float32)).largest == 600 * 9000 * 4


@pytest.mark.parametrize("name", ["columns_of_a_larger_matrix", "transposed"])
def test_blocked_does_not_copy_the_unembedding(name: str) -> None:
    case = CASES[name]()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
        linear_logprob_blocked(*case[:2], case.targets[:, :0])
        case.W_U[:, ::2].clone()
    clones = [e.input_shapes[0] for e in profiled.events() if e.name == "aten::clone"]
    # Of matrices only the clone above, which shows that a copy would be seen.
    assert [shape for shape in clones if len(shape) == 2] == [[16, -(-case.W_U.shape[1] // 2)]]


def test_imports_and_runs_without_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, fastinterp_kernels.linear_logprob as op\n"
        "args = torch.ones(2, 4), torch.zeros(4, 50), torch.tensor([[1], [2]])\n"
        "for backend in ('auto', 'blocked', 'reference'):\n"
        "    print(round(float(op.linear_logprob(*args, backend=backend).logsumexp[0]), 3))\n"
        "print([m for m in sys.modules if m.split('.')[0] in ('fastinterp', 'transformers', 'zarr')])"
    )
    assert run_python(code).split("\n")[:4] == ["3.912", "3.912", "3.912", "[]"]


def test_importing_the_operation_does_not_import_triton() -> None:
    code = (
        "import torch, sys; before = 'triton' in sys.modules\n"
        "import fastinterp_kernels, fastinterp_kernels.linear_logprob\n"
        "assert before or 'triton' not in sys.modules\n"
        "assert not any(name.endswith('triton_kernel') for name in sys.modules)"
    )
    run_python(code)


# Errors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 3, 8)}, ValueError, "flatten"),
        ({"targets": torch.tensor([1, 2])}, ValueError, r"targets\[:, None\]"),
        ({"W_U": torch.zeros(50, 8)}, ValueError, r"W_E\.T"),
        ({"targets": torch.tensor([[1]])}, ValueError, "1 rows and x has 2"),
        ({"b_U": torch.zeros(49)}, ValueError, r"\[50\]"),
        ({"x": torch.zeros(2, 8, dtype=torch.int64)}, TypeError, r"x\.float\(\)"),
        ({"targets": torch.tensor([[1.0], [2.0]])}, TypeError, r"targets\.long\(\)"),
        (
            {"targets": torch.tensor([[1], [50]])},
            ValueError,
            "between 1 and 50; expected 0 to d_vocab - 1 = 49",
        ),
        ({"targets": torch.tensor([[-100], [3]])}, ValueError, "masked_fill"),
        ({"softcap": 0.0}, ValueError, "softcap=None|None for no softcap"),
        ({"softcap": math.inf}, ValueError, "positive"),
        ({"x": torch.zeros(2, 8, device="meta")}, ValueError, "meta"),
        ({"x": torch.zeros(2, 8, requires_grad=True)}, ValueError, r"no_grad"),
        ({"backend": "cuda"}, ValueError, "'blocked' or 'triton'"),
        ({"backend": "triton"}, ValueError, r"backend='blocked'.*TRITON_INTERPRET=1"),
    ],
)
def test_errors(change: dict, error: type[Exception], message: str) -> None:
    good = {"x": torch.zeros(2, 8), "W_U": torch.zeros(8, 50), "targets": torch.tensor([[1], [2]])}
    linear_logprob(**good)
    with pytest.raises(error, match=message):
        linear_logprob(**(good | change))


def test_weights_with_a_gradient_are_fine_under_no_grad() -> None:
    case = _random(3, 40)
    W_U = torch.nn.Parameter(case.W_U)
    with torch.no_grad():
        check(case, linear_logprob(case.x, W_U, case.targets))


# The Triton kernel, interpreted -----------------------------------------------------------------------------


def _triton_checks(device: str) -> dict[str, Callable[[], None]]:
    """Every case in every precision mode, by name."""
    from fastinterp_kernels.linear_logprob.triton_kernel import Tiling, linear_logprob_triton

    def case_in_ieee(name: str) -> None:
        case = CASES[name]()
        found = linear_logprob(*case.to(device)[:4], softcap=case.softcap, backend="triton")
        assert found.logsumexp.dtype == torch.float32
        check(case, LinearLogprob(*(t.cpu() for t in found)))

    def small_tiles() -> None:
        """Several programs along both axes, several tiles per program, ragged in all three."""
        case = _random(77, 2000, d_model=75)
        tiling = Tiling(row=32, vocab=64, d_model=16, num_warps=4, num_stages=2)
        found = linear_logprob_triton(*case.to(device)[:3], tiling=tiling)
        check(case, LinearLogprob(*(t.cpu() for t in found)))

    def precision(mode: str, floor: float, factor: float) -> None:
        """Error within ``floor`` and ``factor * floor``: not exact (the mode is used), not coarser."""
        case = _random(64, 4000, d_model=64, scale=4.0)
        exact = _plain(case, torch.float64)
        found = linear_logprob_triton(*case.to(device)[:3], precision=mode)
        error = largest_error(found.logsumexp.cpu(), exact.logsumexp)
        assert floor <= error <= factor * floor, error
        assert largest_error(found.target_logit.cpu(), exact.target_logit) <= 1e-5

    def refusals() -> None:
        case = _random(2, 40).to(device)
        with pytest.raises(ValueError, match="'bf16x3' or 'tf32'"):
            linear_logprob_triton(*case[:3], precision="bf16")
        with pytest.raises(ValueError, match=r"x\.float\(\)"):
            linear_logprob_triton(case.x.double(), *case[1:3])

    return {
        **{name: partial(case_in_ieee, name) for name in CASES},
        "small_tiles": small_tiles,
        "bf16x3": partial(precision, "bf16x3", 1e-5, 10.0),
        "tf32": partial(precision, "tf32", 1e-3, 10.0),
        "refusals": refusals,
    }


TRITON_CHECKS = [*CASES, "small_tiles", "bf16x3", "tf32", "refusals"]


@pytest.fixture(scope="module")
def interpreted() -> dict[str, str | None]:
    return run_interpreted(__file__)


@pytest.mark.parametrize("name", TRITON_CHECKS)
def test_interpreted(name: str, interpreted: dict[str, str | None]) -> None:
    assert interpreted[name] is None, interpreted[name]


# The Triton kernel, compiled for GPUs that need not be there ------------------------------------------------


def _compile(capability: int, dtype: str, precision: str, *, even: bool = True, transposed: bool = False) -> Compiled:
    """The kernel as it is launched for operands of this dtype, with a bias and a softcap."""
    from fastinterp_kernels.linear_logprob.triton_kernel import default_tiling, partial_logsumexp_kernel

    split = precision == "bf16x3" and dtype == "fp32"
    torch_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    tiling = default_tiling(torch_dtype, precision, 768 if even else 75)
    constants = {
        "MASK_D": not even, "WIDEN": False, "ROUND_TF32": False,
        "DOT": "tf32" if precision == "tf32" else "ieee",
        "BLOCK_ROW": tiling.row, "BLOCK_VOCAB": tiling.vocab, "BLOCK_D": tiling.d_model,
        "stride_x_d": 1, "stride_w_d" if transposed else "stride_w_vocab": 1,
    } | ({} if split else {"x_low_ptr": None, "w_low_ptr": None})  # fmt: skip
    operand = "*bf16" if split else f"*{dtype}"
    types = dict.fromkeys(("x_ptr", "w_ptr", *(("x_low_ptr", "w_low_ptr") if split else ())), operand)
    types |= {"b_ptr": "*fp32", "maximum_ptr": "*fp32", "total_ptr": "*fp32", "softcap": "fp32"}
    divisible = ["chunk_columns", "stride_w_vocab" if transposed else "stride_w_d"]
    return compile_for(
        partial_logsumexp_kernel, types, constants, capability,
        divisible=divisible + ["d_model", "stride_x_row"] * even,
        num_warps=tiling.num_warps, num_stages=tiling.num_stages,
    )  # fmt: skip


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("dtype", "precision"),
    [("fp32", "ieee"), ("fp32", "bf16x3"), ("fp32", "tf32"), ("bf16", "ieee"), ("fp16", "ieee")],
)
def test_compiles_without_spills_to_the_right_instructions(capability: int, dtype: str, precision: str) -> None:
    # Hopper's tensor cores read tf32 operands only with neighbours along d_model.
    compiled = _compile(capability, dtype, precision, transposed=precision == "tf32")
    assert_fits(compiled)
    assert_async_loads(compiled)
    if (dtype, precision) == ("fp32", "ieee"):
        assert_no_tensor_cores(compiled)
    else:
        assert_tensor_cores(compiled, precision if precision == "tf32" else "fp16" if dtype == "fp16" else "bf16")


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    ("layout", "precision"), [("transposed", "ieee"), ("transposed", "bf16x3"), ("ragged_d_model", "bf16x3")]
)
def test_other_layouts_compile_without_spills(capability: int, precision: str, layout: str) -> None:
    compiled = _compile(
        capability, "fp32", precision, even=layout != "ragged_d_model", transposed=layout == "transposed"
    )
    assert_fits(compiled)


def test_offsets_are_computed_in_64_bits() -> None:
    """No stride is multiplied in 32 bits, where row * stride would wrap, and no operand has a 32-bit offset.

    The strides and the number of chunks may only be widened or spread over a tile before they are used.
    """
    compiled = _compile(90, "fp32", "ieee")
    signature = re.search(r"tt\.func public @\w+\((.*)", compiled.ttir)
    assert signature is not None
    values = re.findall(r"(%\w+): (?:!tt|i32|f32)", signature[1])
    assert len(values) == len(compiled.parameters)
    value_of = dict(zip(compiled.parameters, values))
    wide = {value_of[name] for name in ("stride_x_row", "stride_w_d", "n_chunks")}
    extended = set()
    for line in compiled.ttir.splitlines():
        used = set(re.findall(r"%\w+", line.split("=", 1)[-1])) & wide
        if used and "tt.func" not in line:
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


# The Triton kernel on a GPU ---------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("name", TRITON_CHECKS)
def test_on_a_gpu(name: str) -> None:
    # Freed blocks of the sizes that are about to be allocated, filled with NaN.
    stale = [torch.full((n,), math.nan, device="cuda") for n in (64, 512, 4096, 2**15, 2**18)]
    del stale
    _triton_checks("cuda")[name]()


@pytest.mark.gpu
def test_auto_is_triton_on_a_gpu_and_blocked_for_float64() -> None:
    case = bias().to("cuda")
    auto, triton = linear_logprob(*case[:4]), linear_logprob(*case[:4], backend="triton")
    torch.testing.assert_close(auto.logsumexp, triton.logsumexp, rtol=0, atol=0)
    assert linear_logprob(case.x.double(), *case[1:4]).logsumexp.dtype == torch.float64


@pytest.mark.gpu
def test_offsets_beyond_2_to_the_31_on_a_gpu() -> None:
    case = _random(16, 3000)
    storage = torch.empty(15 * 2**28 + 3008, dtype=torch.bfloat16, device="cuda")  # 8 GB
    W_U = storage.as_strided((16, 3000), (2**28, 1)).copy_(case.W_U)
    case = case._replace(W_U=W_U.cpu().float(), x=case.x.bfloat16())
    found = linear_logprob(case.x.cuda(), W_U, case.targets.cuda(), backend="triton")
    check(case, LinearLogprob(*(t.cpu() for t in found)))


if __name__ == "__main__":
    report_checks(_triton_checks("cpu"))
