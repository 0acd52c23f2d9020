"""``benchmarks.gpu``: errors, floors and targets of the kernels, and the dry run without a GPU."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.gpu import GPT2, TINY, Inputs, Job, Rates

H100 = Rates(
    products={"exact": 5e13, "tf32": 4e14, "bf16": 7.7e14, "bf16x3": 7.7e14 / 3}, exponentials=3.7e12, bytes=3e12
)


def _job(name: str) -> Job:
    return next(job for job in gpu._jobs() if job.name == name)


def test_floors_are_those_of_the_formulas() -> None:
    floors = gpu.floor_ms(_job("head_logprob"), GPT2, "bf16", H100)
    pairs = 10_000 * 144 * 50257
    assert floors["exponentials"] == pytest.approx(1e3 * pairs / 3.7e12)
    assert floors["products"] == pytest.approx(1e3 * (2 * 64 * pairs + 2 * 144 * 64 * 768 * 50257) / 7.7e14)
    split = gpu.floor_ms(_job("head_logprob"), GPT2, "bf16x3", H100)
    assert split["products"] == pytest.approx(3 * floors["products"])


def test_the_targets_of_a_device_run() -> None:
    targets = {job.name: job.targets_ms for job in gpu._jobs() if job.targets_ms}
    assert targets == {
        "head_logprob": {"bf16": 33.0, "bf16x3": 60.0},
        "direct_effect_loss": {"bf16": 40.0, "bf16x3": 70.0},
        "head_topk": {"bf16": 60.0, "bf16x3": 60.0},
        "head_gather": {"exact": 2.0},
    }
    for job in gpu._jobs():
        assert set(job.targets_ms) <= set(job.precisions)


def _blocked(job: Job, change: float = 0.0, place: int = 0) -> Job:
    """The job with the blocked backend in place of Triton's, and one of its values changed."""

    def run(inputs: Inputs, backend: str, precision: str) -> Sequence[torch.Tensor]:
        if backend == "reference":
            return job.run(inputs, backend, precision)
        found = [value.clone() for value in job.run(inputs, "blocked", precision)]
        found[-1].view(-1)[place] += change
        return found

    return replace(job, run=run)


@pytest.mark.parametrize(
    "name", ["head_logprob", "direct_effect_loss", "head_topk", "head_gather", "variant_residual", "delta_product"]
)
def test_a_wrong_value_is_found_wherever_it_is(name: str) -> None:
    shape = replace(TINY, n_rows=20, d_vocab=90)
    inputs = Inputs.random(shape, torch.device("cpu"))
    assert gpu.check_and_time(_blocked(_job(name)), inputs, shape, "exact", None)["correct"]
    for change, place in ((1e-3, -1), (float("nan"), 7)):
        row = gpu.check_and_time(_blocked(_job(name), change, place), inputs, shape, "exact", None)
        assert not row["correct"]
        assert row["largest_error"] > row["allowed_error"]


def test_times_stand_beside_floors_and_targets() -> None:
    shape = replace(TINY, n_rows=20, d_vocab=90)
    inputs = Inputs.random(shape, torch.device("cpu"))
    job = replace(_blocked(_job("head_logprob")), targets_ms={"bf16x3": 1e9, "bf16": 0.0})
    for precision, met in (("bf16x3", True), ("bf16", False)):
        row = gpu.check_and_time(job, inputs, shape, precision, H100, repeats=1)
        assert row["target_met"] is met
        assert row["fraction_of_floor"] == pytest.approx(max(row["floors_ms"].values()) / row["milliseconds"])
        assert "% of the floor" in gpu._line(row)


def test_the_inputs_have_logits_of_a_realistic_size() -> None:
    inputs = Inputs.random(replace(TINY, n_rows=200), torch.device("cpu"))
    contribution = inputs.z[0][:, 0] @ inputs.W_O[0][0] @ inputs.W_U
    for logits in (contribution, inputs.x @ inputs.W_U):
        assert 2.0 < float(logits.std()) < 4.0


def test_a_dry_run_needs_no_gpu(tmp_path: Path) -> None:
    path = tmp_path / "kernels.json"
    command = [sys.executable, "-m", "benchmarks.gpu", "--dry-run", "--json", str(path)]
    command += ["--only", "linear_cross_entropy,head_gather,attribution_reduce"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    results = json.loads(path.read_text())["results"]
    assert [(row["operation"], row["precision"]) for row in results] == [
        *(("linear_cross_entropy", precision) for precision in ("exact", "bf16x3", "tf32", "bf16")),
        ("head_gather", "exact"), ("attribution_reduce", "exact"),
    ]  # fmt: skip
    assert all(row["correct"] and row["largest_error"] > 0 for row in results)
    assert "target 2 ms: a device run reports it" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_without_a_device_the_dry_run_is_offered(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu.main([])
    assert "Type --dry-run" in capsys.readouterr().err


def test_an_unknown_operation(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", os.environ.get("TRITON_INTERPRET", "0"))
    with pytest.raises(SystemExit):
        gpu.main(["--dry-run", "--only", "head_gathers"])
    assert "choose from head_logprob" in capsys.readouterr().err
