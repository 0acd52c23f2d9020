"""TransformerLens bridges of every family: the loaded model gives the bridge's logits, and the checkpoint's weights."""

import copy

import pytest
import torch

import fastinterp
from fastinterp.errors import CheckpointKeyError
from fastinterp.families import family_of
from fastinterp.load.transformer_lens import weights_from_transformer_lens

TOLERANCE = 1e-4
"""Logits of a spread of about 2, float32, against another library."""


NO_BRIDGE = "gpt-neox-sequential-no-attention-bias-wide-head"
"""TransformerLens 4.3 cannot boot a GPT-NeoX without biases in its attention."""

NO_COMPATIBILITY = "phi-gqa-wide-head"
"""It cannot fold the value biases of a Phi with grouped-query attention."""

SOME = ["gemma2-softcaps", "gpt-neox", "gptj", "opt", "phi3-gqa-window", "qwen3-gqa"]
"""One of each way in which a bridge can hold its parameters."""

some = pytest.mark.parametrize("family_name", SOME, indirect=True)


@pytest.fixture(params=["raw", "compatibility"])
def bridge(request, zoo, family_name):
    """A bridge of every family, as it boots or in compatibility mode, float32; ``None`` where there is none."""
    if family_name == NO_BRIDGE or (family_name, request.param) == (NO_COMPATIBILITY, "compatibility"):
        return None
    return zoo.bridge(family_name, compatibility=request.param == "compatibility", dtype=torch.float32)


@pytest.mark.parametrize("family_name", [NO_BRIDGE, NO_COMPATIBILITY], indirect=True)
def test_what_transformer_lens_cannot_make_a_bridge_of(zoo, family_name):
    # Once it can, they belong among the others.
    with pytest.raises((AssertionError, RuntimeError)):
        zoo.bridge(family_name, dtype=torch.float32)


def assert_same(model, other, tolerance):
    """Compares every stored parameter; a bridge may spell a bias that is not there as zeros."""
    assert model.spec == other.spec
    ours, theirs = dict(model.weights.named()), dict(other.weights.named())
    for name in ours.keys() ^ theirs.keys():
        value = ours.get(name, theirs.get(name))
        absent = 1.0 if name.endswith(".w") else 0.0
        assert bool((value == absent).all()), name
    for name in ours.keys() & theirs.keys():
        assert ours[name].shape == theirs[name].shape, name
        assert float((ours[name] - theirs[name]).abs().max()) <= tolerance, name


def test_the_logits_of_the_bridge(bridge, token_prompts, padded, logits_of, hf_logits):
    if bridge is None:
        return
    model = fastinterp.load(bridge, processing="none", device="cpu")
    assert model.origin.processing == ("transformer_lens" if bridge.compatibility_mode else "none")
    logits = logits_of(model, padded(token_prompts))
    for row, prompt in enumerate(token_prompts):
        expected = hf_logits(bridge, prompt)
        assert float(expected.std()) > 0.5
        assert float((logits[row, : len(prompt)] - expected).abs().max()) < TOLERANCE


def test_the_weights_are_those_of_the_checkpoint(zoo, family_name, bridge):
    if bridge is None:
        return
    model = fastinterp.load(bridge, device="cpu")
    assert model.origin.processing == "transformer_lens"
    assert_same(model, zoo.model(family_name), 1e-5)
    assert model.tokenizer is bridge.tokenizer
    if not bridge.compatibility_mode:
        assert_same(
            fastinterp.load(bridge, processing="none", device="cpu"), zoo.model(family_name, processing="none"), 0.0
        )


@some
def test_a_bridge_is_neither_changed_nor_shared(bridge, token_prompts, hf_logits):
    before = {key: value.detach().clone() for key, value in bridge.tl_parameters().items()}
    logits = hf_logits(bridge, token_prompts[2])
    for _, tensor in fastinterp.load(bridge, processing="none", device="cpu").weights.named():
        tensor.zero_()
    assert all(torch.equal(before[key], value) for key, value in bridge.tl_parameters().items())
    assert torch.equal(hf_logits(bridge, token_prompts[2]), logits)


@some
def test_the_bos_habit_is_that_of_the_bridge(zoo, family_name, monkeypatch):
    bridge = zoo.bridge(family_name, dtype=torch.float32)
    assert fastinterp.load(bridge, device="cpu").spec.default_prepend_bos == bridge.cfg.default_prepend_bos
    monkeypatch.setattr(bridge.cfg, "default_prepend_bos", not bridge.cfg.default_prepend_bos)
    assert fastinterp.load(bridge, device="cpu").spec.default_prepend_bos == bridge.cfg.default_prepend_bos


def parameters_of(zoo, name):
    """What ``tl_parameters`` and the norms of a raw bridge add up to, and what it is read with."""
    from fastinterp.load.transformer_lens import _further_norms

    bridge = zoo.bridge(name, compatibility=False, dtype=torch.float32)
    spec = zoo.model(name, processing="none").spec
    family = family_of(bridge.original_model.config.model_type)
    return spec, family, dict(bridge.tl_parameters()) | _further_norms(bridge, spec)


@some
def test_every_parameter_must_be_there(zoo, family_name):
    spec, family, parameters = parameters_of(zoo, family_name)
    weights_from_transformer_lens(spec, family, parameters)
    for name in parameters:
        # Biases may be missing: where the model has none, some bridges spell zeros and some leave them out.
        if not name.rsplit(".", 1)[-1].startswith("b"):
            rest = {key: value for key, value in parameters.items() if key != name}
            with pytest.raises(CheckpointKeyError, match=name):
                weights_from_transformer_lens(spec, family, rest)


@some
def test_a_parameter_that_nobody_reads_is_refused(zoo, family_name):
    spec, family, parameters = parameters_of(zoo, family_name)
    for name in ("blocks.0.attn.W_extra", "blocks.0.attn.sinks", "project_in.weight"):
        with pytest.raises(CheckpointKeyError, match=name):
            weights_from_transformer_lens(spec, family, parameters | {name: torch.ones(2)})


@pytest.mark.parametrize("family_name", ["qwen3-gqa", "gemma2-softcaps", "gemma3-mixed-rope"], indirect=True)
def test_norms_of_queries_keys_and_outputs_follow_the_bridge(zoo, family_name, token_prompts, hf_logits, logits_of):
    # They are no part of tl_parameters: a change of them in the bridge must reach the loaded model all the same.
    spec = zoo.model(family_name).spec
    names = ["attn.q_norm", "attn.k_norm"] * spec.attention.qk_norm + ["ln1_post", "ln2_post"] * spec.post_norms
    bridge = copy.deepcopy(zoo.bridge(family_name, compatibility=False, dtype=torch.float32))
    clean = hf_logits(bridge, token_prompts[2])
    for name in names:
        with torch.no_grad():
            bridge.get_submodule(f"blocks.1.{name}").weight.mul_(1.5)
        expected = hf_logits(bridge, token_prompts[2])
        assert float((expected - clean).abs().max()) > 1e-2, name
        model = fastinterp.load(bridge, processing="none", device="cpu")
        got = logits_of(model, torch.tensor([token_prompts[2]]))[0]
        assert float((got - expected).abs().max()) < TOLERANCE, name
        clean = expected
