"""Cases of ``head_logits``, the same for every backend, and what makes a result right."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastinterp_kernels.head_logits import HeadLogits
from tests.kernels.kernel_checks import assert_within_rule, largest_error, unembedding_layouts


class Case(NamedTuple):
    z: list[Tensor]
    W_O: list[Tensor]
    W_U: Tensor
    targets: Tensor
    k: int = 10

    def to(self, device: str) -> "Case":
        return Case(
            [z.to(device) for z in self.z], [W.to(device) for W in self.W_O], self.W_U.to(device),
            self.targets.to(device), self.k,
        )  # fmt: skip

    def everything(self) -> dict[str, Any]:
        return {"k": self.k, "targets": self.targets, "rank": True, "logsumexp": True}


def random_case(
    n_rows: int,
    d_vocab: int,
    *,
    n_layers: int = 1,
    n_heads: int = 1,
    d_head: int = 16,
    d_model: int = 40,
    m: int = 1,
    k: int = 10,
    scale: float = 3.0,
) -> Case:
    """Contributions of standard deviation ``scale``."""
    generator = torch.Generator().manual_seed(n_rows)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    z = [normal(n_rows, n_heads, d_head) for _ in range(n_layers)]
    W_O = [normal(n_heads, d_head, d_model) / d_head**0.5 for _ in range(n_layers)]
    W_U = normal(d_model, d_vocab) * (scale / d_model**0.5)
    return Case(z, W_O, W_U, torch.randint(0, d_vocab, (n_rows, m), generator=generator), k)


def of_length(d_head: int) -> Case:
    """Enough rows for the weights to be multiplied first."""
    d_model = 3 * d_head
    return random_case(d_head * 3 // 2 + 5, 1500, d_head=d_head, d_model=d_model)


def few_rows() -> Case:
    return random_case(3, 2100, n_layers=2, n_heads=3, d_head=24, d_model=72)


def many_rows() -> Case:
    return random_case(1100, 1300)


def layers() -> Case:
    return random_case(70, 1700, n_layers=3, n_heads=2)


def layers_of_different_heads() -> Case:
    """The second has vectors too long to be worth multiplying its weights for."""
    short, long = random_case(50, 1500, n_heads=2), random_case(50, 1500, n_heads=1, d_head=32)
    return short._replace(z=short.z + long.z + short.z, W_O=short.W_O + long.W_O + short.W_O)


def one_column() -> Case:
    return random_case(5, 1, k=1)


def fewer_columns_than_a_group() -> Case:
    return random_case(40, 7, k=7)


def most_of_the_vocabulary() -> Case:
    return random_case(40, 300, k=250)


def no_top() -> Case:
    return random_case(40, 900, k=0)


def many_targets() -> Case:
    return random_case(40, 1000, n_heads=2, m=6)


def no_targets() -> Case:
    return random_case(40, 300, m=0)


def ignored_targets() -> Case:
    case = random_case(50, 900, n_heads=2, m=3)
    targets = case.targets.clone()
    targets[::2, 0] = -1
    targets[7] = -1
    return case._replace(targets=targets)


def peaked() -> Case:
    """Every row is a column of W_O @ W_U, many times over; the same token ten times in sixty rows."""
    case = random_case(60, 3000, d_head=32, d_model=96)
    ids = torch.arange(60) // 10 * 483
    written = (case.W_O[0][0] @ case.W_U)[:, ids].T
    return case._replace(z=[written[:, None] * 3], targets=torch.stack([ids, (ids + 1) % 3000], dim=1))


def beyond_exp() -> Case:
    return random_case(40, 2500, n_heads=2, scale=150.0)


def all_very_negative() -> Case:
    """Every contribution below -300, where exp gives 0."""
    case = random_case(40, 900, d_head=16, d_model=20)
    z, W_O, W_U = case.z[0].clone(), case.W_O[0].clone(), case.W_U.clone()
    z[..., 0], W_O[0, 0], W_O[0, :, 0], W_O[0, 0, 0], W_U[0] = -600.0, 0.0, 0.0, 1.0, 1.0
    return case._replace(z=[z], W_O=[W_O], W_U=W_U)


def nothing() -> Case:
    """All logits are 0 and equal."""
    case = random_case(40, 900, n_heads=2)
    return case._replace(z=[torch.zeros_like(case.z[0])])


def layout(name: str) -> Case:
    case = random_case(40, 1501, n_heads=2)
    return case._replace(W_U=unembedding_layouts(case.W_U)[name])


def strided() -> Case:
    """z and W_O as slices of larger tensors."""
    case = random_case(40, 900, n_heads=3)
    z = torch.full((80, 5, 32), math.nan)[::2, 1:4, ::2].copy_(case.z[0])
    W_O = torch.full((3, 40, 16), math.nan).mT.copy_(case.W_O[0])
    return case._replace(z=[z], W_O=[W_O])


def in_dtype(dtype: torch.dtype, *, weights_only: bool = False) -> Case:
    case = random_case(150, 1800, d_head=32, d_model=96)
    z = case.z if weights_only else [z.to(dtype) for z in case.z]
    return case._replace(z=z, W_O=[W.to(dtype) for W in case.W_O], W_U=case.W_U.to(dtype))


CASES: dict[str, Callable[[], Case]] = {
    **{f"ragged_{n}": partial(random_case, n, 50257) for n in (1, 31, 123, 255, 507)},
    **{f"d_head_{d_head}": partial(of_length, d_head) for d_head in (32, 64, 80, 128, 256)},
    **{name: partial(layout, name) for name in ("transposed", "columns_of_a_larger_matrix", "every_other_column")},
    **{
        case.__name__: case
        for case in (
            few_rows, many_rows, layers, layers_of_different_heads, one_column, fewer_columns_than_a_group,
            most_of_the_vocabulary, no_top, many_targets, no_targets, ignored_targets, peaked, beyond_exp,
            all_very_negative, nothing, strided,
        )
    },
    "bfloat16": partial(in_dtype, torch.bfloat16),
    "float16": partial(in_dtype, torch.float16),
    "mixed_dtypes": partial(in_dtype, torch.bfloat16, weights_only=True),
}  # fmt: skip


def contributions(case: Case, dtype: torch.dtype) -> Tensor:
    """The expression that a user would write, ``[row, head, d_vocab]``."""
    layers = [torch.einsum("rhi,hid->rhd", z.to(dtype), W_O.to(dtype)) for z, W_O in zip(case.z, case.W_O)]
    return torch.cat(layers, dim=1) @ case.W_U.to(dtype)


def check(
    case: Case, found: HeadLogits, *, dtype: torch.dtype = torch.float32, floor: float = 1e-5, factor: float = 3.0
) -> None:
    """Errors against float64 within the rule; ids give their values; ranks right but for what rounding can swap."""
    exact, plain = contributions(case, torch.float64), contributions(case, dtype).double()
    allowed = factor * largest_error(plain, exact) + floor
    rule = partial(assert_within_rule, factor=factor, floor=floor)
    if case.k:
        for largest, values, ids in (
            (True, found.top_values, found.top_ids),
            (False, found.bottom_values, found.bottom_ids),
        ):
            best = exact.topk(case.k, largest=largest).values
            assert values is not None
            assert ids is not None
            rule(values, best, plain.topk(case.k, largest=largest).values)
            assert largest_error(exact.gather(2, ids.cpu()), values.double()) <= allowed
            assert (ids.sort(dim=2).values.diff(dim=2) > 0).all(), "the same token twice"
            assert (values.diff(dim=2) <= 0 if largest else values.diff(dim=2) >= 0).all()
    if found.logsumexp is not None:
        rule(found.logsumexp, exact.logsumexp(-1), plain.logsumexp(-1))
    if found.target_logit is not None:
        ignored = (case.targets == -1)[:, None].expand(-1, exact.shape[1], -1)
        ids = case.targets.clamp_min(0)[:, None].expand(ignored.shape)
        wanted = exact.gather(2, ids)
        rule(
            found.target_logit, wanted.masked_fill(ignored, math.nan),
            plain.gather(2, ids).masked_fill(ignored, math.nan),
        )  # fmt: skip
        assert found.rank is not None
        assert (found.rank.cpu()[ignored] == -1).all()
        check_ranks(found.rank.cpu(), exact, wanted, ignored, 2 * allowed)


def check_ranks(rank: Tensor, exact: Tensor, wanted: Tensor, ignored: Tensor, tolerance: float) -> None:
    """No fewer than the tokens that are clearly larger, no more than those that could be; exact where all are equal."""
    for j in range(wanted.shape[2]):
        more, less = wanted[..., j, None] + tolerance, wanted[..., j, None] - tolerance
        here = ~ignored[..., j]
        assert ((exact > more).sum(-1) <= rank[..., j])[here].all()
        at_most = (exact > less).sum(-1) - 1  # all of these but the target itself
        assert (rank[..., j] <= at_most)[here].all()
    if not exact.any():
        assert (rank[~ignored] == 0).all()
