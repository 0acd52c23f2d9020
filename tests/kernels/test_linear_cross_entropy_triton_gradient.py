"""The backward kernels of ``linear_cross_entropy``, interpreted, and on a GPU where there is one.

Run as a script (``TRITON_INTERPRET=1 python -m tests.kernels.test_linear_cross_entropy_triton_gradient``), this file
runs the checks on the interpreted kernels and prints what failed, as JSON.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch

from fastinterp_kernels.common import Precision
from tests.kernels.kernel_checks import (
    allocations,
    cuda_peak_bytes,
    largest_error,
    report_checks,
    run_interpreted,
)
from tests.kernels.linear_cross_entropy_cases import (
    CASES,
    GRADIENT_CASES,
    Case,
    check_gradient,
    gradient,
    plain,
    random_case,
    run_triton,
    small_tiles,
    small_tiles_case,
    triton_gradient,
)

PRECISION_ERRORS: dict[Precision, float] = {"bf16x3": 1e-5, "tf32": 1e-3, "bf16": 3e-3}
OTHERS = ["tiles", "logsumexp_alone", "memory", "no_rows"]


class Checks:
    """Each check runs on ``device``; the tests are called by its name."""

    def __init__(self, device: str) -> None:
        self.device = device

    def all(self) -> dict[str, Callable[[], None]]:
        checks = {f"case-{name}": partial(self.case, name) for name in GRADIENT_CASES if name != "ragged_123"}
        checks |= {f"precision-{m}": partial(self.precision, floor, m) for m, floor in PRECISION_ERRORS.items()}
        return checks | {name: getattr(self, name) for name in OTHERS}

    def case(self, name: str) -> None:
        case = CASES[name]()
        check_gradient(case, triton_gradient(case.to(self.device)))

    def precision(self, floor: float, mode: Precision) -> None:
        """Not exact (the mode is used) and not coarser than it says."""
        case = random_case(64, 4000, d_model=64, scale=4.0)
        exact = gradient(case._replace(x=case.x.double()), partial(plain, dtype=torch.float64))
        assert floor <= largest_error(triton_gradient(case.to(self.device), mode), exact) <= 10 * floor

    def tiles(self) -> None:
        with small_tiles():
            for layout in ("row_major", "transposed"):
                case = small_tiles_case(layout)
                check_gradient(case, triton_gradient(case.to(self.device)))

    def logsumexp_alone(self) -> None:
        case = random_case(50, 3000)._replace(kl_from=None)
        case = case._replace(targets=case.targets[:, :0])
        found = gradient(case.to(self.device), run_triton).cpu()
        check_gradient(case, found)

    def memory(self) -> None:
        """300 x 30,000 slopes would take 36 MB, and again as much for the logits of kl_from."""
        case = random_case(300, 30_000, d_model=64).to(self.device)
        x = case.x.clone().requires_grad_()
        loss = run_triton(case._replace(x=x), kl_from=case.kl_from).kl.sum()
        held = cuda_peak_bytes(loss.backward) if self.device == "cuda" else allocations(loss.backward).peak
        assert 20 * 2**20 < held < 40 * 2**20, held

    def no_rows(self) -> None:
        arguments = torch.zeros(0, 8), torch.zeros(8, 50), torch.zeros(0, 2, dtype=torch.long)
        case = Case(*arguments).to(self.device)
        x = case.x.clone().requires_grad_()
        run_triton(case._replace(x=x)).logsumexp.sum().backward()
        assert x.grad.shape == (0, 8)


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
    Checks("cuda").all()[name]()


@pytest.mark.gpu
def test_the_same_bits_in_every_run_on_a_gpu() -> None:
    case = random_case(300, 20_000, d_model=64).to("cuda")
    assert torch.equal(triton_gradient(case, "bf16x3"), triton_gradient(case, "bf16x3"))


@pytest.mark.gpu
def test_offsets_beyond_2_to_the_31_on_a_gpu() -> None:
    case = random_case(16, 3000)
    storage = torch.empty(15 * 2**28 + 3008, dtype=torch.bfloat16, device="cuda")  # 8 GB
    W_U = storage.as_strided((16, 3000), (2**28, 1)).copy_(case.W_U)
    case = case._replace(W_U=W_U.cpu().float(), x=case.x.bfloat16(), kl_from=case.kl_from.bfloat16())
    check_gradient(case, triton_gradient(case.to("cuda")._replace(W_U=W_U)))


if __name__ == "__main__":
    report_checks(Checks("cpu").all())
