"""What ``fastinterp_kernels.direct_effect_loss`` needs and refuses."""

import pytest
import torch

from fastinterp_kernels.direct_effect_loss import direct_effect_loss
from tests.kernels.kernel_checks import run_python


def test_imports_and_runs_without_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import torch, fastinterp_kernels.direct_effect_loss as op\n"
        "one, z = torch.ones, torch.ones(2, 1, 3)\n"
        "args = one(2, 4), z, one(1, 3, 4), torch.zeros(4, 50), torch.ones(2, 1).int()\n"
        "for backend in ('auto', 'blocked', 'reference'):\n"
        "    print(round(float(op.direct_effect_loss(*args, backend=backend).logsumexp[0, 0]), 3))\n"
        "print([m for m in sys.modules if m.split('.')[0] in ('fastinterp', 'transformers', 'zarr')])"
    )
    assert run_python(code).split("\n")[:4] == ["3.912", "3.912", "3.912", "[]"]


# Errors -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"x": torch.zeros(2, 3, 8)}, ValueError, r"x\.flatten"),
        ({"x": torch.zeros(3, 8)}, ValueError, "same rows"),
        ({"z": [torch.zeros(2, 4, 3)] * 2}, ValueError, "2 layers"),
        ({"z": [torch.zeros(2, 4, 5)]}, ValueError, "layer 0"),
        ({"targets": torch.tensor([1, 2])}, ValueError, r"targets\[:, None\]"),
        ({"targets": torch.tensor([[1], [50]])}, ValueError, "between 1 and 50"),
        ({"W_U": torch.zeros(50, 8)}, ValueError, r"W_E\.T"),
        ({"W_U": torch.zeros(8, 0)}, ValueError, "0 columns"),
        ({"b_U": torch.zeros(49)}, ValueError, r"\[50\]"),
        ({"replacement": [torch.zeros(3, 4, 3)]}, ValueError, r"layer\.mean\(0, keepdim=True\)"),
        ({"replacement": [torch.zeros(2, 4, 3)] * 2}, ValueError, "2 layers and z has 1"),
        ({"x": torch.zeros(2, 8, dtype=torch.int64)}, TypeError, r"x\.float\(\)"),
        ({"softcap": -1.0}, ValueError, "positive"),
        ({"x": torch.zeros(2, 8, device="meta")}, ValueError, "meta"),
        ({"W_O": [torch.zeros(4, 3, 8, requires_grad=True)]}, ValueError, "no_grad"),
        ({"precision": "fp8"}, ValueError, "'bf16x3'"),
        ({"backend": "cuda"}, ValueError, "'blocked' or 'triton'"),
        ({"backend": "triton"}, ValueError, r"backend='blocked'.*TRITON_INTERPRET=1"),
    ],
)
def test_errors(change: dict, error: type[Exception], message: str) -> None:
    good = {
        "x": torch.zeros(2, 8), "z": [torch.zeros(2, 4, 3)], "W_O": [torch.zeros(4, 3, 8)],
        "W_U": torch.zeros(8, 50), "targets": torch.tensor([[1], [2]]),
    }  # fmt: skip
    direct_effect_loss(**good)
    with pytest.raises(error, match=message):
        direct_effect_loss(**(good | change))
