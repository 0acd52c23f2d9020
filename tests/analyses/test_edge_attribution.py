"""Edge attribution against TransformerLens, a copy of the residual for every reader, real patches and identities."""

import itertools

import numpy as np
import pytest
import torch

from fastinterp.analyses.edge_attribution import edge_attribution
from fastinterp.gradients.edges_nodes import destinations, sources
from fastinterp.model import Edit, Taps, forward
from fastinterp.prompts import PromptSet
from tests.analyses.literal_edges import EXACT, by_hand, ids, literal, metric_of, pairs_of, words, written_by_source


@pytest.fixture
def pairs(token_prompts, answers):
    return pairs_of(token_prompts, answers)


# The definition ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "direction", "metric", "method"),
    [
        ("gpt2", "denoise", "logit_diff", "eap"),
        ("llama-gqa", "noise", "logprob", "eap"),
        ("gemma2-softcaps", "denoise", "kl", "eap"),
        ("gpt-neox", "noise", "loss", "eap"),
        ("gpt2-one-head-one-layer", "noise", "logit_diff", "eap"),
        ("llama-gqa", "denoise", "logit_diff", "eap-ig"),
        ("mistral-window", "noise", "kl", "eap-ig"),
        ("qwen3-gqa", "denoise", "loss", "eap-ig"),
    ],
)
def test_equal_to_a_copy_of_the_residual_for_every_reader(zoo, pairs, name, direction, metric, method):
    model = zoo.model(name, dtype=torch.float64, processing="none" if name == "gpt2" else "transformer_lens")
    found = edge_attribution(model, pairs, method, direction, metric, steps=2, rule="trapezoid")
    points = [(0.0, 1.0)] if method == "eap" else [(0.0, 0.25), (0.5, 0.5), (1.0, 0.25)]
    got = found[f"{metric}_edge"]
    assert got.dims == ("prompt", "source", "destination")
    for row in range(len(pairs.prompts)):
        base, source = ids(pairs, row, direction)
        clean = source if direction == "denoise" else base
        with torch.no_grad():
            of_clean, of_source, of_base = (forward(model.spec, model.weights, t) for t in (clean, source, base))

        def measure(resid, base=base, row=row, reference=of_clean):
            return metric_of(metric, resid, model, base, *words(pairs, row), reference)

        expected = literal(model, base, source, measure, points)
        np.testing.assert_allclose(got[row].values, expected, atol=EXACT, rtol=0)
        # The loss of a prompt does not depend on its last token.
        assert np.nanmax(np.abs(expected)) > 1e-2 or (metric == "loss" and row == 0)
        assert abs(float(found[f"{metric}_base"][row]) - float(measure(of_base))) < EXACT
        assert abs(float(found[f"{metric}_source"][row]) - float(measure(of_source))) < EXACT


def test_equal_to_transformer_lens(zoo, pairs):
    from transformer_lens.tools.analysis.attribution_patching import EdgeAttributionConfig, attribution_patch

    model, bridge = zoo.model("gpt2", dtype=torch.float64), zoo.bridge("gpt2")
    found = edge_attribution(model, pairs)["logit_diff_edge"]
    row = 1
    answer, wrong = words(pairs, row)
    theirs = attribution_patch(
        bridge,
        torch.tensor([pairs.prompts[row]]),
        torch.tensor([pairs.corrupt[row]]),
        lambda logits: (logits[0, -1, answer] - logits[0, -1, wrong]).squeeze(),
        config=EdgeAttributionConfig(granularity="edge"),
    )
    suffix = {"q_input": "H{}.q", "k_input": "KV{}.k", "v_input": "KV{}.v"}
    expected = np.full(found.shape[1:], np.nan)
    labels = [found[dim].values.tolist() for dim in ("source", "destination")]
    # Theirs are edges at one position; a residual stream has no others.
    for (writer, reader), score in theirs.edge_scores.items():
        source = {"embed": "embed", "attn_head_out": f"L{writer.layer}H{writer.head}"}.get(
            writer.kind, f"MLP{writer.layer}"
        )
        destination = {"mlp_in": f"MLP{reader.layer}", "logits": "logits"}.get(reader.kind)
        if destination is None:
            destination = f"L{reader.layer}" + suffix[reader.kind].format(reader.head)
        at = labels[0].index(source), labels[1].index(destination)
        expected[at] = np.nan_to_num(expected[at]) + score
    np.testing.assert_allclose(found[row].values, expected, atol=1e-6, rtol=0)
    assert np.nanmax(np.abs(expected)) > 0.1


