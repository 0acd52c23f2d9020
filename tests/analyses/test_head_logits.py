"""head_logits and weight_logits against the literal tensors."""

import numpy as np
import pytest
import torch

import fastinterp
from fastinterp.errors import OptionError, SiteRangeError, TokenRangeError
from fastinterp.model.norms import center, normalize
from fastinterp.prompts import PromptSet
from tests.analyses.literal_heads import MODELS, literal

K = 6


@pytest.fixture(params=[(name, processing) for name in MODELS for processing in ("transformer_lens", "none")], ids=str)
def model(zoo, request):
    name, processing = request.param
    return zoo.model(name, dtype=torch.float64, processing=processing)


def check_row(contribution, top, top_logit, bottom, bottom_logit, tolerance=1e-9):
    """Ids and values of one head at one token, strongest first."""
    contribution = contribution.numpy()
    for ids, values, expected in (
        (top, top_logit, np.sort(contribution)[::-1][:K]),
        (bottom, bottom_logit, np.sort(contribution)[:K]),
    ):
        assert len(set(ids.tolist())) == K
        assert np.abs(contribution[ids] - values).max() < tolerance
        assert np.abs(values - expected).max() < tolerance


def test_last_token_of_every_prompt(model, token_prompts):
    found = fastinterp.head_logits(model, PromptSet.of(token_prompts), k=K)
    assert found["head_top_token"].dims == ("prompt", "layer", "head", "k")
    assert found["head_top_token"].dtype == np.int32
    for row, prompt in enumerate(token_prompts):
        _, contributions, _ = literal(model, prompt)
        for layer in range(model.spec.n_layers):
            for head in range(model.spec.n_heads):
                at = dict(prompt=row, layer=layer, head=head)
                names = ("head_top_token", "head_top_logit", "head_bottom_token", "head_bottom_logit")
                check_row(contributions[-1, layer, head], *(found[name].isel(at).values for name in names))


def test_every_position_and_chosen_heads_in_the_order_given(model, token_prompts):
    n_layers, n_heads = model.spec.n_layers, model.spec.n_heads
    heads = [(n_layers - 1, n_heads - 1), (0, 0)] if n_layers > 1 else [(0, 0)]
    found = fastinterp.head_logits(model, PromptSet.of(token_prompts), heads=heads, k=K, pos="all")
    assert found["head_top_logit"].dims == ("prompt", "pos", "unit", "k")
    assert list(found["unit"].values) == [f"L{layer}H{head}" for layer, head in heads]
    for row, prompt in enumerate(token_prompts):
        _, contributions, _ = literal(model, prompt)
        for unit, (layer, head) in enumerate(heads):
            for pos in range(len(prompt)):
                at = dict(prompt=row, pos=pos, unit=unit)
                names = ("head_top_token", "head_top_logit", "head_bottom_token", "head_bottom_logit")
                check_row(contributions[pos, layer, head], *(found[name].isel(at).values for name in names))
        assert (found["head_top_token"][row, len(prompt) :] == -1).all()
        assert np.isnan(found["head_bottom_logit"][row, len(prompt) :]).all()


def test_all_heads_add_up_to_the_attention(model, token_prompts):
    """A head's contribution to a token equals its direct logit attribution."""
    prompts = PromptSet.of(token_prompts, answer=[7] * len(token_prompts))
    found = fastinterp.head_logits(model, prompts, k=model.spec.d_vocab)
    dla = fastinterp.direct_logit_attribution(model, prompts, metric="logit")
    at = found["head_top_token"].values == 7
    assert (at.sum(-1) == 1).all()
    ours = found["head_top_logit"].values[at].reshape(dla.shape)
    assert np.abs(ours - dla.values).max() < 1e-9


