"""A scan's store against the functions that return xarray, and what must not change its numbers."""

import json

import numpy as np
import pytest
import torch
import xarray as xr

import fastinterp
from fastinterp.engine.run import compute_block, run
from fastinterp.errors import StoreMismatchError
from fastinterp.prompts import PromptSet
from fastinterp.store import describe_store

# A scan forms its batches within blocks. Float32 rounds other batches differently, so where there are several blocks
# the model is a float64 one, and what remains is the rounding of the store.
SAME = dict(rtol=1e-6, atol=1e-6)


def by_function(model, prompts, name, metric="logit_diff"):
    """The arrays of one analysis, by the function that a notebook would call."""
    match name:
        case "dla":
            arrays = [fastinterp.direct_logit_attribution(model, prompts, metric=metric)]
        case "dla_layer" | "dla_component" | "dla_neuron":
            unit = name.removeprefix("dla_")
            arrays = [fastinterp.direct_logit_attribution(model, prompts, unit=unit, metric=metric)]
        case "lens":
            arrays = [fastinterp.logit_lens(model, prompts, metric=metric)]
        case "ablation":
            arrays = list(fastinterp.ablate(model, prompts, metric=metric).data_vars.values())
    return {array.name: array for array in arrays}


def assert_same(dataset, expected):
    for name, array in expected.items():
        found = dataset[name]
        assert found.dims == array.dims
        assert found.dtype == np.float32
        assert float(np.nanmax(np.abs(array.values))) > 0.1, "numbers near zero would show nothing"
        np.testing.assert_allclose(found.values, array.values, **SAME)
        for key in ("units", "long_name", "metric", "sign"):
            assert found.attrs[key] == array.attrs[key]
        for coordinate in set(array.dims) - {"neuron"}:
            assert found[coordinate].values.tolist() == array[coordinate].values.tolist()


@pytest.mark.parametrize("name", ["dla", "dla_layer", "dla_component", "dla_neuron", "lens", "ablation"])
@pytest.mark.parametrize("model_name", ["gpt2", "llama-gqa"])
@pytest.mark.parametrize(("dtype", "n_blocks"), [(torch.float32, 1), (torch.float64, 4)])
def test_a_scan_holds_what_the_function_returns(zoo, prompts, out, model_name, name, dtype, n_blocks):
    model = zoo.model(model_name, dtype=dtype)
    prompts = prompts.head(15) if n_blocks == 1 else prompts
    returned = fastinterp.scan(model, prompts, out, analysis=name)
    assert describe_store(out).n_blocks == n_blocks
    expected = by_function(model, prompts, name)
    on_disk = xr.open_zarr(out)
    assert_same(on_disk, expected)
    xr.testing.assert_identical(returned, on_disk)
    results = {name for name, array in on_disk.data_vars.items() if "metric" in array.attrs}
    assert results == set(expected)


def test_all_analyses_fit_into_one_store(zoo, prompts, out):
    model = zoo.model("gpt2", dtype=torch.float64)
    names = ["dla", "dla_layer", "dla_component", "dla_neuron", "lens", "ablation"]
    dataset = fastinterp.scan(model, prompts, out, analysis=names)
    for name in names:
        for array in by_function(model, prompts, name).values():
            np.testing.assert_allclose(dataset[array.name].values, array.values, **SAME)


@pytest.mark.parametrize("metric", ["logit", "logprob"])
def test_other_metrics_of_an_answer(zoo, prompts, out, metric):
    model = zoo.model("llama-gqa", dtype=torch.float64)
    dataset = fastinterp.scan(model, prompts, out, analysis="ablation,lens", metric=metric)
    assert dataset[f"{metric}_zero_total"].attrs["units"] == ("nats" if metric == "logprob" else "logits")
    for name in ("ablation", "lens"):
        assert_same(dataset, by_function(model, prompts, name, metric))


