"""Every family against Hugging Face: logits, loss, the packed forward, continued sequences, reduced precision."""

import dataclasses

import pytest
import torch

from fastinterp.metrics import evaluate_loss
from fastinterp.model import Taps, final_logits, forward
from fastinterp.model.decode import KeyValueCache
from fastinterp.model.forward import extend, forward_at
from fastinterp.model.norms import normalize

TOLERANCE = 1e-4
"""Absolute, float32, on logits whose spread is about 2."""

FLOAT64_TOLERANCE = 1e-9
EXACT = 1e-11
"""Absolute, float64, between two ways of ours."""

REDUCED = {torch.bfloat16: 0.04, torch.float16: 0.005}
"""Root mean square over the spread of the logits: 8 and 11 bits of mantissa through up to three blocks."""


def largest(difference: torch.Tensor) -> float:
    return float(difference.abs().max())


def test_family_models_have_realistic_scale(zoo, family_name, token_prompts, hf_logits):
    # A tolerance on near-zero logits, or on patterns that do not depend on their input, would show nothing.
    logits = torch.cat([hf_logits(zoo.hf(family_name), prompt) for prompt in token_prompts])
    assert 1.2 < float(logits.std()) < 4.0
    assert 0.02 < float(logits.softmax(-1).amax(-1).mean()) < 0.8
    model = zoo.model(family_name, processing="none")
    taps = Taps.of(model.spec.n_layers, capture=["pattern"])
    forward(model.spec, model.weights, torch.tensor([token_prompts[4]]), taps=taps)
    for (_, layer), pattern in taps.values.items():
        seen = pattern[..., -1, -(model.spec.attention.window[layer] or 9) :]
        assert 0.02 < float(seen.std(-1).mean()) < 0.4


def test_raw_logits_equal_hugging_face_alone_and_padded(zoo, family_name, token_prompts, padded, logits_of, hf_logits):
    model = zoo.model(family_name, processing="none")
    batch = logits_of(model, padded(token_prompts))
    for row, prompt in zip(batch, token_prompts, strict=True):
        expected = hf_logits(zoo.hf(family_name), prompt)
        assert largest(row[: len(prompt)] - expected) < TOLERANCE
        assert largest(logits_of(model, torch.tensor([prompt]))[0] - expected) < TOLERANCE


def test_processed_logprobs_equal_hugging_face(zoo, family_name, token_prompts, padded, logits_of, hf_logits):
    batch = logits_of(zoo.model(family_name), padded(token_prompts)).log_softmax(-1)
    for row, prompt in zip(batch, token_prompts, strict=True):
        expected = hf_logits(zoo.hf(family_name), prompt).log_softmax(-1)
        assert largest(row[: len(prompt)] - expected) < TOLERANCE


@pytest.mark.parametrize("processing", ["none", "transformer_lens"])
def test_float64_equals_hugging_face_in_float64(
    zoo, family_name, token_prompts, padded, logits_of, exact_hf_logits, processing
):
    batch = logits_of(zoo.model(family_name, processing=processing, dtype=torch.float64), padded(token_prompts))
    assert batch.dtype == torch.float64
    for row, prompt in zip(batch, token_prompts, strict=True):
        expected, got = exact_hf_logits(family_name, prompt), row[: len(prompt)]
        if processing != "none":
            got, expected = got.log_softmax(-1), expected.log_softmax(-1)
        assert expected.dtype == torch.float64
        assert largest(got - expected) < FLOAT64_TOLERANCE


def test_the_whole_context_equals_hugging_face(zoo, family_name, logits_of, exact_hf_logits):
    prompt = torch.randint(0, 400, (64,), generator=torch.Generator().manual_seed(1)).tolist()
    got = logits_of(zoo.model(family_name, processing="none", dtype=torch.float64), torch.tensor([prompt]))[0]
    assert largest(got - exact_hf_logits(family_name, prompt)) < FLOAT64_TOLERANCE


def test_loss_equals_hugging_face(zoo, family_name, token_prompts, padded):
    model, hf_model, tokens = zoo.model(family_name), zoo.hf(family_name), padded(token_prompts)
    n_tokens = torch.tensor([len(prompt) for prompt in token_prompts])
    with torch.no_grad():
        resid = forward(model.spec, model.weights, tokens)
        x = normalize(model.spec.norm, resid, model.weights.ln_final)[None]
        loss = evaluate_loss(
            x, model.weights.W_U, model.weights.b_U, tokens, n_tokens, softcap=model.spec.final_softcap
        )
        for row, prompt in zip(loss[0], token_prompts, strict=True):
            if len(prompt) > 1:
                ids = torch.tensor([prompt])
                expected = hf_model(ids, labels=ids).loss
                assert abs(float(row[: len(prompt) - 1].mean() - expected)) < TOLERANCE
            assert bool(row[len(prompt) - 1 :].isnan().all())


