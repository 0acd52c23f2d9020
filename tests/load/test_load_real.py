"""SmolLM2-135M: known logits, Hugging Face's logits, and TransformerLens's weights."""

import pytest
import torch

import fastinterp

pytestmark = pytest.mark.real


def encoded(model, text, bos):
    return model.encode([text], prepend_bos=bos)[0]


@pytest.mark.parametrize(("bos", "mary", "john"), [(False, 10.758, 7.637), (True, 11.974, 7.358)])
def test_known_logits(smollm2_raw, real_prompts, logits_of, bos, mary, john):
    prompt = encoded(smollm2_raw, real_prompts[0], bos)
    answers = [encoded(smollm2_raw, word, False) for word in (" Mary", " John")]
    assert [len(answer) for answer in answers] == [1, 1]
    logits = logits_of(smollm2_raw, torch.tensor([prompt]))[0, -1]
    got = [float(logits[answer[0]]) for answer in answers]
    assert got == pytest.approx([mary, john], abs=6e-4)


@pytest.mark.parametrize("bos", [False, True])
def test_all_logits_equal_hugging_face(smollm2_raw, smollm2_hf, real_prompts, logits_of, hf_logits, padded, bos):
    prompts = [encoded(smollm2_raw, text, bos) for text in real_prompts]
    assert len({len(prompt) for prompt in prompts}) >= 3
    batch = logits_of(smollm2_raw, padded(prompts))
    for row, prompt in zip(batch, prompts, strict=True):
        assert float((row[: len(prompt)] - hf_logits(smollm2_hf, prompt)).abs().max()) < 1e-4


def test_processed_logprobs_equal_raw_ones(smollm2, smollm2_raw, real_prompts, logits_of, padded):
    prompts = [encoded(smollm2, text, None) for text in real_prompts]
    tokens = padded(prompts)
    processed, raw = (logits_of(model, tokens).log_softmax(-1) for model in (smollm2, smollm2_raw))
    for row, prompt in enumerate(prompts):
        assert float((processed - raw)[row, : len(prompt)].abs().max()) < 1e-4


def test_the_file_gives_what_transformers_reads_from_it(smollm2_raw, smollm2_hf):
    other = fastinterp.load(smollm2_hf, processing="none", device="cpu")
    assert other.spec == smollm2_raw.spec
    ours, theirs = dict(smollm2_raw.weights.named()), dict(other.weights.named())
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def test_the_default_processing_is_that_of_the_parts(smollm2, smollm2_gguf):
    model = fastinterp.load(smollm2_gguf, device="cpu")
    assert model.weights_sha256 == smollm2.weights_sha256
    assert model.origin == smollm2.origin
    assert (model.spec.n_layers, model.spec.n_heads, model.spec.attention.n_kv_heads) == (30, 9, 3)
    assert (model.spec.d_model, model.spec.d_vocab) == (576, 49152)


def test_processed_weights_equal_transformer_lens(smollm2, smollm2_bridge):
    theirs = smollm2_bridge.tl_parameters()
    weights, group = smollm2.weights, smollm2.spec.attention.group
    pairs = {"embed.W_E": weights.W_E, "unembed.W_U": weights.W_U}
    for layer, w in enumerate(weights.blocks):
        parts = {"attn.W_Q": w.W_Q, "attn.W_O": w.W_O, "mlp.W_gate": w.W_gate, "mlp.W_in": w.W_in, "mlp.W_out": w.W_out}
        parts |= {"attn.W_K": w.W_K.repeat_interleave(group, 0), "attn.W_V": w.W_V.repeat_interleave(group, 0)}
        pairs |= {f"blocks.{layer}.{name}": tensor for name, tensor in parts.items()}
    for name, tensor in pairs.items():
        expected = theirs[name].detach()
        assert tensor.shape == expected.shape, name
        assert float((tensor - expected).abs().max()) < 1e-5, name


def test_a_bridge_gives_the_same_model(smollm2, smollm2_bridge, real_prompts, logits_of):
    model = fastinterp.load(smollm2_bridge, device="cpu")
    assert model.spec == smollm2.spec
    tokens = torch.tensor([encoded(smollm2, real_prompts[0], True)])
    difference = logits_of(model, tokens).log_softmax(-1) - logits_of(smollm2, tokens).log_softmax(-1)
    assert float(difference.abs().max()) < 1e-4


def test_tokens_are_those_of_the_bridge(smollm2, smollm2_bridge, real_prompts):
    for text in real_prompts:
        for bos in (True, False):
            assert encoded(smollm2, text, bos) == smollm2_bridge.to_tokens(text, prepend_bos=bos)[0].tolist()
        assert encoded(smollm2, text, None) == smollm2_bridge.to_tokens(text)[0].tolist()
