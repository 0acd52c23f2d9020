"""The forward kernels of ``linear_cross_entropy``, interpreted, and on a GPU where there is one.

Run as a script (``TRITON_INTERPRET=1 python -m tests.kernels.test_linear_cross_entropy_triton``), this file runs the
checks on the interpreted kernels and prints what failed, as JSON.
"""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch

from fastinterp_kernels.common import Precision
from fastinterp_kernels.linear_cross_entropy import LinearCrossEntropy, linear_cross_entropy
from tests.kernels.kernel_checks import (
    allocations,
    columns_summed_alike,
    cuda_peak_bytes,
    largest_error,
    report_checks,
    run_interpreted,
    unembedding_layouts,
)
from tests.kernels.linear_cross_entropy_cases import (
    CASES,
    FEWER_COLUMNS,
    Case,
    check,
    check_ids,
    check_ties,
    on_cpu,
    plain,
    random_case,
    raw_logits,
    run_triton,
    small_tiles,
    small_tiles_case,
    tied_case,
)

PRECISION_ERRORS: dict[Precision, float] = {"bf16x3": 1e-5, "tf32": 1e-3, "bf16": 1e-2}
ALONE = ["ragged_31", "ragged_d_model", "peaked", "beyond_exp", "masked_bias", "all_masked", "softcap", "mixed_dtypes"]
OTHERS = ["tiles", "memory", "equal_columns", "nan", "no_rows", "refusals"]


