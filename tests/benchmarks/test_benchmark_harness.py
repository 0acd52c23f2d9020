"""The harness, with cases that are made up: what is compared, what is timed, and what a failure prevents."""

import dataclasses
import json
import types
from collections.abc import Callable
from pathlib import Path
from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks import __main__ as command
from benchmarks import measure, models
from benchmarks.environment import commit, device_name, environment, gpu_name
from benchmarks.harness import (
    QUICK,
    Array,
    Baseline,
    Case,
    ParityError,
    Prepared,
    Row,
    Settings,
    choose_items,
    parity,
    run_case,
)
from fastinterp.model.products import Products

CPU = torch.device("cpu")
TRUTH = np.arange(12.0).reshape(4, 3)


@pytest.fixture
def fixtures(monkeypatch: pytest.MonkeyPatch) -> models.Fixtures:
    monkeypatch.setattr(measure, "matmul_shapes", lambda spec, device: [(8, 8, 8)])
    # Collecting garbage before every run takes a while in a process that holds all that tests hold.
    monkeypatch.setattr(measure, "_release_memory", lambda device: None)
    return models.Fixtures(name="toy", model=types.SimpleNamespace(spec=None), bridge=None, device=CPU)


def rows_of(truth: Array, name: str = "loop", log: list[str] | None = None) -> Baseline:
    """A loop that computes one row per iteration."""

    def step(item: int) -> torch.Tensor:
        if log is not None:
            log.append(f"{name}{item}")
        return torch.tensor(truth[item])

    return Baseline(
        name=name, how="row by row", shape=truth.shape, n_iterations=4, step=step, where=lambda item: (item,)
    )


def case_of(*baselines: Baseline, fast: Callable[[], Array] = lambda: TRUTH, name: str = "toy_case") -> Case:
    prepared = Prepared(workload="4 x 3", n_tokens=40, baselines=baselines, fast=fast, flops=1000.0)
    return Case(name=name, what="rows", naive_way="row by row", setup=lambda fixtures: prepared)


def test_baseline_fills_only_what_its_iterations_compute() -> None:
    found = rows_of(TRUTH).run([2, 0])
    np.testing.assert_array_equal(found[[0, 2]], TRUTH[[0, 2]])
    assert np.isnan(found[[1, 3]]).all()
    assert rows_of(TRUTH).computed([2, 0]).tolist() == [[True] * 3, [False] * 3, [True] * 3, [False] * 3]


def test_parity_returns_the_largest_difference_of_computed_entries() -> None:
    fast = TRUTH.copy()
    fast[1, 1] += 3e-5
    fast[3, 0] += 1.0
    computed = np.ones_like(TRUTH, dtype=bool)
    computed[3] = False
    assert parity(TRUTH, fast, computed, 1e-4) == pytest.approx(3e-5)
    computed[3] = True
    with pytest.raises(ParityError, match=r"differ by 1, more than 0\.0001") as caught:
        parity(TRUTH, fast, computed, 1e-4)
    assert caught.value.max_abs_difference == 1.0


@pytest.mark.parametrize(
    ("naive", "fast", "computed", "message"),
    [
        (TRUTH, TRUTH.T, np.ones((4, 3), dtype=bool), "layouts differ"),
        (TRUTH, TRUTH, np.zeros((4, 3), dtype=bool), "nothing to compare"),
        (np.where(TRUTH == 5, np.nan, TRUTH), TRUTH, np.ones((4, 3), dtype=bool), "NaN"),
        (TRUTH, np.where(TRUTH == 5, np.nan, TRUTH), np.ones((4, 3), dtype=bool), "NaN"),
        (TRUTH, np.where(TRUTH == 5, np.inf, TRUTH), TRUTH < 5, "infinity"),
    ],
)
def test_parity_refuses_what_cannot_be_compared(naive: Array, fast: Array, computed: Array, message: str) -> None:
    with pytest.raises(ParityError, match=message):
        parity(naive, fast, computed, 1e-4)


def test_all_iterations_are_timed_up_to_the_limit() -> None:
    assert choose_items(60, 1.0, Settings()) == list(range(60))
    assert len(choose_items(61, 1.0, Settings())) == 15


def test_samples_are_seeded_spread_out_and_never_empty() -> None:
    first = choose_items(1000, 1.0, Settings(seed=1))
    assert first == choose_items(1000, 1.0, Settings(seed=1)) == sorted(set(first))
    assert first != choose_items(1000, 1.0, Settings(seed=2))
    assert max(first) > 500
    assert len(choose_items(1000, 100.0, Settings())) == 4
    assert choose_items(3, 100.0, Settings()) == [0, 1, 2]


