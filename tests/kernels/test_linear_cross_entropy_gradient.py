"""The gradient of ``linear_cross_entropy``, blocked: against float64, finite differences, and in memory."""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from fastinterp_kernels.linear_cross_entropy import LinearCrossEntropy, linear_cross_entropy
from tests.kernels.kernel_checks import allocations, largest_error
from tests.kernels.linear_cross_entropy_cases import (
    CASES,
    GRADIENT_CASES,
    Case,
    check_gradient,
    gradient,
    plain,
    random_bias,
    random_case,
)


def run(case: Case, **options: object) -> LinearCrossEntropy:
    return linear_cross_entropy(*case[:4], **(case.options() | options))


@pytest.mark.parametrize("name", GRADIENT_CASES)
def test_blocked(name: str, poisoned: None) -> None:
    case = CASES[name]()
    check_gradient(case, gradient(case, partial(run, backend="blocked")))


@pytest.mark.parametrize("name", ["masked_bias", "softcap_and_bias", "ignored_targets"])
def test_reference(name: str) -> None:
    case = CASES[name]()
    exact = case._replace(x=case.x.double())
    found = gradient(exact, partial(run, backend="reference"))
    torch.testing.assert_close(found, gradient(exact, partial(plain, dtype=torch.float64)), rtol=0, atol=1e-10)


@pytest.mark.parametrize("softcap", [None, 5.0])
def test_gradcheck(softcap: float | None) -> None:
    """Two tiles of the vocabulary, -inf, an ignored target, one target twice."""
    case = random_case(3, 3000, d_model=4, k=3)
    x, W_U, kl_from = case.x.double().requires_grad_(), case.W_U.double(), case.kl_from.double()
    b_U = random_bias(case).double()
    b_U[::7] = -math.inf
    targets = torch.tensor([[1, 1, 2999], [5, -1, 6], [1500, 8, 2]])

    def results(x: Tensor) -> tuple[Tensor, ...]:
        out = linear_cross_entropy(x, W_U, targets, b_U, softcap=softcap, kl_from=kl_from, rank=True, top1=True)
        return out.target_logit[targets >= 0], out.logsumexp, out.kl

    assert torch.autograd.gradcheck(results, (x,))


@pytest.mark.parametrize("used", [("target_logit",), ("logsumexp",), ("kl",), ("target_logit", "logsumexp")])
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_through_some_of_the_results(used: tuple[str, ...], softcap: float | None) -> None:
    case = random_case(40, 3000, k=2)._replace(softcap=softcap)
    case.targets[3, 1] = -1

    def subset(case: Case, f: Callable[[Case], LinearCrossEntropy]) -> Tensor:
        x = case.x.detach().clone().requires_grad_()
        out = f(case._replace(x=x))
        results = [getattr(out, name) for name in used]
        return torch.autograd.grad(results, x, [torch.ones_like(r) for r in results])[0]

    exact = subset(case._replace(x=case.x.double()), partial(plain, dtype=torch.float64))
    rough = subset(case, partial(plain, dtype=torch.float32))
    assert largest_error(subset(case, run), exact) <= 3 * largest_error(rough, exact) + 1e-5


def test_rows_of_minus_infinity_have_no_gradient() -> None:
    case = CASES["all_masked"]()
    x = case.x.clone().requires_grad_()
    linear_cross_entropy(x, *case[1:4]).logsumexp.nan_to_num(neginf=0.0).sum().backward()
    assert (x.grad == 0).all()


@pytest.mark.parametrize(("precision", "floor"), [("bf16x3", 1e-5), ("tf32", 1e-3), ("bf16", 3e-3)])
def test_precision_modes_are_as_coarse_as_they_say(precision: str, floor: float) -> None:
    case = random_case(64, 4000, d_model=64, scale=4.0)
    exact = gradient(case._replace(x=case.x.double()), partial(plain, dtype=torch.float64))
    found = gradient(case, partial(run, precision=precision))
    assert floor <= largest_error(found, exact) <= 10 * floor


def test_kl_from_is_a_constant_and_ids_have_no_gradient() -> None:
    case = random_case(4, 50)
    x, kl_from = (t.clone().requires_grad_() for t in (case.x, case.kl_from))
    for backend in ("blocked", "reference"):
        out = linear_cross_entropy(x, *case[1:3], kl_from=kl_from, rank=True, top1=True, backend=backend)
        assert not out.rank.requires_grad
        assert not out.top1.requires_grad
        out.kl.sum().backward()
        assert x.grad is not None
        assert kl_from.grad is None


def test_second_derivatives_are_refused_and_those_of_the_reference_exist() -> None:
    case = random_case(4, 50)
    x = case.x.clone().requires_grad_()
    with pytest.raises(RuntimeError, match="backend='reference'"):
        torch.autograd.grad(run(case._replace(x=x)).logsumexp.sum(), x, create_graph=True)
    value = run(case._replace(x=x), backend="reference").logsumexp.sum()
    (dx,) = torch.autograd.grad(value, x, create_graph=True)
    assert torch.autograd.grad(dx.sum(), x)[0].abs().max() > 0


def test_target_logits_alone_need_no_pass_over_the_vocabulary() -> None:
    case = random_case(40, 3000, k=2)

    def products(field: str) -> int:
        x = case.x.clone().requires_grad_()
        value = getattr(run(case._replace(x=x)), field).sum()
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            value.backward()
        return sum(event.name in ("aten::addmm", "aten::addmm_", "aten::mm") for event in profiled.events())

    assert products("target_logit") == 0
    assert products("logsumexp") > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_of_both_passes_is_bounded(dtype: torch.dtype) -> None:
    """2000 x 50257 logits take 402 MB; beyond the gradient itself, both passes stay below 64 MB."""
    case = random_case(2000, 50257, d_model=128)
    W_U, kl_from = case.W_U.to(dtype), case.kl_from.to(dtype)
    x = case.x.to(dtype).requires_grad_()
    out = None

    def forward() -> None:
        nonlocal out
        out = linear_cross_entropy(x, W_U, case.targets, kl_from=kl_from, rank=True, top1=True)

    held = allocations(forward)
    assert 0 < held.largest <= 8 * 2**20
    assert held.peak <= 24 * 2**20
    held = allocations(lambda: (out.logsumexp + out.kl - out.target_logit[:, 0]).sum().backward())
    assert 0 < held.largest <= 8 * 2**20
    assert held.peak <= 24 * 2**20
