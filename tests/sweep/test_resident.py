"""Freed memory goes back to the system."""

import ctypes
import sys
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from fastinterp import ablate, activation_patch, circuit
from fastinterp.analyses import budget
from fastinterp.prompts import PromptSet
from fastinterp.sweep import memory, resident, runner

MIB = 1 << 20
N_BLOCKS = 400
PROMPTS = PromptSet.of([[1, 2, 3], [4, 5, 6, 7]], answer=[8, 9], wrong=[9, 8])

glibc = pytest.mark.skipif(
    not sys.platform.startswith("linux") or not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="glibc is not here"
)


@pytest.fixture(autouse=True)
def heap_trimmed(heap_not_trimmed: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here it is the C library's own call."""
    monkeypatch.setattr(resident, "_trim", heap_not_trimmed)


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
    ("options", "times"), [(dict(), 1), (dict(effect="both"), 2), (dict(mode="mean"), 2)], ids=["total", "both", "mean"]
)
def test_when_memory_is_given_back(zoo: Any, monkeypatch: pytest.MonkeyPatch, options: Any, times: int) -> None:
    given: list[torch.device] = []
    for module in ("ablation", "replacements", "written"):
        monkeypatch.setattr(f"fastinterp.analyses.{module}.give_back", given.append)
    ablate(zoo.model("gpt2"), PROMPTS, **options)
    assert given == [torch.device("cpu")] * times


@pytest.mark.parametrize("analysis", ["activation_patching", "circuits"])
def test_memory_is_given_back_after_every_batch(zoo: Any, monkeypatch: pytest.MonkeyPatch, analysis: str) -> None:
    given: list[torch.device] = []
    monkeypatch.setattr(f"fastinterp.analyses.{analysis}.give_back", given.append)
    pairs = PromptSet.of([[1, 2, 3]] * 3, corrupt=[[1, 5, 3]] * 3, answer=[8] * 3, wrong=[9] * 3)
    if analysis == "circuits":
        circuit(zoo.model("gpt2"), pairs, [(0, 1)], mode="resample")
    else:
        activation_patch(zoo.model("gpt2"), pairs, "z")
    assert given == [torch.device("cpu")]


@glibc
def test_what_has_grown_is_given_back_once() -> None:
    resident.give_back(torch.device("cpu"))
    kept = resident.Resident(torch.device("cpu"), N_BLOCKS // 4 * MIB)
    process = psutil.Process()
    alive = _holes()
    before = process.memory_info().rss
    kept.check()
    after = process.memory_info().rss
    assert before - after > N_BLOCKS // 4 * MIB
    more = _holes()
    held = process.memory_info().rss
    kept.check()
    assert held - process.memory_info().rss > N_BLOCKS // 4 * MIB
    assert len(alive) == len(more)


@glibc
@pytest.mark.parametrize(
    ("device", "allowed"), [("cpu", 2 * N_BLOCKS * MIB), ("cpu", None), ("meta", 0)], ids=["little", "no limit", "meta"]
)
def test_what_need_not_be_given_back_stays(monkeypatch: pytest.MonkeyPatch, device: str, allowed: int | None) -> None:
    monkeypatch.setattr(resident, "give_back", lambda device: pytest.fail("given back"))
    kept = resident.Resident(torch.device(device), allowed)
    assert len(_holes()) == N_BLOCKS // 2
    kept.check()


@glibc
def test_nothing_is_given_back_where_the_system_does_not_say_what_is_resident(monkeypatch: pytest.MonkeyPatch) -> None:
    def unreadable(path: Path) -> bytes:
        raise PermissionError(path)

    monkeypatch.setattr(resident, "give_back", lambda device: pytest.fail("given back"))
    before = resident.Resident(torch.device("cpu"), 0)
    monkeypatch.setattr(Path, "read_bytes", unreadable)
    alive = _holes()
    before.check()
    resident.Resident(torch.device("cpu"), 0).check()
    assert len(alive) == N_BLOCKS // 2


@pytest.mark.parametrize(
    ("options", "without_limit"),
    [
        (dict(memory_bytes=4 * MIB), None),
        (dict(memory_bytes=4 * MIB, pos=-1), None),
        (dict(pos=-1), 64 * MIB),
        (dict(), None),
    ],
    ids=["limited", "limited ends", "ends", "whole prompts"],
)
def test_sweeps_look_after_every_layer(
    zoo: Any, monkeypatch: pytest.MonkeyPatch, options: Any, without_limit: int | None
) -> None:
    allowed: list[int | None] = []
    planned: list[int] = []
    checks: list[None] = []

    class Watched(resident.Resident):
        def __init__(self, device: torch.device, allowed_bytes: int | None) -> None:
            allowed.append(allowed_bytes)
            super().__init__(device, allowed_bytes)

        def check(self) -> None:
            checks.append(None)
            super().check()

    def plan(*args: Any, budget: int | None) -> memory.SweepMemory:
        found = memory.plan_memory(*args, budget=budget)
        if budget is not None:
            planned.append(max(4 * MIB - found.peak_bytes, found.peak_bytes // 8))
        return found

    monkeypatch.setattr(runner, "Resident", Watched)
    monkeypatch.setattr(budget, "plan_memory", plan)
    model = zoo.model("gpt2")
    ablate(model, PromptSet.of([[1] * 6, [2] * 6], answer=[8, 9], wrong=[9, 8]), **options)
    assert len(checks) >= model.spec.n_layers
    assert len(allowed) == 1
    assert allowed[0] == (planned[-1] if "memory_bytes" in options else without_limit)


def test_looking_makes_no_new_path(monkeypatch):
    """Each would add strings to the interpreter's table, which then grows for as long as a sweep takes."""
    found = resident._resident_bytes()
    monkeypatch.setattr(resident, "Path", None)
    again = resident._resident_bytes()
    assert (found is None) == (again is None)


def test_the_rest_of_the_clean_run_is_looked_after_too(zoo: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Variants of the first layer leave the layers above it, of the clean run, for the end."""
    checks: list[None] = []
    monkeypatch.setattr(resident.Resident, "check", lambda self: checks.append(None))
    model = zoo.model("gpt2")
    ablate(model, PROMPTS, units=[(0, 0)])
    assert len(checks) == 2 * model.spec.n_layers - 1
