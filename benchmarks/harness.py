"""One case: the parity check first, then interleaved repeats of every way to do the job, then one row.

A case whose parity check fails is not timed, so it has no speed-up that anybody could print.
"""

import random
import statistics
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from benchmarks import measure
from benchmarks.measure import Measurement, Shape
from benchmarks.models import Fixtures

Array: TypeAlias = npt.NDArray[np.floating[Any]]
Index: TypeAlias = tuple[int | slice, ...]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How long to measure.

    A baseline that needs more than ``full_seconds`` is sampled for about ``sample_seconds``.
    """

    repeats: int = 3
    full_seconds: float = 60.0
    sample_seconds: float = 15.0
    smallest_sample: int = 4
    seed: int = 0
    quick: bool = False


REFERENCE_ITEMS = 4

QUICK = Settings(repeats=1, full_seconds=4.0, sample_seconds=2.0, quick=True)


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """One honest way to do the job without fastinterp, as the loop that it is.

    ``step(item)`` does iteration ``item`` of ``n_iterations`` and returns a tensor; ``where(item)`` says
    which entries of the whole result of shape ``shape`` these are. So any part of the loop can be run, timed
    and compared. Without ``alternative`` it does less than the job, and is timed only to compare with: it is never the
    baseline that the speed-up is against.

    ``reference(item)`` is the same iteration in float64, where the loop's own float32 rounds off more than a case
    tolerates: then that is what results are compared with, in ``REFERENCE_ITEMS`` iterations.
    """

    name: str
    how: str
    shape: tuple[int, ...]
    n_iterations: int
    step: Callable[[int], torch.Tensor]
    where: Callable[[int], Index]
    alternative: bool = True
    reference: Callable[[int], torch.Tensor] | None = None

    def run(self, items: Sequence[int]) -> Array:
        """Returns the result of these iterations; NaN where none of them has an entry."""
        return self._collected(self.step, items)

    def expected(self, items: Sequence[int]) -> tuple[Array, npt.NDArray[np.bool_]]:
        """Runs these iterations once, and returns what to compare with, and where."""
        found = self.run(items)
        if self.reference is None:
            return found, self.computed(items)
        some = items[:: -(-len(items) // REFERENCE_ITEMS)]
        return self._collected(self.reference, some), self.computed(some)

    def _collected(self, step: Callable[[int], torch.Tensor], items: Sequence[int]) -> Array:
        # Results stay on the device until the loop is over, as a careful user would leave them there.
        parts = [step(item) for item in items]
        result = np.full(self.shape, np.nan, dtype=np.float64)
        for item, part in zip(items, parts):
            result[self.where(item)] = part.detach().cpu().numpy()
        return result

    def computed(self, items: Sequence[int]) -> npt.NDArray[np.bool_]:
        """True at the entries that these iterations compute."""
        mask = np.zeros(self.shape, dtype=bool)
        for item in items:
            mask[self.where(item)] = True
        return mask


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A case with its inputs: both ways to run it, and the operations that its definition needs."""

    workload: str
    n_tokens: int
    baselines: tuple[Baseline, ...]
    fast: Callable[[], Array]
    flops: float


@dataclass(frozen=True, kw_only=True)
class Case:
    """What is computed, and what a user would otherwise write. ``setup`` is not timed."""

    name: str
    what: str
    naive_way: str
    setup: Callable[[Fixtures], Prepared]
    tolerance: float = 1e-4


@dataclass(frozen=True, kw_only=True)
class BaselineRow:
    """A baseline's figures; seconds are of the whole loop, scaled up if ``timed_iterations < iterations``."""

    name: str
    how: str
    wall_seconds: float
    wall_seconds_repeats: list[float]
    timed_iterations: int
    iterations: int
    peak_memory_bytes: int
    tokens_per_second: float
    ratio: float


@dataclass(frozen=True, kw_only=True)
class FastRow:
    """fastinterp's figures."""

    wall_seconds: float
    wall_seconds_repeats: list[float]
    peak_memory_bytes: int
    tokens_per_second: float
    flops: float
    matmul_flops_per_second: float
    fraction_of_floor: float


@dataclass(frozen=True, kw_only=True)
class Row:
    """One line of the results. Without ``status="ok"`` there are no timings in it.

    ``ratio`` is against ``fastest_baseline``; the ratios against the others stand in ``baselines``.
    """

    case: str
    model: str
    status: Literal["ok", "parity failed", "error"]
    what: str
    workload: str = ""
    quick: bool = False
    measured_at: str = ""
    tolerance: float | None = None
    max_abs_difference: float | None = None
    baselines: tuple[BaselineRow, ...] = ()
    fast: FastRow | None = None
    fastest_baseline: str | None = None
    ratio: float | None = None
    error: str | None = None


class ParityError(Exception):
    """Two ways to do the same job disagree."""

    def __init__(self, message: str, max_abs_difference: float) -> None:
        super().__init__(message)
        self.max_abs_difference = max_abs_difference


