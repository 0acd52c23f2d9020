"""``fastinterp_kernels.direct_effect_loss`` on the CPU against float64; the Triton kernels have a file of their own."""

import math
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from fastinterp_kernels.direct_effect_loss import DirectEffect, blocked, direct_effect_loss, edits
from tests.kernels.kernel_checks import allocations, assert_within_rule, largest_error, unembedding_layouts

# Cases, the same for every backend --------------------------------------------------------------------------


class Case(NamedTuple):
    x: Tensor
    z: list[Tensor]
    W_O: list[Tensor]
    W_U: Tensor
    targets: Tensor
    b_U: Tensor | None = None
    replacement: list[Tensor] | None = None
    softcap: float | None = None

    def to(self, device: str) -> "Case":
        def move(value: object) -> object:
            if isinstance(value, list):
                return [tensor.to(device) for tensor in value]
            return value.to(device) if isinstance(value, Tensor) else value

        return Case(*map(move, self))

    def run(self, **options: object) -> DirectEffect:
        given = {"kl": True, "rank": True, "replacement": self.replacement, "softcap": self.softcap} | options
        return direct_effect_loss(*self[:6], **given)


def random_case(
    n_rows: int, d_vocab: int, heads: tuple[tuple[int, int], ...] = ((2, 16),), d_model: int = 32, k: int = 1,
    scale: float = 3.0,
) -> Case:  # fmt: skip
    """Logits of standard deviation ``scale``; heads, ``(n_heads, d_head)`` by layer, that contribute a third of it."""
    generator = torch.Generator().manual_seed(n_rows)
    x = torch.randn(n_rows, d_model, generator=generator)
    W_U = torch.randn(d_model, d_vocab, generator=generator) * (scale / d_model**0.5)
    z = [torch.randn(n_rows, *of_layer, generator=generator) for of_layer in heads]
    W_O = [torch.randn(*of_layer, d_model, generator=generator) / (3 * of_layer[1] ** 0.5) for of_layer in heads]
    return Case(x, z, W_O, W_U, torch.randint(0, d_vocab, (n_rows, k), generator=generator))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def ragged(n_rows: int, d_vocab: int = 50257) -> Case:
    return random_case(n_rows, d_vocab, heads=((1, 8),), d_model=16)


def d_head(n: int) -> Case:
    return random_case(40, 700, heads=((2, n),), d_model=64)


def layers() -> Case:
    """Layers of different numbers and widths of heads."""
    return random_case(70, 3000, heads=((3, 8), (1, 24), (2, 16)), k=2)


def ragged_d_model() -> Case:
    return random_case(60, 700, heads=((2, 20),), d_model=75)


def one_column() -> Case:
    return random_case(45, 1)


def no_targets() -> Case:
    return random_case(45, 300, k=0)


def many_targets() -> Case:
    return random_case(45, 300, k=6)


def ignored_targets() -> Case:
    case = random_case(50, 2000, k=3)
    targets = case.targets.clone()
    targets[::2, 0] = -1
    targets[7] = -1
    return case._replace(targets=targets)


def mean() -> Case:
    case = layers()
    return case._replace(replacement=[z.mean(0, keepdim=True) for z in case.z])


def other_rows() -> Case:
    case = layers()
    return case._replace(replacement=[normal(*z.shape, seed=i) for i, z in enumerate(case.z)])


def bias() -> Case:
    case = layers()
    return case._replace(b_U=normal(3000) * 2)


def peaked() -> Case:
    """Every row is a column of W_U, many times over: probability 1 on one token, in any tile."""
    case = random_case(60, 5000, d_model=64)
    ids = torch.arange(60) * 83
    return case._replace(x=case.W_U.T[ids] * 40, targets=torch.stack([ids, (ids + 1) % 5000], dim=1))


def beyond_exp() -> Case:
    """Logits of several hundred of either sign that grow along the vocabulary, tile by tile."""
    case = random_case(50, 9000, scale=100.0)
    return case._replace(b_U=torch.linspace(-600.0, 600.0, 9000), targets=torch.arange(50)[:, None] * 179)


