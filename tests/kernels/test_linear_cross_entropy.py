"""``fastinterp_kernels.linear_cross_entropy``: results of the reference and the blocked form, memory, errors."""

import math
from functools import partial

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from fastinterp_kernels.linear_cross_entropy import LinearCrossEntropy, linear_cross_entropy
from tests.kernels.kernel_checks import allocations, largest_error, run_python, unembedding_layouts
from tests.kernels.linear_cross_entropy_cases import (
    CASES,
    Case,
    check,
    check_ids,
    check_ties,
    logprob,
    plain,
    ragged,
    random_bias,
    random_case,
    raw_logits,
    tied_case,
)


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("ragged_255", "ragged_507")])
def test_reference_is_log_softmax_in_float64(name: str) -> None:
    case = CASES[name]()
    out = linear_cross_entropy(*case[:4], **case.options(), backend="reference")
    assert out.logsumexp.dtype == out.target_logit.dtype == out.kl.dtype == torch.float64
    logits = raw_logits(case, torch.float64)
    check_ids(case, out, logits, 1e-10)
    if case.softcap is not None:
        logits = torch.tanh(logits / case.softcap) * case.softcap
    expected = torch.log_softmax(logits, 1).gather(1, case.targets.clamp_min(0))
    expected[case.targets == -1] = math.nan
    torch.testing.assert_close(logprob(out), expected, rtol=0, atol=1e-10, equal_nan=True)
    torch.testing.assert_close(out.kl, plain(case, torch.float64).kl, rtol=1e-12, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("everything", [False, True])
def test_blocked(name: str, everything: bool, poisoned: None) -> None:
    case = CASES[name]()
    options = case.options() if everything else {"softcap": case.softcap}
    out = linear_cross_entropy(*case[:4], **options, backend="blocked")
    assert out.logsumexp.dtype == out.target_logit.dtype == torch.float32
    assert [value is None for value in out[2:]] == [not everything] * 3
    check(case, out)


@pytest.mark.parametrize("wanted", ["rank", "top1", "kl_from"])
def test_one_result_alone_is_that_of_all_together(wanted: str) -> None:
    case = CASES["softcap_and_bias"]()
    both = linear_cross_entropy(*case[:4], **case.options())
    alone = linear_cross_entropy(*case[:4], softcap=case.softcap, **{wanted: case.options()[wanted]})
    field = wanted.removesuffix("_from")
    torch.testing.assert_close(getattr(alone, field), getattr(both, field), rtol=1e-4, atol=1e-5)
    assert sum(value is None for value in alone) == 2


def test_blocked_computes_float64_in_float64() -> None:
    case = ragged(123)
    out = linear_cross_entropy(case.x.double(), case.W_U, case.targets, kl_from=case.kl_from)
    exact = plain(case, torch.float64)
    assert out.logsumexp.dtype == torch.float64
    for found, expected in (
        (out.target_logit, exact.target_logit),
        (out.logsumexp, exact.logsumexp),
        (out.kl, exact.kl),
    ):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_more_rows_than_a_chunk() -> None:
    case = random_case(1300, 2500, k=2)
    check(case, linear_cross_entropy(*case[:3], **case.options(), backend="blocked"))


@pytest.mark.parametrize("precision", ["exact", "bf16x3", "tf32", "bf16"])
@pytest.mark.parametrize("layout", ["row_major", "transposed"])
def test_equal_logits_count_neither_in_ranks_nor_against_the_lowest_id(layout: str, precision: str) -> None:
    case = tied_case()
    W_U = unembedding_layouts(case.W_U)[layout]
    for backend in ("blocked", "reference"):
        out = linear_cross_entropy(
            case.x, W_U, case.targets, case.b_U, rank=True, top1=True, backend=backend, precision=precision
        )  # fmt: skip
        check_ties(case, out)


def test_equal_columns_are_tied_in_full_precision() -> None:
    """A target is not behind its own copies: its threshold has the bits that its logit has in a tile."""
    case = random_case(300, 4000, d_model=96)
    W_U = case.W_U[:, :2000].repeat(1, 2)
    ids = (case.x @ case.W_U[:, :2000]).topk(5).indices
    out = linear_cross_entropy(case.x, W_U, torch.cat([ids, ids + 2000], 1), rank=True, top1=True)
    expected = torch.arange(5).mul(2).expand(300, 5)
    assert torch.equal(out.rank, torch.cat([expected, expected], 1))
    assert torch.equal(out.top1, ids[:, 0])


def test_softcap_that_saturates_keeps_ranks() -> None:
    case = random_case(20, 500, scale=400.0)._replace(softcap=2.0)
    out = linear_cross_entropy(*case[:3], softcap=2.0, rank=True, top1=True)
    bare = linear_cross_entropy(*case[:3], rank=True, top1=True)
    assert torch.equal(out.rank, bare.rank)
    assert torch.equal(out.top1, bare.top1)
    assert (bare.rank > 100).any()


def test_divergence_of_equal_residuals_is_zero() -> None:
    case = CASES["masked_bias"]()
    out = linear_cross_entropy(*case[:4], kl_from=case.x.clone())
    assert (out.kl == 0).all()


PRECISION_ERRORS = {"bf16x3": 1e-5, "tf32": 1e-3, "bf16": 1e-2}


@pytest.mark.parametrize("precision", PRECISION_ERRORS)
def test_precision_modes_are_as_coarse_as_they_say(precision: str) -> None:
    case = random_case(64, 4000, d_model=64, scale=4.0)
    exact = plain(case, torch.float64)
    out = linear_cross_entropy(*case[:3], **case.options(), precision=precision)
    floor = PRECISION_ERRORS[precision]
    assert floor <= largest_error(out.logsumexp, exact.logsumexp) <= 10 * floor
    assert floor / 10 <= largest_error(out.kl, exact.kl) <= 10 * floor
    assert largest_error(out.target_logit, exact.target_logit) <= 1e-5
    check_ids(case, out, raw_logits(case, torch.float64), 20 * floor)


def test_reduced_operands_are_multiplied_as_they_are_in_every_precision() -> None:
    case = CASES["bfloat16"]()
    out = [linear_cross_entropy(*case[:4], precision=p).logsumexp for p in (None, "exact", "bf16x3", "tf32", "bf16")]
    assert all(torch.equal(out[0], other) for other in out[1:])


@pytest.mark.parametrize(("where", "value"), [(0, math.inf), (2999, math.inf), (0, math.nan), (2999, math.nan)])
def test_infinity_and_nan_are_not_swallowed(where: int, value: float) -> None:
    case = random_case(4, 3000)
    b_U = torch.zeros(3000)
    b_U[where] = value
    expected = torch.full((4,), value)
    for options in ({}, {"rank": True, "top1": True, "kl_from": case.kl_from}):
        out = linear_cross_entropy(case.x, case.W_U, case.targets, b_U, **options, backend="blocked")
        torch.testing.assert_close(out.logsumexp, expected, equal_nan=True)
    assert out.kl.isnan().all()
    assert (out.top1 == (-1 if math.isnan(value) else where)).all()
    assert (out.rank == -1).all() == math.isnan(value)
    reference = linear_cross_entropy(case.x, case.W_U, case.targets, b_U, rank=True, top1=True, backend="reference")
    assert torch.equal(reference.rank, out.rank)
    assert torch.equal(reference.top1, out.top1)


def test_no_rows() -> None:
    arguments = torch.zeros(0, 8), torch.zeros(8, 50), torch.zeros(0, 2, dtype=torch.long)
    out = linear_cross_entropy(*arguments, rank=True, top1=True, kl_from=torch.zeros(0, 8))
    assert [tuple(value.shape) for value in out] == [(0, 2), (0,), (0, 2), (0,), (0,)]


# Memory and imports -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("softcap", [None, 30.0])
@pytest.mark.parametrize("everything", [False, True])
def test_blocked_never_holds_more_than_a_tile(softcap: float | None, everything: bool) -> None:
    case = random_case(600, 9000)._replace(softcap=softcap)
    case = case._replace(b_U=random_bias(case))
    options = case.options() if everything else {"softcap": softcap}
    held = allocations(lambda: linear_cross_entropy(*case[:4], **options, backend="blocked"))
    assert 0 < held.largest <= 2**20
    assert held.peak <= 3 * 2**20
    assert allocations(lambda: plain(case, torch.float32)).largest == 600 * 9000 * 4


@pytest.mark.parametrize("name", ["columns_of_a_larger_matrix", "transposed"])
def test_blocked_does_not_copy_the_unembedding(name: str) -> None:
    case = CASES[name]()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
        linear_cross_entropy(*case[:2], case.targets[:, :0], **case.options())
        case.W_U[:, ::2].clone()
    clones = [e.input_shapes[0] for e in profiled.events() if e.name == "aten::clone"]
    # Of as many rows only the clone above, which shows that a copy would be seen.
    assert [shape for shape in clones if shape[:1] == [16]] == [[16, -(-case.W_U.shape[1] // 2)]]


def test_imports_and_runs_without_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, fastinterp_kernels.linear_cross_entropy as op\n"
        "args = torch.ones(2, 4), torch.zeros(4, 50), torch.tensor([[1], [2]])\n"
        "for backend in ('auto', 'blocked', 'reference'):\n"
        "    print(round(float(op.linear_cross_entropy(*args, backend=backend).logsumexp[0]), 3))\n"
        "print([m for m in sys.modules if m.split('.')[0] in ('fastinterp', 'transformers', 'zarr')])"
    )
    assert run_python(code).split("\n")[:4] == ["3.912", "3.912", "3.912", "[]"]


def test_importing_the_operation_does_not_import_triton() -> None:
    run_python(
        "import torch, sys; before = 'triton' in sys.modules\n"
        "import fastinterp_kernels, fastinterp_kernels.linear_cross_entropy\n"
        "assert before or 'triton' not in sys.modules\n"
        "assert not any(name.endswith(('triton_kernel', 'triton_common')) for name in sys.modules)"
    )


# Errors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 3, 8)}, ValueError, "flatten"),
        ({"targets": torch.tensor([1, 2])}, ValueError, r"targets\[:, None\]"),
        ({"W_U": torch.zeros(50, 8)}, ValueError, r"W_E\.T"),
        ({"targets": torch.tensor([[1]])}, ValueError, "1 rows and x has 2"),
        ({"b_U": torch.zeros(49)}, ValueError, r"\[50\]"),
        ({"kl_from": torch.zeros(2, 9)}, ValueError, r"kl_from .* \(2, 8\)"),
        ({"kl_from": torch.zeros(2, 8).long()}, TypeError, r"kl_from\.float\(\)"),
        ({"x": torch.zeros(2, 8, dtype=torch.int64)}, TypeError, r"x\.float\(\)"),
        ({"targets": torch.tensor([[1.0], [2.0]])}, TypeError, r"targets\.long\(\)"),
        ({"targets": torch.tensor([[1], [50]])}, ValueError, "between 1 and 50; expected 0 to d_vocab - 1 = 49"),
        ({"targets": torch.tensor([[-100], [3]])}, ValueError, "masked_fill"),
        ({"softcap": 0.0}, ValueError, "None for no softcap"),
        ({"softcap": math.inf}, ValueError, "positive"),
        ({"x": torch.zeros(2, 8, device="meta")}, ValueError, "meta"),
        ({"W_U": torch.zeros(8, 50, requires_grad=True)}, ValueError, r"W_U\.detach\(\)"),
        ({"b_U": torch.zeros(50, requires_grad=True)}, ValueError, r"b_U\.detach\(\)"),
        ({"backend": "cuda"}, ValueError, "'blocked' or 'triton'"),
        ({"backend": "triton"}, ValueError, r"backend='blocked'.*TRITON_INTERPRET=1"),
        ({"precision": "ieee"}, ValueError, "'exact', 'bf16x3', 'tf32' or 'bf16'"),
        ({"precision": "bf16", "x": torch.zeros(2, 8).double()}, ValueError, "precision='exact'"),
    ],
)
def test_errors(change: dict, error: type[Exception], message: str) -> None:
    good = {"x": torch.zeros(2, 8), "W_U": torch.zeros(8, 50), "targets": torch.tensor([[1], [2]])}
    linear_cross_entropy(**good)
    with pytest.raises(error, match=message):
        linear_cross_entropy(**(good | change))


def test_weights_with_a_gradient_are_fine_under_no_grad() -> None:
    case = random_case(3, 40)
    W_U = torch.nn.Parameter(case.W_U)
    with torch.no_grad():
        check(case, linear_cross_entropy(case.x, W_U, case.targets))


def test_integer_dtypes_of_targets() -> None:
    case = random_case(5, 100)
    run = partial(linear_cross_entropy, case.x, case.W_U, rank=True)
    expected: LinearCrossEntropy = run(case.targets)
    for dtype in (torch.int32, torch.int16, torch.uint8):
        assert torch.equal(run(case.targets.to(dtype)).rank, expected.rank)
    assert isinstance(case, Case)