@pytest.mark.parametrize("where", ["last", "middle"])
def test_the_packed_forward_equals_the_whole(zoo, family_name, token_prompts, padded, where):
    model, tokens = zoo.model(family_name, dtype=torch.float64), padded(token_prompts)
    n_tokens = torch.tensor([len(prompt) for prompt in token_prompts])
    at = n_tokens - 1 if where == "last" else n_tokens // 2
    names = ["embed", "resid_pre", "z", "attn_raw", "attn_out", "mlp_in", "post", "mlp_raw", "mlp_out", "resid_post"]
    names += [] if model.spec.parallel else ["resid_mid"]
    names += ["ln1_post_scale", "ln2_post_scale"] if model.spec.post_norms else []
    whole, packed = (Taps.of(model.spec.n_layers, capture=names) for _ in range(2))
    with torch.no_grad():
        expected = forward(model.spec, model.weights, tokens, taps=whole)
        got = forward_at(model.spec, model.weights, tokens, n_tokens, at, taps=packed)
    rows = torch.arange(len(at))
    assert largest(got - expected[rows, at]) < EXACT
    assert packed.values.keys() == whole.values.keys()
    for key, value in whole.values.items():
        assert largest(packed.values[key] - value[rows, at]) < EXACT, key


def test_continued_sequences_equal_the_whole_forward(zoo, family_name, token_prompts, padded):
    check_continued(zoo.model(family_name, dtype=torch.float64), token_prompts, padded)


def test_continued_sequences_of_the_first_families(zoo, tiny_name, token_prompts, padded):
    check_continued(zoo.model(tiny_name, dtype=torch.float64), token_prompts, padded)


def check_continued(model, token_prompts, padded):
    # Beginnings of different lengths in one batch, then tokens one by one, then several at once for some rows only.
    generator = torch.Generator().manual_seed(3)
    n_first, singles = torch.tensor([len(prompt) for prompt in token_prompts]), 6
    n_last = torch.tensor([3, 1, 2, 3, 1, 2, 3])
    full = torch.randint(1, 379, (len(n_first), int(n_first.max()) + singles + 3), generator=generator)
    for row, prompt in zip(full, token_prompts, strict=True):
        row[: len(prompt)] = torch.tensor(prompt)
    past = KeyValueCache(model.spec, len(full), full.shape[1], device=full.device, dtype=torch.float64)
    rows = torch.arange(len(full))
    with torch.no_grad():
        expected = final_logits(model.spec, model.weights, forward(model.spec, model.weights, full))

        def check(tokens: torch.Tensor, n_new: torch.Tensor) -> None:
            before = past.n_tokens
            resid = extend(model.spec, model.weights, tokens, n_new, past)
            got = final_logits(model.spec, model.weights, resid)
            assert torch.equal(past.n_tokens, before + n_new)
            for row, (start, n) in enumerate(zip(before.tolist(), n_new.tolist(), strict=True)):
                assert largest(got[row, :n] - expected[row, start : start + n]) < FLOAT64_TOLERANCE

        check(padded(token_prompts), n_first)
        for _ in range(singles):
            check(full[rows, past.n_tokens][:, None], torch.ones_like(n_first))
        check(full[rows[:, None], past.n_tokens[:, None] + torch.arange(3)], n_last)


def test_continued_sequences_see_nothing_beyond_their_window(zoo):
    # A window of 5 through three layers reaches 13 tokens back.
    model = zoo.model("phi3-gqa-window", dtype=torch.float64)
    first, second = torch.arange(40, 60)[None], torch.arange(40, 60)[None]
    second[0, :3] = 7

    def last(tokens: torch.Tensor) -> torch.Tensor:
        past = KeyValueCache(model.spec, 1, 20, device=tokens.device, dtype=torch.float64)
        with torch.no_grad():
            extend(model.spec, model.weights, tokens[:, :10], torch.tensor([10]), past)
            return extend(model.spec, model.weights, tokens[:, 10:], torch.tensor([10]), past)[0]

    difference = (last(first) - last(second)).abs().amax(-1)
    assert float(difference[0]) > 1e-3
    assert float(difference[5:].max()) == 0.0


@pytest.mark.parametrize("name", ["gemma2-softcaps", "gemma3-mha-biases-final-softcap-untied"])
def test_softcaps_bend_the_logits(zoo, name, token_prompts, logits_of):
    # Otherwise a model that forgets them would pass for right.
    model, tokens = zoo.model(name, processing="none"), torch.tensor([token_prompts[2]])
    capped = logits_of(model, tokens)
    assert float(capped.abs().max()) < 4.0
    assert float(capped.abs().max()) > 3.0
    specs = [dataclasses.replace(model.spec, final_softcap=None)]
    if name == "gemma2-softcaps":
        attention = dataclasses.replace(model.spec.attention, softcap=None)
        specs.append(dataclasses.replace(model.spec, attention=attention))
    for spec in specs:
        assert largest(logits_of(dataclasses.replace(model, spec=spec), tokens) - capped) > 0.05


@pytest.mark.parametrize("dtype", REDUCED, ids=str)
def test_reduced_precision_is_near_float32(zoo, family_name, token_prompts, padded, logits_of, dtype):
    tokens, n_tokens = padded(token_prompts), torch.tensor([len(prompt) for prompt in token_prompts])
    exact = logits_of(zoo.model(family_name), tokens)
    reduced = logits_of(zoo.model(family_name, dtype=dtype), tokens)
    assert reduced.dtype == dtype
    real = torch.arange(tokens.shape[1]) < n_tokens[:, None]
    assert bool(reduced[real].isfinite().all())
    error = (reduced.float() - exact)[real].square().mean().sqrt() / exact[real].std()
    assert float(error) < REDUCED[dtype]
