"""``fastinterp_kernels.head_logits``: results of the reference and the blocked form, memory, the other operations."""

import math
from functools import partial

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from fastinterp_kernels.head_logits import HeadLogits, head_gather, head_logits, head_logits_mean, vector_logits
from fastinterp_kernels.head_logits import blocked as blocked_module
from fastinterp_kernels.head_logits.plan import result_is_cheaper
from tests.kernels.head_logits_cases import CASES, Case, check, contributions, random_case
from tests.kernels.kernel_checks import allocations, assert_within_rule, largest_error, run_python, unembedding_layouts

MIB = 2**20


@pytest.mark.parametrize("name", [name for name in CASES if name not in ("ragged_255", "ragged_507")])
def test_reference_is_the_definition_in_float64(name: str) -> None:
    case = CASES[name]()
    found = head_logits(case.z, case.W_O, case.W_U, **case.everything(), backend="reference")
    assert found.logsumexp is not None
    assert found.logsumexp.dtype == torch.float64
    check(case, found, dtype=torch.float64, floor=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_blocked(name: str, poisoned: None) -> None:
    case = CASES[name]()
    found = head_logits(case.z, case.W_O, case.W_U, **case.everything())
    check(case, found)
    for field in found:
        assert field is None or field.dtype in (torch.float32, torch.int64)


def test_both_orders_of_multiplication_are_among_the_cases() -> None:
    def orders(name: str) -> set[bool]:
        case = CASES[name]()
        return {result_is_cheaper(z.shape[0], *W.shape[1:]) for z, W in zip(case.z, case.W_O)}

    assert orders("few_rows") == orders("ragged_1") == {True}
    assert orders("d_head_256") == orders("many_rows") == {False}
    assert orders("layers_of_different_heads") == {True, False}


@pytest.mark.parametrize("name", ["many_targets", "few_rows", "layers_of_different_heads", "ragged_31"])
def test_several_slabs_and_tiles(name: str, monkeypatch: pytest.MonkeyPatch, poisoned: None) -> None:
    """Sizes so small that heads, rows, columns and tiles are all cut, unevenly."""
    for size in ("_WEIGHT_BYTES", "_EXTREME_BYTES", "_KEPT_BYTES"):
        monkeypatch.setattr(blocked_module, size, 1)
    monkeypatch.setattr(blocked_module, "_MAX_ROWS", 13)
    monkeypatch.setattr(blocked_module, "TILE_BYTES", 2**14)
    case = CASES[name]()
    check(case, head_logits(case.z, case.W_O, case.W_U, **case.everything()))


def test_blocked_computes_float64_in_float64() -> None:
    case = random_case(123, 3000, n_heads=2, m=2)
    found = head_logits([z.double() for z in case.z], case.W_O, case.W_U, **case.everything())
    assert found.top_values is not None
    assert found.top_values.dtype == torch.float64
    check(case, found, dtype=torch.float64, floor=1e-11)


@pytest.mark.parametrize("n_rows", [5, 90])
def test_what_was_not_asked_for_is_none(n_rows: int) -> None:
    case = random_case(n_rows, 700, n_heads=2, m=2)
    every = head_logits(case.z, case.W_O, case.W_U, **case.everything())
    assert all(field is not None for field in every)
    for options, fields in (
        ({"k": 10}, {"top_values", "top_ids", "bottom_values", "bottom_ids"}),
        ({"k": 10, "bottom": False}, {"top_values", "top_ids"}),
        ({"logsumexp": True}, {"logsumexp"}),
        ({"targets": case.targets}, {"target_logit"}),
        ({"targets": case.targets, "rank": True}, {"target_logit", "rank"}),
    ):
        found = head_logits(case.z, case.W_O, case.W_U, **options)
        assert {name for name, field in found._asdict().items() if field is not None} == fields
        for name in fields:
            torch.testing.assert_close(getattr(found, name), getattr(every, name), rtol=0, atol=1e-5)


def test_a_tensor_is_a_layer() -> None:
    case = random_case(30, 700, n_heads=3)
    one = head_logits(case.z[0], case.W_O[0], case.W_U, k=4)
    listed = head_logits(case.z, case.W_O, case.W_U, k=4)
    torch.testing.assert_close(tuple(one[:4]), tuple(listed[:4]))


@pytest.mark.parametrize("n_rows", [1, 3, 5, 40, 300, 517])
@pytest.mark.parametrize("layout", ["row_major", "transposed"])
def test_copies_of_a_token_are_tied(n_rows: int, layout: str) -> None:
    """A target is not behind its own copies: its threshold has the bits that its logit has in a tile."""
    case = random_case(n_rows, 2000, n_heads=2, d_head=32, d_model=96)
    W_U = unembedding_layouts(case.W_U.repeat(1, 2))[layout]
    exact = contributions(case, torch.float64)
    ids = exact[:, 0].topk(5).indices
    found = head_logits(case.z, case.W_O, W_U, targets=torch.cat([ids, ids + 2000], 1), rank=True)
    expected = torch.arange(5).mul(2).expand(n_rows, 5)
    assert found.rank is not None
    assert torch.equal(found.rank[:, 0], torch.cat([expected, expected], 1))


@pytest.mark.parametrize("n_rows", [4, 200])
def test_nan_stays_in_its_row(n_rows: int) -> None:
    case = random_case(n_rows, 900, n_heads=2)
    clean = head_logits(case.z, case.W_O, case.W_U, **case.everything())
    case.z[0][2, 1] = math.nan
    found = head_logits(case.z, case.W_O, case.W_U, **case.everything())
    for before, after in zip(clean, found):
        kept = torch.ones(before.shape[:2], dtype=torch.bool)
        kept[2, 1] = False
        torch.testing.assert_close(after[kept], before[kept], rtol=0, atol=1e-5)
    assert found.logsumexp[2, 1].isnan()
    for values, ids in ((found.top_values, found.top_ids), (found.bottom_values, found.bottom_ids)):
        assert values[2, 1].isnan().all()
        assert (ids < 900).all()


def test_no_rows() -> None:
    case = random_case(0, 50, n_heads=3, m=2, k=4)
    for found in (
        head_logits(case.z, case.W_O, case.W_U, **case.everything()),
        head_logits(case.z, case.W_O, case.W_U, **case.everything(), backend="reference"),
    ):
        assert found.top_ids.shape == (0, 3, 4)
        assert found.logsumexp.shape == (0, 3)
        assert found.rank.shape == (0, 3, 2)


@pytest.mark.parametrize("n_rows", [3, 60])
@pytest.mark.parametrize("backend", ["blocked", "reference"])
def test_layers_without_heads(backend: str, n_rows: int) -> None:
    case = random_case(n_rows, 300, n_heads=2)
    none = random_case(n_rows, 300, n_heads=0, d_head=24)
    every = head_logits(case.z, case.W_O, case.W_U, **case.everything(), backend=backend)
    found = head_logits(
        none.z + case.z + none.z, none.W_O + case.W_O + none.W_O, case.W_U, **case.everything(), backend=backend
    )
    torch.testing.assert_close(tuple(found), tuple(every))
    alone = head_logits(none.z, none.W_O, case.W_U, **case.everything(), backend=backend)
    assert alone.top_ids.shape == (n_rows, 0, 10)
    assert alone.target_logit.shape == (n_rows, 0, 1)


def test_no_d_head() -> None:
    case = random_case(5, 300, d_head=16)
    with pytest.raises(ValueError, match=r"d_head is \[0\] by layer"):
        head_logits(case.z[0][..., :0], case.W_O[0][:, :0], case.W_U, k=3)


PRECISION_ERRORS = {"bf16x3": (2e-6, 1e-3), "tf32": (2e-4, 2e-2), "bf16": (2e-3, 0.2)}


@pytest.mark.parametrize("n_rows", [20, 200])
@pytest.mark.parametrize("precision", PRECISION_ERRORS)
def test_precisions_are_emulated(precision: str, n_rows: int) -> None:
    """Not exact, which shows that the mode is in use, and no coarser than it; target logits are exact in all."""
    case = random_case(n_rows, 2000, d_head=32, d_model=96)
    exact = contributions(case, torch.float64)
    found = head_logits(case.z, case.W_O, case.W_U, **case.everything(), precision=precision)
    low, high = PRECISION_ERRORS[precision]
    assert low <= largest_error(found.top_values, exact.topk(10).values) <= high
    assert low / 10 <= largest_error(found.logsumexp, exact.logsumexp(-1)) <= high
    assert largest_error(found.target_logit[..., 0], exact.gather(2, case.targets[:, None])[..., 0]) <= 1e-5


# Memory -----------------------------------------------------------------------------------------------------


def _bytes(found: HeadLogits) -> int:
    return sum(field.numel() * field.itemsize for field in found if field is not None)


@pytest.mark.parametrize(
    ("n_rows", "n_heads", "d_head", "d_vocab"), [(1500, 2, 32, 110_000), (600, 1, 96, 200_000), (5, 90, 16, 110_000)]
)
def test_memory_stays_below_64_mib(n_rows: int, n_heads: int, d_head: int, d_vocab: int) -> None:
    case = random_case(n_rows, d_vocab, n_heads=n_heads, d_head=d_head, d_model=128)
    W_U = case.W_U.T.contiguous().T
    out: list[HeadLogits] = []
    held = allocations(lambda: out.append(head_logits(case.z, case.W_O, W_U, **case.everything())))
    assert n_rows * n_heads * d_vocab * 4 > 2 * 64 * MIB  # what is not held
    assert held.peak - _bytes(out[0]) <= 64 * MIB


@pytest.mark.parametrize("n_rows", [5, 200])
@pytest.mark.parametrize("layout", ["columns_of_a_larger_matrix", "transposed"])
def test_the_unembedding_is_not_copied(layout: str, n_rows: int) -> None:
    case = random_case(n_rows, 30_000, d_model=96, k=3)
    W_U = unembedding_layouts(case.W_U)[layout]
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
        head_logits(case.z, case.W_O, W_U, **case.everything())
        W_U[:, ::2].clone()
    copied = [math.prod(e.input_shapes[0]) for e in profiled.events() if e.name in ("aten::clone", "aten::contiguous")]
    assert max(copied) == W_U.numel() // 2  # the clone above, which shows that a copy would be seen
    assert sum(size == max(copied) for size in copied) == 1
    held = allocations(lambda: head_logits(case.z, case.W_O, W_U, targets=case.targets))
    assert held.peak < W_U.numel() * 4 // 2


# The other operations ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["blocked", "reference"])
def test_mean_is_the_mean_of_contributions(backend: str) -> None:
    case = random_case(60, 700, n_layers=2, n_heads=2)
    groups = torch.arange(60) % 4
    groups[5:9] = -1
    targets = torch.randint(0, 700, (4, 2))
    options = {"k": 5, "targets": targets, "rank": True, "logsumexp": True}
    found = head_logits_mean(case.z, case.W_O, case.W_U, groups, **options, backend=backend)
    members = [(groups == group).nonzero()[:, 0] for group in range(4)]
    mean = Case([torch.stack([z[rows].mean(0) for rows in members]) for z in case.z], case.W_O, case.W_U, targets, 5)
    check(mean, found)
    exact = contributions(case, torch.float64)
    expected = torch.stack([exact[rows].mean(0) for rows in members])
    assert_within_rule(found.logsumexp, expected.logsumexp(-1), contributions(mean, torch.float32).logsumexp(-1))


@pytest.mark.parametrize(
    ("groups", "error", "message"),
    [
        (torch.zeros(3, dtype=torch.long), ValueError, r"\[5\], one number for each row"),
        (torch.tensor([0, 2, 2, 0, 0]), ValueError, "no row has the group 1.*return_inverse"),
        (torch.tensor([0, -2, 0, 0, 0]), ValueError, "-1 to leave a row out"),
        (torch.zeros(5), TypeError, r"groups\.long\(\)"),
    ],
)
def test_mean_refuses_groups(groups: torch.Tensor, error: type[Exception], message: str) -> None:
    case = random_case(5, 100)
    with pytest.raises(error, match=message):
        head_logits_mean(case.z, case.W_O, case.W_U, groups, k=3)


@pytest.mark.parametrize("n_rows", [1, 31, 507])
def test_gather_is_the_projection_on_directions(n_rows: int) -> None:
    case = random_case(n_rows, 60, n_layers=2, n_heads=3, d_head=24, d_model=72)
    exact, plain = contributions(case, torch.float64), contributions(case, torch.float32)
    assert_within_rule(head_gather(case.z, case.W_O, case.W_U), exact, plain)
    ids = case.targets[:, 0]
    found = head_gather(case.z, case.W_O, case.W_U[:, ids].T)
    at = ids[:, None, None].expand(-1, 6, 1)
    assert_within_rule(found, exact.gather(2, at)[..., 0], plain.gather(2, at)[..., 0])


def test_gather_takes_directions_that_fit_both_ways_only_when_told() -> None:
    case = random_case(40, 40, n_heads=2, d_model=40)
    with pytest.raises(ValueError, match="per_row=True or per_row=False"):
        head_gather(case.z, case.W_O, case.W_U)
    exact = contributions(case, torch.float64)
    assert largest_error(head_gather(case.z, case.W_O, case.W_U, per_row=False), exact) < 1e-4
    one_each = head_gather(case.z, case.W_O, case.W_U.T, per_row=True)
    assert largest_error(one_each, exact.diagonal(dim1=0, dim2=2).T) < 1e-4
    for directions in (torch.zeros(7, 3), torch.zeros(40)):
        with pytest.raises(ValueError, match=r"expected \[row, d_model\] = \(40, 40\)"):
            head_gather(case.z, case.W_O, directions)


def test_gather_in_bounded_memory() -> None:
    case = random_case(4000, 300, n_heads=8, d_head=32, d_model=256, m=3)
    for run in (
        partial(head_gather, case.z, case.W_O, case.W_U.T[:, :256].repeat(14, 1)[:4000]),
        partial(head_logits, case.z, case.W_O, case.W_U, targets=case.targets),
    ):
        held = allocations(run)
        assert held.peak < 4000 * 8 * 256 * 4  # the heads' results


@pytest.mark.parametrize("layout", ["row_major", "transposed", "columns_of_a_larger_matrix", "every_other_column"])
@pytest.mark.parametrize(("n_rows", "d_model"), [(1, 40), (31, 300), (600, 72)])
def test_vectors(n_rows: int, d_model: int, layout: str, poisoned: None) -> None:
    case = random_case(n_rows, 2100, d_head=d_model, d_model=d_model, m=2)
    case = case._replace(W_O=[torch.eye(d_model)[None]], W_U=unembedding_layouts(case.W_U)[layout])
    for backend in ("blocked", "reference"):
        found = vector_logits(case.z[0][:, 0], case.W_U, **case.everything(), backend=backend)
        assert found.top_ids.shape == (n_rows, 10)
        assert found.logsumexp.shape == (n_rows,)
        check(case, HeadLogits(*(field[:, None] for field in found)))


def test_importing_the_operation_does_not_import_triton() -> None:
    code = (
        "import torch, sys; sys.modules['triton'] = None\n"
        "from fastinterp_kernels.head_logits import head_logits\n"
        "z, W_O, W_U = torch.ones(1, 1, 2), torch.ones(1, 2, 3), torch.arange(30.0).view(3, 10)\n"
        "for backend in ('auto', 'blocked', 'reference'):\n"
        "    print(head_logits(z, W_O, W_U, k=2, backend=backend).top_ids.tolist())\n"
        "print([m for m in sys.modules if m.split('.')[0] in ('fastinterp', 'transformers', 'zarr')])"
    )
    assert run_python(code).split("\n")[:4] == ["[[[9, 8]]]"] * 3 + ["[]"]