def heads_beyond_exp() -> Case:
    """Without one head the logits are several hundred lower or higher: no clean shift serves all pairs."""
    case = random_case(50, 4000, heads=((1, 16), (3, 16)))
    case.z[0][::3] *= 200
    return case._replace(
        x=case.x + torch.einsum("rhd,hdm->rm", case.z[0], case.W_O[0]) * torch.ones(50, 1).cumsum(0) / 25
    )


def all_negative() -> Case:
    return random_case(45, 3000)._replace(b_U=torch.full((3000,), -5000.0))


def masked_bias() -> Case:
    """-inf for the whole first tile of every backend, and for every third token after it."""
    case = random_case(50, 6000, k=2)
    b_U = normal(6000) * 2
    b_U[:2500] = -math.inf
    b_U[2500::3] = -math.inf
    return case._replace(b_U=b_U, targets=torch.tensor([[2501, 7]]).repeat(50, 1))


def all_masked() -> Case:
    return random_case(45, 300)._replace(b_U=torch.full((300,), -math.inf))


def softcap() -> Case:
    return random_case(50, 6000, scale=30.0)._replace(softcap=30.0)


def softcap_and_more() -> Case:
    case = mean()
    return case._replace(b_U=normal(3000) * 2, softcap=5.0)


def softcap_and_masked_bias() -> Case:
    return masked_bias()._replace(softcap=20.0)


def transposed() -> Case:
    """Views of ``[d_vocab, d_model]``, of ``[d_model, head * d_head]`` and of ``[head, row, d_head]``."""
    case = random_case(50, 3000)
    W_O = case.W_O[0].flatten(0, 1).T.contiguous().T.unflatten(0, (2, 16))
    z = case.z[0].transpose(0, 1).contiguous().transpose(0, 1)
    return case._replace(W_U=case.W_U.T.contiguous().T, W_O=[W_O], z=[z])


def columns_of_a_larger_matrix() -> Case:
    case = random_case(50, 3001)
    return case._replace(W_U=unembedding_layouts(case.W_U)["columns_of_a_larger_matrix"])


def equal_columns() -> Case:
    """Every token ten times over."""
    case = random_case(45, 200)
    return case._replace(W_U=case.W_U.repeat(1, 10))


def reduced(dtype: torch.dtype) -> Case:
    case = mean()._replace(b_U=normal(3000))
    to = lambda value: [v.to(dtype) for v in value] if isinstance(value, list) else value.to(dtype)  # noqa: E731
    return Case(*map(to, case[:4]), case.targets, to(case.b_U), to(case.replacement))


def mixed_dtypes() -> Case:
    case = layers()
    return case._replace(W_U=case.W_U.bfloat16(), z=[case.z[0].half(), *case.z[1:]])


CASES: dict[str, Callable[[], Case]] = {
    **{f"ragged_{n}": partial(ragged, n) for n in (1, 31, 123, 255, 507)},
    **{f"d_head_{n}": partial(d_head, n) for n in (32, 64, 80, 128, 256)},
    **{
        case.__name__: case
        for case in (
            layers, ragged_d_model, one_column, no_targets, many_targets, ignored_targets, mean, other_rows, bias,
            peaked, beyond_exp, heads_beyond_exp, all_negative, masked_bias, all_masked, softcap, softcap_and_more,
            softcap_and_masked_bias, transposed, columns_of_a_larger_matrix, equal_columns, mixed_dtypes,
        )
    },
    "bfloat16": partial(reduced, torch.bfloat16),
    "float16": partial(reduced, torch.float16),
}  # fmt: skip


def raw_logits(case: Case, dtype: torch.dtype) -> list[Tensor]:
    """Clean raw logits, and then those without each head, as a user would compute them."""
    W_U = case.W_U.to(dtype)
    clean = case.x.to(dtype) @ W_U
    if case.b_U is not None:
        clean = clean + case.b_U.to(dtype)
    without = []
    for i, (z, W_O) in enumerate(zip(case.z, case.W_O)):
        away = z.to(dtype) if case.replacement is None else z.to(dtype) - case.replacement[i].to(dtype)
        without += [clean - (away[:, h] @ W_O[h].to(dtype)) @ W_U for h in range(z.shape[1])]
    return [clean, *without]


