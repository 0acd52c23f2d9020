"""What can be read on the way: names, shapes, and TransformerLens's value for each."""

import pytest
import torch

from fastinterp.errors import SiteRangeError, UnknownActivationError
from fastinterp.model import Capture, Taps, final_logits, forward
from fastinterp.model.forward import missing_because
from fastinterp.names import ACTIVATIONS

TOLERANCE = 1e-4
MODELS = ["gpt2", "llama-gqa", "llama-biases-mqa-head-dim", "mistral-window", "llama-one-head-one-layer"]

# Read, these make attention or norms take another route, with other rounding; all others are read in passing.
# Of several views of one tensor, one alone is copied, and what follows reads it in another order.
COPIED = {"q", "k", "v", "pre", "pre_linear"}
OTHER_ROUTE = {"attn_scores", "pattern", "result"} | COPIED | {name for name in ACTIVATIONS if name.startswith("ln")}

HEAD_INPUTS = dict.fromkeys(("attn_in", "q_input", "k_input", "v_input"), "resid_pre") | {"mlp_in": "resid_mid"}


def available(model):
    """Names that this model computes."""
    return [name for name in ACTIVATIONS if missing_because(model.spec, name) is None]


def layers_of(model, name):
    return range(model.spec.n_layers) if ACTIVATIONS[name].per_layer else [None]


def read(model, tokens, names):
    """Returns the captured values and the logits."""
    taps = Taps.of(model.spec.n_layers, capture=names)
    with torch.no_grad():
        resid = forward(model.spec, model.weights, tokens, taps=taps)
        logits = final_logits(model.spec, model.weights, resid, taps=taps)
    return taps.values, logits


@pytest.mark.parametrize("tiny_name", MODELS, indirect=True)
def test_every_name_has_its_declared_shape(zoo, tiny_name, token_prompts, padded):
    model, tokens = zoo.model(tiny_name), padded(token_prompts)
    spec = model.spec
    sizes = {
        "batch": len(token_prompts),
        "pos": 12,
        "query_pos": 12,
        "key_pos": 12,
        "one": 1,
        "d_model": spec.d_model,
        "head": spec.n_heads,
        "kv_head": spec.attention.n_kv_heads,
        "d_head": spec.d_head,
        "d_mlp": spec.mlp.d_mlp,
    }
    values, _ = read(model, tokens, available(model))
    expected = {
        (name, layer): tuple(sizes[dim] for dim in ACTIVATIONS[name].dims)
        for name in available(model)
        for layer in layers_of(model, name)
    }
    assert {key: tuple(value.shape) for key, value in values.items()} == expected


@pytest.mark.parametrize("tiny_name", MODELS, indirect=True)
def test_activations_that_the_model_lacks_are_refused(zoo, tiny_name):
    model = zoo.model(tiny_name)
    values, _ = read(model, torch.arange(4)[None], available(model))
    assert {name for name, _ in values} == set(available(model))
    lacking = set(ACTIVATIONS) - set(available(model))
    assert {"ln1_post_scale", "ln2_post_normalized"} <= lacking
    for name in lacking:
        with pytest.raises(UnknownActivationError, match=f"there is no {name}"):
            read(model, torch.arange(4)[None], [name])


@pytest.mark.parametrize("tiny_name", MODELS, indirect=True)
def test_every_value_equals_transformer_lens(zoo, tiny_name, token_prompts):
    model, bridge = zoo.model(tiny_name), zoo.bridge(tiny_name)
    for prompt in (token_prompts[2], token_prompts[1]):
        tokens = torch.tensor([prompt])
        bridge.set_use_attn_result(True)
        try:
            with torch.no_grad():
                _, cache = bridge.run_with_cache(tokens)
        finally:
            bridge.set_use_attn_result(False)
        values, _ = read(model, tokens, available(model))
        for (name, layer), value in values.items():
            if name in HEAD_INPUTS:  # copies of the residual, which a bridge makes only if told to
                expected = values[HEAD_INPUTS[name], layer]
                assert torch.equal(value, expected if name == "mlp_in" else expected[:, :, None].expand_as(value))
                continue
            expected = cache[ACTIVATIONS[name].hook.format(layer=layer)]
            assert value.shape == expected.shape, (name, layer)
            allowed = torch.isfinite(expected) if name == "attn_scores" else torch.ones_like(value).bool()
            difference = (value - expected)[allowed].abs().max()
            assert float(difference) < TOLERANCE, (name, layer)
            assert bool((value[~allowed] == -torch.inf).all()), (name, layer)


