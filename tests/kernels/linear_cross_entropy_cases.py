"""Cases of ``linear_cross_entropy``, the same for every backend, and what their results are held to."""

import contextlib
import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from fastinterp_kernels.common import Precision
from fastinterp_kernels.linear_cross_entropy import LinearCrossEntropy, linear_cross_entropy
from tests.kernels.kernel_checks import assert_within_rule, fitted_tilings, largest_error, unembedding_layouts


class Case(NamedTuple):
    x: Tensor
    W_U: Tensor
    targets: Tensor
    b_U: Tensor | None = None
    softcap: float | None = None
    kl_from: Tensor | None = None

    def to(self, device: str) -> "Case":
        return Case(*(v.to(device) if isinstance(v, Tensor) else v for v in self))

    def options(self) -> dict[str, object]:
        return {"softcap": self.softcap, "kl_from": self.kl_from, "rank": True, "top1": True}


def random_case(n_rows: int, d_vocab: int, d_model: int = 16, k: int = 1, scale: float = 3.0) -> Case:
    """Logits of standard deviation ``scale``; those of ``kl_from`` differ by a third of that."""
    generator = torch.Generator().manual_seed(n_rows)
    x = torch.randn(n_rows, d_model, generator=generator)
    W_U = torch.randn(d_model, d_vocab, generator=generator) * (scale / d_model**0.5)
    targets = torch.randint(0, d_vocab, (n_rows, k), generator=generator)
    return Case(x, W_U, targets, kl_from=x + torch.randn(n_rows, d_model, generator=generator) / 3)


def random_bias(case: Case, *, seed: int = 0) -> Tensor:
    return torch.randn(case.W_U.shape[1], generator=torch.Generator().manual_seed(seed)) * 2


def ragged(n_rows: int, d_vocab: int = 50257) -> Case:
    return random_case(n_rows, d_vocab)


def one_column() -> Case:
    return random_case(5, 1)


def ragged_d_model() -> Case:
    return random_case(33, 700, d_model=75)


def many_targets() -> Case:
    return random_case(40, 1000, k=7)


def no_targets() -> Case:
    return random_case(9, 300, k=0)


def peaked() -> Case:
    """Every row is a column of W_U, many times over: probability 1 on one token, in any tile."""
    case = random_case(60, 5000, d_model=64)
    ids = torch.arange(60) * 83
    targets = torch.stack([ids, (ids + 1) % 5000], dim=1)
    return case._replace(x=case.W_U.T[ids] * 40, targets=targets, kl_from=case.W_U.T[ids] * 20)


def beyond_exp() -> Case:
    """Logits of several hundred of either sign that grow along the vocabulary, tile by tile."""
    case = random_case(37, 9000, scale=100.0)
    growing = torch.linspace(-600.0, 600.0, 9000)
    return case._replace(b_U=growing, targets=torch.arange(37)[:, None] * 243)


def all_negative() -> Case:
    return random_case(20, 3000)._replace(b_U=torch.full((3000,), -5000.0))


def bias() -> Case:
    case = random_case(50, 6000)
    return case._replace(b_U=random_bias(case))


def masked_bias() -> Case:
    """-inf for the whole first tile of every backend, and for every third token after it."""
    case = random_case(50, 9000, k=2)
    b_U = random_bias(case)
    b_U[:2500] = -math.inf
    b_U[2500::3] = -math.inf
    return case._replace(b_U=b_U, targets=torch.tensor([[2501, 7]]).repeat(50, 1))


def all_masked() -> Case:
    return random_case(6, 300)._replace(b_U=torch.full((300,), -math.inf))


def softcap() -> Case:
    return random_case(50, 6000, scale=30.0)._replace(softcap=30.0)


def softcap_and_bias() -> Case:
    case = random_case(50, 6000, scale=12.0)
    return case._replace(b_U=random_bias(case), softcap=5.0)


def ignored_targets() -> Case:
    case = random_case(50, 2000, k=3)
    targets = case.targets.clone()
    targets[::2, 0] = -1
    targets[7] = -1
    return case._replace(targets=targets)


def layout(name: str) -> Case:
    case = random_case(30, 3001)
    return case._replace(W_U=unembedding_layouts(case.W_U)[name])


def rows_of_a_larger_matrix() -> Case:
    case = random_case(30, 3001)
    wide = torch.full((60, 40), math.nan)
    wide[::2, 10:26] = case.x
    return case._replace(x=wide[::2, 10:26])


def bfloat16() -> Case:
    case = random_case(50, 6000, d_model=64)
    case = case._replace(x=case.x.bfloat16(), W_U=case.W_U.bfloat16(), kl_from=case.kl_from.bfloat16())
    return case._replace(b_U=random_bias(case).bfloat16())


def float16() -> Case:
    case = random_case(50, 6000, d_model=64)
    return case._replace(x=case.x.half(), W_U=case.W_U.half(), kl_from=case.kl_from.half())


