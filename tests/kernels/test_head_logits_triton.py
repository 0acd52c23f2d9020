"""The Triton kernels of ``fastinterp_kernels.head_logits``: interpreted, and on a GPU.

The interpreted cases are here, the other interpreted checks in ``test_head_logits_triton_more.py``. Run as a script
(``TRITON_INTERPRET=1 python -m tests.kernels.test_head_logits_triton``), this file runs the cases on the interpreted
kernels and prints what failed, as JSON.
"""

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from unittest import mock

import numpy
import pytest
import torch

from fastinterp_kernels.common import Precision
from fastinterp_kernels.head_logits import HeadLogits, head_logits, head_logits_mean, vector_logits
from tests.kernels.head_logits_cases import CASES, Case, check, contributions, random_case
from tests.kernels.kernel_checks import (
    allocations,
    columns_summed_alike,
    cuda_peak_bytes,
    fitted_tilings,
    largest_error,
    report_checks,
    run_interpreted,
    unembedding_layouts,
)

MIB = 2**20
PRECISION_ERRORS: dict[Precision, tuple[float, float]] = {
    "bf16x3": (2e-6, 1e-3), "tf32": (2e-4, 2e-2), "bf16": (2e-3, 0.2),
}  # fmt: skip
ORDERS = {"results": 20, "weights": 100}
"""Rows for which heads are written to the residual stream first, and for which ``W_O @ W_U`` is built."""

OTHERS = [
    "small_tiles", "alone", "mean", "vectors", "nan", "no_rows", "memory", "online", "copies", "refusal",
]  # fmt: skip


FEWER_COLUMNS = {f"ragged_{n}": partial(random_case, n, 3001) for n in (1, 123, 255, 507)}
"""Interpreted instead of those with 50257 columns, of which one case is enough: two tiles, the second ragged."""


@contextlib.contextmanager
def quick(n_rows: int, d_vocab: int) -> Iterator[None]:
    """Interpreted, tiles as large as these sizes need; and no warnings of infinities by the interpreter's numpy."""
    from fastinterp_kernels.head_logits import triton_engine

    with (
        fitted_tilings(triton_engine, row=n_rows, column=d_vocab),
        fitted_tilings(triton_engine, "group_tiling", row=n_rows),
        numpy.errstate(over="ignore", invalid="ignore"),
    ):
        yield


def on_cpu(found: HeadLogits) -> HeadLogits:
    return HeadLogits(*(None if field is None else field.cpu() for field in found))


