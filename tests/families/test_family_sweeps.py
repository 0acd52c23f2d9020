"""Sweeps over every family against their definition: one whole forward per variant, metrics read off the logits."""

import numpy as np
import pytest
import torch

from fastinterp.analyses import ablate
from fastinterp.model import Edit, Taps, final_logits, forward
from fastinterp.prompts import PromptSet
from fastinterp.sweep import Variant, run_variants

EXACT = 1e-9
"""Float64: what the two ways may differ by is rounding."""

METRICS = ("logit_diff", "logit", "logprob", "loss")

# Several alternatives, of different number: prompts with fewer are padded.
SEVERAL = {
    "answer": [[5, 6], [7], [8], [9, 10, 11], [12], [13, 14], [15]],
    "wrong": [[16], [17, 18], [19], [20], [21, 22], [23], [24, 25, 26]],
}

# Every family, and what its config can change about the sums.
FAMILIES = [
    "gemma-mha-biases-untied",
    "gemma2-softcaps",
    "gemma2-one-head-one-layer-no-softcaps",
    "gemma3-mixed-rope",
    "gpt-neo",
    "gpt-neox",
    "gpt-neox-sequential-no-attention-bias-wide-head",
    "gptj-wide-head-tied",
    "opt",
    "phi-gqa-wide-head",
    "phi3-gqa-window",
    "qwen2-gqa-tied",
    "qwen3-biases-mha-wide-head-windows-tied",
    "starcoder2-gqa-window",
]


@pytest.fixture(params=FAMILIES)
def name(request):
    return request.param


def logits_with(model, prompt, *edits):
    """Logits ``[pos, d_vocab]`` of one prompt by itself, under edits."""
    taps = Taps.of(model.spec.n_layers, edits=edits)
    with torch.no_grad():
        resid = forward(model.spec, model.weights, torch.tensor([prompt]), taps=taps)
        return final_logits(model.spec, model.weights, resid)[0]


def measured(logits, prompt, row):
    """All metrics of the logits ``[pos, d_vocab]`` of one prompt, written out; alternatives count by their mean."""
    answer, wrong = SEVERAL["answer"][row], SEVERAL["wrong"][row]
    logprobs = logits.log_softmax(-1)
    following = torch.tensor(prompt[1:], dtype=torch.int64)
    return {
        "logit_diff": (logits[-1, answer].mean() - logits[-1, wrong].mean()).numpy(),
        "logit": logits[-1, answer].mean().numpy(),
        "logprob": logprobs[-1, answer].exp().sum().log().numpy(),
        "loss": -logprobs[torch.arange(len(following)), following].numpy(),
    }


@pytest.mark.parametrize("processing", ["none", "transformer_lens"])
def test_ablation_equals_the_loop_over_heads(zoo, name, token_prompts, processing):
    model = zoo.model(name, processing=processing, dtype=torch.float64)
    prompts = PromptSet.of(token_prompts, **SEVERAL)
    results = {metric: ablate(model, prompts, metric=metric) for metric in METRICS}
    smallest = np.inf
    for row in (2, 1, 0):
        prompt = token_prompts[row]
        clean = measured(logits_with(model, prompt), prompt, row)
        for metric, data in results.items():
            got = data[f"{metric}_clean"][row].values
            got = got[: len(prompt) - 1] if metric == "loss" else got
            assert np.abs(got - clean[metric]).max(initial=0.0) < EXACT, metric
        for layer in range(model.spec.n_layers):
            for head in range(model.spec.n_heads):
                edit = Edit(site="z", layer=layer, head=head, replacement=0.0)
                ablated = measured(logits_with(model, prompt, edit), prompt, row)
                for metric, data in results.items():
                    got = data[f"{metric}_zero"].sel(layer=layer, head=head)[row].values
                    if metric == "loss":
                        assert np.isnan(got[len(prompt) - 1 :]).all()
                        got = got[: len(prompt) - 1]
                    difference = np.abs(got - (ablated[metric] - clean[metric]))
                    assert difference.max(initial=0.0) < EXACT, (metric, layer, head, row)
                if len(prompt) == 12:
                    smallest = min(smallest, abs(ablated["loss"] - clean["loss"]).max())
    # So that none of the comparisons is one of the clean run with itself.
    assert smallest > 1e-3


@pytest.mark.parametrize("metric", ["logit_diff", "logprob", "loss"])
def test_prompts_of_other_lengths_change_nothing(zoo, name, token_prompts, metric):
    model = zoo.model(name)
    together = ablate(model, PromptSet.of(token_prompts, **SEVERAL), metric=metric)
    for row in (2, 1, 4):
        prompt = token_prompts[row]
        columns = {key: column[row : row + 1] for key, column in SEVERAL.items()}
        alone = ablate(model, PromptSet.of([prompt], **columns), metric=metric)
        for name in (f"{metric}_zero", f"{metric}_clean"):
            whole, single = together[name][row].values, alone[name][0].values
            if metric == "loss":
                whole, single = whole[: len(prompt) - 1], single[: len(prompt) - 1]
            assert np.abs(whole - single).max(initial=0.0) < 1e-5, (name, row)