def parity(naive: Array, fast: Array, computed: npt.NDArray[np.bool_], tolerance: float) -> float:
    """Returns the largest absolute difference at the ``computed`` entries; raises :class:`ParityError` above
    ``tolerance``.

    A missing value on either side, an empty comparison and another layout fail as well.
    """
    if naive.shape != fast.shape:
        raise ParityError(f"layouts differ: {naive.shape} and {fast.shape}", float("nan"))
    if not computed.any():
        raise ParityError("nothing to compare", float("nan"))
    if not np.isfinite(naive[computed]).all() or not np.isfinite(fast).all():
        raise ParityError("a result holds NaN or infinity", float("nan"))
    difference = float(np.abs(naive[computed] - fast[computed]).max())
    if not difference <= tolerance:
        raise ParityError(f"results differ by {difference:.3g}, more than {tolerance:g}", difference)
    return difference


def choose_items(n_iterations: int, seconds_per_iteration: float, settings: Settings) -> list[int]:
    """Returns the iterations to run: all of them, or a seeded random sample where all would take too long."""
    if n_iterations * seconds_per_iteration <= settings.full_seconds:
        return list(range(n_iterations))
    wanted = max(settings.smallest_sample, int(settings.sample_seconds / seconds_per_iteration))
    if wanted >= n_iterations:
        return list(range(n_iterations))
    return sorted(random.Random(settings.seed).sample(range(n_iterations), wanted))


def run_case(case: Case, fixtures: Fixtures, settings: Settings) -> Row:
    """Runs one case.

    Never raises for what goes wrong inside of it: the row says so, and other cases go on.
    """
    common: dict[str, Any] = {
        "case": case.name,
        "model": fixtures.name,
        "what": case.what,
        "quick": settings.quick,
        "tolerance": case.tolerance,
        "measured_at": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    try:
        prepared = case.setup(fixtures)
        common["workload"] = prepared.workload
        items = [_warm_up(baseline, fixtures.device, settings) for baseline in prepared.baselines]
        fast = prepared.fast()
        difference = 0.0
        for baseline, chosen in zip(prepared.baselines, items):
            # This run is the warm-up as well.
            naive, computed = baseline.expected(chosen)
            try:
                found = parity(naive, fast, computed, case.tolerance)
            except ParityError as error:
                raise ParityError(f"{baseline.name}: {error}", error.max_abs_difference) from error
            difference = max(difference, found)
        shapes = measure.matmul_shapes(fixtures.model.spec, fixtures.device)
        return Row(
            status="ok",
            max_abs_difference=difference,
            **_timings(prepared, items, shapes, fixtures.device, settings.repeats),
            **common,
        )
    except ParityError as error:
        found = error.max_abs_difference
        return Row(
            status="parity failed",
            max_abs_difference=None if np.isnan(found) else found,
            error=str(error),
            **common,
        )
    except Exception as error:
        traceback.print_exc()
        return Row(status="error", error=f"{type(error).__name__}: {error}", **common)


def _warm_up(baseline: Baseline, device: torch.device, settings: Settings) -> list[int]:
    """Runs a few iterations, the first of them unmeasured, and chooses by their speed which ones to time."""
    if baseline.n_iterations == 1:
        return [0]
    baseline.run([0])
    probe = [baseline.n_iterations // 2, baseline.n_iterations - 1]
    _, measured = measure.measure(lambda: baseline.run(probe), device)
    return choose_items(baseline.n_iterations, measured.wall_seconds / len(probe), settings)


def _timings(
    prepared: Prepared, items: Sequence[list[int]], shapes: list[Shape], device: torch.device, repeats: int
) -> dict[str, Any]:
    """Times everything in turn, ``repeats`` times over: a slow spell of the machine hits all alike."""
    naive_runs: list[list[Measurement]] = [[] for _ in prepared.baselines]
    fast_runs: list[Measurement] = []
    rate = measure.matmul_flops_per_second(shapes, device)
    for _ in range(repeats):
        for baseline, chosen, runs in zip(prepared.baselines, items, naive_runs):
            runs.append(measure.measure(lambda baseline=baseline, chosen=chosen: baseline.run(chosen), device)[1])
        fast_runs.append(measure.measure(prepared.fast, device)[1])
    rate = max(rate, measure.matmul_flops_per_second(shapes, device))

    fast_seconds = [run.wall_seconds for run in fast_runs]
    fast_median = statistics.median(fast_seconds)
    rows = []
    for baseline, chosen, runs in zip(prepared.baselines, items, naive_runs):
        scale = baseline.n_iterations / len(chosen)
        seconds = [run.wall_seconds * scale for run in runs]
        median = statistics.median(seconds)
        rows.append(
            BaselineRow(
                name=baseline.name,
                how=baseline.how,
                wall_seconds=median,
                wall_seconds_repeats=seconds,
                timed_iterations=len(chosen),
                iterations=baseline.n_iterations,
                peak_memory_bytes=max(run.peak_memory_bytes for run in runs),
                tokens_per_second=prepared.n_tokens / median,
                ratio=median / fast_median,
            )
        )
    does_the_job = [row for row, baseline in zip(rows, prepared.baselines) if baseline.alternative]
    fastest = min(does_the_job, key=lambda row: row.wall_seconds)
    fast = FastRow(
        wall_seconds=fast_median,
        wall_seconds_repeats=fast_seconds,
        peak_memory_bytes=max(run.peak_memory_bytes for run in fast_runs),
        tokens_per_second=prepared.n_tokens / fast_median,
        flops=prepared.flops,
        matmul_flops_per_second=rate,
        fraction_of_floor=prepared.flops / rate / fast_median,
    )
    return {"baselines": tuple(rows), "fast": fast, "fastest_baseline": fastest.name, "ratio": fastest.ratio}
