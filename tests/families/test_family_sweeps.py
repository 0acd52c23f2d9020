"""Sweeps over every family against their definition: one whole forward per variant, metrics read off the logits."""

import numpy as np
import pytest
import torch

from fastinterp.analyses import ablate
from fastinterp.model import Edit, Taps, final_logits, forward
from fastinterp.prompts import PromptSet
from fastinterp.sweep import Variant, head_variants, run_variants

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
    "stablelm-gqa",
    "starcoder2-gqa-window",
]


@pytest.fixture(params=FAMILIES)
def name(request):
    return request.param


def logits_with(model, tokens, *edits):
    """Logits ``[batch, pos, d_vocab]`` under edits."""
    taps = Taps.of(model.spec.n_layers, edits=edits)
    with torch.no_grad():
        resid = forward(model.spec, model.weights, tokens, taps=taps)
        return final_logits(model.spec, model.weights, resid)


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


def all_measured(logits, prompts):
    """All metrics of every prompt of a batch, at its real tokens: ``{metric: [...]}``."""
    rows = [measured(logits[row, : len(prompt)], prompt, row) for row, prompt in enumerate(prompts)]
    return {metric: np.concatenate([np.atleast_1d(row[metric]) for row in rows]) for metric in METRICS}


def test_ablation_equals_the_loop_over_heads(zoo, name, token_prompts, padded):
    model, tokens = zoo.model(name, dtype=torch.float64), padded(token_prompts)
    prompts = PromptSet.of(token_prompts, **SEVERAL)
    results = {metric: ablate(model, prompts, metric=metric) for metric in METRICS}

    def found(metric, which):
        """A result's values, those of every position in a row."""
        values = results[metric][f"{metric}_{which}"].values
        if metric != "loss":
            return values
        assert all(np.isnan(values[row, len(prompt) - 1 :]).all() for row, prompt in enumerate(token_prompts))
        return np.concatenate([values[row, : len(prompt) - 1] for row, prompt in enumerate(token_prompts)])

    clean = all_measured(logits_with(model, tokens), token_prompts)
    for metric in METRICS:
        assert np.abs(found(metric, "clean") - clean[metric]).max() < EXACT, metric
    for layer in range(model.spec.n_layers):
        for head in range(model.spec.n_heads):
            edit = Edit(site="z", layer=layer, head=head, replacement=0.0)
            ablated = all_measured(logits_with(model, tokens, edit), token_prompts)
            for metric in METRICS:
                effect = ablated[metric] - clean[metric]
                got = found(metric, "zero_total")[..., layer, head]
                assert np.abs(got - effect).max() < EXACT, (metric, layer, head)
                # So that none of the comparisons is one of the clean run with itself.
                assert np.abs(effect).max() > 1e-3


@pytest.mark.parametrize("name", ["gemma2-softcaps", "gpt-neox", "opt", "qwen2-gqa-tied"], indirect=True)
def test_ablation_with_the_weights_of_the_checkpoint(zoo, name, token_prompts, padded):
    # Without folding, z holds the value bias too, and that goes with the head.
    model, tokens = zoo.model(name, processing="none", dtype=torch.float64), padded(token_prompts)
    data = ablate(model, PromptSet.of(token_prompts, **SEVERAL), metric="logprob")
    clean = all_measured(logits_with(model, tokens), token_prompts)["logprob"]
    for layer in range(model.spec.n_layers):
        for head in (0, model.spec.n_heads - 1):
            edit = Edit(site="z", layer=layer, head=head, replacement=0.0)
            ablated = all_measured(logits_with(model, tokens, edit), token_prompts)["logprob"]
            got = data["logprob_zero_total"].sel(layer=layer, head=head).values
            assert np.abs(got - (ablated - clean)).max() < EXACT, (layer, head)


@pytest.mark.parametrize("metric", ["logit_diff", "logprob", "loss"])
def test_prompts_of_other_lengths_change_nothing(zoo, name, token_prompts, metric):
    model = zoo.model(name)
    together = ablate(model, PromptSet.of(token_prompts, **SEVERAL), metric=metric)
    for row in (2, 1, 4):
        prompt = token_prompts[row]
        columns = {key: column[row : row + 1] for key, column in SEVERAL.items()}
        alone = ablate(model, PromptSet.of([prompt], **columns), metric=metric)
        for name in (f"{metric}_zero_total", f"{metric}_clean"):
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


def assert_equal_whole_forwards(model, tokens, n_tokens, variants, **options):
    """Compares with one forward per variant, at all real tokens and at the last ones; returns what each changes."""
    last = n_tokens - 1
    everywhere = swept(model, tokens, variants, n_tokens=n_tokens, **options)
    at_last = swept(model, tokens, variants, n_tokens=n_tokens, at=last, **options)
    real, rows = torch.arange(tokens.shape[1]) < n_tokens[:, None], torch.arange(len(last))
    changes = []
    with torch.no_grad():
        clean = forward(model.spec, model.weights, tokens)
        for index, variant in enumerate(variants):
            taps = Taps.of(model.spec.n_layers, edits=variant.edits)
            expected = forward(model.spec, model.weights, tokens, taps=taps)
            changes.append(float((expected - clean)[real].abs().max()))
            assert float((everywhere[index] - expected)[real].abs().max()) < EXACT, variant
            assert float((at_last[index] - expected[rows, last]).abs().max()) < EXACT, variant
    return changes


def test_variants_of_every_kind_equal_whole_forwards(zoo, name, token_prompts, padded):
    model, tokens = zoo.model(name, dtype=torch.float64), padded(token_prompts)
    n_tokens = torch.tensor([len(prompt) for prompt in token_prompts])
    changes = assert_equal_whole_forwards(model, tokens, n_tokens, some_variants(model.spec, tokens))
    assert min(changes) > 1e-3


@pytest.mark.parametrize("residual_bytes", [1, 1 << 30])
def test_groups_and_beginnings_in_common_change_nothing(zoo, name, padded, residual_bytes):
    alike = [[7, 8, 9, 10, 11, 12, 13], [7, 8, 9], [7, 30, 9, 10], [7], [7, 8, 9, 10, 11, 12, 13], [8, 9]]
    model, tokens = zoo.model(name, dtype=torch.float64), padded(alike)
    n_tokens = torch.tensor([len(prompt) for prompt in alike])
    variants = head_variants(model.spec)[:: 1 if residual_bytes > 1 else 3]
    assert_equal_whole_forwards(model, tokens, n_tokens, variants, residual_bytes=residual_bytes)
