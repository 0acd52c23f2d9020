"""direct_effect against literal logits, head by head; the metrics of all logits in sweeps and lenses."""

import numpy as np
import pytest
import torch

import fastinterp
from fastinterp.errors import MetricError, OptionError, SiteRangeError
from fastinterp.prompts import PromptSet
from tests.analyses.literal_heads import MODELS, capped, literal

METRICS = ("logit_diff", "logit", "logprob", "rank", "kl", "loss")
SEVERAL = {
    "answer": [[5, 6], [7], [8], [9, 10, 11], [12], [13, 14], [15]],
    "wrong": [[16], [17, 18], [19], [20], [21, 22], [23], [24, 25, 26]],
}


@pytest.fixture(params=[(name, processing) for name in MODELS for processing in ("transformer_lens", "none")], ids=str)
def model(zoo, request):
    name, processing = request.param
    return zoo.model(name, dtype=torch.float64, processing=processing)


def measured(metric, logits, clean, row):
    """A metric of logits [d_vocab], written out; of several answers the definitions of ``fastinterp.metrics``."""
    answer, wrong = SEVERAL["answer"][row], SEVERAL["wrong"][row]
    if metric == "kl":
        p, q = clean.log_softmax(-1), logits.log_softmax(-1)
        return float((p.exp() * (p - q)).sum())
    if metric == "rank":
        return float(min(int((logits > logits[token]).sum()) for token in answer))
    if metric == "logprob":
        return float(logits.softmax(-1)[answer].sum().log())
    value = logits[answer].mean()
    return float(value - logits[wrong].mean() if metric == "logit_diff" else value)


def removed(model, prompts, mode):
    """For each prompt: raw logits, and what taking away each head subtracts from them, both [pos, ..]."""
    parts = [literal(model, prompt) for prompt in prompts]
    if mode == "zero":
        return [(raw, contributions) for raw, contributions, _ in parts]
    mean = torch.cat([z for _, _, z in parts]).mean(0)
    found = []
    for prompt, (raw, contributions, z) in zip(prompts, parts, strict=True):
        # A contribution is linear in z: that of the mean, at this prompt's own scales.
        basis = literal_of(model, prompt, mean.expand_as(z))
        found.append((raw, contributions - basis))
    return found


def literal_of(model, prompt, z):
    from fastinterp.model import Taps, forward
    from fastinterp.model.norms import norm_scale
    from tests.analyses.literal_heads import through

    names = ["ln1_post_scale"] if model.spec.post_norms else []
    taps = Taps.of(model.spec.n_layers, capture=names)
    with torch.no_grad():
        resid = forward(model.spec, model.weights, torch.tensor([prompt]), taps=taps)
    scale = norm_scale(model.spec.norm, resid)[0]
    return torch.stack([through(model, taps, scale, z, layer) for layer in range(model.spec.n_layers)], 1)


@pytest.mark.parametrize("mode", ["zero", "mean"])
@pytest.mark.parametrize("metric", METRICS)
def test_every_head_every_prompt(model, token_prompts, metric, mode):
    token_prompts = token_prompts[:4]
    columns = {name: given[:4] for name, given in SEVERAL.items()}
    found = fastinterp.direct_effect(model, PromptSet.of(token_prompts, **columns), mode=mode, metric=metric)
    effect, clean = found[f"{metric}_{mode}_direct"], found[f"{metric}_clean"]
    for row, (raw, taken) in enumerate(removed(model, token_prompts, mode)):
        logits, prompt = capped(model, raw), token_prompts[row]
        for layer in range(model.spec.n_layers):
            for head in range(model.spec.n_heads):
                edited = capped(model, raw - taken[:, layer, head])
                if metric == "loss":
                    following = torch.tensor(prompt[1:], dtype=torch.int64)[:, None]
                    before, after = (-x.log_softmax(-1)[:-1].gather(1, following)[:, 0] for x in (logits, edited))
                    ours = effect[row, : len(prompt) - 1, layer, head].values
                    assert np.abs(ours - (after - before).numpy()).max(initial=0.0) < 1e-9
                    assert np.isnan(effect[row, len(prompt) - 1 :, layer, head]).all()
                    continue
                expected = measured(metric, edited[-1], logits[-1], row) - measured(metric, logits[-1], logits[-1], row)
                assert abs(float(effect[row, layer, head]) - expected) < 1e-9
                assert abs(float(clean[row]) - measured(metric, logits[-1], logits[-1], row)) < 1e-9


@pytest.mark.parametrize("metric", ["logit_diff", "logprob", "kl"])
def test_every_position_is_as_by_itself(zoo, token_prompts, answers, metric):
    model = zoo.model("llama-gqa", dtype=torch.float64)
    prompts = PromptSet.of(token_prompts, **answers)
    everywhere = fastinterp.direct_effect(model, prompts, metric=metric, pos="all")[f"{metric}_zero_direct"]
    for pos in (0, -1):
        one = fastinterp.direct_effect(model, prompts, metric=metric, pos=pos)[f"{metric}_zero_direct"]
        for row, prompt in enumerate(token_prompts):
            assert np.abs(everywhere[row, pos % len(prompt)].values - one[row].values).max() < 1e-9