def test_the_loss_has_a_value_for_every_token_that_has_a_next_one(zoo, prompts, out):
    model = zoo.model("gpt2", dtype=torch.float64)
    texts = PromptSet.of(prompts.prompts)
    dataset = fastinterp.scan(model, texts, out, analysis=["ablation", "lens"], metric="loss")
    assert dataset.loss_zero_total.dims == ("prompt", "pos", "layer", "head")
    assert dataset.loss_zero_total.attrs["units"] == "nats"
    for name in ("ablation", "lens"):
        assert_same(dataset, by_function(model, texts, name, "loss"))
    scored = dataset.pos.values < dataset.n_tokens.values[:, None] - 1
    assert np.array_equal(np.isfinite(dataset.loss_clean.values), scored)
    assert np.array_equal(np.isfinite(dataset.loss_zero_total.values).all((2, 3)), scored)
    assert "answer" not in dataset.coords


def test_a_prompt_of_one_token_has_no_loss(zoo, out):
    texts = PromptSet.of(["a", "b"])
    dataset = fastinterp.scan(zoo.model("gpt2"), texts, out, analysis="ablation", metric="loss", prepend_bos=False)
    assert dataset.n_tokens.values.tolist() == [1, 1]
    assert np.isnan(dataset.loss_zero_total.values).all()
    assert dataset.status.values.tolist() == [1, 1]


def test_prompts_answers_tokens_and_status_are_stored(zoo, prompts, out):
    model = zoo.model("gpt2")
    dataset = fastinterp.scan(model, prompts, out)
    assert dataset.prompt_text.values.tolist() == list(prompts.prompts)
    assert dataset.prompt_id.values.tolist() == list(prompts.ids)
    assert dataset.answer.values.tolist() == list(prompts.answer)
    assert dataset.wrong.values.tolist() == list(prompts.wrong)
    assert dataset.status.values.tolist() == [1] * 22
    assert dataset.prompt.values.tolist() == list(range(22))
    assert dataset.head_label.values[2, 1] == "L2H1"
    tokens = model.encode(list(prompts.prompts))
    assert dataset.n_tokens.values.tolist() == [len(row) for row in tokens]
    assert dataset.sizes["pos"] == max(map(len, tokens))
    for stored, row in zip(dataset.tokens.values, tokens, strict=True):
        assert stored.tolist() == row + [-1] * (len(stored) - len(row))
    assert {coord for coord in dataset.coords if dataset[coord].dims == ("prompt",)} == {
        "prompt",
        "prompt_text",
        "prompt_id",
        "answer",
        "wrong",
    }


def test_several_answers_are_averaged_and_named(zoo, out):
    prompts = PromptSet.of(["The fox and the dog"], answer=[[" Mary", " Tom"]], wrong=[[" John"]])
    model = zoo.model("gpt2")
    dataset = fastinterp.scan(model, prompts, out)
    assert dataset.answer.values.tolist() == [" Mary |  Tom"]
    single = [PromptSet.of(["The fox and the dog"], answer=[name], wrong=[" John"]) for name in (" Mary", " Tom")]
    mean = sum(fastinterp.direct_logit_attribution(model, each).values for each in single) / 2
    np.testing.assert_allclose(dataset.direct_effect.values, mean, rtol=1e-4, atol=1e-5)


def test_provenance_is_in_the_attributes(zoo, prompts, out):
    model = zoo.model("gpt2")
    attrs = fastinterp.scan(model, prompts, out, analysis="dla,ablation", ablation_limit=3).attrs
    assert attrs["model"] == str(zoo.directory("gpt2"))
    assert attrs["weights_sha256"] == model.weights_sha256
    assert attrs["tokenizer_hash"] == model.tokenizer_hash
    assert attrs["input_hash"] == prompts.content_hash()
    assert attrs["processing"] == "transformer_lens"
    assert attrs["dtype"] == "float32"
    assert attrs["device"] == "cpu"
    assert attrs["fastinterp_version"] == fastinterp.__version__
    assert attrs["model_spec"] == json.loads(json.dumps(model.spec.to_dict()))
    ablation = {"prompts": 3, "mode": ["zero"], "effect": "total", "units": "heads", "ablate_pos": "all"}
    assert attrs["options"]["analyses"] == {"dla": {"prompts": 22}, "ablation": ablation}
    assert attrs["options"]["prepend_bos"] is True


