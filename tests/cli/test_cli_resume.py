"""A scan that is killed or interrupted goes on where it was, to the same bytes."""

import importlib.util
import json
import os
import random
import shlex
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

import fastinterp.engine.run
from fastinterp.store import describe_store

CHILD = Path(__file__).with_name("scan_child.py")
BLOCK_SIZE, N_BLOCKS = 3, 8
ANALYSES = ["--analysis", "dla,ablation", "--ablation-limit", "13"]


@dataclass(frozen=True)
class Job:
    """A scan that struck itself, and how it ended."""

    moment: str
    block: int
    signals: tuple[str, ...]
    argv: tuple[str, ...]
    out: Path
    status: int
    printed: str
    errors: str


def moments():
    """Seeded: every kind of moment, at blocks from the first to the last."""
    draw = random.Random(5)
    kinds = ["computed", "first_file", "last_file", "before_commit", "after_commit"]
    chosen = [(kind, draw.randrange(1, N_BLOCKS - 1), ("SIGKILL",)) for kind in kinds]
    chosen += [("before_commit", 0, ("SIGKILL",)), ("after_commit", N_BLOCKS - 1, ("SIGKILL",))]
    chosen += [("computed", 3, ("SIGINT",)), ("computed", 5, ("SIGTERM",))]
    chosen += [("stuck", 2, ("SIGINT", "SIGTERM")), ("loading", 0, ("SIGINT",))]
    return chosen


MOMENTS = moments()


@pytest.fixture(scope="module")
def jobs(zoo, prompt_file, tmp_path_factory):
    """Every moment in one process that forks for each, since importing takes longest."""
    folder = tmp_path_factory.mktemp("struck")
    common = ["scan", "--model", str(zoo.directory("gpt2")), "--prompts", str(prompt_file), *ANALYSES, "--out"]
    described = []
    for n, (moment, block, signals) in enumerate(MOMENTS):
        (folder / str(n)).mkdir()
        argv = [*common, str(folder / str(n) / "my run.zarr")]
        described.append({"argv": argv, "moment": moment, "block": block, "signals": signals})
    (folder / "jobs").write_text(json.dumps(described))
    command = [sys.executable, "-W", "error", str(CHILD), str(folder / "jobs"), str(zoo.directory("gpt2"))]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr
    return [
        Job(
            moment=moment,
            block=block,
            signals=signals,
            argv=tuple(described[n]["argv"]),
            out=Path(described[n]["argv"][-1]),
            status=status,
            printed=(folder / f"jobs.{n}.out").read_text(),
            errors=(folder / f"jobs.{n}.err").read_text(),
        )
        for n, ((moment, block, signals), status) in enumerate(zip(MOMENTS, json.loads(ended.stdout), strict=True))
    ]


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """The same blocks as in the child."""
    monkeypatch.setattr("fastinterp.store.blocks.MAX_PROMPTS_SWEEP", BLOCK_SIZE)


@pytest.fixture(scope="module")
def undisturbed(zoo, prompt_file, tmp_path_factory, files):
    """Every file of the same scan without a disturbance."""
    out = tmp_path_factory.mktemp("undisturbed") / "run.zarr"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastinterp.store.blocks.MAX_PROMPTS_SWEEP", BLOCK_SIZE)
        model = fastinterp.load(zoo.directory("gpt2"))
        fastinterp.scan(model, prompt_file, out, analysis="dla,ablation", ablation_limit=13)
    assert describe_store(out).n_blocks == N_BLOCKS
    return files(out)


@pytest.fixture
def computed(monkeypatch):
    """The blocks that are computed from now on."""
    blocks, compute = [], fastinterp.engine.run.compute_block

    def counting(model, planned, block, advance):
        blocks.append(block)
        return compute(model, planned, block, advance)

    monkeypatch.setattr("fastinterp.engine.run.compute_block", counting)
    return blocks


def of_signals(*signals):
    return [n for n, (_, _, sent) in enumerate(MOMENTS) if sent in signals]


def test_the_child_makes_the_blocks_that_are_expected_here():
    spec = importlib.util.spec_from_file_location("scan_child", CHILD)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.BLOCK_SIZE == BLOCK_SIZE


@pytest.mark.parametrize("n", of_signals(("SIGKILL",)), ids=lambda n: "{}-{}".format(*MOMENTS[n]))
def test_a_killed_scan_resumes_to_the_same_bytes(jobs, n, cli, undisturbed, computed, files):
    job = jobs[n]
    assert os.WIFSIGNALED(job.status), job.errors
    assert os.WTERMSIG(job.status) == signal.SIGKILL
    committed = describe_store(job.out).committed
    match job.moment:
        case "after_commit":
            assert committed == set(range(job.block + 1))
        case "computed":
            assert committed <= set(range(job.block))
        case _:
            assert committed == set(range(job.block))
    result = cli(*job.argv)
    assert (result.code, result.err) == (0, "")
    assert f"{len(committed)} of {N_BLOCKS} blocks are there" in result.out
    assert computed == sorted(set(range(N_BLOCKS)) - committed)
    assert describe_store(job.out).complete
    assert files(job.out) == undisturbed
    assert {path.name for path in job.out.parent.iterdir()} == {"my run.zarr", "my run.zarr.d"}


def test_the_moments_leave_different_amounts_of_work(jobs):
    assert len({job.block for job in jobs if job.signals == ("SIGKILL",)}) >= 4


