"""What has to add up, in every family: components to logits, heads to what attention writes."""

import functools

import numpy as np
import pytest
import torch

from fastinterp.analyses import direct_logit_attribution, logit_lens
from fastinterp.model import Taps, forward
from fastinterp.prompts import PromptSet

EXACT = 1e-9
"""Float64."""

# Several alternatives, of different number: prompts with fewer are padded.
SEVERAL = {
    "answer": [[5, 6], 7, [8], [9, 10, 11], 12, [13, 14], 15],
    "wrong": [16, [17, 18], 19, 20, [21, 22], 23, [24, 25, 26]],
}
BOTH = ("none", "transformer_lens")
PROCESSING = pytest.mark.parametrize("processing", BOTH)

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


@pytest.fixture
def prompts(token_prompts):
    return PromptSet.of(token_prompts, **SEVERAL)


def mean_logit(logits, tokens):
    return logits[..., [tokens] if isinstance(tokens, int) else tokens].mean(-1)


def metric_of(logits, row, metric):
    """The metric of one prompt's logits ``[.., d_vocab]``, written out."""
    answer, wrong = SEVERAL["answer"][row], SEVERAL["wrong"][row]
    match metric:
        case "logit":
            return mean_logit(logits, answer)
        case "logit_diff":
            return mean_logit(logits, answer) - mean_logit(logits, wrong)
        case "logprob":
            chosen = [answer] if isinstance(answer, int) else answer
            return logits.log_softmax(-1)[..., chosen].exp().sum(-1).log()


def before_softcap(spec, logits):
    """Undoes the bound of the logits."""
    if spec.final_softcap is None:
        return logits
    return spec.final_softcap * torch.atanh(logits / spec.final_softcap)


@PROCESSING
@pytest.mark.parametrize("metric", ["logit_diff", "logit"])
def test_components_sum_to_the_logit_before_its_softcap(
    zoo, name, token_prompts, prompts, padded, logits_of, processing, metric
):
    model = zoo.model(name, processing=processing, dtype=torch.float64)
    attribute = functools.partial(direct_logit_attribution, model, prompts, unit="component", metric=metric)
    everywhere, last = attribute(pos="all"), attribute()
    logits = before_softcap(model.spec, logits_of(model, padded(token_prompts)))
    for row, prompt in enumerate(token_prompts):
        expected = metric_of(logits[row, : len(prompt)], row, metric).numpy()
        total = everywhere[row].sum("component", skipna=False).values
        assert np.abs(total[: len(prompt)] - expected).max() < EXACT
        assert np.isnan(total[len(prompt) :]).all()
        assert abs(float(last[row].sum()) - expected[-1]) < EXACT


@PROCESSING
def test_heads_sum_to_what_attention_writes(zoo, name, token_prompts, padded, processing):
    model = zoo.model(name, processing=processing, dtype=torch.float64)
    spec = model.spec
    scale = ["ln1_post_scale", "ln2_post_scale"] if spec.post_norms else []
    names = ["z", "result", "attn_raw", "attn_out", "mlp_raw", "mlp_out", "post", "resid_pre", "resid_post", *scale]
    taps = Taps.of(spec.n_layers, capture=names)
    with torch.no_grad():
        forward(spec, model.weights, padded(token_prompts), taps=taps)
    for layer, w in enumerate(model.weights.blocks):
        at = {name: taps.values[name, layer] for name in names}
        written = torch.einsum("bphe,hed->bphd", at["z"], w.W_O)
        b_O, b_out = (torch.zeros(spec.d_model) if b is None else b for b in (w.b_O, w.b_out))
        assert float((at["result"] - written).abs().max()) < EXACT
        assert float((written.sum(2) + b_O - at["attn_raw"]).abs().max()) < EXACT
        assert float((at["post"] @ w.W_out + b_out - at["mlp_raw"]).abs().max()) < EXACT
        if spec.post_norms:
            # The post-norm with its scale frozen is linear, so what each head writes can be pushed through it.
            heads = (written.sum(2) + b_O) / at["ln1_post_scale"] * w.ln1_post.w
            each = (written / at["ln1_post_scale"].unsqueeze(2) * w.ln1_post.w).sum(2)
            assert float((each + b_O / at["ln1_post_scale"] * w.ln1_post.w - heads).abs().max()) < EXACT
            assert float((heads - at["attn_out"]).abs().max()) < EXACT
            assert float((at["mlp_raw"] / at["ln2_post_scale"] * w.ln2_post.w - at["mlp_out"]).abs().max()) < EXACT
            assert float((at["attn_raw"] - at["attn_out"]).abs().mean()) > 0.1
        else:
            assert torch.equal(at["attn_raw"], at["attn_out"])
            assert torch.equal(at["mlp_raw"], at["mlp_out"])
        whole = at["resid_pre"] + at["attn_out"] + at["mlp_out"]
        assert float((whole - at["resid_post"]).abs().max()) < EXACT