@pytest.mark.parametrize("limit", [1, 7, 100])
def test_ablation_limit_leaves_the_other_prompts_nan(zoo, prompts, out, limit):
    model = zoo.model("gpt2", dtype=torch.float64)
    dataset = fastinterp.scan(model, prompts, out, analysis="dla,ablation", ablation_limit=limit)
    done = min(limit, 22)
    expected = fastinterp.ablate(model, prompts.head(done))
    for name in ("logit_diff_zero_total", "logit_diff_clean"):
        np.testing.assert_allclose(dataset[name].values[:done], expected[name].values, **SAME)
        assert np.isnan(dataset[name].values[done:]).all()
        assert dataset[name].attrs["n_prompts_computed"] == done
    assert np.isfinite(dataset.direct_effect.values).all()
    assert dataset.direct_effect.attrs["n_prompts_computed"] == 22
    assert dataset.status.values.tolist() == [1] * 22


@pytest.mark.parametrize(("limit", "kept"), [(1, 1), (9, 9), (100, 22)])
def test_limit_takes_the_first_prompts(zoo, prompts, out, limit, kept):
    model = zoo.model("gpt2", dtype=torch.float64)
    dataset = fastinterp.scan(model, prompts, out, limit=limit)
    assert dataset.prompt_id.values.tolist() == list(prompts.ids[:kept])
    expected = fastinterp.direct_logit_attribution(model, prompts.head(kept))
    np.testing.assert_allclose(dataset.direct_effect.values, expected.values, **SAME)


def test_batches_change_rounding_only(zoo, prompts, tmp_path):
    model = zoo.model("llama-gqa", dtype=torch.float64)
    stores = [
        fastinterp.scan(model, prompts, tmp_path / f"{size}.zarr", analysis="dla,ablation", batch_tokens=size)
        for size in ("auto", 40, 1)
    ]
    for other in stores[1:]:
        for name in ("direct_effect", "logit_diff_zero_total", "logit_diff_clean"):
            np.testing.assert_allclose(other[name].values, stores[0][name].values, **SAME)
    blocks = {describe_store(tmp_path / f"{size}.zarr").block_size for size in ("auto", 40, 1)}
    assert len(blocks) == 1
    sizes = [store.attrs["batch_tokens"]["dla"] for store in stores]
    assert sizes[1:] == [40, 1]
    assert sizes[0] > 40


def test_a_file_and_a_prompt_set_give_the_same_store(zoo, prompts, tmp_path, files):
    model = zoo.model("gpt2")
    prompts.write(tmp_path / "prompts.jsonl")
    stores = {"set": prompts, "path": tmp_path / "prompts.jsonl", "text": str(tmp_path / "prompts.jsonl")}
    for name, given in stores.items():
        fastinterp.scan(model, given, tmp_path / f"{name}.zarr", analysis="dla,ablation")
    first = files(tmp_path / "set.zarr")
    assert first == files(tmp_path / "path.zarr") == files(tmp_path / "text.zarr")


def test_a_block_by_itself_equals_the_same_block_of_a_full_run(zoo, prompts, out):
    model = zoo.model("llama-gqa")
    planned = fastinterp.plan(model, prompts, analysis="dla,ablation", ablation_limit=13)
    assert planned.store.n_blocks == 4
    run(model, planned, out)
    dataset = xr.open_zarr(out)
    for block in (3, 1, 2):
        rows = planned.store.prompts_of(block)
        arrays = compute_block(model, planned, block, lambda share: None)
        assert set(arrays) == {array.name for array in planned.store.arrays}
        for name, values in arrays.items():
            stored = dataset[name].values[rows.start : rows.stop]
            assert np.array_equal(stored, values, equal_nan=values.dtype == np.float32), name


@pytest.mark.parametrize("compress", ["none", "zstd"])
def test_compression_and_durability_change_no_number(zoo, prompts, out, compress):
    model = zoo.model("gpt2", dtype=torch.float64)
    dataset = fastinterp.scan(model, prompts, out, compress=compress, durability="power")
    np.testing.assert_allclose(
        dataset.direct_effect.values, fastinterp.direct_logit_attribution(model, prompts).values, **SAME
    )


def test_float64_is_computed_in_float64_and_stored_in_float32(zoo, prompts, out):
    model = zoo.model("gpt2", dtype=torch.float64)
    dataset = fastinterp.scan(model, prompts, out, analysis="ablation")
    expected = fastinterp.ablate(model, prompts)
    assert expected.logit_diff_zero_total.dtype == np.float64
    assert dataset.logit_diff_zero_total.dtype == np.float32
    # Half a unit in the last place: float32 arithmetic would be off by more.
    np.testing.assert_allclose(
        dataset.logit_diff_zero_total.values, expected.logit_diff_zero_total.values, rtol=6.1e-8, atol=1e-12
    )
    assert dataset.attrs["dtype"] == "float64"


