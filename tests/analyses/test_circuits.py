"""Circuits against one forward with everything else replaced by hand."""

import numpy as np
import pytest
import torch
import xarray as xr

from fastinterp.analyses import circuit
from fastinterp.analyses.circuits import faithfulness
from fastinterp.errors import MetricError, OptionError, PromptError, SiteRangeError
from fastinterp.model import Edit, Taps, final_logits, forward
from fastinterp.prompts import PromptSet

EXACT = 1e-9
FAMILIES = ["gpt2", "llama-gqa", "gemma2-softcaps", "gpt-neox", "qwen3-biases-mha-wide-head-windows-tied"]
SETS = [[(0, 0), (1, 1), "MLP0"], ["L0H1", "MLP1"], [], ["MLP0", "MLP1", "L1H0"]]


def values_of(model, prompts, site):
    """``[token of all prompts, ...]`` of every layer, prompt by prompt, and by prompt."""
    by_prompt = []
    for prompt in prompts:
        taps = Taps.of(model.spec.n_layers, capture=[site])
        with torch.no_grad():
            forward(model.spec, model.weights, torch.tensor([prompt]), taps=taps)
        by_prompt.append([taps.values[site, layer][0] for layer in range(model.spec.n_layers)])
    return by_prompt


def parts_of(items):
    labels = {"MLP0": ("mlp_out", 0, None), "MLP1": ("mlp_out", 1, None), "L0H1": ("z", 0, 1), "L1H0": ("z", 1, 0)}
    return {labels[item] if isinstance(item, str) else ("z", *item) for item in items}


def literal(model, prompts, row, keep, mode, among=("z", "mlp_out"), corrupt=None):
    """Logits of the last token."""
    spec, edits = model.spec, []
    for site in among:
        values = values_of(model, prompts, site)
        taken = values_of(model, [corrupt[row]], site)[0] if mode == "resample" else None
        for layer in range(spec.n_layers):
            if mode == "mean":
                given = torch.cat([prompt[layer] for prompt in values]).mean(0)
            else:
                given = torch.zeros_like(values[0][layer][0]) if mode == "zero" else taken[layer]
            for head in range(spec.n_heads) if site == "z" else (None,):
                if (site, layer, head) not in keep:
                    replacement = given if head is None else given[..., head, :]
                    edits.append(Edit(site=site, layer=layer, head=head, replacement=replacement))
    with torch.no_grad():
        taps = Taps.of(spec.n_layers, edits=edits)
        resid = forward(spec, model.weights, torch.tensor([prompts[row]]), taps=taps)
        return final_logits(spec, model.weights, resid)[0, -1]


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_what_changes_nothing_but_rounding_has_no_faithfulness(zoo, scale):
    model = zoo.model("gpt2")
    same = PromptSet.of([[3, 5, 7, 9]], corrupt=[[3, 5, 7, 9]], answer=[[1]], wrong=[[4]])
    nothing = circuit(model, same, [(0, 0)], mode="resample")
    assert abs(float((nothing["logit_diff_clean"] - nothing["logit_diff_nothing"])[0])) < 1e-5
    assert np.isnan(nothing["faithfulness"]).all()
    # Small is not the same as none: that is measured by how large the metric is.
    whole, none, kept = scale * 2.0, scale * 1.9998, scale * 1.9999
    metrics = {"clean": ("prompt", [whole]), "nothing": ("prompt", [none])}
    arrays = {f"prob_{name}": xr.DataArray(values, dims=dim) for name, (dim, values) in metrics.items()}
    arrays["prob_circuit"] = xr.DataArray([[kept, whole]], dims=("prompt", "circuit"))
    np.testing.assert_allclose(faithfulness(arrays, "prob"), [0.5, 1.0], rtol=1e-6)
    arrays["prob_nothing"] = xr.DataArray([whole * (1 - 5e-6)], dims="prompt")
    assert np.isnan(faithfulness(arrays, "prob")).all()


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("mode", ["zero", "mean", "resample"])
def test_sets_equal_forwards_with_the_rest_replaced(zoo, name, token_prompts, answers, mode):
    model = zoo.model(name, dtype=torch.float64)
    generator = torch.Generator().manual_seed(1)
    corrupt = [torch.randint(1, 379, (len(prompt),), generator=generator).tolist() for prompt in token_prompts]
    prompts = PromptSet.of(token_prompts, corrupt=corrupt, **answers)
    found = circuit(model, prompts, SETS, mode=mode)
    assert found["circuit"].values.tolist()[0] == "L0H0+L1H1+MLP0"
    changes = []
    for row in (0, 2, 4):
        answer, wrong = answers["answer"][row], answers["wrong"][row]
        for index, keep in enumerate(SETS):
            logits = literal(model, token_prompts, row, parts_of(keep), mode, corrupt=corrupt)
            expected = float(logits[answer] - logits[wrong])
            assert abs(float(found["logit_diff_circuit"][row, index]) - expected) < EXACT
            changes.append(abs(expected - float(found["logit_diff_clean"][row])))
        assert float(found["logit_diff_nothing"][row]) == pytest.approx(
            float(found["logit_diff_circuit"][row, 2]), abs=EXACT
        )
    assert min(changes) > 1e-6
    nothing, whole = (float(found[f"logit_diff_{name}"].mean()) for name in ("nothing", "clean"))
    expected = (found["logit_diff_circuit"].mean("prompt").values - nothing) / (whole - nothing)
    assert np.abs(found["faithfulness"].values - expected).max() < EXACT