def swept(model, tokens, variants, **options):
    """Final residuals of all variants, in their order; every variant must come once."""
    found = {}
    for indices, residuals in run_variants(model, tokens, variants, **options):
        for index, residual in zip(indices, residuals, strict=True):
            assert index not in found
            found[index] = residual.clone()
    return torch.stack([found[index] for index in range(len(variants))])


def some_variants(spec, tokens):
    """Edits of every kind of site, some by heads and some not, alone and together."""
    generator, top = torch.Generator().manual_seed(4), spec.n_layers - 1
    batch, pos = tokens.shape
    z = torch.randn(batch, pos, spec.d_head, generator=generator, dtype=torch.float64)
    positions = torch.rand(tokens.shape, generator=generator) < 0.4
    edits = [
        Edit(site="z", layer=0, head=0, replacement=z),
        Edit(site="z", layer=top, head=spec.n_heads - 1, replacement=z, positions=positions),
        Edit(site="z", layer=top, replacement=0.3),
        Edit(site="z", layer=0, positions=positions),
        Edit(site="q", layer=top, head=0, replacement=1.0),
        Edit(site="k", layer=0, head=0, replacement=0.5),
        Edit(site="v", layer=0, head=0),
        Edit(site="v", layer=top, head=-1, replacement=0.2),
        Edit(site="pattern", layer=0, head=0),
        Edit(site="result", layer=top, head=0, replacement=0.1),
        Edit(site="attn_raw", layer=0, replacement=0.2),
        Edit(site="attn_out", layer=top, positions=positions),
        Edit(site="mlp_raw", layer=0, replacement=0.2),
        Edit(site="mlp_out", layer=0),
        Edit(site="post", layer=top, replacement=0.1),
        Edit(site="resid_post", layer=0, replacement=0.2),
        Edit(site="q_input", layer=0, head=0, replacement=0.4),
        Edit(site="embed", layer=0, positions=positions),
    ]
    if spec.position.kind == "rotary":
        edits += [Edit(site="rot_q", layer=0, head=0, replacement=1.0)]
    if spec.post_norms:
        edits += [Edit(site="ln1_post_scale", layer=0, replacement=2.0)]
    if not spec.parallel:
        edits += [Edit(site="resid_mid", layer=top, replacement=0.2)]
    variants = [Variant(edits=(edit,)) for edit in edits]
    variants += [Variant(edits=(edits[0], edits[1])), Variant(edits=(edits[4], edits[6], edits[13]))]
    return [variants[i] for i in torch.randperm(len(variants), generator=generator).tolist()]


@pytest.mark.parametrize("where", ["everywhere", "last", "first"])
def test_variants_of_every_kind_equal_whole_forwards(zoo, name, token_prompts, padded, where):
    model, tokens = zoo.model(name, dtype=torch.float64), padded(token_prompts)
    n_tokens = torch.tensor([len(prompt) for prompt in token_prompts])
    at = {"everywhere": None, "last": n_tokens - 1, "first": torch.zeros_like(n_tokens)}[where]
    variants = some_variants(model.spec, tokens)
    got = swept(model, tokens, variants, at=at, n_tokens=n_tokens)
    real = torch.arange(tokens.shape[1]) < n_tokens[:, None]
    changes = []
    with torch.no_grad():
        clean = forward(model.spec, model.weights, tokens)
    for variant, final in zip(variants, got, strict=True):
        taps = Taps.of(model.spec.n_layers, edits=variant.edits)
        with torch.no_grad():
            expected = forward(model.spec, model.weights, tokens, taps=taps)
        changes.append(float((expected - clean)[real].abs().max()))
        difference = (final - expected)[real] if at is None else final - expected[torch.arange(len(at)), at]
        assert float(difference.abs().max()) < EXACT, variant
    assert min(changes) > 1e-3


@pytest.mark.parametrize("at_last", [False, True])
def test_groups_and_beginnings_in_common_change_nothing(zoo, name, padded, at_last):
    alike = [[7, 8, 9, 10, 11, 12, 13], [7, 8, 9], [7, 30, 9, 10], [7], [7, 8, 9, 10, 11, 12, 13], [8, 9]]
    model, tokens = zoo.model(name, dtype=torch.float64), padded(alike)
    n_tokens = torch.tensor([len(prompt) for prompt in alike])
    at = n_tokens - 1 if at_last else None
    variants = [
        Variant(edits=(Edit(site="z", layer=layer, head=head),))
        for layer in range(model.spec.n_layers)
        for head in range(model.spec.n_heads)
    ]
    whole = swept(model, tokens, variants, at=at, n_tokens=n_tokens)
    grouped = swept(model, tokens, variants, at=at, n_tokens=n_tokens, residual_bytes=1)
    real = torch.arange(tokens.shape[1]) < n_tokens[:, None]
    for index, variant in enumerate(variants):
        taps = Taps.of(model.spec.n_layers, edits=variant.edits)
        with torch.no_grad():
            expected = forward(model.spec, model.weights, tokens, taps=taps)
        expected = expected[real] if at is None else expected[torch.arange(len(at)), at]
        for got in (whole[index], grouped[index]):
            assert float(((got[real] if at is None else got) - expected).abs().max()) < EXACT