def plain(case: Case, dtype: torch.dtype) -> DirectEffect:
    """The expression that a user would write; no ranks."""
    logits = [case.softcap * torch.tanh(raw / case.softcap) if case.softcap else raw for raw in raw_logits(case, dtype)]
    ids, ignored = case.targets.clamp_min(0), (case.targets == -1)[:, None]
    clean = logits[0].log_softmax(1)
    target_logit = torch.stack([edited.gather(1, ids) for edited in logits[1:]], 1).masked_fill(ignored, math.nan)
    logsumexp = torch.stack([edited.logsumexp(1) for edited in logits[1:]], 1)
    surprise = [(clean - edited.log_softmax(1)).masked_fill(clean == -math.inf, 0.0) for edited in logits[1:]]
    kl = torch.stack([(clean.exp() * values).sum(1) for values in surprise], 1)
    return DirectEffect(target_logit, logsumexp, None, kl)


def check(case: Case, found: DirectEffect, dtype: torch.dtype = torch.float32) -> None:
    """Errors by the rule against the plain expression in ``dtype``; ranks as exact as the logits."""
    exact, same = plain(case, torch.float64), plain(case, dtype)
    n_heads = sum(z.shape[1] for z in case.z)
    assert found.target_logit.shape == (len(case.x), n_heads, case.targets.shape[1])
    for get in (
        lambda o: o.target_logit,
        lambda o: o.logsumexp,
        lambda o: o.logsumexp[..., None] - o.target_logit,
        lambda o: o.kl,
    ):
        assert_within_rule(get(found), get(exact), get(same))
    if found.rank is not None:
        check_ranks(case, found.rank, largest_error(same.logsumexp, exact.logsumexp) + 1e-4)


def check_ranks(case: Case, rank: Tensor, margin: float) -> None:
    """A rank counts every token that is above the target by more than ``margin`` and none that is below by as much."""
    ids, ignored = case.targets.clamp_min(0), case.targets == -1
    margin *= 1 + float(case.x.abs().max()) / 10
    for head, raw in enumerate(raw_logits(case, torch.float64)[1:]):
        for j in range(ids.shape[1]):
            above = raw - raw.gather(1, ids[:, j, None])
            nan = raw.logsumexp(1).isnan() | ignored[:, j]
            here = rank[:, head, j].cpu()
            assert (here[nan] == -1).all()
            assert (here >= (above > margin).sum(1))[~nan].all()
            assert (here <= (above.scatter(1, ids[:, j, None], -math.inf) > -margin).sum(1))[~nan].all()


# Reference and blocked --------------------------------------------------------------------------------------

TILES, PAIRS = "tiles", "pairs"


