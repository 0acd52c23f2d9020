"""What can be replaced on the way: against TransformerLens hooks that do the same, and by identities."""

import re

import pytest
import torch

from fastinterp.errors import OptionError, SiteRangeError, UnknownActivationError
from fastinterp.model import Edit, Taps, final_logits, forward
from fastinterp.model.forward import missing_because
from fastinterp.names import ACTIVATIONS

TOLERANCE = 1e-4
MODELS = ["gpt2", "llama-gqa", "mistral-window"]
# Bridges cannot edit these here; tests/hooked compares them by what they do.
WITHOUT_A_HOOK = {"attn_in", "q_input", "k_input", "v_input", "mlp_in", "rot_q", "rot_k"}
PER_LAYER = [name for name, activation in ACTIVATIONS.items() if activation.per_layer]


def run(model, tokens, edits=(), capture=()):
    taps = Taps.of(model.spec.n_layers, capture=capture, edits=edits)
    with torch.no_grad():
        resid = forward(model.spec, model.weights, tokens, taps=taps)
        return final_logits(model.spec, model.weights, resid, taps=taps), taps.values


def refused(model, name):
    """Whether the model lacks the activation, which must then be refused with a reason."""
    reason = missing_because(model.spec, name)
    if reason is not None:
        with pytest.raises(UnknownActivationError, match=re.escape(reason)):
            run(model, torch.tensor([[1, 2]]), capture=[name])
    return reason is not None


@pytest.mark.parametrize("tiny_name", MODELS, indirect=True)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_an_activation_replaced_by_itself_changes_nothing(zoo, tiny_name, name, token_prompts, padded):
    model, tokens = zoo.model(tiny_name, dtype=torch.float64), padded(token_prompts)
    if refused(model, name):
        return
    clean, values = run(model, tokens, capture=[name])
    assert values
    for (_, layer), value in values.items():
        edit = Edit(site=name, layer=layer or 0, replacement=value)
        if name == "attn_in" and model.spec.attention.group > 1:
            with pytest.raises(OptionError, match="q_input"):
                run(model, tokens, [edit])
            continue
        logits, _ = run(model, tokens, [edit])
        assert float((logits - clean).abs().max()) < 1e-11


# TransformerLens says so where a norm's hook is edited; its value is what is wanted here.
@pytest.mark.filterwarnings("ignore:A forward hook edited hook_scale:UserWarning")
@pytest.mark.parametrize("tiny_name", MODELS, indirect=True)
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_patching_another_run_in_equals_a_transformer_lens_hook(zoo, tiny_name, name, token_prompts):
    model, bridge = zoo.model(tiny_name), zoo.bridge(tiny_name)
    tokens, other = torch.tensor([token_prompts[2]]), torch.tensor([token_prompts[2][::-1]])
    if refused(model, name) or name in WITHOUT_A_HOOK:
        return
    clean, resid_pre = run(model, tokens, capture=["resid_pre"])
    _, values = run(model, other, capture=[name])
    for (_, layer), value in values.items():
        if layer == 2:
            continue  # the last layer is the least demanding
        point, replacement = ACTIVATIONS[name].hook.format(layer=layer), value.double()
        if name == "resid_mid":
            # A bridge's hook_resid_mid is the input of ln2: an edit there misses the skip connection.
            point = f"blocks.{layer}.hook_attn_out"
            replacement = replacement - resid_pre["resid_pre", layer].double()
        bridge.set_use_attn_result(name == "result")
        try:
            with torch.no_grad():
                expected = bridge.run_with_hooks(
                    tokens, fwd_hooks=[(point, lambda activation, hook, new=replacement: new.clone())]
                )
        finally:
            bridge.set_use_attn_result(False)
        logits, _ = run(model, tokens, [Edit(site=name, layer=layer or 0, replacement=value)])
        assert float((logits - expected).abs().max()) < TOLERANCE
        assert name == "pos_embed" or float((logits - clean).abs().max()) > 0.1