def test_chosen_heads_are_those_of_all(zoo, token_prompts):
    model = zoo.model("gpt2", dtype=torch.float64)
    prompts = PromptSet.of(token_prompts)
    whole = fastinterp.direct_effect(model, prompts, mode="mean")["loss_mean_direct"]
    heads = [(2, 1), (0, 3), (2, 0)]
    some = fastinterp.direct_effect(model, prompts, heads=heads, mode="mean")["loss_mean_direct"]
    assert list(some["unit"].values) == ["L2H1", "L0H3", "L2H0"]
    for unit, (layer, head) in enumerate(heads):
        assert np.nanmax(np.abs(some[..., unit].values - whole[..., layer, head].values)) < 1e-12


def test_the_mean_of_other_prompts(zoo, token_prompts):
    model = zoo.model("gpt2", dtype=torch.float64)
    one, others = PromptSet.of(token_prompts[:1]), PromptSet.of(token_prompts[1:])
    own = fastinterp.direct_effect(model, one, mode="mean")["loss_mean_direct"]
    other = fastinterp.direct_effect(model, one, mode="mean", reference=others)["loss_mean_direct"]
    assert np.nanmax(np.abs(own.values - other.values)) > 1e-3
    same = fastinterp.direct_effect(model, one, mode="mean", reference=one)["loss_mean_direct"]
    assert np.array_equal(own.values, same.values, equal_nan=True)


def test_the_last_layers_total_effect_is_direct_but_for_the_scale_and_its_mlp(zoo, token_prompts, answers):
    """The direct logit difference that a head takes with it is its attribution."""
    model = zoo.model("llama-gqa", dtype=torch.float64)
    prompts = PromptSet.of(token_prompts, **answers)
    effect = fastinterp.direct_effect(model, prompts, metric="logit_diff")["logit_diff_zero_direct"]
    assert np.abs(effect.values + fastinterp.direct_logit_attribution(model, prompts).values).max() < 1e-9


@pytest.mark.parametrize("name", ["gpt2", "llama-gqa", "gemma2-softcaps"])
@pytest.mark.parametrize("metric", ["rank", "kl"])
def test_total_effects_on_rank_and_divergence(zoo, name, token_prompts, metric):
    from fastinterp.model import Edit, Taps, final_logits, forward

    model = zoo.model(name, dtype=torch.float64)
    found = fastinterp.ablate(model, PromptSet.of(token_prompts, **SEVERAL), metric=metric)
    for row, prompt in enumerate(token_prompts):

        def logits(*edits, prompt=prompt):
            taps = Taps.of(model.spec.n_layers, edits=edits)
            with torch.no_grad():
                resid = forward(model.spec, model.weights, torch.tensor([prompt]), taps=taps)
                return final_logits(model.spec, model.weights, resid)[0, -1]

        clean = logits()
        for layer in range(model.spec.n_layers):
            for head in range(model.spec.n_heads):
                edited = logits(Edit(site="z", layer=layer, head=head))
                expected = measured(metric, edited, clean, row) - measured(metric, clean, clean, row)
                assert abs(float(found[f"{metric}_zero_total"][row, layer, head]) - expected) < 1e-9


@pytest.mark.parametrize("pos", [-1, "all"])
def test_the_lens_of_rank_and_divergence_ends_in_the_clean_run(zoo, token_prompts, pos):
    model = zoo.model("llama-gqa", dtype=torch.float64)
    prompts = PromptSet.of(token_prompts, **SEVERAL)
    kl = fastinterp.logit_lens(model, prompts, metric="kl", pos=pos)
    last = kl.sel(site="final_post").values
    assert np.nanmax(np.abs(last)) < 1e-12
    assert np.nanmin(kl.values) > -1e-12
    assert np.nanmax(kl.values) > 1e-3
    rank = fastinterp.logit_lens(model, prompts, metric="rank", pos=pos).sel(site="final_post")
    if pos == -1:
        clean = fastinterp.ablate(model, prompts, metric="rank")["rank_clean"]
        assert np.array_equal(rank.values, clean.values)


@pytest.mark.usefixtures("without_shape_checks")
def test_bad_input_is_refused(zoo, token_prompts):
    model = zoo.model("gpt2")
    prompts = PromptSet.of(token_prompts)
    for error, match, options in (
        (OptionError, "mode", {"mode": "resample"}),
        (MetricError, "metric", {"metric": "losses"}),
        (MetricError, "leave out pos", {"metric": "loss", "pos": 2}),
        (SiteRangeError, "head 4", {"heads": [(0, 4)], "mode": "mean"}),
        (fastinterp.FastinterpError, "answer", {"metric": "logprob"}),
        (SiteRangeError, "pos=99", {"metric": "kl", "pos": 99}),
    ):
        with pytest.raises(error, match=match):
            fastinterp.direct_effect(model, prompts, **options)
