"""Integrated gradients against a loop over layers and alphas, and the theorem that gives them their name."""

import dataclasses

import numpy as np
import pytest
import torch

from fastinterp.analyses import activation_patch
from fastinterp.analyses.attribution_patching import attribution_patch
from fastinterp.gradients import RULES, quadrature
from fastinterp.model import Edit, Taps, final_logits, forward
from fastinterp.model.weights import NormWeights
from fastinterp.prompts import PromptSet

EXACT = 1e-10


@pytest.fixture
def pairs():
    generator = torch.Generator().manual_seed(7)
    prompts, corrupt = (
        [torch.randint(1, 379, (n,), generator=generator).tolist() for n in (6, 3, 8)] for _ in range(2)
    )
    return PromptSet.of(prompts, corrupt=corrupt, answer=[30, 40, 50], wrong=[31, 41, 51])


def run(model, tokens, capture=(), edits=()):
    taps = Taps.of(model.spec.n_layers, capture=capture, edits=edits)
    resid = forward(model.spec, model.weights, torch.tensor([tokens]), taps=taps)
    return final_logits(model.spec, model.weights, resid)[0, -1], taps.values


def value_of(metric, logits, answer, wrong):
    return logits[answer] - logits[wrong] if metric == "logit_diff" else logits.log_softmax(-1)[answer]


def summed(site, product):
    """Over features and positions, for one prompt."""
    if site == "pattern":
        return product[0].sum((1, 2))
    return product[0].sum(0) if site == "post" else product[0].sum((0, -1))


@pytest.mark.parametrize(
    ("name", "metric", "direction", "rule"),
    [
        ("llama-gqa", "logit_diff", "denoise", "midpoint"),
        ("gpt2", "logprob", "noise", "trapezoid"),
        ("gpt-neox", "logprob", "denoise", "gauss"),
        ("gemma2-softcaps", "logit_diff", "noise", "right"),
    ],
)
def test_a_loop_over_layers_and_alphas(zoo, pairs, name, metric, direction, rule):
    model = zoo.model(name, dtype=torch.float64)
    sites = ("z", "k", "pattern", "resid_pre", "attn_out", "post", "mlp_out", "resid_post")
    steps = 3
    found = attribution_patch(
        model, pairs, sites, method="ig", direction=direction, metric=metric, steps=steps, rule=rule
    )
    assert found[f"{metric}_attribution_z"].attrs["rule"] == rule
    generator = torch.Generator().manual_seed(0)
    for row in range(len(pairs.prompts)):
        base, source = pairs.corrupt[row], pairs.prompts[row]
        if direction == "noise":
            base, source = source, base
        words = [int(np.atleast_1d(column[row])[0]) for column in (pairs.answer, pairs.wrong)]
        with torch.no_grad():
            logits, own = run(model, base, capture=sites)
            other_logits, other = run(model, source, capture=sites)
        before = float(value_of(metric, logits, *words))
        assert abs(float(found[f"{metric}_base"][row]) - before) < EXACT
        assert abs(float(found[f"{metric}_source"][row]) - float(value_of(metric, other_logits, *words))) < EXACT
        for site in sites:
            layer = int(torch.randint(model.spec.n_layers, (), generator=generator))
            a, b = own[site, layer], other[site, layer]
            average = torch.zeros_like(a)
            for alpha, weight in quadrature(rule, steps):
                leaf = (a + alpha * (b - a)).requires_grad_()
                changed, _ = run(model, base, edits=[Edit(site=site, layer=layer, replacement=leaf)])
                (gradient,) = torch.autograd.grad(value_of(metric, changed, *words), leaf)
                average += weight * gradient
            expected = summed(site, (b - a) * average)
            got = found[f"{metric}_attribution_{site}"][row, layer].values
            assert np.abs(got - expected.numpy()).max() < EXACT * max(1.0, np.abs(got).max()), (site, layer)
            with torch.no_grad():
                patched, _ = run(model, base, edits=[Edit(site=site, layer=layer, replacement=b)])
            error = float(expected.sum()) - (float(value_of(metric, patched, *words)) - before)
            assert abs(float(found[f"{metric}_completeness_{site}"][row, layer]) - error) < EXACT