# Numbers by hand --------------------------------------------------------------------------------------------------


def test_numbers_by_hand():
    # A single token: every pattern is 1, so nothing depends on queries and keys.
    #
    # base, token 1:    r = (1, 1)    norm (1, 1)      L0H0 = 6 * (0, 1)     MLP0 = 0
    #                   r = (1, 7)    norm (0.2, 1.4)  L1H0 = 0.2 * (30, 0)  r = (7, 7)    norm (1, 1)
    #                   MLP1 = relu(1) * (-6, 0)       r = (1, 7)            logit = 10 * 0.2
    # source, token 0:  r = (-1, -1)  L0H0 = (0, -6)   r = (-1, -7)          L1H0 = -0.2 * (30, 0)
    #                   r = (-7, -7)  MLP1 = relu(-1) * .. = 0               logit = 10 * -1
    #
    # Backwards, with the norm's (y - n (n . y) / 2) / scale:
    #   logits   y = (10, 0)                      n = (0.2, 1.4)  scale 5   g = (9.8, -1.4) / 5 = (1.96, -0.28)
    #   MLP1     y = -6 * 1.96 (1, 0)             n = (1, 1)      scale 7   g = (-5.88, 5.88) / 7 = (-0.84, 0.84)
    #   L1 v     y = 30 * (1.96 - 0.84) (1, 0)    n = (0.2, 1.4)  scale 5   g = (32.928, -4.704) / 5
    #   MLP0     its weights are 0
    #   L0 v     y = 6 * (-0.28 + 0.84 - 0.9408) (1, 0)   n = (1, 1)  scale 1   g = (-1.1424, 1.1424)
    differences = {"embed": (-2, -2), "L0H0": (0, -12), "MLP0": (0, 0), "L1H0": (-12, 0), "MLP1": (6, 0)}
    expected = {
        ("embed", "L0KV0.v"): -2 * -1.1424 + -2 * 1.1424,
        ("embed", "L1KV0.v"): -2 * 6.5856 + -2 * -0.9408,
        ("embed", "MLP1"): -2 * -0.84 + -2 * 0.84,
        ("embed", "logits"): -2 * 1.96 + -2 * -0.28,
        ("L0H0", "L1KV0.v"): -12 * -0.9408,
        ("L0H0", "MLP1"): -12 * 0.84,
        ("L0H0", "logits"): -12 * -0.28,
        ("L1H0", "MLP1"): -12 * -0.84,
        ("L1H0", "logits"): -12 * 1.96,
        ("MLP1", "logits"): 6 * 1.96,
    }
    prompts = PromptSet.of([[0]], corrupt=[[1]], answer=[2], wrong=[3])
    found = edge_attribution(by_hand(), prompts)
    assert float(found["logit_diff_base"][0]) == pytest.approx(2)
    assert float(found["logit_diff_source"][0]) == pytest.approx(-10)
    for source, destination in itertools.product(differences, found["destination"].values):
        got = float(found["logit_diff_edge"][0].sel(source=source, destination=destination))
        exists = {
            "embed": True,
            "L0H0": not destination.startswith("L0"),
            "MLP0": destination == "logits" or destination[1:2] == "1" or destination == "MLP1",
            "L1H0": destination in ("MLP1", "logits"),
            "MLP1": destination == "logits",
        }[source]
        if not exists:
            assert np.isnan(got), (source, destination)
        else:
            assert got == pytest.approx(expected.get((source, destination), 0.0), abs=1e-12), (source, destination)