@pytest.mark.parametrize(("among", "sites"), [("heads", ("z",)), ("mlps", ("mlp_out",))])
def test_only_some_are_ablated(zoo, token_prompts, answers, among, sites):
    model = zoo.model("llama-gqa", dtype=torch.float64)
    keep = [(0, 0)] if among == "heads" else ["MLP0"]
    found = circuit(model, PromptSet.of(token_prompts, **answers), keep, mode="mean", among=among)
    for row in (1, 3):
        logits = literal(model, token_prompts, row, parts_of(keep), "mean", sites)
        expected = float(logits[answers["answer"][row]] - logits[answers["wrong"][row]])
        assert abs(float(found["logit_diff_circuit"][row, 0]) - expected) < EXACT


def test_all_of_the_model_is_faithful(zoo, prompt_set):
    model = zoo.model("gpt2", dtype=torch.float64)
    spec = model.spec
    everything = [(i, h) for i in range(spec.n_layers) for h in range(spec.n_heads)]
    everything += [f"MLP{i}" for i in range(spec.n_layers)]
    found = circuit(model, prompt_set, [everything, []], mode="mean", metric="logprob")
    assert float(np.abs(found["logprob_circuit"][:, 0] - found["logprob_clean"]).max()) < EXACT
    assert found["faithfulness"].values == pytest.approx([1.0, 0.0], abs=EXACT)


def test_what_is_no_circuit_is_refused(zoo, prompt_set, without_shape_checks, monkeypatch):
    from fastinterp.analyses import measuring

    model = zoo.model("gpt2")
    monkeypatch.setattr(measuring, "forward_at", lambda *args, **kwargs: pytest.fail("it ran"))
    for keep, options, error, message in (
        ([], {}, OptionError, "keep is empty"),
        ([(0, 99)], {}, SiteRangeError, "head 99 is out of range"),
        (["MLP9"], {}, SiteRangeError, "layer 9 is out of range"),
        (["ATTN0"], {}, OptionError, "keep has ATTN0"),
        (["MLP0"], {"among": "heads"}, OptionError, "keep has MLP0.*are heads"),
        ([(0, 0)], {"mode": "half"}, OptionError, "mode='half' is not known"),
        ([(0, 0)], {"among": "neurons"}, OptionError, "among='neurons' is not known"),
        ([(0, 0)], {"metric": "loss"}, MetricError, "such as 'logprob'"),
        ([(0, 0)], {"mode": "resample"}, PromptError, "no other prompt has"),
    ):
        with pytest.raises(error, match=message):
            circuit(model, prompt_set, keep, **options)