@pytest.mark.parametrize(
    ("name", "direction", "rule"), [("llama-gqa", "denoise", "midpoint"), ("gpt2", "noise", "gauss")]
)
def test_a_loop_over_embeddings(zoo, pairs, name, direction, rule):
    model = zoo.model(name, dtype=torch.float64)
    sites, steps, n_layers = ("z", "pattern", "resid_pre", "post", "v"), 3, model.spec.n_layers
    found = attribution_patch(model, pairs, sites, method="ig_inputs", direction=direction, steps=steps, rule=rule)
    for row in range(len(pairs.prompts)):
        base, source = pairs.corrupt[row], pairs.prompts[row]
        if direction == "noise":
            base, source = source, base
        words = [int(np.atleast_1d(column[row])[0]) for column in (pairs.answer, pairs.wrong)]
        (_, own), (_, other) = (run(model, prompt, capture=sites) for prompt in (base, source))
        first = "resid_pre", 0
        averages = {key: torch.zeros_like(value) for key, value in own.items()}
        for alpha, weight in quadrature(rule, steps):
            leaf = (own[first] + alpha * (other[first] - own[first])).detach().requires_grad_()
            put = Edit(site="resid_pre", layer=0, replacement=leaf)
            logits, values = run(model, base, capture=sites, edits=[put])
            keys = list(values)
            found_here = torch.autograd.grad(value_of("logit_diff", logits, *words), [values[key] for key in keys])
            for key, gradient in zip(keys, found_here, strict=True):
                averages[key] += weight * gradient
        for site in sites:
            for layer in range(n_layers):
                key = site, layer
                expected = summed(site, (other[key] - own[key]) * averages[key]).numpy()
                got = found[f"logit_diff_attribution_{site}"][row, layer].values
                assert np.abs(got - expected).max() < EXACT * max(1.0, np.abs(got).max()), key
        whole = float(((other[first] - own[first]) * averages[first]).sum())
        effect = float(found["logit_diff_source"][row] - found["logit_diff_base"][row])
        assert abs(float(found["logit_diff_completeness"][row]) - (whole - effect)) < EXACT
        assert abs(float(found["logit_diff_attribution_resid_pre"][row, 0]) - whole) < EXACT
    with_embed = attribution_patch(
        model, pairs, "embed", method="ig_inputs", direction=direction, steps=steps, rule=rule, reduce=()
    )
    same = found["logit_diff_attribution_resid_pre"][:, 0]
    np.testing.assert_allclose(with_embed["logit_diff_attribution_embed"].sum("pos"), same, atol=EXACT)


def close(pairs):
    """Pairs that differ in one token, so that few steps are enough."""
    corrupt = [[*clean[:-1], other[-1]] for clean, other in zip(pairs.prompts, pairs.corrupt, strict=True)]
    return PromptSet.of(pairs.prompts, corrupt=corrupt, answer=pairs.answer, wrong=pairs.wrong)


@pytest.mark.parametrize("method", ["ig", "ig_inputs"])
def test_more_steps_are_closer_to_the_effect(zoo, pairs, method):
    model = zoo.model("gpt-neox", dtype=torch.float64)
    sites = ("mlp_out", "attn_out") if method == "ig" else ("z",)
    wanted = [f"logit_diff_completeness_{site}" for site in sites] if method == "ig" else ["logit_diff_completeness"]

    def worst(rule, steps):
        found = attribution_patch(model, close(pairs), sites, method=method, rule=rule, steps=steps)
        return np.array([float(np.abs(found[name]).max()) for name in wanted])

    for rule, order in (("midpoint", 4.0), ("trapezoid", 4.0), ("left", 2.0)):
        few, many = worst(rule, 16), worst(rule, 32)
        assert (few > 1e-6).all()
        assert few / many == pytest.approx(order, rel=0.35), rule
    assert (worst("gauss", 16) < 0.02 * worst("midpoint", 16)).all()


def test_the_sum_of_a_site_is_its_patch(zoo, pairs):
    model = zoo.model("llama-gqa", dtype=torch.float64)
    sites = ("attn_out", "mlp_out", "z")
    found = attribution_patch(model, close(pairs), sites, method="ig", rule="gauss", steps=24, metric="logprob")
    patched = activation_patch(model, close(pairs), sites, by="layer", metric="logprob")
    for site in sites:
        total = found[f"logprob_attribution_{site}"]
        total = total.sum("head") if "head" in total.dims else total
        effect = patched[f"logprob_patch_{site}"]
        assert float(np.abs(effect).max()) > 1e-2
        assert float(np.abs(total - effect).max()) < 1e-4
        error = found[f"logprob_completeness_{site}"]
        np.testing.assert_allclose(error, total - effect, atol=1e-9)