@pytest.mark.parametrize("tiny_name", MODELS, indirect=True)
@pytest.mark.parametrize("name", ["q", "k", "v", "pattern", "z", "result", "attn_scores"])
def test_an_edit_of_one_head_equals_a_transformer_lens_hook(zoo, tiny_name, name, token_prompts):
    model, bridge, tokens = zoo.model(tiny_name), zoo.bridge(tiny_name), torch.tensor([token_prompts[4]])
    dims = ACTIVATIONS[name].dims
    axis = dims.index("kv_head" if "kv_head" in dims else "head")
    n = model.spec.attention.n_kv_heads if "kv_head" in dims else model.spec.n_heads
    replacement = -3.0 if name == "attn_scores" else 0.0
    clean, values = run(model, tokens, capture=[name])
    for layer, head in [(0, 0), (1, n - 1), (2, -1)]:

        def hook(activation, hook, head=head):
            activation.select(axis, head).fill_(replacement)
            if name == "attn_scores":
                blocked = torch.ones(activation.shape[-2:], dtype=torch.bool).triu(1)
                window = model.spec.attention.window[0]
                if window is not None:
                    blocked |= torch.ones_like(blocked).tril(-window)
                activation.masked_fill_(blocked, -torch.inf)
            return activation

        bridge.set_use_attn_result(name == "result")
        try:
            with torch.no_grad():
                point = ACTIVATIONS[name].hook.format(layer=layer)
                expected = bridge.run_with_hooks(tokens, fwd_hooks=[(point, hook)])
        finally:
            bridge.set_use_attn_result(False)
        new = replacement
        if name == "attn_scores":
            one_head = values[name, layer].select(axis, head)
            new = torch.where(torch.isfinite(one_head), replacement, -torch.inf)
        logits, _ = run(model, tokens, [Edit(site=name, layer=layer, head=head, replacement=new)])
        assert float((logits - expected).abs().max()) < TOLERANCE
        assert float((logits - clean).abs().max()) > 0.01


@pytest.mark.parametrize("name", ["k", "v"])
def test_an_edit_of_a_kv_head_reaches_its_whole_group_and_no_other(zoo, name, token_prompts):
    model, tokens = zoo.model("llama-gqa"), torch.tensor([token_prompts[2]])
    _, clean = run(model, tokens, capture=["z"])
    _, edited = run(model, tokens, [Edit(site=name, layer=1, head=1)], capture=["z"])
    changed = (edited["z", 1] - clean["z", 1]).abs().amax((0, 1, 3))
    assert torch.equal(changed > 0, torch.tensor([False, False, False, True, True, True]))
    assert torch.equal(edited["z", 0], clean["z", 0])


def test_an_edit_is_made_at_its_positions_only(zoo, token_prompts, padded):
    model, tokens = zoo.model("gpt2"), padded(token_prompts)
    positions = torch.zeros(tokens.shape, dtype=torch.bool)
    positions[2, 4] = positions[4, 0] = True
    edit = Edit(site="z", layer=1, head=2, positions=positions, replacement=7.0)
    _, clean = run(model, tokens, capture=["z"])
    _, edited = run(model, tokens, [edit], capture=["z"])
    expected = clean["z", 1].clone()
    expected[2, 4, 2] = expected[4, 0, 2] = 7.0
    assert torch.equal(edited["z", 1], expected)
    same_after = (edited["z", 2] == clean["z", 2]).flatten(2).all(-1)
    # A position is touched if the edit lies at it or before it in the same prompt.
    touched = torch.zeros_like(positions)
    touched[2, 4:] = touched[4] = True
    assert torch.equal(same_after, ~touched)


@pytest.mark.parametrize("site", ["resid_pre", "attn_out", "post", "q"])
def test_positions_and_replacement_broadcast(zoo, site, token_prompts, padded):
    model, tokens = zoo.model("llama-gqa"), padded(token_prompts)
    generator = torch.Generator().manual_seed(3)
    positions = torch.rand(tokens.shape, generator=generator) < 0.5
    _, clean = run(model, tokens, capture=[site])
    shape = clean[site, 1].shape
    for replacement in (torch.randn(shape, generator=generator), torch.randn(shape[-1], generator=generator)):
        edit = Edit(site=site, layer=1, positions=positions, replacement=replacement)
        _, edited = run(model, tokens, [edit], capture=[site])
        mask = positions.view(*positions.shape, *[1] * (len(shape) - 2))
        assert torch.equal(edited[site, 1], torch.where(mask, replacement, clean[site, 1]))


