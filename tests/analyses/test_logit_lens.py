"""The logit lens against TransformerLens's accumulated residuals and against full logits."""

import numpy as np
import pytest
import torch

from fastinterp.analyses import direct_logit_attribution, logit_lens
from fastinterp.prompts import PromptSet

TOLERANCE = 1e-4
MODELS = ["gpt2", "gpt2-one-head-one-layer", "llama-gqa", "llama-biases-mqa-head-dim", "mistral-window"]


def literal(metric, logits, prompt, answer, wrong):
    """Metric of logits ``[site, pos, d_vocab]`` at every position, written out."""
    logprobs = logits.log_softmax(-1)
    match metric:
        case "logit_diff":
            return logits[..., answer].mean(-1) - logits[..., wrong].mean(-1)
        case "logit":
            return logits[..., answer].mean(-1)
        case "logprob":
            return logprobs[..., answer].exp().sum(-1).log()
        case "loss":
            return -logprobs[:, torch.arange(len(prompt) - 1), torch.tensor(prompt[1:], dtype=torch.int64)]


@pytest.mark.parametrize("tiny_name", MODELS, indirect=True)
@pytest.mark.parametrize("scale", ["own", "frozen"])
def test_every_metric_equals_transformer_lens(zoo, tiny_name, token_prompts, scale):
    model, bridge = zoo.model(tiny_name), zoo.bridge(tiny_name)
    answer = [[5, 6], [7], [8], [9, 10, 11], [12], [13, 14], [15]]
    wrong = [[16], [17, 18], [19], [20], [21, 22], [23], [24, 25, 26]]
    prompts = PromptSet.of(token_prompts, answer=answer, wrong=wrong)
    results = {
        metric: logit_lens(model, prompts, metric=metric, pos="all", scale=scale)
        for metric in ("logit_diff", "logit", "logprob", "loss")
    }
    for row, prompt in enumerate(token_prompts):
        with torch.no_grad():
            _, cache = bridge.run_with_cache(torch.tensor([prompt]))
            stack, labels = cache.accumulated_resid(incl_mid=True, return_labels=True)
            if scale == "frozen":
                logits = bridge.unembed(cache.apply_ln_to_stack(stack, layer=-1)[:, 0])
            else:
                logits = bridge.unembed(bridge.ln_final(stack[:, 0]))
        for metric, got in results.items():
            assert got.site.values.tolist() == labels
            assert got.dims == ("prompt", "pos", "site")
            expected = literal(metric, logits, prompt, answer[row], wrong[row])
            n = len(prompt) - (metric == "loss")
            if n:
                difference = got[row, :n].values.T - expected.numpy()
                assert np.abs(difference).max() < TOLERANCE, metric
            assert np.isnan(got[row, n:].values).all()


@pytest.mark.parametrize("processing", ["none", "transformer_lens"])
@pytest.mark.parametrize("metric", ["logit_diff", "logit", "logprob"])
@pytest.mark.parametrize("scale", ["own", "frozen"])
def test_the_last_entry_is_the_metric_itself(
    zoo, tiny_name, token_prompts, padded, answers, prompt_set, logits_of, processing, metric, scale
):
    model = zoo.model(tiny_name, processing=processing)
    got = logit_lens(model, prompt_set, metric=metric, scale=scale).sel(site="final_post")
    logits = logits_of(model, padded(token_prompts))
    for row, prompt in enumerate(token_prompts):
        answer, wrong = [answers["answer"][row]], [answers["wrong"][row]]
        expected = literal(metric, logits[row, len(prompt) - 1][None, None], prompt, answer, wrong)
        assert abs(float(got[row]) - float(expected)) < TOLERANCE


@pytest.mark.parametrize("tiny_name", ["gpt2", "llama-gqa", "llama-biases-mqa-head-dim"], indirect=True)
@pytest.mark.parametrize("processing", ["none", "transformer_lens"])
@pytest.mark.parametrize("metric", ["logit_diff", "logit"])
def test_differences_of_neighbours_are_direct_effects(zoo, tiny_name, prompt_set, processing, metric):
    model = zoo.model(tiny_name, processing=processing)
    lens = logit_lens(model, prompt_set, metric=metric, scale="frozen")
    effect = direct_logit_attribution(model, prompt_set, unit="component", metric=metric)
    components = effect.sel(component=[name for name in effect.component.values if name.endswith("_out")])
    assert np.abs(np.diff(lens.values, axis=1) - components.values).max() < TOLERANCE
    rest = [name for name in effect.component.values if not name.endswith("_out")]
    first = effect.sel(component=rest).sum("component")
    assert np.abs(lens.sel(site="0_pre").values - first.values).max() < TOLERANCE


@pytest.mark.parametrize("scale", ["own", "frozen"])
@pytest.mark.parametrize("metric", ["logit_diff", "logprob"])
def test_positions_agree_with_all_positions(zoo, token_prompts, answers, scale, metric):
    model = zoo.model("mistral-window")
    long = [row for row, prompt in enumerate(token_prompts) if len(prompt) >= 4]
    prompts = PromptSet.of(
        [token_prompts[row] for row in long], **{key: [column[row] for row in long] for key, column in answers.items()}
    )
    everywhere = logit_lens(model, prompts, metric=metric, pos="all", scale=scale)
    for pos in (0, 3, -2, -4):
        got = logit_lens(model, prompts, metric=metric, pos=pos, scale=scale)
        assert got.dims == ("prompt", "site")
        for index, row in enumerate(long):
            expected = everywhere[index, pos % len(token_prompts[row])]
            assert np.abs(got[index].values - expected.values).max() < 1e-5


@pytest.mark.parametrize("metric", ["logit_diff", "logprob", "loss"])
def test_batch_companions_change_nothing(zoo, token_prompts, answers, prompt_set, metric):
    model = zoo.model("llama-gqa")
    together = logit_lens(model, prompt_set, metric=metric)
    for row, prompt in enumerate(token_prompts):
        one = PromptSet.of([prompt], answer=answers["answer"][row : row + 1], wrong=answers["wrong"][row : row + 1])
        alone = logit_lens(model, one, metric=metric)[0].values
        whole = together[row].values[: len(prompt)] if metric == "loss" else together[row].values
        assert np.array_equal(np.isnan(whole), np.isnan(alone))
        assert np.abs(np.nan_to_num(whole - alone)).max() < 1e-5


def test_loss_needs_no_answers_and_has_a_value_per_token(zoo, token_prompts):
    got = logit_lens(zoo.model("gpt2"), PromptSet.of(token_prompts), metric="loss")
    assert got.dims == ("prompt", "pos", "site")
    assert np.isfinite(got.values).all(-1).sum(1).tolist() == [len(prompt) - 1 for prompt in token_prompts]
    assert got.attrs["units"] == "nats"
    assert got.attrs["pos"] == "all"


def test_labels_and_attributes(zoo, prompt_set):
    got = logit_lens(zoo.model("gpt2"), prompt_set)
    assert got.name == "logit_diff_lens"
    assert got.dims == ("prompt", "site")
    assert got.site.values.tolist() == ["0_pre", "0_mid", "1_pre", "1_mid", "2_pre", "2_mid", "final_post"]
    assert got.attrs["units"] == "logits"
    assert got.attrs["final_norm_scale"] == "own"
    assert {"long_name", "sign", "pos", "metric", "model", "processing", "dtype"} <= set(got.attrs)
    assert logit_lens(zoo.model("gpt2"), prompt_set, metric="logprob").attrs["units"] == "nats"
