"""All-head ablation against a loop of hooks, one head, one prompt and one run at a time."""

import functools

import numpy as np
import pytest
import torch

from fastinterp.analyses import ablate
from fastinterp.prompts import PromptSet

TOLERANCE = 1e-4
MODELS = [
    "gpt2",
    "gpt2-one-head-one-layer",
    "llama-gqa",
    "llama-biases-mqa-head-dim",
    "llama-one-head-one-layer",
    "mistral-window",
]


def zero_head(z, hook, head):
    z[:, :, head] = 0.0
    return z


def measured(logits, prompt, answer, wrong):
    """All metrics of the logits ``[pos, d_vocab]`` of one prompt, written out."""
    logprobs = logits.log_softmax(-1)
    following = torch.tensor(prompt[1:], dtype=torch.int64)
    return {
        "logit_diff": float(logits[-1, answer] - logits[-1, wrong]),
        "logit": float(logits[-1, answer]),
        "logprob": float(logprobs[-1, answer]),
        "loss": -logprobs[torch.arange(len(following)), following].numpy(),
    }


@pytest.mark.parametrize("tiny_name", MODELS, indirect=True)
def test_every_head_and_metric_equals_a_loop_of_hooks(zoo, tiny_name, token_prompts, answers, prompt_set):
    model, bridge = zoo.model(tiny_name), zoo.bridge(tiny_name)
    results = {
        metric: ablate(model, prompt_set, metric=metric) for metric in ("logit_diff", "logit", "logprob", "loss")
    }
    largest = 0.0
    for row, prompt in enumerate(token_prompts):
        tokens, answer, wrong = torch.tensor([prompt]), answers["answer"][row], answers["wrong"][row]
        with torch.no_grad():
            clean = measured(bridge(tokens)[0], prompt, answer, wrong)
        for layer in range(model.spec.n_layers):
            for head in range(model.spec.n_heads):
                point = f"blocks.{layer}.attn.hook_z"
                hook = functools.partial(zero_head, head=head)
                with torch.no_grad():
                    logits = bridge.run_with_hooks(tokens, fwd_hooks=[(point, hook)])[0]
                ablated = measured(logits, prompt, answer, wrong)
                for metric, data in results.items():
                    got = data[f"{metric}_zero_total"].sel(layer=layer, head=head)[row].values
                    if metric == "loss":
                        assert np.isnan(got[len(prompt) - 1 :]).all()
                        got = got[: len(prompt) - 1]
                    difference = np.abs(got - (ablated[metric] - clean[metric]))
                    assert difference.max(initial=0.0) < TOLERANCE, (metric, layer, head, row)
                largest = max(largest, abs(ablated["logit_diff"] - clean["logit_diff"]))
        for metric, data in results.items():
            got = data[f"{metric}_clean"][row].values
            got = got[: len(prompt) - 1] if metric == "loss" else got
            assert np.abs(got - clean[metric]).max(initial=0.0) < TOLERANCE, metric
    assert largest > 0.5


@pytest.mark.parametrize("tiny_name", ["gpt2", "llama-gqa", "llama-biases-mqa-head-dim"], indirect=True)
def test_raw_weights_equal_hooks_on_hugging_face(zoo, tiny_name, token_prompts, answers, prompt_set):
    # Without folding, z holds the value bias too, and that goes with the head.
    model, hf_model = zoo.model(tiny_name, processing="none"), zoo.hf(tiny_name)
    got = ablate(model, prompt_set)["logit_diff_zero_total"]
    d_head = model.spec.d_head

    def output(layer):
        if model.spec.family == "gpt2":
            return hf_model.transformer.h[layer].attn.c_proj
        return hf_model.model.layers[layer].self_attn.o_proj

    def logit_diff(row):
        with torch.no_grad():
            logits = hf_model(torch.tensor([token_prompts[row]])).logits[0, -1]
        return float(logits[answers["answer"][row]] - logits[answers["wrong"][row]])

    for row in (2, 1, 4):
        clean = logit_diff(row)
        for layer in range(model.spec.n_layers):
            for head in range(model.spec.n_heads):

                def zero(module, args, head=head):
                    z = args[0].clone()
                    z[..., head * d_head : (head + 1) * d_head] = 0.0
                    return (z,)

                handle = output(layer).register_forward_pre_hook(zero)
                try:
                    effect = logit_diff(row) - clean
                finally:
                    handle.remove()
                assert abs(float(got[row, layer, head]) - effect) < TOLERANCE


@pytest.mark.parametrize("tiny_name", MODELS, indirect=True)
@pytest.mark.parametrize("metric", ["logit_diff", "logprob", "loss"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-11)], ids=str)
def test_prompts_of_other_lengths_change_nothing(
    zoo, tiny_name, token_prompts, answers, prompt_set, metric, dtype, tolerance
):
    model = zoo.model(tiny_name, dtype=dtype)
    together = ablate(model, prompt_set, metric=metric)
    for row, prompt in enumerate(token_prompts):
        one = PromptSet.of([prompt], answer=answers["answer"][row : row + 1], wrong=answers["wrong"][row : row + 1])
        alone = ablate(model, one, metric=metric)
        for name in (f"{metric}_zero_total", f"{metric}_clean"):
            whole, single = together[name][row].values, alone[name][0].values
            whole = whole[: len(prompt)] if metric == "loss" else whole
            assert np.array_equal(np.isnan(whole), np.isnan(single))
            assert np.abs(np.nan_to_num(whole - single)).max() < tolerance


