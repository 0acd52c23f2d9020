"""``fastinterp scan --analysis ablation`` with options: one command, the numbers of ``ablate`` and of literal hooks."""

import json

import numpy as np
import pytest
import torch
import xarray as xr

import fastinterp
from fastinterp.engine.run import compute_block
from fastinterp.prompts import PromptSet
from tests.engine.literal_copy_suppression import Literal

JOB = ["--analysis", "ablation", "--metric", "loss", "--mode", "zero,mean", "--effect", "both"]
KINDS = [(mode, effect) for mode in ("zero", "mean") for effect in ("total", "direct")]


@pytest.fixture(scope="module")
def token_prompts():
    generator = torch.Generator().manual_seed(4)
    return [torch.randint(1, 379, (8,), generator=generator).tolist() for _ in range(6)]


@pytest.fixture
def scan(cli, zoo, prompt_file, out):
    """Runs a scan of the tiny GPT-2; the prompts are the 22 sentences unless others are given."""

    def call(*arguments, prompts=prompt_file):
        return cli("scan", "--model", zoo.directory("gpt2"), "--prompts", prompts, "--out", out, *arguments)

    return call


@pytest.mark.parametrize("units", ["L0H1,L2H3,L1H0", "heads"])
def test_the_loss_of_every_token_without_heads(scan, zoo, token_prompts, write, tmp_path, out, units):
    path = write(tmp_path / "p.jsonl", [{"prompt": ids} for ids in token_prompts])
    result = scan(*JOB, "--units", units, "--processing", "none", "--dtype", "float64", prompts=path)
    assert (result.code, result.err) == (0, "")
    assert "arrays: loss_clean, loss_zero_total, loss_zero_direct, loss_mean_total, loss_mean_direct" in result.out
    dataset, literal = xr.open_zarr(out), Literal(zoo.hf_double("gpt2"), token_prompts)
    chosen = [(0, 1), (2, 3), (1, 0)] if units != "heads" else [(i, h) for i in range(3) for h in range(4)]
    for mode, effect in KINDS:
        array = dataset[f"loss_{mode}_{effect}"]
        for layer, head in chosen:
            found = array.sel(unit=f"L{layer}H{head}") if units != "heads" else array.isel(layer=layer, head=head)
            for row in range(len(token_prompts)):
                wanted = literal.effect(row, layer, head, mode, effect).numpy()
                np.testing.assert_allclose(found.values[row, :-1], wanted, atol=1e-6)
        assert np.isnan(array.values[:, -1]).all()


def test_every_option_reaches_the_analysis(scan, zoo, prompt_file, write, rows, tmp_path, out):
    """Also that the file of the means is read by the same column."""
    reference = write(tmp_path / "other.jsonl", [{"text": row["prompt"] + " Bob"} for row in rows[:8]])
    renamed = write(tmp_path / "p.jsonl", [{"text": row.pop("prompt"), **row} for row in rows])
    result = scan(
        *("--analysis", "dla,ablation", "--metric", "logit_diff", "--effect", "both"),
        *("--mode", "mean", "--mean-over", "pos", "--reference", reference, "--units", "MLP1,L0H1+L2H3"),
        *("--ablate-pos", "-2:", "--column", "prompt=text"),
        prompts=renamed,
    )
    assert (result.code, result.err) == (0, "")
    dataset, model = xr.open_zarr(out), fastinterp.load(zoo.directory("gpt2"))
    expected = fastinterp.ablate(
        model,
        PromptSet.read(prompt_file),
        units=["MLP1", ["L0H1", "L2H3"]],
        mode="mean",
        mean_over="pos",
        reference=PromptSet.read(reference, columns={"prompt": "text"}),
        pos=slice(-2, None),
        effect="both",
    )
    assert "direct_effect" in dataset
    for name, array in expected.data_vars.items():
        np.testing.assert_allclose(dataset[name].values, array.values, atol=1e-5)
        assert float(np.nanmax(np.abs(array.values))) > 0.01


def test_metrics_share_a_store_that_info_and_report_read(scan, cli, out, tmp_path):
    options = ["--analysis", "ablation", "--metric", "loss,logit_diff,kl", "--mode", "zero,mean"]
    assert scan(*options, "--ablate-pos", "last").code == 0
    told = json.loads(cli("info", out, "--format", "json").out)
    assert told["options"]["metric"] == ["loss", "logit_diff", "kl"]
    assert told["options"]["analyses"]["ablation"]["ablate_pos"] == -1
    dims = {array["name"]: array["dims"] for array in told["arrays"]}
    assert dims["loss_mean_total"] == ["prompt", "pos", "layer", "head"]
    assert dims["kl_mean_total"] == ["prompt", "layer", "head"]
    page = tmp_path / "page.html"
    assert cli("report", out, "--html", page).code == 0
    for name in ("loss_zero_total", "logit_diff_mean_total", "kl_zero_total"):
        assert f'data-array="{name}"' in page.read_text()


