"""The forward against Hugging Face: every tiny model, every length, padded or alone, float32 and float64."""

import dataclasses
from typing import Any

import pytest
import torch

import fastinterp
from fastinterp.model import Taps, final_logits, forward

TOLERANCE = 1e-4
"""Absolute, float32, on logits whose spread is about 2."""

FLOAT64_TOLERANCE = 1e-9


def largest(difference: torch.Tensor) -> float:
    return float(difference.abs().max())


def test_tiny_models_have_realistic_scale(zoo, tiny_name, token_prompts, hf_logits):
    # A tolerance on near-zero logits, or on patterns that do not depend on their input, would show nothing.
    logits = torch.cat([hf_logits(zoo.hf(tiny_name), prompt) for prompt in token_prompts])
    assert 1.5 < float(logits.std()) < 6.0
    assert 0.05 < float(logits.softmax(-1).amax(-1).mean()) < 0.8
    model = zoo.model(tiny_name, processing="none")
    taps = Taps.of(model.spec.n_layers, capture=["pattern"])
    forward(model.spec, model.weights, torch.tensor([token_prompts[4]]), taps=taps)
    assert all(float(pattern[..., -1, :].std()) > 0.05 for pattern in taps.values.values())


def test_raw_logits_equal_hugging_face_alone_and_padded(zoo, tiny_name, token_prompts, padded, logits_of, hf_logits):
    model = zoo.model(tiny_name, processing="none")
    batch = logits_of(model, padded(token_prompts))
    for row, prompt in zip(batch, token_prompts, strict=True):
        expected = hf_logits(zoo.hf(tiny_name), prompt)
        alone = logits_of(model, torch.tensor([prompt]))[0]
        assert largest(row[: len(prompt)] - expected) < TOLERANCE
        assert largest(alone - expected) < TOLERANCE


def test_batch_companions_change_nothing_but_rounding(zoo, tiny_name, token_prompts, padded, logits_of):
    # In float64, where rounding is some 1e-14, so that the least glance at padding would stand out.
    model = zoo.model(tiny_name, dtype=torch.float64)
    batch = logits_of(model, padded(token_prompts))
    for row, prompt in zip(batch, token_prompts, strict=True):
        assert largest(row[: len(prompt)] - logits_of(model, torch.tensor([prompt]))[0]) < 1e-12


def test_processed_logprobs_equal_hugging_face(zoo, tiny_name, token_prompts, padded, logits_of, hf_logits):
    batch = logits_of(zoo.model(tiny_name), padded(token_prompts)).log_softmax(-1)
    for row, prompt in zip(batch, token_prompts, strict=True):
        expected = hf_logits(zoo.hf(tiny_name), prompt).log_softmax(-1)
        assert largest(row[: len(prompt)] - expected) < TOLERANCE


@pytest.mark.usefixtures("float64_rms_norm")
@pytest.mark.parametrize("processing", ["none", "transformer_lens"])
def test_float64_equals_hugging_face_in_float64(
    zoo, tiny_name, token_prompts, padded, logits_of, hf_logits, processing
):
    model = zoo.model(tiny_name, processing=processing, dtype=torch.float64)
    batch = logits_of(model, padded(token_prompts))
    assert batch.dtype == torch.float64
    for row, prompt in zip(batch, token_prompts, strict=True):
        expected = hf_logits(zoo.hf_double(tiny_name), prompt)
        got = row[: len(prompt)]
        if processing != "none":
            got, expected = got.log_softmax(-1), expected.log_softmax(-1)
        assert expected.dtype == torch.float64
        assert largest(got - expected) < FLOAT64_TOLERANCE


@pytest.mark.parametrize("tiny_name", ["gpt2", "llama-gqa", "mistral-window"], indirect=True)
def test_prompts_as_long_as_the_context(zoo, tiny_name, logits_of, hf_logits):
    prompt = torch.randint(0, 400, (64,), generator=torch.Generator().manual_seed(1)).tolist()
    got = logits_of(zoo.model(tiny_name, processing="none"), torch.tensor([prompt]))[0]
    assert largest(got - hf_logits(zoo.hf(tiny_name), prompt)) < TOLERANCE


@pytest.mark.parametrize("n_tokens", [4, 5, 6, 7, 40])
def test_window_at_its_edges(zoo, logits_of, hf_logits, n_tokens):
    model, prompt = zoo.model("mistral-window", processing="none"), list(range(20, 20 + n_tokens))
    got = logits_of(model, torch.tensor([prompt]))[0]
    assert largest(got - hf_logits(zoo.hf("mistral-window"), prompt)) < TOLERANCE
    attention = dataclasses.replace(model.spec.attention, window=(None,) * model.spec.n_layers)
    unlimited = dataclasses.replace(model, spec=dataclasses.replace(model.spec, attention=attention))
    difference = largest(logits_of(unlimited, torch.tensor([prompt]))[0] - got)
    assert difference == 0 if n_tokens <= 5 else difference > 0.1