@pytest.mark.parametrize("tiny_name", ["gpt2", "llama-gqa", "mistral-window"], indirect=True)
@pytest.mark.parametrize("metric", ["logit_diff", "loss"])
def test_prompts_that_begin_alike_change_nothing(zoo, tiny_name, metric):
    alike = [[7, 8, 9, 10, 11], [7, 8, 9], [7, 8, 9, 10, 11], [7, 30, 9, 10], [8, 9, 10, 11], [7, 8, 9, 10, 11, 12]]
    columns = {"answer": [1, 2, 3, 4, 5, 6], "wrong": [11, 12, 13, 14, 15, 16]}
    model = zoo.model(tiny_name)
    together = ablate(model, PromptSet.of(alike, **columns), metric=metric)[f"{metric}_zero_total"]
    for row, prompt in enumerate(alike):
        one = PromptSet.of([prompt], **{key: column[row : row + 1] for key, column in columns.items()})
        alone = ablate(model, one, metric=metric)[f"{metric}_zero_total"][0].values
        whole = together[row].values[: len(prompt)] if metric == "loss" else together[row].values
        assert np.array_equal(np.isnan(whole), np.isnan(alone))
        assert np.abs(np.nan_to_num(whole - alone)).max() < 1e-5


def test_repeated_calls_give_the_same_bits(zoo, prompt_set):
    model = zoo.model("llama-gqa")
    first = ablate(model, prompt_set)
    ablate(model, prompt_set, metric="loss")
    assert first.identical(ablate(model, prompt_set))
    assert model.weights.sha256() == model.weights_sha256


def test_alternative_answers(zoo, token_prompts):
    model, bridge = zoo.model("gpt2"), zoo.bridge("gpt2")
    prompts = PromptSet.of(token_prompts[2:4], answer=[[5, 6], 7], wrong=[[8], [9, 10, 11]])
    data = ablate(model, prompts)
    logprob = ablate(model, prompts, metric="logprob")
    for row, (right, other) in enumerate([([5, 6], [8]), ([7], [9, 10, 11])]):
        tokens = torch.tensor([token_prompts[2 + row]])
        hook = functools.partial(zero_head, head=1)
        with torch.no_grad():
            runs = [
                bridge.run_with_hooks(tokens, fwd_hooks=hooks)[0, -1]
                for hooks in ([], [("blocks.1.attn.hook_z", hook)])
            ]
        clean, ablated = (float(run[right].mean() - run[other].mean()) for run in runs)
        assert abs(float(data["logit_diff_zero_total"][row, 1, 1]) - (ablated - clean)) < TOLERANCE
        clean, ablated = (float(run.softmax(-1)[right].sum().log()) for run in runs)
        assert abs(float(logprob["logprob_zero_total"][row, 1, 1]) - (ablated - clean)) < TOLERANCE


def test_labels_as_text_are_those_in_a_list(zoo, prompt_set):
    model = zoo.model("gpt2")
    listed = ablate(model, prompt_set, units=[(0, 1), ["MLP1", (2, 3)], "L0N5"])
    assert listed["unit"].values.tolist() == ["L0H1", "MLP1+L2H3", "L0N5"]
    assert listed.identical(ablate(model, prompt_set, units="L0H1, MLP1 + L2H3,L0N5"))
    assert listed.identical(ablate(model, prompt_set, units=listed["unit"].values))


def test_labels_and_attributes(zoo, prompt_set, token_prompts):
    data = ablate(zoo.model("gpt2"), prompt_set)
    assert set(data.data_vars) == {"logit_diff_zero_total", "logit_diff_clean"}
    effect, clean = data["logit_diff_zero_total"], data["logit_diff_clean"]
    assert effect.dims == ("prompt", "layer", "head")
    assert clean.dims == ("prompt",)
    assert effect.head_label.values[2, 3] == "L2H3"
    assert effect.attrs["sign"] == "ablated - clean"
    for array in (effect, clean):
        assert array.attrs["units"] == "logits"
        assert array.attrs["metric"] == "logit_diff"
        assert {"long_name", "sign"} <= set(array.attrs)
    assert {"model", "processing", "dtype"} <= set(data.attrs)
    loss = ablate(zoo.model("gpt2"), PromptSet.of(token_prompts), metric="loss")
    assert loss["loss_zero_total"].dims == ("prompt", "pos", "layer", "head")
    assert loss["loss_clean"].dims == ("prompt", "pos")
    assert loss["loss_zero_total"].attrs["units"] == "nats"


def test_rejected_prompts_are_nan(zoo, token_prompts):
    model = zoo.model("gpt2")
    prompts = PromptSet.of([token_prompts[0], [399, 400], token_prompts[2]], answer=[1, 2, 3], wrong=[4, 5, 6])
    data = ablate(model, prompts.tokenize(model, bad_prompts="reject"))
    for name in ("logit_diff_zero_total", "logit_diff_clean"):
        finite = np.isfinite(data[name].values.reshape(3, -1))
        assert finite.all(1).tolist() == [True, False, True]
        assert not finite[1].any()