def test_a_dry_run_shows_the_plan_and_writes_nothing(scan, out):
    result = scan(*JOB, "--units", "L0H1,L2H3", "--dry-run", "--format", "json")
    assert (result.code, result.err) == (0, "")
    planned = json.loads(result.out)
    shapes = {array["name"]: array["shape"] for array in planned["arrays"]}
    assert {name: shapes[name] for name in shapes if name.startswith("loss_")} == {
        "loss_clean": [22, planned["longest_prompt_tokens"]],
        **{f"loss_{mode}_{effect}": [22, planned["longest_prompt_tokens"], 2] for mode, effect in KINDS},
    }
    assert planned["options"]["analyses"]["ablation"]["mode"] == ["zero", "mean"]
    more = json.loads(scan(*JOB, "--dry-run", "--format", "json").out)
    assert more["flops"] > 2 * planned["flops"] > 0
    assert not out.exists()


def test_an_interrupted_command_is_resumed_with_the_same_options_only(scan, files, out, tmp_path, monkeypatch):
    command = [*JOB, "--units", "L0H1,L2H3"]

    def failing(model, planned, block, advance):
        if block == 2:
            raise OSError(28, "No space left on device")
        return compute_block(model, planned, block, advance)

    with monkeypatch.context() as patch:
        patch.setattr("fastinterp.engine.run.compute_block", failing)
        stopped = scan(*command)
    assert stopped.code == 1
    assert "--mode zero,mean --effect both --units L0H1,L2H3" in stopped.err
    before = files(out)
    for others, said in (
        (["--mode", "zero"], 'options.analyses.ablation.mode: store has ["zero", "mean"], this run has ["zero"]'),
        (["--effect", "total"], 'options.analyses.ablation.effect: store has "both", this run has "total"'),
        (["--units", "L0H1"], 'options.analyses.ablation.units: store has ["L0H1", "L2H3"], this run has ["L0H1"]'),
        (["--ablate-pos", "last"], 'options.analyses.ablation.ablate_pos: store has "all", this run has -1'),
        (["--metric", "loss,kl"], 'options.metric: store has "loss", this run has ["loss", "kl"]'),
    ):
        refused = scan(*command, *others)
        assert refused.code == 1
        assert said in refused.err
        assert "Give the same options and input again to resume it" in refused.err
    assert files(out) == before
    resumed = scan(*command)
    assert resumed.code == 0
    assert "2 of 4 blocks are there" in resumed.out
    found = files(out)
    for path in (out, out.with_name("run.zarr.d")):
        path.rename(tmp_path / f"first-{path.name}")
    assert scan(*command).code == 0
    assert files(out) == found


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--analysis", "dla", "--mode", "mean"],
            "mode does not fit the analyses chosen (dla): leave it out, or choose",
        ),
        (["--units", "heads"], "units does not fit the analyses chosen (dla)"),
        (["--metric", "logit_diff,loss"], "analysis 'dla' takes one metric, not 2 (logit_diff, loss)"),
        (["--analysis", "ablation", "--metric", "loss,los"], "did you mean 'loss'"),
        (["--analysis", "ablation", "--mode", "none"], "'none'"),
        (["--analysis", "ablation", "--effect", "indirect"], "'indirect'"),
        (["--analysis", "ablation", "--units", "head"], "'head'"),
        (["--analysis", "ablation", "--units", "L10"], "units has 'L10': give heads, mlps"),
        (["--analysis", "ablation", "--ablate-pos", "end"], "ablate_pos='end': give all, last, each"),
        (["--analysis", "ablation", "--seed", "1"], "seed is for mode 'resample'"),
        (["--analysis", "ablation", "--mean-over", "pos"], "mean_over is for mode 'mean'"),
        (["--analysis", "ablation", "--mode", "mean", "--mean-over", "all"], "'all'"),
        (["--analysis", "ablation", "--mode", "mean", "--reference", "none.jsonl"], "none.jsonl"),
        (["--analysis", "ablation_mean", "--mode", "mean"], "mode does not fit"),
    ],
)
def test_options_that_do_not_fit_are_refused_before_the_model_is_loaded(scan, out, monkeypatch, arguments, message):
    monkeypatch.setattr(fastinterp, "load", None)
    result = scan(*arguments)
    assert (result.code, result.out) == (1, "")
    assert result.err.startswith("fastinterp: ")
    assert message in result.err
    assert not out.exists()