def test_edits_of_one_site_are_made_in_the_order_given(zoo):
    model, tokens = zoo.model("gpt2"), torch.arange(6)[None]
    every, one = Edit(site="z", layer=0, replacement=1.0), Edit(site="z", layer=0, head=1, replacement=2.0)
    _, first = run(model, tokens, [every, one], capture=["z"])
    _, second = run(model, tokens, [one, every], capture=["z"])
    assert first["z", 0][0, 0, :, 0].tolist() == [1.0, 2.0, 1.0, 1.0]
    assert second["z", 0][0, 0, :, 0].tolist() == [1.0, 1.0, 1.0, 1.0]


def test_edits_of_different_sites_are_independent_of_their_order(zoo, token_prompts, padded):
    model, tokens = zoo.model("llama-gqa"), padded(token_prompts)
    edits = [
        Edit(site="resid_post", layer=0, replacement=0.1),
        Edit(site="v", layer=1, head=0),
        Edit(site="mlp_out", layer=2),
    ]
    forwards, _ = run(model, tokens, edits)
    backwards, _ = run(model, tokens, edits[::-1])
    assert torch.equal(forwards, backwards)


def test_negative_layers_and_heads_count_from_the_end(zoo, token_prompts, padded):
    model, tokens = zoo.model("llama-gqa"), padded(token_prompts)
    negative, _ = run(model, tokens, [Edit(site="z", layer=-2, head=-1)])
    positive, _ = run(model, tokens, [Edit(site="z", layer=1, head=5)])
    assert torch.equal(negative, positive)


@pytest.mark.parametrize("tiny_name", MODELS, indirect=True)
def test_nothing_leaks_from_an_edited_run(zoo, tiny_name, token_prompts, padded):
    model, tokens = zoo.model(tiny_name), padded(token_prompts)
    clean, values = run(model, tokens, capture=["z", "resid_pre"])
    copies = {key: value.clone() for key, value in values.items()}
    replacement = torch.full((1,), 5.0)
    for name in PER_LAYER:
        if not refused(model, name) and not (name == "attn_in" and model.spec.attention.group > 1):
            run(model, tokens, [Edit(site=name, layer=0, replacement=replacement)])
    again, _ = run(model, tokens)
    assert torch.equal(clean, again)
    assert all(torch.equal(values[key], copy) for key, copy in copies.items())
    assert replacement.tolist() == [5.0]
    assert zoo.model(tiny_name).weights.sha256() == model.weights_sha256


def test_a_site_that_is_not_there_is_refused_with_suggestions():
    with pytest.raises(UnknownActivationError, match=r"'atn_out'.*did you mean 'attn_out'"):
        Edit(site="atn_out", layer=0)


@pytest.mark.parametrize("layer", [3, -4])
def test_a_layer_that_is_not_there_is_refused(layer):
    with pytest.raises(SiteRangeError, match=rf"layer {layer} is out of range.*0 to 2"):
        Taps.of(3, edits=[Edit(site="z", layer=layer)])


@pytest.mark.parametrize(("site", "head", "what"), [("z", 6, "head 6"), ("v", 2, "head 2"), ("k", -3, "head -3")])
def test_a_head_that_is_not_there_is_refused(zoo, site, head, what):
    with pytest.raises(SiteRangeError, match=f"{what} is out of range"):
        run(zoo.model("llama-gqa"), torch.arange(4)[None], [Edit(site=site, layer=0, head=head)])


def test_a_head_of_a_site_without_heads_is_refused():
    with pytest.raises(OptionError, match=r"'resid_mid' has no head axis.*head=None"):
        Edit(site="resid_mid", layer=0, head=1)


def test_a_neuron_of_a_site_without_neurons_is_refused():
    with pytest.raises(OptionError, match=r"'mlp_out' has no neuron axis.*neuron=None"):
        Edit(site="mlp_out", layer=0, neuron=1)