# Real patches -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "direction"), [("llama-gqa", "denoise"), ("gpt-neox", "noise")])
def test_the_beginning_of_real_path_patches(zoo, pairs, name, direction):
    model = zoo.model(name, dtype=torch.float64)
    spec, row = model.spec, 2
    base, source = ids(pairs, row, direction)
    found = edge_attribution(model, pairs, direction=direction)["logit_diff_edge"][row]
    difference = written_by_source(model, source) - written_by_source(model, base)
    labels = [node.label for node in sources(spec)]

    def measured(site, layer, head, change):
        edit = Edit(site=site, layer=layer, head=head, replacement=change[None], how="add")
        with torch.no_grad():
            resid = forward(spec, model.weights, base, taps=Taps.of(spec.n_layers, edits=[edit]))
            return float(metric_of("logit_diff", resid, model, base, *words(pairs, row)))

    step, sizes = 1e-5, []
    for writer, reader in itertools.product(("L0H1", "L1H2", "MLP0", "embed"), destinations(spec)):
        if reader.layer != 2 or reader.kind == "logits" or (reader.head or 0) > 1:
            continue
        site = "mlp_in" if reader.kind == "mlp" else f"{reader.kind}_input"
        change = step * difference[labels.index(writer)]
        slope = [measured(site, 2, reader.head, sign * change) for sign in (1, -1)]
        score = float(found.sel(source=writer, destination=reader.label))
        assert score == pytest.approx((slope[0] - slope[1]) / (2 * step), abs=1e-6), (writer, reader.label)
        sizes.append(abs(score))
    assert np.median(sizes) > 1e-3


# Identities -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "gemma2-softcaps"])
def test_scores_into_a_destination_sum_to_its_whole_input(zoo, pairs, name):
    model = zoo.model(name, dtype=torch.float64)
    spec, row = model.spec, 2
    base, source = ids(pairs, row, "denoise")
    found = edge_attribution(model, pairs)["logit_diff_edge"][row]
    taps = Taps.of(spec.n_layers, capture=["mlp_in", "v_input"])
    start = written_by_source(model, base)[:1].requires_grad_()
    taps.edits["resid_pre", 0] = [Edit(site="resid_pre", layer=0, replacement=start)]
    resid = forward(spec, model.weights, base, taps=taps)
    there = Taps.of(spec.n_layers, capture=["mlp_in", "v_input"])
    with torch.no_grad():
        end = forward(spec, model.weights, source, taps=there)
    keys = [("mlp_in", 1), ("v_input", 2)]
    value = metric_of("logit_diff", resid, model, base, *words(pairs, row))
    gradients = torch.autograd.grad(value, [*(taps.values[key] for key in keys), resid])
    resid, here = resid.detach(), {key: taps.values[key].detach() for key in keys}
    # b_O and the biases of MLPs are the same in both runs.
    into = found.sum("source")
    whole = (there.values["mlp_in", 1] - here["mlp_in", 1]) * gradients[0]
    assert float(into.sel(destination="MLP1")) == pytest.approx(float(whole.sum()), abs=EXACT)
    whole = ((there.values["v_input", 2] - here["v_input", 2]) * gradients[1])[0, :, 1]
    assert float(into.sel(destination="L2KV1.v")) == pytest.approx(float(whole.sum()), abs=EXACT)
    whole = (end - resid) * gradients[2]
    assert float(into.sel(destination="logits")) == pytest.approx(float(whole.sum()), abs=EXACT)
    assert abs(float(whole.sum())) > 1e-2


@pytest.mark.parametrize("metric", ["logit_diff", "prob"])
def test_integrated_scores_of_the_embedding_are_complete(zoo, pairs, metric):
    model = zoo.model("gpt2", dtype=torch.float64)
    found = edge_attribution(model, pairs, "eap-ig", metric=metric, steps=48, rule="gauss")
    total = found[f"{metric}_edge"].sel(source="embed").sum("destination")
    change = found[f"{metric}_source"] - found[f"{metric}_base"]
    np.testing.assert_allclose(total, change, atol=1e-6 * float(np.abs(change).max()), rtol=0)
    np.testing.assert_allclose(found[f"{metric}_completeness"], total - change, atol=EXACT)
    coarse = edge_attribution(model, pairs, "eap-ig", metric=metric, steps=2)[f"{metric}_completeness"]
    assert float(np.abs(coarse).max()) > 1e-3 * float(np.abs(change).max())