def test_rejected_prompts_are_marked_and_nan(zoo, prompts, out):
    model = zoo.model("gpt2", dtype=torch.float64)
    texts, answers = list(prompts.prompts), list(prompts.answer)
    texts[4], answers[20] = "the " * 80, " elephants"
    mixed = PromptSet.of(texts, answer=answers, wrong=prompts.wrong)
    dataset = fastinterp.scan(model, mixed, out, analysis="dla,ablation", bad_prompts="reject")
    bad = np.isin(np.arange(22), [4, 20])
    assert np.array_equal(dataset.status.values, np.where(bad, 3, 1))
    assert np.array_equal(np.isnan(dataset.direct_effect.values).all((1, 2)), bad)
    assert np.array_equal(np.isnan(dataset.logit_diff_clean.values), bad)
    assert dataset.n_tokens.values[bad].tolist() == [0, 0]
    assert (dataset.tokens.values[bad] == -1).all()
    assert dataset.prompt_text.values[4] == texts[4]
    assert dataset.answer.values[bad].tolist() == ["", ""]
    good = fastinterp.direct_logit_attribution(model, prompts).values
    np.testing.assert_allclose(dataset.direct_effect.values[~bad], good[~bad], **SAME)
    assert describe_store(out).status == {"pending": 0, "ok": 20, "failed": 0, "rejected": 2}


def test_a_block_of_rejected_prompts_is_a_block(zoo, prompts, out):
    answers = [" elephants"] * 6 + list(prompts.answer[6:])
    mixed = PromptSet.of(prompts.prompts, answer=answers, wrong=prompts.wrong)
    fastinterp.scan(zoo.model("gpt2"), mixed, out, analysis="dla,ablation", ablation_limit=4, bad_prompts="reject")
    stored = describe_store(out)
    assert stored.block_size == 6
    assert stored.complete
    assert stored.status["rejected"] == 6


def test_a_complete_store_is_left_as_it_is(zoo, prompts, out, files, monkeypatch):
    model = zoo.model("gpt2")
    first = fastinterp.scan(model, prompts, out)
    before = files(out)
    monkeypatch.setattr("fastinterp.engine.run.compute_block", None)
    again = fastinterp.scan(model, prompts, out, batch_tokens=50)
    xr.testing.assert_identical(first, again)
    assert files(out) == before


def test_only_missing_blocks_are_computed(zoo, prompts, tmp_path, files, monkeypatch):
    model, computed = zoo.model("gpt2"), []

    def failing(model, planned, block, advance):
        if block == 2 and len(computed) == 2:
            raise KeyboardInterrupt
        computed.append(block)
        return compute_block(model, planned, block, advance)

    monkeypatch.setattr("fastinterp.engine.run.compute_block", failing)
    with pytest.raises(KeyboardInterrupt):
        fastinterp.scan(model, prompts, tmp_path / "run.zarr", analysis="dla,ablation")
    assert describe_store(tmp_path / "run.zarr").committed == {0, 1}
    partial = xr.open_zarr(tmp_path / "run.zarr")
    assert partial.status.values.tolist() == [1] * 12 + [0] * 10
    assert np.isnan(partial.direct_effect.values[12:]).all()
    computed.append(-1)
    fastinterp.scan(model, prompts, tmp_path / "run.zarr", analysis="dla,ablation")
    assert computed == [0, 1, -1, 2, 3]
    fastinterp.scan(model, prompts, tmp_path / "whole.zarr", analysis="dla,ablation")
    assert files(tmp_path / "run.zarr") == files(tmp_path / "whole.zarr")


def test_another_analysis_needs_another_store(zoo, prompts, out):
    fastinterp.scan(zoo.model("gpt2"), prompts, out)
    with pytest.raises(StoreMismatchError, match=r"options\.analyses\.ablation"):
        fastinterp.scan(zoo.model("gpt2"), prompts, out, analysis="dla,ablation")
