"""Scans of mean and resample ablation and of direct effects: what ``ablate`` gives, interrupted or not."""

import numpy as np
import pytest
import torch
import xarray as xr

import fastinterp
from fastinterp.engine.run import compute_block
from fastinterp.errors import PromptError
from fastinterp.prompts import PromptSet
from fastinterp.store import describe_store

ANALYSES = {
    "ablation_mean": dict(mode="mean"),
    "ablation_resample": dict(mode="resample"),
    "direct": dict(mode=("zero", "mean"), effect="direct"),
}
# What is stored is float32.
SAME = dict(rtol=1e-6, atol=1e-6)


def prompts(n=22, *, corrupt=True):
    """Prompts of 2 to 7 tokens, each length several times, in no order of length."""
    generator = torch.Generator().manual_seed(3)
    lengths = [2 + (5 * i) % 6 for i in range(n)]
    columns = {name: torch.randint(1, 379, (n,), generator=generator).tolist() for name in ("answer", "wrong")}
    drawn = [[torch.randint(1, 379, (m,), generator=generator).tolist() for m in lengths] for _ in range(2)]
    return PromptSet.of(drawn[0], corrupt=drawn[1] if corrupt else None, **columns)


def assert_same(dataset, expected):
    results = {name for name, array in dataset.data_vars.items() if "metric" in array.attrs}
    assert results == set(expected.data_vars)
    for name, array in expected.data_vars.items():
        found = dataset[name]
        assert found.dims == array.dims
        # A run does not differ from itself.
        assert name == "kl_clean" or float(np.nanmax(np.abs(array.values))) > 0.05
        assert np.array_equal(np.isnan(found.values), np.isnan(array.values))
        np.testing.assert_allclose(found.values, array.values, **SAME)
        for key in ("units", "metric", "sign", "long_name", "ablated_pos", "mean_over", "final_norm_scale"):
            assert found.attrs.get(key) == array.attrs.get(key)


@pytest.mark.parametrize("corrupt", [True, False])
@pytest.mark.parametrize("metric", ["logit_diff", "loss", "kl"])
@pytest.mark.parametrize("name", ANALYSES)
def test_a_scan_holds_what_ablate_returns(zoo, tmp_path, name, metric, corrupt):
    model, given = zoo.model("llama-gqa", dtype=torch.float64), prompts(corrupt=corrupt)
    dataset = fastinterp.scan(model, given, tmp_path / "run.zarr", analysis=name, metric=metric, batch_tokens=20)
    assert describe_store(tmp_path / "run.zarr").n_blocks == 4
    assert_same(dataset, fastinterp.ablate(model, given, metric=metric, **ANALYSES[name]))


def test_a_limit_takes_means_and_partners_of_the_prompts_that_are_ablated(zoo, tmp_path):
    model, given = zoo.model("gpt2", dtype=torch.float64), prompts(corrupt=False)
    dataset = fastinterp.scan(
        model, given, tmp_path / "run.zarr", analysis="ablation_mean,ablation_resample", ablation_limit=13
    )
    expected = fastinterp.ablate(model, given.head(13), mode=("mean", "resample"))
    for name in ("logit_diff_mean_total", "logit_diff_resample_total"):
        np.testing.assert_allclose(dataset[name].values[:13], expected[name].values, **SAME)
        assert np.isnan(dataset[name].values[13:]).all()


def test_an_interrupted_scan_goes_on_to_the_same_bits(zoo, tmp_path, files, monkeypatch):
    # In float32, where another mean or another batch would show.
    model, given, computed = zoo.model("gpt2"), prompts(corrupt=False), []
    names = list(ANALYSES)

    def failing(model, planned, block, advance):
        if block == 2 and len(computed) == 2:
            raise KeyboardInterrupt
        computed.append(block)
        return compute_block(model, planned, block, advance)

    monkeypatch.setattr("fastinterp.engine.run.compute_block", failing)
    with pytest.raises(KeyboardInterrupt):
        fastinterp.scan(model, given, tmp_path / "run.zarr", analysis=names)
    partial = xr.open_zarr(tmp_path / "run.zarr")
    for name in ("logit_diff_mean_total", "logit_diff_resample_total", "logit_diff_zero_direct"):
        assert np.isfinite(partial[name].values[:12]).all()
        assert np.isnan(partial[name].values[12:]).all()
    computed.append(-1)
    fastinterp.scan(model, given, tmp_path / "run.zarr", analysis=names)
    assert computed == [0, 1, -1, 2, 3]
    fastinterp.scan(model, given, tmp_path / "whole.zarr", analysis=names)
    assert files(tmp_path / "run.zarr") == files(tmp_path / "whole.zarr")


def test_rejected_prompts_are_in_no_mean_and_nobodys_partner(zoo, tmp_path):
    model, good = zoo.model("gpt2", dtype=torch.float64), prompts(corrupt=False)
    rows = [*range(10), None, *range(10, 22)]

    def column(values, bad):
        return [bad if row is None else values[row] for row in rows]

    given = PromptSet.of(
        column(good.prompts, [399, 399, 400]), answer=column(good.answer, 5), wrong=column(good.wrong, 6)
    )
    dataset = fastinterp.scan(
        model, given, tmp_path / "run.zarr", analysis="ablation_mean,ablation_resample", bad_prompts="reject"
    )
    expected = fastinterp.ablate(model, good, mode=("mean", "resample"))
    keep = [i for i, row in enumerate(rows) if row is not None]
    for name in ("logit_diff_mean_total", "logit_diff_resample_total"):
        np.testing.assert_allclose(dataset[name].values[keep], expected[name].values, **SAME)
        assert np.isnan(dataset[name].values[10]).all()


def test_a_prompt_that_is_alone_of_its_length_is_refused_before_anything_is_written(zoo, tmp_path):
    given = PromptSet.of([[1, 2], [3, 4], [5, 6, 7]], answer=[[1], [2], [3]], wrong=[[4], [5], [6]])
    with pytest.raises(PromptError, match="no other prompt has 3 tokens"):
        fastinterp.scan(zoo.model("gpt2"), given, tmp_path / "run.zarr", analysis="ablation_resample")
    assert not (tmp_path / "run.zarr").exists()
