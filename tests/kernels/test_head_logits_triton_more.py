"""The interpreted checks of ``head_logits`` that are no cases: precisions, small tiles, memory, NaN, ties.

``test_head_logits_triton.py`` has them, and runs them on a GPU too.
"""

import pytest

from tests.kernels.kernel_checks import report_checks, run_interpreted
from tests.kernels.test_head_logits_triton import Checks

NAMES = [name for name in Checks("cpu").all() if not name.startswith("case-")]


@pytest.fixture(scope="module")
def interpreted() -> dict[str, str | None]:
    return run_interpreted(__file__)


@pytest.mark.parametrize("name", NAMES)
def test_interpreted(name: str, interpreted: dict[str, str | None]) -> None:
    assert interpreted[name] is None, interpreted[name]


if __name__ == "__main__":
    report_checks({name: run for name, run in Checks("cpu").all().items() if name in NAMES})