def test_weights_of_heads(model):
    tokens = [3, 17, 250]
    found = fastinterp.weight_logits(model, "ov", K, tokens=tokens)
    assert found["top_token"].dims == ("layer", "head", "token", "k")
    w = model.weights
    for layer, block in enumerate(w.blocks):
        for head in range(model.spec.n_heads):
            x = normalize(model.spec.norm, w.W_E[tokens], block.ln1) @ block.W_V[head // model.spec.attention.group]
            written = x @ block.W_O[head]
            for norm in (block.ln1_post, w.ln_final):
                if norm is not None:
                    written = center(model.spec.norm, written)
                    written = written if norm.w is None else written * norm.w
            logits = written @ w.W_U
            for t in range(len(tokens)):
                at = dict(layer=layer, head=head, token=t)
                names = ("top_token", "top_logit", "bottom_token", "bottom_logit")
                check_row(logits[t], *(found[name].isel(at).values for name in names))
    one = fastinterp.weight_logits(model, "ov", K, heads=[(0, 0)], tokens=tokens)
    assert one["top_logit"].dims == ("unit", "token", "k")
    assert np.abs(one["top_logit"].values[0] - found["top_logit"].values[0, 0]).max() < 1e-12


def test_weights_of_neurons_and_directions(zoo):
    model = zoo.model("llama-gqa", dtype=torch.float64)
    found = fastinterp.weight_logits(model, "neurons", K, layers=[-1, 0])
    assert list(found["layer"].values) == [2, 0]
    assert found["top_token"].dims == ("layer", "neuron", "k")
    W_out, W_U = model.weights.blocks[2].W_out, model.weights.W_U
    logits = W_out @ W_U
    for neuron in (0, 5, model.spec.mlp.d_mlp - 1):
        at = dict(layer=0, neuron=neuron)
        names = ("top_token", "top_logit", "bottom_token", "bottom_logit")
        check_row(logits[neuron], *(found[name].isel(at).values for name in names))
    same = fastinterp.weight_logits(model, W_out.view(2, -1, model.spec.d_model), K)
    assert same["top_token"].dims == ("dim_0", "dim_1", "k")
    assert np.array_equal(same["top_token"].values.reshape(-1, K), found["top_token"].values[0])


def test_a_scan_stores_what_the_function_returns(zoo, token_prompts, tmp_path):
    model = zoo.model("llama-gqa")
    prompts = PromptSet.of(token_prompts)
    stored = fastinterp.scan(model, prompts, tmp_path / "run.zarr", analysis="head_logits", progress=False)
    direct = fastinterp.head_logits(model, prompts)
    for name in direct:
        assert stored[name].dims == direct[name].dims
        assert stored[name].dtype == direct[name].dtype
        assert np.array_equal(stored[name].values, direct[name].values)
    fastinterp.write_html(stored, tmp_path / "page.html")
    assert "head_top_token" in (tmp_path / "page.html").read_text()


def test_head_logits_beside_others_need_the_others_answers(zoo, token_prompts, answers, tmp_path):
    model = zoo.model("llama-gqa")
    with pytest.raises(fastinterp.FastinterpError, match="answer"):
        fastinterp.scan(model, PromptSet.of(token_prompts), tmp_path / "a.zarr", analysis="head_logits,dla")
    prompts = PromptSet.of(token_prompts, **answers)
    stored = fastinterp.scan(model, prompts, tmp_path / "b.zarr", analysis="head_logits,dla", progress=False)
    assert {"head_bottom_token", "direct_effect"} <= set(stored)


@pytest.mark.usefixtures("without_shape_checks")
def test_bad_input_is_refused(zoo, token_prompts):
    model = zoo.model("gpt2")
    prompts = PromptSet.of(token_prompts)
    for error, match, options in (
        (OptionError, "k=0", {"k": 0}),
        (OptionError, "vocabulary has 400", {"k": 401}),
        (OptionError, "pairs", {"heads": "L0H1"}),
        (OptionError, "pairs", {"heads": [3]}),
        (OptionError, "empty", {"heads": []}),
        (OptionError, "twice", {"heads": [(0, 1), (0, -3)]}),
        (SiteRangeError, "head 4", {"heads": [(0, 4)]}),
        (SiteRangeError, "layer 3", {"heads": [(3, 0)]}),
        (OptionError, "position", {"pos": 1.5}),
        (SiteRangeError, "pos=99", {"pos": 99}),
    ):
        with pytest.raises(error, match=match):
            fastinterp.head_logits(model, prompts, **options)
    for error, match, arguments, options in (
        (OptionError, "'ov', 'neurons'", ("mlp",), {}),
        (OptionError, "tokens=", ("ov",), {}),
        (OptionError, "tokens=", ("ov",), {"tokens": " Mary"}),
        (TokenRangeError, "400", ("ov",), {"tokens": [400]}),
        (OptionError, "k=0", ("neurons", 0), {}),
        (OptionError, "empty", ("neurons",), {"layers": []}),
        (SiteRangeError, "layer 3", ("neurons",), {"layers": [3]}),
        (OptionError, "48", (torch.zeros(3, 47),), {}),
    ):
        with pytest.raises(error, match=match):
            fastinterp.weight_logits(model, *arguments, **options)
