"""Activations that overflow never become numbers of a store."""

import dataclasses

import pytest
import torch
import xarray as xr

import fastinterp
from fastinterp.errors import NonFiniteError
from fastinterp.prompts import PromptSet
from fastinterp.store import describe_store

ANALYSES = [("dla", "logit_diff"), ("ablation", "logit_diff"), ("lens", "logprob"), ("ablation", "loss")]


def with_embeddings(model, change):
    W_E = model.weights.W_E.clone()
    change(W_E)
    return dataclasses.replace(model, weights=dataclasses.replace(model.weights, W_E=W_E))


@pytest.mark.parametrize(("analysis", "metric"), ANALYSES)
@pytest.mark.parametrize("model_name", ["gpt2", "llama-gqa"])
def test_an_overflow_names_the_prompt_and_keeps_the_blocks_before(zoo, prompts, out, model_name, analysis, metric):
    model = zoo.model(model_name)
    (token,) = model.encode([" dog"], prepend_bos=False)[0]

    def overflow(W_E):
        W_E[token] = 1e37 * torch.sign(W_E[token])

    texts = list(prompts.prompts)
    texts[14] = "The lazy dog and the fox"
    mixed = PromptSet.of(texts, answer=prompts.answer, wrong=prompts.wrong, ids=prompts.ids)
    with pytest.raises(NonFiniteError, match=r"prompt 14 \(id 'row-14'\)"):
        fastinterp.scan(with_embeddings(model, overflow), mixed, out, analysis=analysis, metric=metric)
    assert describe_store(out).committed == {0, 1}
    assert xr.open_zarr(out).status.values.tolist() == [1] * 12 + [0] * 10


@pytest.mark.parametrize(("analysis", "metric"), ANALYSES)
@pytest.mark.parametrize("model_name", ["gpt2", "llama-gqa"])
def test_float16_gives_the_numbers_of_float32_or_none(zoo, prompts, out, model_name, analysis, metric):
    """Residuals of a few hundred, as trained models have them: their squares are beyond float16."""
    large = with_embeddings(zoo.model(model_name), lambda W_E: W_E.mul_(100))
    exact = fastinterp.scan(large, prompts, out.with_name("exact.zarr"), analysis=analysis, metric=metric)
    try:
        half = fastinterp.scan(large.to(dtype=torch.float16), prompts, out, analysis=analysis, metric=metric)
    except NonFiniteError:
        return
    for name, array in exact.data_vars.items():
        if "metric" in array.attrs:
            largest = float(abs(array).max())
            assert float(abs(half[name] - array).max()) < 0.1 * largest, name


@pytest.mark.parametrize(("analysis", "metric"), ANALYSES)
def test_bfloat16_is_near_float32(zoo, prompts, out, analysis, metric):
    model = zoo.model("llama-gqa")
    exact = fastinterp.scan(model, prompts, out.with_name("exact.zarr"), analysis=analysis, metric=metric)
    reduced = fastinterp.scan(model.to(dtype=torch.bfloat16), prompts, out, analysis=analysis, metric=metric)
    for name, array in exact.data_vars.items():
        if "metric" in array.attrs:
            assert float(abs(reduced[name] - array).mean()) < 0.05 * float(abs(array).max()), name