class Checks:
    """Each check runs on ``device``; the tests are called by its name."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.cases = CASES | (FEWER_COLUMNS if device == "cpu" else {})

    def all(self) -> dict[str, Callable[[], None]]:
        checks: dict[str, Callable[[], None]] = {}
        checks |= {f"case-{name}": partial(self.case, name) for name in CASES}
        checks |= {
            f"{mode}-{order}": partial(self.precision, mode, n_rows)
            for mode in PRECISION_ERRORS
            for order, n_rows in ORDERS.items()
        }
        return checks | {name: getattr(self, name) for name in OTHERS}

    def run(self, case: Case, *, precision: Precision | None = "exact", **options: object) -> HeadLogits:
        case = case.to(self.device)
        with quick(len(case.z[0]), case.W_U.shape[1]):
            return on_cpu(
                head_logits(
                    case.z, case.W_O, case.W_U, **(options or case.everything()), backend="triton", precision=precision
                )
            )

    def case(self, name: str) -> None:
        case = self.cases[name]()
        if self.device == "cpu" and len(case.z[0]) > 64:  # the interpreter takes long for many rows' candidates
            case = case._replace(k=min(case.k, 3))
        found = self.run(case)
        assert all(field.dtype in (torch.float32, torch.int64) for field in found if field is not None)
        # Operands that are all in a reduced dtype are multiplied as they are, and so is W_O @ W_U.
        check(case, found, dtype=case.W_U.dtype if name in ("bfloat16", "float16") else torch.float32)

    def precision(self, mode: Precision, n_rows: int) -> None:
        """Not exact, which shows that the mode is in use, and no coarser than it; target logits are exact in all."""
        case = random_case(n_rows, 2000, d_head=32, d_model=96, k=4)
        exact = contributions(case, torch.float64)
        found = self.run(case, precision=mode)
        low, high = PRECISION_ERRORS[mode]
        for largest, values in ((True, found.top_values), (False, found.bottom_values)):
            error = largest_error(values, exact.topk(4, largest=largest).values)
            # The second pass computes tf32's candidates from float32 operands that nothing has rounded.
            assert (0.0 if mode == "tf32" else low) <= error <= high
        assert low / 10 <= largest_error(found.logsumexp, exact.logsumexp(-1)) <= high
        assert largest_error(found.target_logit[..., 0], exact.gather(2, case.targets[:, None])[..., 0]) <= 1e-5

    def small_tiles(self) -> None:
        """Several programs, tiles, slabs and chunks, ragged in all; vectors read in several blocks."""
        from fastinterp_kernels.head_logits import triton_engine
        from fastinterp_kernels.head_logits.triton_kernel import HeadTiling

        tiling = HeadTiling(row=64, column=128, d=16, num_warps=4, num_stages=2)
        with (
            mock.patch.object(triton_engine, "default_tiling", return_value=tiling),
            mock.patch.object(triton_engine, "_WEIGHT_BYTES", 1),
            mock.patch.object(triton_engine, "PROGRAMS", 4),
        ):
            for n_rows in (3, 70):
                case = random_case(n_rows, 1100, n_heads=2, m=6, k=2)
                check(case, self.run(case))

    def alone(self) -> None:
        case = random_case(40, 700, n_heads=2, m=2, k=3)
        every = self.run(case)
        for options, fields in (
            ({"k": 3}, {"top_values", "top_ids", "bottom_values", "bottom_ids"}),
            ({"k": 3, "bottom": False}, {"top_values", "top_ids"}),
            ({"logsumexp": True}, {"logsumexp"}),
            ({"targets": case.targets.to(self.device)}, {"target_logit"}),
            ({"targets": case.targets.to(self.device), "rank": True}, {"target_logit", "rank"}),
        ):
            found = self.run(case, **options)
            assert {name for name, field in found._asdict().items() if field is not None} == fields
            for name in fields:
                torch.testing.assert_close(getattr(found, name), getattr(every, name), rtol=0, atol=1e-5)

    def mean(self) -> None:
        case = random_case(60, 700, n_layers=2, n_heads=2).to(self.device)
        groups = (torch.arange(60) % 4).to(self.device)
        with quick(4, 700):
            found = head_logits_mean(
                case.z, case.W_O, case.W_U, groups, k=5, logsumexp=True, backend="triton", precision="exact"
            )
        exact = contributions(case.to("cpu"), torch.float64).unflatten(0, (15, 4)).mean(0)
        assert largest_error(found.logsumexp, exact.logsumexp(-1)) <= 1e-5
        assert largest_error(found.top_values, exact.topk(5).values) <= 1e-5

    def vectors(self) -> None:
        case = random_case(31, 2100, d_head=300, d_model=300, m=2, k=4)
        layouts = unembedding_layouts(case.W_U)
        for layout in ("transposed", "every_other_column"):
            case = case._replace(W_O=[torch.eye(300)[None]], W_U=layouts[layout])
            moved = case.to(self.device)
            with quick(31, 2100):
                found = vector_logits(
                    moved.z[0][:, 0], moved.W_U, **moved.everything(), backend="triton", precision="exact"
                )
            check(case, on_cpu(HeadLogits(*(field[:, None] for field in found))))

    def nan(self) -> None:
        """Stays in its row."""
        for n_rows in (4, 40):
            case = random_case(n_rows, 900, n_heads=2, k=3)
            clean = self.run(case)
            case.z[0][2, 1] = math.nan
            with warnings.catch_warnings():  # numpy's, of a slice with nothing but NaN
                warnings.simplefilter("ignore", RuntimeWarning)
                found = self.run(case)
            for before, after in zip(clean, found):
                kept = torch.ones(before.shape[:2], dtype=torch.bool)
                kept[2, 1] = False
                torch.testing.assert_close(after[kept], before[kept], rtol=0, atol=1e-5)
            assert found.logsumexp[2, 1].isnan()
            for values, ids in ((found.top_values, found.top_ids), (found.bottom_values, found.bottom_ids)):
                assert values[2, 1].isnan().all()
                assert (ids < 900).all()

    def no_rows(self) -> None:
        case = random_case(0, 50, n_heads=3, m=2, k=4)
        found = self.run(case)
        assert found.top_ids.shape == (0, 3, 4)
        assert found.logsumexp.shape == (0, 3)
        assert found.rank.shape == (0, 3, 2)

    def memory(self) -> None:
        for n_rows, n_heads, d_head, d_vocab in ((260, 1, 32, 70_000), (5, 40, 16, 85_000)):
            case = random_case(n_rows, d_vocab, n_heads=n_heads, d_head=d_head, d_model=128, k=3).to(self.device)
            case = case._replace(W_U=case.W_U.T.contiguous().T)
            options = case.everything()

            sizes = n_rows * n_heads, d_vocab

            def run(
                case: Case = case, options: dict[str, object] = options, sizes: tuple[int, int] = sizes
            ) -> HeadLogits:
                with quick(*sizes):
                    return head_logits(case.z, case.W_O, case.W_U, **options, backend="triton", precision="bf16x3")

            n_output = n_rows * n_heads * (2 * 3 * 12 + 4 + 4 + 8)
            assert n_rows * n_heads * d_vocab * 4 > 64 * MIB  # what is not held
            held = cuda_peak_bytes(run) if self.device == "cuda" else allocations(run).peak
            assert held <= n_output + 64 * MIB, held

    def online(self) -> None:
        """Rows whose sum leaves the range of floats, among rows whose does not, above and below."""
        case = random_case(120, 2500, n_heads=2)
        case.z[0][::3, 1] *= 60.0
        found = self.run(case)
        check(case, found)
        assert found.logsumexp[::3, 1].min() > 100

    def copies(self) -> None:
        """A target is not behind its own copies: its threshold has the bits that its logit has in a tile."""
        for n_rows in (3, 60):
            for precision in ("exact", "bf16x3", "bf16"):
                case = random_case(n_rows, 1000, n_heads=2, d_head=32, d_model=96, scale=300.0)
                exact = contributions(case, torch.float64)
                ids = exact[:, 0].topk(5).indices
                case = case._replace(W_U=case.W_U.repeat(1, 2))
                both = torch.cat([ids, ids + 1000], 1)
                with columns_summed_alike():
                    found = self.run(case, precision=precision, targets=both.to(self.device), rank=True)
                assert torch.equal(found.rank[:, 0, :5], found.rank[:, 0, 5:])
                assert (found.rank[:, 0] % 2 == 0).all(), "as many of each token are larger as of its copy"
                if precision != "bf16":
                    assert torch.equal(found.rank[:, 0, :5], torch.arange(5).mul(2).expand(n_rows, 5))

    def refusal(self) -> None:
        case = random_case(4, 50)
        with pytest.raises(ValueError, match=r"x\.float\(\)"):
            self.run(case._replace(W_U=case.W_U.double()), k=3)


NAMES = list(Checks("cpu").all())
SLOW = [
    "case-many_rows", "case-layers", "case-layers_of_different_heads", "case-ragged_255", "case-ragged_123",
    "case-columns_of_a_larger_matrix", "case-float16",
]  # fmt: skip
"""Left to a GPU; what they cover is covered by smaller cases and tiles too."""


@pytest.fixture(scope="module")
def interpreted() -> dict[str, str | None]:
    return run_interpreted(__file__)


INTERPRETED_CASES = [name for name in NAMES if name.startswith("case-") and name not in SLOW]


@pytest.mark.parametrize("name", INTERPRETED_CASES)
def test_interpreted(name: str, interpreted: dict[str, str | None]) -> None:
    assert interpreted[name] is None, interpreted[name]


# On a GPU ---------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_on_a_gpu(name: str) -> None:
    # Freed blocks of the sizes that are about to be allocated, filled with NaN.
    stale = [torch.full((n,), math.nan, device="cuda") for n in (64, 512, 4096, 2**15, 2**18, 2**21)]
    del stale
    Checks("cuda").all()[name]()


@pytest.mark.gpu
@pytest.mark.parametrize("options", [{"k": 10}, {"logsumexp": True}, {"k": 10, "logsumexp": True, "rank": True}])
def test_memory_of_many_tokens_on_a_gpu(options: dict[str, object]) -> None:
    case = random_case(10_000, 50257, n_layers=2, n_heads=12, d_head=64, d_model=768).to("cuda")
    options = {**options, "targets": case.targets}
    n_output = 10_000 * 24 * (4 + 8 * bool(options.get("rank")) + 4 * bool(options.get("logsumexp")))
    n_output += 10_000 * 24 * 2 * int(options.get("k", 0)) * 12
    held = cuda_peak_bytes(lambda: head_logits(case.z, case.W_O, case.W_U, **options))
    assert held <= n_output + 64 * MIB, held


@pytest.mark.gpu
def test_auto_is_triton_in_bf16x3_on_a_gpu_and_blocked_for_float64() -> None:
    case = random_case(100, 700).to("cuda")
    auto = head_logits(case.z, case.W_O, case.W_U, k=5)
    split = head_logits(case.z, case.W_O, case.W_U, k=5, backend="triton", precision="bf16x3")
    torch.testing.assert_close(auto.top_values, split.top_values, rtol=0, atol=0)
    assert head_logits([z.double() for z in case.z], case.W_O, case.W_U, k=5).top_values.dtype == torch.float64


if __name__ == "__main__":
    report_checks({name: run for name, run in Checks("cpu").all().items() if name in INTERPRETED_CASES})
