"""One scan for the loss of every token without a head, two ways by two, against literal hooks on another model."""

import numpy as np
import pytest
import torch
import xarray as xr

import fastinterp
from fastinterp.engine.run import compute_block
from fastinterp.prompts import PromptSet
from fastinterp.report import top_heads, write_html
from tests.engine.literal_copy_suppression import Literal

N_PROMPTS, N_TOKENS = 12, 9
HEADS = [(0, 1), (2, 3), (1, 0)]
JOB = dict(analysis="ablation", metric="loss", mode="zero,mean", effect="both")
NAMES = {(mode, effect): f"loss_{mode}_{effect}" for mode in ("zero", "mean") for effect in ("total", "direct")}


def drawn(n=N_PROMPTS, lengths=(N_TOKENS,), seed=7):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(1, 379, (lengths[i % len(lengths)],), generator=generator).tolist() for i in range(n)]


def assert_literal(dataset, literal, heads, of_head, tolerance=1e-6):
    largest = 0.0
    for (mode, effect), name in NAMES.items():
        values = dataset[name]
        for layer, head in heads:
            found = of_head(values, layer, head).values
            for row, ids in enumerate(literal.prompts):
                n = ids.shape[1]
                wanted = literal.effect(row, layer, head, mode, effect).numpy()
                assert np.abs(found[row, : n - 1] - wanted).max() < tolerance, (name, layer, head, row)
                assert np.isnan(found[row, n - 1 :]).all()
                largest = max(largest, np.abs(wanted).max())
    assert largest > 0.1


# The job ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lengths", [(N_TOKENS,), (9, 2, 6)], ids=["even", "uneven"])
def test_chosen_heads_equal_literal_hooks(zoo, out, lengths):
    model, prompts = zoo.model("gpt2", processing="none", dtype=torch.float64), drawn(lengths=lengths)
    dataset = fastinterp.scan(model, PromptSet.of(prompts), out, units="L0H1, L2H3,L1H0", **JOB)
    assert {name for name in dataset.data_vars if name.startswith("loss_")} == {"loss_clean", *NAMES.values()}
    literal = Literal(zoo.hf_double("gpt2"), prompts)
    assert dataset.unit.values.tolist() == [f"L{layer}H{head}" for layer, head in HEADS]
    for name in NAMES.values():
        assert dataset[name].dims == ("prompt", "pos", "unit")
        assert dataset[name].shape == (N_PROMPTS, N_TOKENS, 3)
    assert_literal(dataset, literal, HEADS, lambda array, layer, head: array.sel(unit=f"L{layer}H{head}"))
    for row, ids in enumerate(literal.prompts):
        clean = literal.loss(literal.clean[row][0], ids).numpy()
        np.testing.assert_allclose(dataset.loss_clean.values[row, : len(clean)], clean, atol=1e-6)


def test_all_heads_equal_literal_hooks(zoo, out):
    model, prompts = zoo.model("gpt2", processing="none", dtype=torch.float64), drawn()
    dataset = fastinterp.scan(model, PromptSet.of(prompts), out, **JOB)
    for name in NAMES.values():
        assert dataset[name].dims == ("prompt", "pos", "layer", "head")
    every = [(layer, head) for layer in range(3) for head in range(4)]
    literal = Literal(zoo.hf_double("gpt2"), prompts)
    assert_literal(dataset, literal, every, lambda array, layer, head: array.isel(layer=layer, head=head))


def test_float32_is_within_1e_4(zoo, out):
    prompts = drawn()
    dataset = fastinterp.scan(
        zoo.model("gpt2", processing="none"),
        PromptSet.of(prompts),
        out,
        units=HEADS,
        **JOB | {"mode": ["zero", "mean"]},
    )
    literal = Literal(zoo.hf_double("gpt2"), prompts)
    assert_literal(dataset, literal, HEADS, lambda array, layer, head: array.sel(unit=f"L{layer}H{head}"), 1e-4)


@pytest.mark.parametrize("units", ["heads", "L0H1,L2H3,L1H0"])
def test_an_interrupted_job_goes_on_to_the_same_bits(zoo, tmp_path, files, monkeypatch, units):
    # In float32, where another mean or another batch would show.
    model, given, computed = zoo.model("gpt2"), PromptSet.of(drawn(22)), []

    def failing(model, planned, block, advance):
        if block == 2 and len(computed) == 2:
            raise KeyboardInterrupt
        computed.append(block)
        return compute_block(model, planned, block, advance)

    monkeypatch.setattr("fastinterp.engine.run.compute_block", failing)
    with pytest.raises(KeyboardInterrupt):
        fastinterp.scan(model, given, tmp_path / "run.zarr", units=units, **JOB)
    partial = xr.open_zarr(tmp_path / "run.zarr")
    for name in NAMES.values():
        assert np.isfinite(partial[name].values[:12, :-1]).all()
        assert np.isnan(partial[name].values[12:]).all()
    computed.append(-1)
    fastinterp.scan(model, given, tmp_path / "run.zarr", units=units, **JOB)
    assert computed == [0, 1, -1, 2, 3]
    fastinterp.scan(model, given, tmp_path / "whole.zarr", units=units, **JOB)
    assert files(tmp_path / "run.zarr") == files(tmp_path / "whole.zarr")


# Reports ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("units", ["heads", "L0H1,MLP2"])
@pytest.mark.parametrize("options", [{}, {"ablate_pos": "each", "effect": "total"}], ids=["all", "each"])
def test_tables_and_pages_take_the_arrays(zoo, out, tmp_path, units, options):
    model = zoo.model("gpt2")
    dataset = fastinterp.scan(model, PromptSet.of(drawn(lengths=(6, 4))), out, **JOB | {"units": units} | options)
    array = dataset["loss_mean_total"]
    means = array.mean([dim for dim in array.dims if dim in ("pos", "edit_pos")]).mean("prompt")
    top = top_heads(array, k=3)
    labels = array.head_label.values if units == "heads" else array.unit.values
    ranked = sorted(zip(means.values.ravel().tolist(), labels.ravel().tolist(), strict=True))
    largest = [(value, label) for value, label in ranked[::-1] if value > 0][:3]
    smallest = [(value, label) for value, label in ranked if value < 0][:3]
    for table, expected in ((top.positive, largest), (top.negative, smallest)):
        assert table["head"].tolist() == [label for _, label in expected]
        assert table["mean"].tolist() == pytest.approx([value for value, _ in expected], rel=1e-5)
        assert set(table["n_prompts"]) <= {N_PROMPTS}
    assert largest or smallest
    page = write_html(dataset, tmp_path / "page.html").read_text()
    for name in ("loss_zero_total", "loss_mean_total"):
        assert f'data-array="{name}"' in page
    assert "effect of mean ablation on loss, mean over positions" in page
    assert "L0H1" in page
