"""Direct effects of ablation: every unit taken out of the literal logits, all scales those of the clean run."""

import numpy as np
import pytest
import torch

import fastinterp
from fastinterp.analyses import ablate
from tests.analyses.literal_ablation import METRICS, Hooked, Tapped, assert_equal, units_of
from tests.analyses.test_ablation_modes import (
    ANSWER,
    CORRUPT,
    KINDS,
    LIST,
    MODES,
    POSITIONS,
    PROMPTS,
    REFERENCE_SET,
    SET,
    TAPPED,
    WRONG,
    given,
    loop_of,
    sample,
)


class Remembering(Tapped):
    """Runs without edits are done once: what a unit adds to the logits is read off them, whatever takes its place."""

    def __init__(self, model):
        super().__init__(model)
        self.runs = {}

    def run(self, prompt, puts=(), capture=()):
        if puts:
            return super().run(prompt, puts, capture)
        key = (tuple(prompt), frozenset(capture))
        if key not in self.runs:
            self.runs[key] = super().run(prompt, puts, capture)
        return self.runs[key]


# Every kind of unit with every choice of positions, on other models than in the test of total effects.
CASES = [
    (TAPPED[(3 * i + 5) % len(TAPPED)], kind, pos, ("pos", "tokens")[(i // 2) % 2], ("none", "transformer_lens")[i % 2])
    for i, (kind, pos) in enumerate((kind, pos) for pos in POSITIONS for kind in KINDS)
]


@pytest.mark.parametrize(("name", "kind", "pos", "mean_over", "processing"), CASES, ids=str)
def test_every_unit_equals_literal_logits_without_it(zoo, name, kind, pos, mean_over, processing):
    model = zoo.model(name, dtype=torch.float64, processing=processing)
    units, parts = given(kind, model.spec)
    data = ablate(
        model,
        SET,
        units=units,
        mode=MODES,
        metric=METRICS,
        pos=pos,
        mean_over=mean_over,
        effect="direct",
        reference=REFERENCE_SET,
    )
    loop = loop_of(Remembering(model), model.spec, reference=True)
    # Ablated everywhere: every unit; at some positions: some of them.
    options = {} if pos == "all" else {"pick": sample(kind, pos)}
    largest = assert_equal(
        data, loop, parts, modes=MODES, pos=pos, effects=["direct"], tolerance=1e-9, mean_over=mean_over, **options
    )
    # Of every choice of positions some prompt's last token is one.
    assert largest["logit_diff"] > 0.02
    assert largest["loss"] == 0 if pos == -1 else largest["loss"] > 0.02


@pytest.mark.parametrize("name", ["gpt2", "gemma2-softcaps", "gpt-neox"])
def test_float32_is_as_near_as_it_can_be(zoo, name):
    model = zoo.model(name)
    for kind in ("heads", "layers"):
        data = ablate(model, SET, units=kind, mode=MODES, metric=METRICS, effect="direct")
        loop = loop_of(Remembering(zoo.model(name, dtype=torch.float64)), model.spec)
        assert_equal(data, loop, units_of(model.spec, kind), modes=MODES, pos="all", effects=["direct"], tolerance=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "llama-gqa", "gpt-neox"])
def test_heads_equal_results_of_transformer_lens_through_the_unembedding(zoo, name):
    model, bridge = zoo.model(name), zoo.bridge(name)
    data = ablate(model, SET, mode=("zero", "resample"), metric=("logit_diff", "logprob", "kl"), effect="direct")
    weights = [bridge.blocks[layer].attn.W_O.detach() for layer in range(model.spec.n_layers)]

    def normed(cache, layer, head, scale):
        result = cache[f"blocks.{layer}.attn.hook_z"][0, -1, head] @ weights[layer][head]
        result = result - result.mean() if model.spec.norm.kind == "layer" else result
        return (result / scale) @ bridge.W_U.detach()

    for row, prompt in enumerate(PROMPTS):
        with torch.no_grad():
            logits, cache = bridge.run_with_cache(torch.tensor([prompt]))
            _, other = bridge.run_with_cache(torch.tensor([CORRUPT[row]]))
        clean, scale = logits[0, -1], cache["ln_final.hook_scale"][0, -1]
        for layer in range(model.spec.n_layers):
            for head in range(model.spec.n_heads):
                gone = normed(cache, layer, head, scale)
                for mode, change in (("zero", -gone), ("resample", normed(other, layer, head, scale) - gone)):
                    edited, answer, wrong = clean + change, ANSWER[row], WRONG[row]
                    p, q = clean.log_softmax(-1), edited.log_softmax(-1)
                    expected = {
                        "logit_diff": change[answer].mean() - change[wrong].mean(),
                        "logprob": q[answer].logsumexp(0) - p[answer].logsumexp(0),
                        "kl": (p.exp() * (p - q)).sum(),
                    }
                    for metric, value in expected.items():
                        got = float(data[f"{metric}_{mode}_direct"][row, layer, head])
                        assert abs(got - float(value)) < 1e-4, (mode, metric, layer, head)


@pytest.mark.parametrize("name", ["gpt2", "gpt-neo", "gemma3-mixed-rope", "phi", "stablelm-gqa"])
@pytest.mark.parametrize("processing", ["transformer_lens", "none"])
@pytest.mark.parametrize("mode", MODES)
def test_direct_effects_of_parts_sum_to_those_of_the_whole(zoo, name, processing, mode):
    """Of linear metrics: heads (and their bias) make the attention, neurons (and theirs) the MLP, both the block."""
    model = zoo.model(name, dtype=torch.float64, processing=processing)
    assert model.spec.final_softcap is None
    options = dict(mode=mode, metric=("logit_diff", "logit"), effect="direct", reference=REFERENCE_SET)
    found = {
        kind: ablate(model, SET, units=kind, **options) for kind in ("heads", "neurons", "attns", "mlps", "layers")
    }
    for metric in ("logit_diff", "logit"):
        part = {kind: data[f"{metric}_{mode}_direct"].values for kind, data in found.items()}
        assert np.abs(part["layers"] - part["attns"] - part["mlps"]).max() < 1e-9
        exact = mode != "zero" and not model.spec.post_norms
        # A bias stays where single heads and neurons are zeroed; a post-norm has another scale at the mean.
        without = all(w.b_O is None and w.b_out is None for w in model.weights.blocks) and not model.spec.post_norms
        if exact or without:
            assert np.abs(part["heads"].sum(-1) - part["attns"]).max() < 1e-9
            assert np.abs(part["neurons"].sum(-1) - part["mlps"]).max() < 1e-9


@pytest.mark.parametrize("name", ["gpt2", "gemma2-softcaps"])
@pytest.mark.parametrize("mode", MODES)
def test_heads_in_a_list_are_those_of_all_and_sets_are_their_sum(zoo, name, mode):
    model = zoo.model(name, dtype=torch.float64)
    for mean_over in ("tokens", "pos"):
        options = dict(mode=mode, metric=("logit_diff", "kl", "loss"), effect="direct", mean_over=mean_over)
        whole = ablate(model, SET, **options)
        heads = [(2, 1), (0, 3), (2, 0)]
        # Single heads go one way, and mixed lists another.
        for units in (heads, [*heads, "MLP1"]):
            some = ablate(model, SET, units=units, **options)
            for metric in ("logit_diff", "kl", "loss"):
                key = f"{metric}_{mode}_direct"
                for unit, (layer, head) in enumerate(heads):
                    difference = some[key].values[..., unit] - whole[key].values[..., layer, head]
                    assert np.abs(np.nan_to_num(difference)).max() < 1e-10
        if model.spec.final_softcap is None:
            key = f"logit_diff_{mode}_direct"
            pair = ablate(model, SET, units=[[(2, 1), (0, 3)]], **options)[key].values[..., 0]
            assert np.abs(pair - whole[key].values[:, 2, 1] - whole[key].values[:, 0, 3]).max() < 1e-9


def test_the_same_numbers_as_direct_effect(zoo):
    model = zoo.model("gemma2-softcaps", dtype=torch.float64)
    for metric in METRICS:
        for mode in ("zero", "mean"):
            one = ablate(model, SET, mode=mode, metric=metric, effect="direct", reference=REFERENCE_SET)
            other = fastinterp.direct_effect(model, SET, mode=mode, metric=metric, reference=REFERENCE_SET)
            for name in (f"{metric}_{mode}_direct", f"{metric}_clean"):
                assert one[name].dims == other[name].dims
                assert np.abs(np.nan_to_num(one[name].values - other[name].values)).max() < 1e-10


def test_an_edit_elsewhere_has_no_direct_effect_on_the_last_token(zoo):
    model = zoo.model("llama-gqa")
    for units in ("heads", "layers", LIST):
        data = ablate(model, SET, units=units, mode=MODES, pos=0, metric=("logit_diff", "kl"), effect="both")
        for mode in MODES:
            for metric in ("logit_diff", "kl"):
                assert (data[f"{metric}_{mode}_direct"].values == 0).all()
            assert np.abs(data[f"logit_diff_{mode}_total"].values).max() > 0.01


def test_the_bridge_and_the_forward_agree_on_what_is_measured_here(zoo):
    for name in ("gpt2", "gemma2-softcaps"):
        tapped, hooked = Tapped(zoo.model(name, dtype=torch.float64)), Hooked(zoo.bridge(name))
        for prompt in PROMPTS:
            clean = tapped.logits(prompt)
            assert (clean - hooked.logits(prompt)).abs().max() < 1e-4
            assert (clean - tapped.without(prompt, [])).abs().max() < 1e-11
