"""Processed weights against TransformerLens's, name by name, and what processing must leave alone."""

import dataclasses

import pytest
import torch

from fastinterp.errors import CheckpointKeyError, NonFiniteError
from fastinterp.model.process import process_weights
from fastinterp.model.weights import check_shapes

TOLERANCE = 1e-5


def named_as_transformer_lens(model):
    """Every parameter under TransformerLens's name; missing biases are zeros, KV heads stand once per query head."""
    spec, weights = model.spec, model.weights
    group, d_model, d_mlp = spec.attention.group, spec.d_model, spec.mlp.d_mlp
    heads = (spec.n_heads, spec.d_head)

    def or_zeros(tensor, *shape):
        return weights.W_E.new_zeros(shape) if tensor is None else tensor

    named = {"embed.W_E": weights.W_E, "unembed.W_U": weights.W_U}
    named["unembed.b_U"] = or_zeros(weights.b_U, spec.d_vocab)
    if weights.W_pos is not None:
        named["pos_embed.W_pos"] = weights.W_pos
    for layer, w in enumerate(weights.blocks):
        attn = {"W_Q": w.W_Q, "b_Q": or_zeros(w.b_Q, *heads), "W_O": w.W_O, "b_O": or_zeros(w.b_O, d_model)}
        kv_heads = (spec.attention.n_kv_heads, spec.d_head)
        for letter, W, b in (("K", w.W_K, w.b_K), ("V", w.W_V, w.b_V)):
            attn[f"W_{letter}"] = W.repeat_interleave(group, dim=0)
            attn[f"b_{letter}"] = or_zeros(b, *kv_heads).repeat_interleave(group, dim=0)
        mlp = {"W_in": w.W_in, "b_in": or_zeros(w.b_in, d_mlp)}
        mlp |= {"W_out": w.W_out, "b_out": or_zeros(w.b_out, d_model)}
        if w.W_gate is not None:
            mlp["W_gate"] = w.W_gate
            mlp["b_gate"] = or_zeros(None if w.b_gate_in is None else w.b_gate_in[:d_mlp], d_mlp)
        named |= {f"blocks.{layer}.attn.{name}": value for name, value in attn.items()}
        named |= {f"blocks.{layer}.mlp.{name}": value for name, value in mlp.items()}
    return named


def assert_equal_parameters(model, bridge):
    ours = named_as_transformer_lens(model)
    theirs = {key: value for key, value in bridge.tl_parameters().items() if ".ln" not in f".{key}"}
    # A bridge lists b_gate only where the checkpoint has one.
    missing = ours.keys() - theirs.keys()
    assert all(name.endswith("b_gate") and not ours[name].any() for name in missing), missing
    assert theirs.keys() <= ours.keys()
    for name, expected in theirs.items():
        assert ours[name].shape == expected.shape, name
        assert float((ours[name] - expected.detach()).abs().max()) < TOLERANCE, name


def test_processed_weights_equal_transformer_lens(zoo, tiny_name):
    assert_equal_parameters(zoo.model(tiny_name), zoo.bridge(tiny_name, dtype=torch.float32))


def test_raw_weights_equal_transformer_lens(zoo, tiny_name):
    bridge = zoo.bridge(tiny_name, compatibility=False, dtype=torch.float32)
    assert_equal_parameters(zoo.model(tiny_name, processing="none"), bridge)


def test_processed_norms_have_no_weights(zoo, tiny_name):
    weights = zoo.model(tiny_name).weights
    norms = [weights.ln_final, *(norm for block in weights.blocks for norm in (block.ln1, block.ln2))]
    assert all(norm.w is None and norm.b is None for norm in norms)
    raw = zoo.model(tiny_name, processing="none").weights
    assert all(norm.w is not None for norm in (raw.ln_final, raw.blocks[0].ln1, raw.blocks[0].ln2))


def test_processed_value_biases_are_folded(zoo, tiny_name):
    for before, after in zip(
        zoo.model(tiny_name, processing="none").weights.blocks,
        zoo.model(tiny_name).weights.blocks,
        strict=True,
    ):
        assert (after.b_V is None) == (before.b_V is None and before.ln1.b is None)
        assert after.b_V is None or not after.b_V.any()


def test_unembedding_and_writing_weights_are_centred(zoo, tiny_name):
    model = zoo.model(tiny_name, dtype=torch.float64)
    weights = model.weights
    assert float(weights.W_U.mean(1).abs().max()) < 1e-12
    if model.spec.norm.kind == "layer":
        written = [weights.W_E, weights.W_pos]
        for block in weights.blocks:
            written += [block.W_O, block.b_O, block.W_out, block.b_out]
        assert max(float(tensor.mean(-1).abs().max()) for tensor in written) < 1e-12


def test_processing_twice_changes_nothing(zoo, tiny_name):
    model = zoo.model(tiny_name, dtype=torch.float64)
    again = dict(process_weights(model.spec, model.weights).named())
    once = dict(model.weights.named())
    assert again.keys() == once.keys()
    assert max(float((again[name] - once[name]).abs().max()) for name in once) < 1e-12


def test_processing_leaves_its_input_alone(zoo, tiny_name):
    model = zoo.model(tiny_name, processing="none")
    before = model.weights.sha256()
    process_weights(model.spec, model.weights)
    assert model.weights.sha256() == before


def test_views_show_the_stored_matrices(zoo):
    block = zoo.model("llama-gqa", processing="none").weights.blocks[1]
    views = [block.W_Q, block.W_K, block.W_V, block.W_gate, block.W_in]
    stored = {block.W_QKV.untyped_storage().data_ptr(), block.W_gate_in.untyped_storage().data_ptr()}
    assert [tuple(view.shape) for view in views] == [(6, 48, 8), (2, 48, 8), (2, 48, 8), (48, 112), (48, 112)]
    assert {view.untyped_storage().data_ptr() for view in views} == stored


def test_hash_depends_on_every_parameter(zoo):
    weights = zoo.model("gpt2").weights
    reference = weights.sha256()
    assert reference == weights.to(dtype=torch.float32).sha256()
    assert reference != weights.to(dtype=torch.float64).sha256()
    assert reference != zoo.model("gpt2", processing="none").weights.sha256()
    for changed in (
        dataclasses.replace(weights, b_U=weights.b_U + 1e-3),
        dataclasses.replace(weights, blocks=(weights.blocks[1], weights.blocks[0], weights.blocks[2])),
    ):
        assert changed.sha256() != reference


def test_non_finite_weights_are_named(zoo):
    weights = zoo.model("gpt2").weights
    W_out = weights.blocks[2].W_out.clone()
    W_out[3, 3] = torch.inf
    block = dataclasses.replace(weights.blocks[2], W_out=W_out)
    with pytest.raises(NonFiniteError, match=r"'blocks.2.W_out' holds NaN or infinity.*dtype=torch.float32"):
        dataclasses.replace(weights, blocks=(*weights.blocks[:2], block)).check_finite()


def test_wrong_shapes_are_named(zoo):
    model = zoo.model("gpt2")
    with pytest.raises(CheckpointKeyError, match="has 2 blocks, the config says 3"):
        check_shapes(model.spec, dataclasses.replace(model.weights, blocks=model.weights.blocks[:2]))
    with pytest.raises(CheckpointKeyError, match=r"'W_pos' has shape \(63, 48\).*\(64, 48\)"):
        check_shapes(model.spec, dataclasses.replace(model.weights, W_pos=model.weights.W_pos[:63]))