def test_window_that_differs_between_layers(zoo, logits_of):
    # No family here alternates windows, so a windowed layer is compared with the same model's explicit pattern.
    model, tokens = zoo.model("mistral-window", dtype=torch.float64), torch.arange(30, 42)[None]
    attention = dataclasses.replace(model.spec.attention, window=(3, None, 6))
    mixed = dataclasses.replace(model, spec=dataclasses.replace(model.spec, attention=attention))
    taps = Taps.of(3, capture=["pattern"])
    slow = forward(mixed.spec, mixed.weights, tokens, taps=taps)
    for layer, window in enumerate((3, 12, 6)):
        seen = (taps.values["pattern", layer][0] > 0).any(0)
        distance = torch.arange(12)[:, None] - torch.arange(12)[None, :]
        assert torch.equal(seen, (distance >= 0) & (distance < window))
    assert largest(forward(mixed.spec, mixed.weights, tokens) - slow) < 1e-10
    assert largest(logits_of(mixed, tokens) - logits_of(model, tokens)) > 0.1


ROPE_SCALINGS: dict[str, dict[str, Any]] = {
    "linear": dict(rope_type="linear", factor=3.0, rope_theta=10000.0),
    "llama3": dict(
        rope_type="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=32,
        rope_theta=500.0,
    ),
    "other base": dict(rope_type="default", rope_theta=100.0),
}


@pytest.mark.parametrize("kind", ROPE_SCALINGS)
@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_rope_scaling_equals_hugging_face(tiny_builders, logits_of, hf_logits, kind, family):
    hf_model = tiny_builders[family](rope_parameters=dict(ROPE_SCALINGS[kind]), head_dim=32)
    prompt = list(range(40, 90))
    model = fastinterp.load(hf_model, processing="none", device="cpu")
    got = logits_of(model, torch.tensor([prompt]))[0]
    assert largest(got - hf_logits(hf_model, prompt)) < TOLERANCE
    (rope,) = set(model.spec.position.rope)
    unscaled = dataclasses.replace(rope, scaling=None, base=10000.0)
    position = dataclasses.replace(model.spec.position, rope=(unscaled,) * model.spec.n_layers)
    plain = dataclasses.replace(model, spec=dataclasses.replace(model.spec, position=position))
    assert largest(logits_of(plain, torch.tensor([prompt]))[0] - got) > 0.1


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("gpt2", dict(activation_function="relu")),
        ("gpt2", dict(activation_function="gelu")),
        ("gpt2", dict(activation_function="gelu_pytorch_tanh")),
        ("gpt2", dict(scale_attn_weights=False)),
        ("gpt2", dict(layer_norm_epsilon=0.3)),
        ("gpt2", dict(reorder_and_upcast_attn=True)),
        ("llama", dict(hidden_act="gelu")),
        ("llama", dict(hidden_act="gelu_pytorch_tanh")),
        ("llama", dict(hidden_act="relu")),
        ("llama", dict(rms_norm_eps=0.3)),
        ("llama", dict(attention_bias=True)),
        ("llama", dict(mlp_bias=True, tie_word_embeddings=True)),
        ("mistral", dict(sliding_window=None)),
        ("mistral", dict(sliding_window=1)),
        ("mistral", dict(head_dim=None, num_key_value_heads=3)),
    ],
    ids=str,
)
def test_config_choices_equal_hugging_face(tiny_builders, logits_of, hf_logits, family, changes):
    hf_model, prompt = tiny_builders[family](**changes), list(range(100, 111))
    expected = hf_logits(hf_model, prompt)
    raw = logits_of(fastinterp.load(hf_model, processing="none", device="cpu"), torch.tensor([prompt]))[0]
    assert largest(raw - expected) < TOLERANCE
    processed = logits_of(fastinterp.load(hf_model, device="cpu"), torch.tensor([prompt]))[0]
    assert largest(processed.log_softmax(-1) - expected.log_softmax(-1)) < TOLERANCE


@pytest.mark.parametrize("tiny_name", ["gpt2", "llama-biases-mqa-head-dim"], indirect=True)
def test_logits_of_single_rows_equal_logits_of_all(zoo, tiny_name, token_prompts, padded):
    model = zoo.model(tiny_name, processing="none")
    resid = forward(model.spec, model.weights, padded(token_prompts))
    everywhere = final_logits(model.spec, model.weights, resid)
    rows = final_logits(model.spec, model.weights, resid[2, 3:7])
    assert largest(rows - everywhere[2, 3:7]) < 1e-5


def test_forward_leaves_global_state_alone(zoo):
    model = zoo.model("llama-gqa")
    before = [tensor.clone() for _, tensor in model.weights.named()]
    grad, precision = torch.is_grad_enabled(), torch.get_float32_matmul_precision()
    first = forward(model.spec, model.weights, torch.arange(8)[None])
    assert torch.equal(first, forward(model.spec, model.weights, torch.arange(8)[None]))
    assert (torch.is_grad_enabled(), torch.get_float32_matmul_precision()) == (grad, precision)
    assert all(torch.equal(a, b) for a, (_, b) in zip(before, model.weights.named(), strict=True))


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_float16_norms_do_not_overflow(tiny_builders, logits_of, family):
    # Residual streams of trained models hold values of some hundreds, whose squares exceed float16.
    hf_model, tokens = tiny_builders[family](), torch.arange(20, 30)[None]
    embedding = hf_model.get_input_embeddings().weight
    embedding.data[20:30] *= 1000.0
    exact = logits_of(fastinterp.load(hf_model, processing="none", device="cpu"), tokens)
    half = logits_of(fastinterp.load(hf_model, processing="none", dtype=torch.float16, device="cpu"), tokens)
    assert float(exact[..., :20].std()) > 0.3
    assert largest(half[..., :20].float() - exact[..., :20]) < 0.15
