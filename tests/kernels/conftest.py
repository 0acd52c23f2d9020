"""Fixtures of the kernel tests."""

from collections.abc import Iterator

import pytest

from tests.kernels.kernel_checks import nan_filled_allocations


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Every ``torch.empty`` is filled with NaN."""
    with nan_filled_allocations():
        yield
