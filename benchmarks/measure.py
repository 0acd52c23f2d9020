"""Wall time, peak memory and the matrix-product rate of a machine."""

import contextlib
import ctypes
import gc
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import psutil
import torch
from torch import Tensor

from fastinterp.model.products import EXACT, SWIFT, Products

Result = TypeVar("Result")

Shape = tuple[int, int, int]
"""``(rows, inner, columns)`` of a matrix product."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One run: seconds on the wall clock, and how much memory it needed beyond what was there before it."""

    wall_seconds: float
    peak_memory_bytes: int


class ResidentMemory:
    """Samples this process's resident memory in a thread; ``increase_bytes`` is the peak minus the start."""

    def __init__(self, interval_seconds: float = 0.005) -> None:
        self._process = psutil.Process()
        self._interval_seconds = interval_seconds
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)
        self._start = self._peak = 0

    def __enter__(self) -> "ResidentMemory":
        self._start = self._peak = self._process.memory_info().rss
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self._peak = max(self._peak, self._process.memory_info().rss)

    def _sample(self) -> None:
        while not self._stop.wait(self._interval_seconds):
            self._peak = max(self._peak, self._process.memory_info().rss)

    @property
    def increase_bytes(self) -> int:
        """How far the peak lay above the start."""
        return self._peak - self._start


def measure(function: Callable[[], Result], device: torch.device) -> tuple[Result, Measurement]:
    """Runs ``function`` once and returns what it returned together with its measurement."""
    _release_memory(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result, wall_seconds = _timed(function, device)
        peak = torch.cuda.max_memory_allocated(device) - before
    else:
        with ResidentMemory() as memory:
            result, wall_seconds = _timed(function, device)
        peak = memory.increase_bytes
    return result, Measurement(wall_seconds=wall_seconds, peak_memory_bytes=peak)


def _timed(function: Callable[[], Result], device: torch.device) -> tuple[Result, float]:
    synchronize(device)
    start = time.perf_counter()
    result = function()
    synchronize(device)
    return result, time.perf_counter() - start


def synchronize(device: torch.device) -> None:
    """Waits for a GPU to finish what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _release_memory(device: torch.device) -> None:
    """Gives freed memory back to the system, lest what one run left behind hides the next one's increase."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return
    with contextlib.suppress(OSError, AttributeError):  # Only glibc has it.
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def matmul_shapes(spec: Any, device: torch.device) -> list[Shape]:
    """Matrix products of realistic size: a large square one and those of the model's own blocks."""
    on_gpu = device.type == "cuda"
    side, rows = (8192, 16384) if on_gpu else (2048, 2048)
    matrices = 2 if spec.mlp.kind == "gated" else 1
    return [
        (side, side, side),
        (rows, spec.d_model, matrices * spec.mlp.d_mlp),
        (rows, spec.mlp.d_mlp, spec.d_model),
        (rows, spec.d_model, spec.d_model),
    ]


def matmul_flops_per_second(shapes: Sequence[Shape], device: torch.device, repeats: int = 5) -> float:
    """Returns the best rate, in multiply-adds times two per second, of float32 products of these shapes.

    By either library that multiplies for fastinterp, whichever was faster: the floor is not to profit from a slow one.
    """
    best = 0.0
    for rows, inner, columns in shapes:
        left = torch.randn(rows, inner, device=device)
        right = torch.randn(inner, columns, device=device)
        for products in (EXACT, SWIFT):

            def multiply(products: Products = products, left: Tensor = left, right: Tensor = right) -> Tensor:
                return products("W_out", left, right, None)

            multiply()
            for _ in range(repeats):
                _, seconds = _timed(multiply, device)
                best = max(best, 2.0 * rows * inner * columns / seconds)
    return best