@pytest.mark.parametrize("n", of_signals(("SIGINT",), ("SIGTERM",))[:2], ids=lambda n: MOMENTS[n][2][0])
def test_an_interrupted_scan_keeps_its_blocks_and_says_how_to_go_on(jobs, n, cli, undisturbed, computed, files):
    job = jobs[n]
    name = job.signals[0]
    assert os.WIFEXITED(job.status)
    assert os.WEXITSTATUS(job.status) == {"SIGINT": 130, "SIGTERM": 143}[name]
    assert "Traceback" not in job.errors
    assert f"fastinterp: stopped by {name}" in job.errors
    assert describe_store(job.out).committed == set(range(job.block))
    (line,) = [line for line in job.errors.splitlines() if "to go on: " in line]
    program, *arguments = shlex.split(line.partition("to go on: ")[2])
    assert program == "fastinterp"
    assert cli(*arguments).code == 0
    assert computed == list(range(job.block, N_BLOCKS))
    assert files(job.out) == undisturbed


def test_a_second_signal_stops_at_once(jobs, cli, undisturbed, files):
    (n,) = of_signals(("SIGINT", "SIGTERM"))
    job = jobs[n]
    assert os.WIFSIGNALED(job.status), job.errors
    assert os.WTERMSIG(job.status) == signal.SIGTERM
    assert describe_store(job.out).committed == frozenset()
    assert cli(*job.argv).code == 0
    assert files(job.out) == undisturbed


def test_an_interrupt_while_the_model_loads_leaves_nothing(jobs):
    job = next(job for job in jobs if job.moment == "loading")
    assert os.WIFEXITED(job.status)
    assert os.WEXITSTATUS(job.status) == 130
    assert "Traceback" not in job.errors
    assert list(job.out.parent.iterdir()) == []


@pytest.fixture
def complete(cli, zoo, prompt_file, out):
    """The arguments of a scan that has been run to its end."""
    arguments = ["scan", "--model", zoo.directory("gpt2"), "--prompts", prompt_file, "--out", out, *ANALYSES]
    assert cli(*arguments).code == 0
    return arguments


@pytest.mark.parametrize("more", [[], ["--batch-tokens", "40"], ["--durability", "power"], ["--format", "json"]])
def test_a_complete_store_needs_no_computing(cli, complete, out, computed, files, more):
    before = files(out)
    result = cli(*complete, *more)
    assert (result.code, result.err, computed) == (0, "", [])
    assert files(out) == before
    if "json" not in more:
        assert f"resuming {out}: 8 of 8 blocks are there" in result.out
        assert "(0 of 8 blocks computed)" in result.out


@pytest.mark.parametrize(
    ("more", "field"),
    [
        (["--metric", "logit"], 'options.metric: store has "logit_diff", this run has "logit"'),
        (["--no-bos"], "options.prepend_bos: store has true, this run has false"),
        (["--limit", "20"], "n_prompts: store has 22, this run has 20"),
        (["--ablation-limit", "5"], "options.analyses.ablation.prompts: store has 13, this run has 5"),
        (["--analysis", "ablation"], "options.analyses.dla.prompts: store has 22, this run has no such field"),
        (["--answer-token", "first"], 'options.answer_token: store has "single", this run has "first"'),
        (["--bad-prompts", "reject"], 'options.bad_prompts: store has "error", this run has "reject"'),
        (["--processing", "none"], 'processing: store has "transformer_lens", this run has "none"'),
        (["--dtype", "float64"], 'dtype: store has "float32", this run has "float64"'),
        (["--compress", "zstd"], 'compress: store has "none", this run has "zstd"'),
    ],
)
def test_other_options_are_refused_by_name(cli, complete, out, computed, files, more, field):
    before = files(out)
    result = cli(*complete, *more)
    assert (result.code, result.out, computed) == (1, "", [])
    assert f"fastinterp: {out} was begun with another specification:" in result.err
    assert field in result.err.splitlines()
    assert files(out) == before


def test_other_prompts_and_weights_are_refused(cli, zoo, complete, rows, write, tmp_path, files, out):
    before = files(out)
    rows[21]["answer"] = " Alice" if rows[21]["answer"] != " Alice" else " Tom"
    other = write(tmp_path / "other.jsonl", rows)
    result = cli(*[other if value == complete[4] else value for value in complete])
    assert result.code == 1
    assert "\ninput_hash: store has " in result.err
    assert "weights_sha256" not in result.err

    hf = zoo.hf("gpt2")
    changed = tmp_path / "changed"
    hf.save_pretrained(changed)
    zoo.tokenizer.save_pretrained(changed)
    import safetensors.torch

    tensors = safetensors.torch.load_file(changed / "model.safetensors")
    name = next(name for name in tensors if name.endswith("h.2.mlp.c_proj.bias"))
    tensors[name][3] += 1e-3
    safetensors.torch.save_file(tensors, changed / "model.safetensors", metadata={"format": "pt"})
    result = cli(*[changed if value == complete[2] else value for value in complete])
    assert result.code == 1
    assert "\nweights_sha256: store has " in result.err
    assert "input_hash" not in result.err
    assert files(out) == before


def test_a_damaged_block_is_named_and_computed_again(cli, complete, out, computed, files):
    before = files(out)
    chunk = out / "direct_effect/c/5/0/0"
    chunk.write_bytes(chunk.read_bytes()[:-1])
    result = cli(*complete)
    assert result.code == 0
    assert "block 5 was damaged and is computed again: direct_effect/c/5/0/0" in result.err
    assert computed == [5]
    assert files(out) == before