def mixed_dtypes() -> Case:
    case = random_case(50, 6000, d_model=64)
    return case._replace(W_U=case.W_U.bfloat16(), kl_from=case.kl_from.bfloat16())


CASES: dict[str, Callable[[], Case]] = {
    **{f"ragged_{n_rows}": partial(ragged, n_rows) for n_rows in (1, 31, 123, 255, 507)},
    **{
        case.__name__: case
        for case in (
            one_column, ragged_d_model, many_targets, no_targets, peaked, beyond_exp, all_negative, bias,
            masked_bias, all_masked, softcap, softcap_and_bias, ignored_targets, rows_of_a_larger_matrix,
            bfloat16, float16, mixed_dtypes,
        )
    },
    **{
        name: partial(layout, name) for name in ("transposed", "columns_of_a_larger_matrix", "every_other_column")
    },
}  # fmt: skip

FEWER_COLUMNS = {f"ragged_{n}": partial(ragged, n, 3001) for n in (1, 123, 255, 507)}
"""Interpreted instead of those with 50257 columns, of which one case is enough: two tiles, the second ragged."""

GRADIENT_CASES = [
    "ragged_1", "ragged_123", "one_column", "ragged_d_model", "many_targets", "no_targets", "peaked", "beyond_exp",
    "all_negative", "masked_bias", "softcap", "softcap_and_bias", "ignored_targets", "transposed", "every_other_column",
    "rows_of_a_larger_matrix", "bfloat16", "float16", "mixed_dtypes",
]  # fmt: skip


def raw_logits(case: Case, dtype: torch.dtype, x: Tensor | None = None) -> Tensor:
    logits = (case.x if x is None else x).to(dtype) @ case.W_U.to(dtype)
    return logits if case.b_U is None else logits + case.b_U.to(dtype)


def plain(case: Case, dtype: torch.dtype) -> LinearCrossEntropy:
    """The expressions that a user would write, without ranks and best tokens."""
    logits, other = raw_logits(case, dtype), None
    if case.kl_from is not None:
        other = raw_logits(case, dtype, case.kl_from)
    if case.softcap is not None:
        logits = case.softcap * torch.tanh(logits / case.softcap)
        other = None if other is None else case.softcap * torch.tanh(other / case.softcap)
    target_logit = logits.gather(1, case.targets.clamp_min(0)).masked_fill(case.targets == -1, math.nan)
    kl = None
    if other is not None:
        log_p, log_q = torch.log_softmax(other, 1), torch.log_softmax(logits, 1)
        excluded = log_p == -math.inf
        kl = (log_p.exp() * (log_p - log_q).masked_fill(excluded, 0.0)).sum(1)
    return LinearCrossEntropy(target_logit, logits.logsumexp(1), kl=kl)


def logprob(out: LinearCrossEntropy) -> Tensor:
    return out.target_logit - out.logsumexp[:, None]


def check(case: Case, found: LinearCrossEntropy) -> None:
    """Every result follows the tolerance rule; ranks and best tokens are right up to the same error of a logit."""
    exact, rough = plain(case, torch.float64), plain(case, torch.float32)
    assert found.target_logit.shape == case.targets.shape
    assert found.logsumexp.shape == case.x.shape[:1]
    for get in (lambda o: o.target_logit, lambda o: o.logsumexp, logprob):
        assert_within_rule(get(found), get(exact), get(rough))
    if found.kl is not None:
        assert_within_rule(found.kl, exact.kl, rough.kl)
        assert not (found.kl < 0).any()
    if found.rank is not None or found.top1 is not None:
        raw = raw_logits(case, torch.float64)
        check_ids(case, found, raw, 3 * largest_error(raw_logits(case, torch.float32), raw) + 1e-5)


def check_ids(case: Case, found: LinearCrossEntropy, raw: Tensor, error: float) -> None:
    """Ranks and best tokens are those of ``raw`` logits to which at most ``error`` was added."""
    if found.rank is not None:
        assert found.rank.dtype == torch.long
        assert found.rank.shape == case.targets.shape
        for j in range(case.targets.shape[1]):
            rank, target = found.rank[:, j], case.targets[:, j]
            assert (rank[target == -1] == -1).all()
            threshold = raw.gather(1, target.clamp_min(0)[:, None])
            surely = (raw > threshold + 2 * error).sum(1)
            possibly = (raw > threshold - 2 * error).sum(1) - (threshold[:, 0] > -math.inf).long()
            wanted = target >= 0
            assert (surely <= rank)[wanted].all()
            assert (rank <= possibly)[wanted].all()
    if found.top1 is not None:
        assert found.top1.dtype == torch.long
        assert found.top1.shape == case.x.shape[:1]
        best = raw.gather(1, found.top1[:, None])[:, 0]
        assert (best >= raw.amax(1) - 2 * error).all()


# Triton -----------------------------------------------------------------------------------------------------


def run_triton(case: Case, *, precision: Precision = "exact", **options: object) -> LinearCrossEntropy:
    with fitted(case):
        return linear_cross_entropy(
            *case[:4], **({"softcap": case.softcap} | options), backend="triton", precision=precision
        )  # fmt: skip