def test_repeats_are_interleaved_after_a_warm_up_of_each(fixtures: models.Fixtures) -> None:
    log: list[str] = []

    def fast() -> Array:
        log.append("fast")
        return TRUTH

    row = run_case(case_of(rows_of(TRUTH, "a", log), rows_of(TRUTH, "b", log), fast=fast), fixtures, Settings())
    assert row.status == "ok"
    one_repeat = [f"a{item}" for item in range(4)] + [f"b{item}" for item in range(4)] + ["fast"]
    assert log[-3 * len(one_repeat) :] == 3 * one_repeat
    warm_up = log[: -3 * len(one_repeat)]
    assert {"a0", "b0", "fast"} <= set(warm_up)


def test_figures_follow_from_the_runs(fixtures: models.Fixtures, monkeypatch: pytest.MonkeyPatch) -> None:
    fast_seconds = iter([9.0, 2.0, 1.0])

    def fake_measure(function: Callable[[], object], device: torch.device) -> tuple[object, measure.Measurement]:
        result = function()
        # A loop takes 10 s per iteration ("slow") or 5 s ("quick"); fastinterp what the list above says.
        seconds = next(fast_seconds) if result is TRUTH else per_iteration[0] * np.isfinite(result).sum() / 3
        per_iteration.append(per_iteration.pop(0)) if result is not TRUTH else None
        return result, measure.Measurement(wall_seconds=float(seconds), peak_memory_bytes=int(seconds))

    per_iteration = [10.0, 5.0]
    monkeypatch.setattr(measure, "measure", fake_measure)
    monkeypatch.setattr(measure, "matmul_flops_per_second", lambda shapes, device: 1000.0)
    settings = Settings(full_seconds=30.0, sample_seconds=20.0, smallest_sample=1)
    row = run_case(case_of(rows_of(TRUTH, "slow"), rows_of(TRUTH, "quick")), fixtures, settings)

    assert row.status == "ok", row.error
    assert row.fast is not None
    slow, quick = row.baselines
    # "slow" would need 40 s: two of its four iterations are timed, and scaled up. "quick" needs 20 s.
    assert (slow.timed_iterations, slow.iterations, slow.wall_seconds) == (2, 4, 40.0)
    assert (quick.timed_iterations, quick.iterations, quick.wall_seconds) == (4, 4, 20.0)
    assert row.fast.wall_seconds == 2.0
    assert row.fast.wall_seconds_repeats == [9.0, 2.0, 1.0]
    assert (slow.ratio, quick.ratio) == (20.0, 10.0)
    assert (row.fastest_baseline, row.ratio) == ("quick", 10.0)
    assert (slow.peak_memory_bytes, quick.peak_memory_bytes, row.fast.peak_memory_bytes) == (20, 20, 9)
    assert (quick.tokens_per_second, row.fast.tokens_per_second) == (2.0, 20.0)
    assert row.fast.fraction_of_floor == 0.5


def test_what_does_less_than_the_job_is_not_the_fastest_way_to_do_it(fixtures: models.Fixtures) -> None:
    less = dataclasses.replace(rows_of(TRUTH, "less"), where=lambda item: (item % 2,), alternative=False)
    less = dataclasses.replace(less, step=lambda item: torch.tensor(TRUTH[item % 2]), n_iterations=1)
    row = run_case(case_of(rows_of(TRUTH, "whole"), less), fixtures, QUICK)
    assert row.status == "ok", row.error
    assert [baseline.name for baseline in row.baselines] == ["whole", "less"]
    assert row.fastest_baseline == "whole"
    assert row.ratio == row.baselines[0].ratio


def test_a_difference_in_any_baseline_prevents_every_timing(fixtures: models.Fixtures) -> None:
    log: list[str] = []
    wrong = TRUTH.copy()
    wrong[3, 2] += 0.01
    row = run_case(case_of(rows_of(TRUTH, "right"), rows_of(wrong, "wrong", log)), fixtures, Settings())
    assert (row.status, row.ratio, row.baselines, row.fast) == ("parity failed", None, (), None)
    assert row.error is not None
    assert row.error.startswith("wrong: results differ by 0.01")
    assert row.max_abs_difference == pytest.approx(0.01)
    assert log.count("wrong1") == 1


def test_an_error_becomes_a_row(fixtures: models.Fixtures, capsys: pytest.CaptureFixture[str]) -> None:
    def broken() -> Array:
        raise RuntimeError("out of luck")

    row = run_case(case_of(rows_of(TRUTH), fast=broken), fixtures, Settings())
    assert (row.status, row.error, row.fast) == ("error", "RuntimeError: out of luck", None)
    assert "out of luck" in capsys.readouterr().err


def test_quick_is_marked_and_repeats_once(fixtures: models.Fixtures) -> None:
    row = run_case(case_of(rows_of(TRUTH)), fixtures, QUICK)
    assert row.quick
    assert row.fast is not None
    assert len(row.fast.wall_seconds_repeats) == 1


# The command line ---------------------------------------------------------------------------------------


@pytest.fixture
def cases(monkeypatch: pytest.MonkeyPatch, fixtures: models.Fixtures) -> dict[str, Case]:
    made = {
        "wrong": case_of(rows_of(TRUTH + 1), name="wrong"),
        "right": case_of(rows_of(TRUTH), name="right"),
    }
    monkeypatch.setattr(command, "CASES", made)
    monkeypatch.setattr(command, "load_fixtures", lambda name, device: fixtures)
    return made


