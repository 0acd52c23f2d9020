"""Freed memory goes back to the system."""

import ctypes
import sys
from typing import Any

import psutil
import pytest
import torch

from fastinterp import ablate
from fastinterp.prompts import PromptSet
from fastinterp.sweep import resident

MIB = 1 << 20
N_BLOCKS = 400

glibc = pytest.mark.skipif(
    not sys.platform.startswith("linux") or not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="glibc is not here"
)


def _holes() -> list[torch.Tensor]:
    """Frees every second block: what is left keeps the heap from shrinking."""
    # Blocks of this size come from the heap once such a one has been freed.
    del [torch.empty(8 * MIB, dtype=torch.uint8)][:]
    blocks = [torch.ones(MIB, dtype=torch.uint8) for _ in range(N_BLOCKS)]
    return blocks[::2]


@glibc
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_is_freed_between_living_blocks_is_not_resident_afterwards(device: str) -> None:
    resident.give_back(torch.device("cpu"))
    process = psutil.Process()
    kept = _holes()
    before = process.memory_info().rss
    resident.give_back(torch.device(device))
    released = before - process.memory_info().rss
    assert len(kept) == N_BLOCKS // 2
    assert all(bool((block == 1).all()) for block in kept)
    if device == "cpu":
        assert released > N_BLOCKS // 4 * MIB
    else:
        assert released < N_BLOCKS // 8 * MIB


def test_nothing_happens_where_the_c_library_has_no_such_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resident, "_trim", lambda: None)
    resident.give_back(torch.device("cpu"))


@pytest.mark.parametrize("raised", [AttributeError, OSError])
def test_nothing_happens_where_the_call_cannot_be_found(
    monkeypatch: pytest.MonkeyPatch, raised: type[Exception]
) -> None:
    class Library:
        def __getattr__(self, name: str) -> object:
            raise raised(name)

    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(ctypes, "CDLL", lambda name: Library())
    resident._trim.cache_clear()
    try:
        assert resident._trim() is None
        resident.give_back(torch.device("cpu"))
    finally:
        resident._trim.cache_clear()


@pytest.mark.parametrize("platform", ["darwin", "win32"])
def test_other_systems_are_not_asked(monkeypatch: pytest.MonkeyPatch, platform: str) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: pytest.fail("asked"))
    resident._trim.cache_clear()
    try:
        assert resident._trim() is None
    finally:
        resident._trim.cache_clear()


@pytest.mark.parametrize(
    ("options", "times"),
    [
        (dict(memory_bytes=4 << 20), None),
        (dict(), 1),
        (dict(effect="both"), 2),
        (dict(mode="mean"), 2),
    ],
    ids=["layers of a limited sweep", "sweep", "total and direct", "mean"],
)
def test_when_memory_is_given_back(zoo: Any, monkeypatch: pytest.MonkeyPatch, options: Any, times: int | None) -> None:
    given: list[torch.device] = []
    for module in ("sweep.runner", "analyses.ablation", "analyses.replacements", "analyses.written"):
        monkeypatch.setattr(f"fastinterp.{module}.give_back", given.append)
    model = zoo.model("gpt2")
    ablate(model, PromptSet.of([[1, 2, 3], [4, 5, 6, 7]], answer=[8, 9], wrong=[9, 8]), **options)
    if times is None:
        assert len(given) >= model.spec.n_layers
    else:
        assert len(given) == times
    assert set(given) <= {torch.device("cpu")}