@pytest.mark.parametrize("tiny_name", MODELS, indirect=True)
def test_capturing_does_not_change_the_output(zoo, tiny_name, token_prompts, padded):
    model, tokens = zoo.model(tiny_name), padded(token_prompts)
    _, clean = read(model, tokens, [])
    for name in available(model):
        _, logits = read(model, tokens, [name])
        if name in OTHER_ROUTE:
            assert float((logits - clean).abs().max()) < 5e-5, name
        else:
            assert torch.equal(logits, clean), name


@pytest.mark.parametrize("tiny_name", ["gpt2", "llama-gqa", "mistral-window"], indirect=True)
def test_captured_parts_add_up(zoo, tiny_name, token_prompts, padded):
    model = zoo.model(tiny_name, dtype=torch.float64)
    values, _ = read(model, padded(token_prompts), available(model))
    for layer, w in enumerate(model.weights.blocks):
        result = torch.einsum("bphe,hed->bphd", values["z", layer], w.W_O)
        torch.testing.assert_close(values["result", layer], result, rtol=0, atol=1e-12)
        b_O = 0 if w.b_O is None else w.b_O
        torch.testing.assert_close(values["attn_out", layer], result.sum(2) + b_O, rtol=0, atol=1e-12)
        mid = values["resid_pre", layer] + values["attn_out", layer]
        torch.testing.assert_close(values["resid_mid", layer], mid, rtol=0, atol=1e-12)
        post = values["resid_mid", layer] + values["mlp_out", layer]
        torch.testing.assert_close(values["resid_post", layer], post, rtol=0, atol=1e-12)
        v = values["v", layer].repeat_interleave(model.spec.attention.group, dim=2)
        z = torch.einsum("bhqk,bkhe->bqhe", values["pattern", layer], v)
        torch.testing.assert_close(values["z", layer], z, rtol=0, atol=1e-12)
        rows = values["pattern", layer].sum(-1)
        torch.testing.assert_close(rows, torch.ones_like(rows), rtol=0, atol=1e-12)


def test_only_what_is_asked_for_is_kept(zoo):
    model = zoo.model("gpt2")
    requests = [Capture(name="z", layers=(0, -1)), Capture(name="embed"), "resid_mid"]
    values, _ = read(model, torch.arange(5)[None], requests)
    expected = {("z", 0), ("z", 2), ("embed", None)} | {("resid_mid", layer) for layer in range(3)}
    assert values.keys() == expected


def test_stacked_has_layers_in_order(zoo):
    model = zoo.model("gpt2")
    taps = Taps.of(3, capture=["resid_post"])
    final = forward(model.spec, model.weights, torch.arange(5)[None], taps=taps)
    stacked = taps.stacked("resid_post", 3)
    assert stacked.shape == (3, 1, 5, 48)
    assert torch.equal(stacked[2], final)
    assert torch.equal(stacked[0], taps.values["resid_post", 0])


def test_an_unknown_name_is_refused_with_suggestions():
    with pytest.raises(UnknownActivationError, match=r"'resid_pots'.*did you mean 'resid_post'"):
        Taps.of(3, capture=["resid_pots"])
    with pytest.raises(UnknownActivationError, match=r"'hook_z'.*attn_out.*z"):
        Taps.of(3, capture=[Capture(name="hook_z")])


@pytest.mark.parametrize("layer", [3, -4, 100])
def test_a_layer_that_is_not_there_is_refused(layer):
    with pytest.raises(SiteRangeError, match=rf"layer {layer} is out of range.*3 \(0 to 2\)"):
        Taps.of(3, capture=[Capture(name="z", layers=(layer,))])