FAMILIES = [
    "gpt-neo", "gptj", "opt", "llama3-rope", "qwen2-windows", "qwen3-biases-mha-wide-head-windows-tied",
    "gemma-mqa-wide-head", "gemma3-mixed-rope", "phi-gqa-wide-head", "phi3-gqa-window", "starcoder2-gqa-window",
    "stablelm-gqa", "gpt-neox-sequential-no-attention-bias-wide-head", "mistral-window",
]  # fmt: skip


@pytest.mark.parametrize("name", FAMILIES)
def test_attributions_sum_to_the_effect_in_every_family(zoo, pairs, name):
    """A wrong gradient would be off by as much as the effect itself; with the ReLU of OPT integrals converge slowly."""
    model = zoo.model(name, dtype=torch.float64)
    sites = ("v", "z", "mlp_out")
    first = close(PromptSet.of(pairs.prompts[:1], corrupt=pairs.corrupt[:1], answer=[30], wrong=[31]))
    found = attribution_patch(model, first, sites, method="ig", rule="gauss", steps=10)
    for site in sites:
        total = found[f"logit_diff_attribution_{site}"]
        total = total.sum([dim for dim in total.dims if dim.endswith("head")])
        error = np.abs(found[f"logit_diff_completeness_{site}"])
        assert float(np.abs(total).max()) > 0.05
        assert float(error.max()) < 0.05 * float(np.abs(total).max()), site


def linear_behind_attention(model):
    """The model with norms that divide by a constant, 1, and without its last MLP: the logits are linear in ``z``."""
    spec = dataclasses.replace(model.spec, norm=dataclasses.replace(model.spec.norm, eps=1e20))
    norm = NormWeights(w=torch.full((spec.d_model,), 1e10, dtype=model.dtype))
    blocks = [dataclasses.replace(block, ln1=norm, ln2=norm) for block in model.weights.blocks]
    blocks[-1] = dataclasses.replace(blocks[-1], W_out=torch.zeros_like(blocks[-1].W_out))
    weights = dataclasses.replace(model.weights, blocks=tuple(blocks), ln_final=norm)
    return dataclasses.replace(model, spec=spec, weights=weights)


def test_what_is_linear_needs_one_step(zoo, pairs):
    model = linear_behind_attention(zoo.model("llama-gqa", dtype=torch.float64))
    sites = ("z", "pattern")
    plain = attribution_patch(model, pairs, sites)
    for rule, steps in [*((rule, 1) for rule in RULES), ("midpoint", 4)]:
        found = attribution_patch(model, pairs, sites, method="ig", rule=rule, steps=steps)
        for site in sites:
            total, error = (found[f"logit_diff_{what}_{site}"] for what in ("attribution", "completeness"))
            assert float(np.abs(error[:, -1]).max()) < 1e-9
            assert float(np.abs(total[:, -1]).max()) > 1.0
            same = plain[f"logit_diff_attribution_{site}"]
            np.testing.assert_allclose(total[:, -1], same[:, -1], atol=1e-9)
            # Of layers below, that is not so.
            assert float(np.abs(total[:, 0] - same[:, 0]).max()) > 1e-3 or (rule, steps) == ("left", 1)


@pytest.mark.parametrize("method", ["ig", "ig_inputs"])
def test_groups_of_alphas_change_nothing(zoo, pairs, method, monkeypatch):
    model = zoo.model("gemma2-softcaps", dtype=torch.float64)
    options = {"sites": ("z", "post"), "method": method, "steps": 4, "metric": "kl", "direction": "noise"}
    together = attribution_patch(model, pairs, **options)
    assert float(np.abs(together["kl_attribution_z"]).max()) > 1e-2
    assert float(np.abs(together["kl_base"]).max()) < EXACT
    monkeypatch.setattr("fastinterp.gradients.memory.run_bytes", lambda device: 1)
    one_by_one = attribution_patch(model, pairs, **options)
    for name, array in together.items():
        np.testing.assert_allclose(one_by_one[name], array, atol=EXACT)
    # In float32, against float64.
    rounded = attribution_patch(zoo.model("gemma2-softcaps"), pairs, **options)
    for name, array in together.items():
        assert float(np.abs(rounded[name] - array).max()) < 1e-4 * max(1.0, float(np.abs(array).max()))