@PROCESSING
@pytest.mark.parametrize("pos", [-1, "all"])
def test_attributions_of_parts_sum_to_their_component(zoo, name, token_prompts, prompts, padded, processing, pos):
    """heads + b_O's share = attn_out; neurons + b_out's share = mlp_out; attn_out + mlp_out = layer."""
    model = zoo.model(name, processing=processing, dtype=torch.float64)
    spec, weights = model.spec, model.weights
    component, head, neuron, layers = (
        direct_logit_attribution(model, prompts, unit=unit, pos=pos)
        for unit in ("component", "head", "neuron", "layer")
    )
    scales = ["ln1_post_scale", "ln2_post_scale"] if spec.post_norms else []
    taps = Taps.of(spec.n_layers, capture=scales)
    with torch.no_grad():
        resid = forward(spec, weights, padded(token_prompts), taps=taps)

    def final_norm(x, scale):
        x = x - x.mean(-1, keepdim=True) if spec.norm.kind == "layer" else x
        return x / scale if weights.ln_final.w is None else x / scale * weights.ln_final.w

    centred = resid - resid.mean(-1, keepdim=True) if spec.norm.kind == "layer" else resid
    scale = (centred.pow(2).mean(-1, keepdim=True) + spec.norm.eps).sqrt()
    lengths = [len(prompt) for prompt in token_prompts]
    for index, w in enumerate(weights.blocks):
        for kind, parts, bias, post in (
            ("attn", head.sel(layer=index).sum("head", skipna=False), w.b_O, w.ln1_post),
            ("mlp", neuron.sel(layer=index).sum("neuron", skipna=False), w.b_out, w.ln2_post),
        ):
            written = torch.zeros_like(resid) if bias is None else bias.expand_as(resid)
            if post is not None:
                number = 1 if kind == "attn" else 2
                written = written / taps.values[f"ln{number}_post_scale", index] * post.w
            written = final_norm(written, scale)
            whole = component.sel(component=f"{index}_{kind}_out")
            for row, n in enumerate(lengths):
                share = metric_of(written[row, :n] @ weights.W_U, row, "logit_diff").numpy()
                share = share if pos == "all" else share[-1:]
                got = np.atleast_1d(parts[row].values)[: len(share)] + share
                assert np.abs(got - np.atleast_1d(whole[row].values)[: len(share)]).max() < EXACT, (kind, index, row)
        both = component.sel(component=f"{index}_attn_out") + component.sel(component=f"{index}_mlp_out")
        assert np.nanmax(np.abs(both.values - layers.sel(layer=index).values)) < EXACT
    assert float(np.nanmax(np.abs(head.values))) > 0.1


@PROCESSING
@pytest.mark.parametrize("metric", ["logit_diff", "logit", "logprob"])
def test_the_lens_ends_with_the_metric_of_the_model(
    zoo, name, token_prompts, prompts, padded, logits_of, processing, metric
):
    model = zoo.model(name, processing=processing, dtype=torch.float64)
    everywhere = logit_lens(model, prompts, metric=metric, pos="all")
    last = logit_lens(model, prompts, metric=metric)
    logits = logits_of(model, padded(token_prompts))
    assert len(everywhere.site) == model.spec.n_layers * (1 if model.spec.parallel else 2) + 1
    for row, prompt in enumerate(token_prompts):
        expected = metric_of(logits[row, : len(prompt)], row, metric).numpy()
        got = everywhere[row].sel(site="final_post").values
        assert np.abs(got[: len(prompt)] - expected).max() < EXACT
        assert abs(float(last[row].sel(site="final_post")) - expected[-1]) < EXACT


@pytest.mark.parametrize("metric", ["logit_diff", "logit"])
def test_the_frozen_lens_grows_by_direct_effects(zoo, name, prompts, metric):
    model = zoo.model(name, dtype=torch.float64)
    if model.spec.final_softcap is not None:
        return  # Bounded logits are not sums.
    lens = logit_lens(model, prompts, metric=metric, scale="frozen")
    component = direct_logit_attribution(model, prompts, unit="component", metric=metric)
    per_block = component.values[:, -1 - 2 * model.spec.n_layers : -1]
    if model.spec.parallel:
        per_block = per_block.reshape(len(per_block), -1, 2).sum(-1)
    assert np.abs(np.diff(lens.values, axis=1) - per_block).max() < EXACT


def test_bounded_logits_stay_within_their_bound(zoo, name, prompts):
    model = zoo.model(name, dtype=torch.float64)
    cap = model.spec.final_softcap
    values = logit_lens(model, prompts, metric="logit", pos="all").values
    direct = direct_logit_attribution(model, prompts, unit="component", metric="logit").sum("component").values
    if cap is None:
        last = logit_lens(model, prompts, metric="logit").sel(site="final_post").values
        assert np.abs(last - direct).max() < EXACT
    else:
        assert np.nanmax(np.abs(values)) < cap
        # The bound has to matter for this to be a test of it.
        last = logit_lens(model, prompts, metric="logit").sel(site="final_post").values
        assert np.abs(last - direct).max() > 0.05


NO_BRIDGE = {"gpt-neox-sequential-no-attention-bias-wide-head", "phi-gqa-wide-head"}


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in NO_BRIDGE], indirect=True)
def test_attributions_equal_the_tool_of_transformer_lens(zoo, name, token_prompts, prompt_set, answers):
    from transformer_lens.tools.analysis import direct_logit_attribution as tool

    model, bridge, row = zoo.model(name), zoo.bridge(name, dtype=torch.float32), 2
    asked = {"answer_tokens": answers["answer"][row], "incorrect_tokens": answers["wrong"][row]}
    for unit in ("head", "component"):
        got = direct_logit_attribution(model, prompt_set, unit=unit)[row].values
        with torch.no_grad():
            result = tool(bridge, torch.tensor([token_prompts[row]]), unit=unit, **asked)
        if unit == "component":
            assert np.abs(got[:-1] - result.attribution.squeeze().numpy()).max() < 1e-4
            continue
        n_heads = len([label for label in result.labels if label.startswith("L")])
        difference = np.abs(got - result.attribution[:n_heads].squeeze().reshape(got.shape).numpy()).max()
        if model.spec.post_norms:
            # The tool leaves out the norm after attention, so that its heads do not sum to what attention writes.
            assert difference > 0.05
        else:
            assert difference < 1e-4