@pytest.fixture(params=[TILES, PAIRS])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Both ways to evaluate, whatever would be less work."""
    monkeypatch.setattr(edits, "_explicit_is_less_work", lambda _: request.param == PAIRS)
    return str(request.param)


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("ragged_255", "ragged_507")])
def test_reference(name: str) -> None:
    case = CASES[name]()
    found, expected = case.run(backend="reference"), plain(case, torch.float64)
    torch.testing.assert_close(found._replace(rank=None), expected, rtol=0, atol=1e-9, equal_nan=True)
    check_ranks(case, found.rank, 1e-9)


@pytest.mark.parametrize("name", CASES)
def test_blocked(name: str, poisoned: None, way: str) -> None:
    case = CASES[name]()
    found = case.run(backend="blocked")
    assert found.logsumexp.dtype == found.target_logit.dtype == found.kl.dtype == torch.float32
    check(case, found)


def test_auto_is_blocked_and_only_what_is_asked_for() -> None:
    case = layers()
    found, everything = case.run(kl=False, rank=False), case.run(backend="blocked")
    assert found.rank is found.kl is None
    torch.testing.assert_close(found[:2], everything[:2], rtol=0, atol=0)


def test_a_layer_may_be_a_tensor() -> None:
    case = d_head(32)
    found = direct_effect_loss(case.x, case.z[0], case.W_O[0], *case[3:5], replacement=case.z[0].mean(0, keepdim=True))
    expected = case._replace(replacement=[case.z[0].mean(0, keepdim=True)]).run(kl=False, rank=False)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_large_softcap(way: str) -> None:
    """Rounding is relative to the logits, not to the softcap."""
    case = layers()._replace(softcap=5000.0)
    check(case, case.run(backend="blocked"))


def test_blocked_computes_float64_in_float64(way: str) -> None:
    case = mean()
    case = case._replace(W_O=[case.W_O[0].double(), *case.W_O[1:]])
    found = case.run()
    torch.testing.assert_close(found._replace(rank=None), plain(case, torch.float64), rtol=0, atol=1e-11)


def test_sums_that_leave_the_range_are_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    case = heads_beyond_exp()
    again = []
    fill = edits._fill_explicitly
    monkeypatch.setattr(
        edits, "_fill_explicitly", lambda e, b, pairs, out: (again.append(pairs), fill(e, b, pairs, out))
    )
    case.run(backend="blocked")
    exact = plain(case, torch.float64)
    change = exact.logsumexp - raw_logits(case, torch.float64)[0].logsumexp(1)[:, None]
    assert bool((change < -100).any() & (change > 100).any())
    assert torch.equal(again[0], (change > 88.7) | (change < -60 * math.log(2)))


def test_rows_are_taken_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch, way: str) -> None:
    monkeypatch.setattr(blocked, "_CLEAN_BYTES", 2**18)
    monkeypatch.setattr(blocked, "_MAX_ROWS", 64)
    monkeypatch.setattr(blocked, "_W_OV_BYTES", 1)
    for make in (softcap_and_more, other_rows):
        case = make()
        z, targets = [torch.cat([z] * 4) for z in case.z], torch.cat([case.targets] * 4)
        replacement = [r if len(r) == 1 else torch.cat([r] * 4) for r in case.replacement]
        case = case._replace(x=torch.cat([case.x] * 4), z=z, targets=targets, replacement=replacement)
        check(case, case.run(backend="blocked"))


PRECISIONS = {"bf16x3": (5e-6, 4e-4), "tf32": (5e-4, 3e-2), "bf16": (5e-3, 3e-1)}
"""The largest error of a mode lies between these: not exact (the mode is used), not coarser."""


@pytest.mark.parametrize("name", ["layers", "mean", "softcap"])
@pytest.mark.parametrize("mode", PRECISIONS)
def test_precision(mode: str, name: str, way: str) -> None:
    case = CASES[name]()
    low, high = PRECISIONS[mode]
    exact, found = plain(case, torch.float64), case.run(precision=mode)
    assert low <= largest_error(found.logsumexp, exact.logsumexp) <= high
    assert largest_error(found.kl, exact.kl) <= 2 * high
    assert largest_error(found.target_logit, exact.target_logit) <= 2e-5


@pytest.mark.parametrize(("where", "value"), [(0, math.inf), (2999, math.nan)])
def test_infinity_and_nan_are_not_swallowed(where: int, value: float, way: str) -> None:
    case = layers()
    b_U = torch.zeros(3000)
    b_U[where] = value
    found = case._replace(b_U=b_U).run(backend="blocked")
    torch.testing.assert_close(found.logsumexp, torch.full((70, 6), value), equal_nan=True)


def test_no_rows() -> None:
    case = layers()
    found = direct_effect_loss(case.x[:0], [z[:0] for z in case.z], *case[2:4], case.targets[:0], kl=True, rank=True)
    assert [t.shape for t in found] == [(0, 6, 2), (0, 6), (0, 6, 2), (0, 6)]


@pytest.mark.parametrize("softcap", [None, 30.0])
def test_blocked_memory(softcap: float | None) -> None:
    case = random_case(700, 9000, heads=((4, 16), (4, 16)), d_model=256)._replace(softcap=softcap)
    case = case._replace(replacement=[z.mean(0, keepdim=True) for z in case.z])
    held = allocations(lambda: case.run(backend="blocked"))
    assert held.peak <= 16 * 2**20
    assert allocations(lambda: raw_logits(case, torch.float32)).largest == 700 * 9000 * 4


@pytest.mark.parametrize("layout", ["row_major", "transposed", "columns_of_a_larger_matrix", "every_other_column"])
def test_blocked_does_not_copy_the_unembedding(layout: str, way: str) -> None:
    case = random_case(90, 50257, d_model=96)
    case = case._replace(W_U=unembedding_layouts(case.W_U)[layout])
    held = allocations(lambda: case.run(backend="blocked", kl=False, rank=way == TILES))
    assert held.peak <= 10 * 2**20 < case.W_U.numel() * 4