class Checks:
    """Each check runs on ``device``; the tests are called by its name."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.cases = CASES | (FEWER_COLUMNS if device == "cpu" else {})

    def all(self) -> dict[str, Callable[[], None]]:
        checks: dict[str, Callable[[], None]] = {}
        checks |= {f"case-{name}": partial(self.case, name, everything=True) for name in CASES}
        checks |= {f"alone-{name}": partial(self.case, name, everything=False) for name in ALONE}
        checks |= {f"precision-{m}": partial(self.precision, floor, m) for m, floor in PRECISION_ERRORS.items()}
        checks |= {f"ties-{m}": partial(self.ties, m) for m in ("exact", *PRECISION_ERRORS)}
        return checks | {name: getattr(self, name) for name in OTHERS}

    def case(self, name: str, *, everything: bool) -> None:
        case = self.cases[name]().to(self.device)
        found = run_triton(case, **(case.options() if everything else {}))
        assert found.logsumexp.dtype == found.target_logit.dtype == torch.float32
        check(case.to("cpu"), on_cpu(found))

    def precision(self, floor: float, mode: Precision) -> None:
        """Not exact (the mode is used) and not coarser than it says."""
        case = random_case(64, 4000, d_model=64, scale=4.0)
        exact = plain(case, torch.float64)
        found = on_cpu(run_triton(case.to(self.device), precision=mode, **case.to(self.device).options()))
        assert floor <= largest_error(found.logsumexp, exact.logsumexp) <= 10 * floor
        assert floor / 10 <= largest_error(found.kl, exact.kl) <= 10 * floor
        assert largest_error(found.target_logit, exact.target_logit) <= 1e-5
        check_ids(case, found, raw_logits(case, torch.float64), 20 * floor)

    def ties(self, mode: Precision) -> None:
        case = tied_case()
        for W_U in unembedding_layouts(case.W_U).values():
            moved = case._replace(W_U=W_U).to(self.device)
            check_ties(case, on_cpu(run_triton(moved, precision=mode, rank=True, top1=True)))

    def tiles(self) -> None:
        with small_tiles():
            for layout in ("row_major", "transposed"):
                case = small_tiles_case(layout)
                check(case, on_cpu(run_triton(case.to(self.device), **case.to(self.device).options())))

    def memory(self) -> None:
        """60 x 150,000 logits would take 36 MB for each of x and kl_from, the parts of W_U 38 MB."""
        case = random_case(60, 150_000, d_model=64).to(self.device)
        case = case._replace(x=case.x[:, :63], W_U=case.W_U[:63], kl_from=case.kl_from[:, :63])

        def forward() -> LinearCrossEntropy:
            return run_triton(case, kl_from=case.kl_from, top1=True, precision="bf16x3")

        held = cuda_peak_bytes(forward) if self.device == "cuda" else allocations(forward).peak
        assert 30 * 2**20 < held < 40 * 2**20, held

    def equal_columns(self) -> None:
        """A target is not behind its own copies: its threshold has the bits that its logit has in a tile."""
        case = random_case(100, 4000, d_model=64)
        ids = (case.x @ case.W_U[:, :2000]).topk(5).indices
        case = case._replace(W_U=case.W_U[:, :2000].repeat(1, 2), targets=torch.cat([ids, ids + 2000], 1))
        with columns_summed_alike():
            found = on_cpu(run_triton(case.to(self.device), rank=True, top1=True))
        expected = torch.arange(5).mul(2).expand(100, 5)
        assert torch.equal(found.rank, torch.cat([expected, expected], 1))
        assert torch.equal(found.top1, ids[:, 0])

    def nan(self) -> None:
        case = random_case(4, 3000)
        b_U = torch.zeros(3000)
        b_U[2500] = math.nan
        case = case._replace(b_U=b_U).to(self.device)
        found = on_cpu(run_triton(case, **case.options()))
        assert found.logsumexp.isnan().all()
        assert found.kl.isnan().all()
        assert (found.rank == -1).all()
        assert (found.top1 == -1).all()

    def no_rows(self) -> None:
        arguments = torch.zeros(0, 8), torch.zeros(8, 50), torch.zeros(0, 2, dtype=torch.long)
        case = Case(*arguments, kl_from=torch.zeros(0, 8)).to(self.device)
        found = run_triton(case, **case.options())
        assert [tuple(value.shape) for value in found] == [(0, 2), (0,), (0, 2), (0,), (0,)]

    def refusals(self) -> None:
        case = random_case(2, 40).to(self.device)
        with pytest.raises(ValueError, match=r"x\.float\(\)"):
            run_triton(case._replace(x=case.x.double()))


NAMES = list(Checks("cpu").all())


@pytest.fixture(scope="module")
def interpreted() -> dict[str, str | None]:
    return run_interpreted(__file__)


@pytest.mark.parametrize("name", NAMES)
def test_interpreted(name: str, interpreted: dict[str, str | None]) -> None:
    assert interpreted[name] is None, interpreted[name]


@pytest.mark.gpu
@pytest.mark.parametrize("name", NAMES)
def test_on_a_gpu(name: str) -> None:
    # Freed blocks of the sizes that are about to be allocated, filled with NaN.
    stale = [torch.full((n,), math.nan, device="cuda") for n in (64, 512, 4096, 2**15, 2**18)]
    del stale
    Checks("cuda").all()[name]()


@pytest.mark.gpu
def test_auto_is_triton_on_a_gpu_and_blocked_for_float64() -> None:
    case = CASES["bias"]().to("cuda")
    auto = linear_cross_entropy(*case[:4])
    split = linear_cross_entropy(*case[:4], backend="triton", precision="bf16x3")
    torch.testing.assert_close(auto.logsumexp, split.logsumexp, rtol=0, atol=0)
    assert linear_cross_entropy(case.x.double(), *case[1:4]).logsumexp.dtype == torch.float64


@pytest.mark.gpu
def test_offsets_beyond_2_to_the_31_on_a_gpu() -> None:
    case = random_case(16, 3000)
    storage = torch.empty(15 * 2**28 + 3008, dtype=torch.bfloat16, device="cuda")  # 8 GB
    W_U = storage.as_strided((16, 3000), (2**28, 1)).copy_(case.W_U)
    case = case._replace(W_U=W_U.cpu().float(), x=case.x.bfloat16(), kl_from=case.kl_from.bfloat16())
    moved = case.to("cuda")._replace(W_U=W_U)
    check(case, on_cpu(run_triton(moved, **moved.options())))


if __name__ == "__main__":
    report_checks(Checks("cpu").all())