@contextlib.contextmanager
def fitted(case: Case) -> Iterator[None]:
    """Interpreted, tiles as large as the case needs, in both passes."""
    from fastinterp_kernels.linear_cross_entropy import triton_backward, triton_kernel

    sizes = {"row": len(case.x), "vocab": case.W_U.shape[1]}
    with (
        fitted_tilings(triton_kernel, **sizes),
        fitted_tilings(triton_backward, **sizes),
        fitted_tilings(triton_backward, "default_product_tiling", **sizes, d_model=case.x.shape[1]),
    ):
        yield


def on_cpu(out: LinearCrossEntropy) -> LinearCrossEntropy:
    return LinearCrossEntropy(*(None if value is None else value.detach().cpu() for value in out))


def triton_gradient(case: Case, precision: Precision = "exact") -> Tensor:
    """Of all results; on the CPU."""
    with fitted(case):
        return gradient(case, lambda c: run_triton(c, precision=precision, **c.options())).cpu()


@contextlib.contextmanager
def small_tiles() -> Iterator[None]:
    """Tiles, slabs and blocks of rows of which 150 rows, 75 of d_model and 700 columns need several, ragged."""
    from fastinterp_kernels import triton_common
    from fastinterp_kernels.linear_cross_entropy import triton_backward, triton_kernel, triton_tiles

    tiling = triton_common.Tiling(row=64, vocab=128, d_model=16, num_warps=4, num_stages=2)
    product = triton_common.Tiling(row=64, vocab=128, d_model=32, num_warps=4, num_stages=2)
    tilings = triton_backward.BackwardTilings(slope=tiling, product=product)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton_tiles, "BLOCK_BYTES", 0)
        patch.setattr(triton_kernel, "SLAB_BYTES", 256 * 80 * 4)
        patch.setattr(triton_backward, "SLAB_BYTES", 512 * 80 * 4)
        patch.setattr(triton_backward, "SLOPE_BYTES", 128 * 4 * 128)
        patch.setattr(triton_kernel, "forward_triton", partial(triton_kernel.forward_triton, tiling=tiling))
        patch.setattr(triton_backward, "backward_triton", partial(triton_backward.backward_triton, tilings=tilings))
        yield


def small_tiles_case(layout: str) -> Case:
    case = random_case(150, 700, d_model=75, k=2)
    return case._replace(b_U=random_bias(case), softcap=20.0, W_U=unembedding_layouts(case.W_U)[layout])


# Ties -------------------------------------------------------------------------------------------------------


def tied_case(n_rows: int = 40, d_vocab: int = 5000) -> Case:
    """Small integers, exact in every precision and order of summation: many equal logits, and equal columns."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-2, 3, (n_rows, 64), generator=generator).float()
    W_U = torch.randint(-2, 3, (64, d_vocab), generator=generator).float()
    W_U[:, d_vocab // 2 :] = W_U[:, : d_vocab - d_vocab // 2]
    targets = torch.randint(0, d_vocab, (n_rows, 2), generator=generator)
    targets[:, 0] = (x @ W_U).argmax(1) + d_vocab // 2  # tied with the best of a lower id
    return Case(x, W_U, targets, torch.randint(-2, 3, (d_vocab // 2,), generator=generator).float().repeat(2))


def check_ties(case: Case, found: LinearCrossEntropy) -> None:
    raw = raw_logits(case, torch.float64)
    assert found.rank is not None
    assert found.top1 is not None
    for j in range(2):
        expected = (raw > raw.gather(1, case.targets[:, j, None])).sum(1)
        assert torch.equal(found.rank[:, j].cpu(), expected)
    assert (raw == raw.amax(1, keepdim=True)).sum(1).min() >= 2
    assert torch.equal(found.top1.cpu(), (raw == raw.amax(1, keepdim=True)).int().argmax(1))


# Gradients --------------------------------------------------------------------------------------------------


def gradient(case: Case, run: Callable[[Case], LinearCrossEntropy]) -> Tensor:
    """The gradient with respect to x for random gradients of all results."""
    generator = torch.Generator().manual_seed(1)
    x = case.x.detach().clone().requires_grad_()
    out = run(case._replace(x=x))
    results = [t for t in (out.target_logit, out.logsumexp, out.kl) if t is not None and t.numel()]
    weights = [torch.randn(t.shape, generator=generator).to(t.dtype).to(t.device) for t in results]
    return torch.autograd.grad(results, x, weights)[0]


def check_gradient(case: Case, found: Tensor) -> None:
    """The tolerance rule, with a plain expression in float32 whose gradient is in the dtype of x, as found."""
    exact = gradient(case._replace(x=case.x.double()), partial(plain, dtype=torch.float64))
    rough = gradient(case, partial(plain, dtype=torch.float32))
    assert found.dtype == rough.dtype == case.x.dtype
    assert_within_rule(found, exact, rough)