@pytest.mark.usefixtures("cases")
def test_other_cases_go_on_and_the_exit_status_tells(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "new" / "results.json"
    assert command.main(["--json", str(path)]) == 1
    rows = {row["case"]: row for row in json.loads(path.read_text())["rows"]}
    assert {name: row["status"] for name, row in rows.items()} == {"wrong": "parity failed", "right": "ok"}
    assert rows["right"]["environment"]["threads"] == torch.get_num_threads()
    printed = capsys.readouterr().out
    assert "wrong: parity failed: loop: results differ by 1" in printed
    assert printed.count("x as fast as") == 1
    assert command.main(["--json", str(path), "--case", "right"]) == 0


@pytest.mark.usefixtures("cases")
def test_quick_results_are_not_filed_among_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    default = tmp_path / "cpu-2000-01-01.json"
    monkeypatch.setattr(command.table, "default_path", lambda device: default)
    assert command.main(["--quick", "--case", "right"]) == 0
    assert not default.exists()
    assert command.main(["--case", "right"]) == 0
    assert default.exists()
    assert str(default) in capsys.readouterr().out


@pytest.mark.usefixtures("cases")
def test_an_unknown_case_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        command.main(["--case", "right,lleft"])
    assert caught.value.code == 2
    assert "no case lleft: choose from wrong, right" in capsys.readouterr().err


# Measuring ----------------------------------------------------------------------------------------------


def test_peak_memory_is_seen_although_it_is_freed_again() -> None:
    def allocate() -> int:
        block = np.ones(25_000_000)
        for _ in range(20):
            block += 1
        return int(block[0])

    result, measured = measure.measure(allocate, CPU)
    assert result == 21
    assert 150e6 < measured.peak_memory_bytes < 400e6
    assert measured.wall_seconds > 0
    assert measure.measure(lambda: None, CPU)[1].peak_memory_bytes < 50e6


def test_matmul_rate_takes_the_best_shape() -> None:
    slow = measure.matmul_flops_per_second([(1, 1, 1)], CPU, repeats=2)
    assert measure.matmul_flops_per_second([(1, 1, 1), (256, 256, 256)], CPU, repeats=2) > 10 * slow


@pytest.mark.parametrize("quicker", ["EXACT", "SWIFT"])
def test_matmul_rate_takes_the_faster_library(monkeypatch: pytest.MonkeyPatch, quicker: str) -> None:
    clock = [0.0]

    def taking(seconds: float) -> Products:
        def multiply(name: str, x: Tensor, W: Tensor, b: Tensor | None) -> Tensor:
            clock[0] += seconds
            return x @ W

        return cast("Products", multiply)

    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock[0])
    for name in ("EXACT", "SWIFT"):
        monkeypatch.setattr(measure, name, taking(2.0 if name == quicker else 4.0))
    assert measure.matmul_flops_per_second([(2, 3, 4)], CPU, repeats=2) == pytest.approx(2 * 2 * 3 * 4 / 2.0)


@pytest.mark.parametrize(
    ("product", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100"),
        ("NVIDIA H200", "h200"),
        ("NVIDIA A100-SXM4-40GB", "a100"),
        ("Tesla V100-PCIE-16GB", "v100"),
        ("NVIDIA GeForce RTX 4090", "rtx-4090"),
    ],
)
def test_gpu_names(product: str, name: str) -> None:
    assert gpu_name(product) == name


def test_environment_says_where_and_with_what() -> None:
    found = environment(CPU)
    assert found["device"] == device_name(CPU)
    assert found["device"].startswith("cpu-")
    assert found["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert "transformer-lens" in found["versions"]
    assert found["commit"] == commit()


def test_rows_hold_no_timings_unless_ok() -> None:
    row = Row(case="a", model="m", status="error", what="w")
    assert (row.ratio, row.fast, row.baselines) == (None, None, ())


def test_results_are_compared_with_float64_where_there_is_a_reference() -> None:
    values = torch.arange(9.0)
    rough = Baseline(
        name="rough",
        how="",
        shape=(9,),
        n_iterations=9,
        step=lambda item: values[item] + 0.01,
        where=lambda item: (item,),
        reference=lambda item: values[item].double(),
    )
    expected, computed = rough.expected(range(9))
    assert computed.tolist() == [item in (0, 3, 6) for item in range(9)]
    assert parity(expected, values.double().numpy(), computed, 1e-4) == 0.0
    with pytest.raises(ParityError, match="differ"):
        parity(expected, values.double().numpy() + 0.001, computed, 1e-4)
    # Without one, with the loop itself.
    expected, computed = dataclasses.replace(rough, reference=None).expected(range(9))
    assert computed.all()
    with pytest.raises(ParityError, match=r"differ by 0\.01"):
        parity(expected, values.double().numpy(), computed, 1e-4)
