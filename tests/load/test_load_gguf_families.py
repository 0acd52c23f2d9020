"""GGUF files of other families: the same model as the Hugging Face checkpoint, or refused by the metadata at fault."""

import gguf
import numpy as np
import pytest
import torch

import fastinterp
from fastinterp.errors import UnknownFamilyError, UnsupportedConfigError

ARCHITECTURES = {
    "qwen2": gguf.MODEL_ARCH.QWEN2,
    "qwen3": gguf.MODEL_ARCH.QWEN3,
    "phi3": gguf.MODEL_ARCH.PHI3,
    "gemma2": gguf.MODEL_ARCH.GEMMA2,
    "gemma3": gguf.MODEL_ARCH.GEMMA3,
    "starcoder2": gguf.MODEL_ARCH.STARCODER2,
}


@pytest.fixture
def write(tmp_path, zoo):
    """Writes a model with the metadata that llama.cpp's converter writes for its family."""

    def write(name, architecture, metadata):
        hf_model = zoo.hf(name)
        config = hf_model.config
        table = gguf.get_tensor_name_map(ARCHITECTURES[architecture], config.num_hidden_layers)
        path = tmp_path / "tiny.gguf"
        writer = gguf.GGUFWriter(path, architecture)
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_vocab_size(config.vocab_size)
        writer.add_pad_token_id(0)
        if architecture == "starcoder2":
            writer.add_layer_norm_eps(config.norm_epsilon)
        else:
            writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        for key, value in metadata.items():
            (writer.add_uint32 if isinstance(value, int) else writer.add_float32)(f"{architecture}.{key}", value)
        for key, value in hf_model.state_dict().items():
            if key == "lm_head.weight" and config.tie_word_embeddings:
                continue
            stem, _, suffix = key.rpartition(".")
            W = value.numpy().astype(np.float32)
            if architecture.startswith("gemma") and key.endswith("norm.weight"):
                W = W + 1
            writer.add_tensor(f"{table.get_name(stem)}.{suffix}", np.ascontiguousarray(W))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


@pytest.mark.parametrize(
    ("name", "architecture", "metadata"),
    [
        ("qwen2-gqa-tied", "qwen2", {"rope.freq_base": 10000.0}),
        ("qwen2-gqa-tied", "qwen2", {"rope.freq_base": 10000.0, "rope.dimension_count": 8}),
    ],
)
def test_a_gguf_file_gives_the_same_model(zoo, write, tiny_tokenizer, name, architecture, metadata):
    model = fastinterp.load(
        write(name, architecture, metadata), tokenizer=tiny_tokenizer, processing="none", device="cpu"
    )
    expected = zoo.model(name, processing="none")
    assert model.spec.attention == expected.spec.attention
    assert model.spec.position == expected.spec.position
    assert (model.spec.mlp, model.spec.parallel) == (expected.spec.mlp, expected.spec.parallel)
    ours = dict(model.weights.named())
    assert ours.keys() == dict(expected.weights.named()).keys()
    assert all(torch.equal(ours[key], value) for key, value in expected.weights.named())


@pytest.mark.parametrize(
    ("name", "architecture", "metadata", "culprit"),
    [
        ("gemma2-softcaps", "gemma2", {"attn_logit_softcapping": 5.0}, r"gemma2.attn_logit_softcapping=5\.0"),
        ("gemma2-softcaps", "gemma2", {"final_logit_softcapping": 4.0}, r"gemma2.final_logit_softcapping=4\.0"),
        ("phi3-gqa-window", "phi3", {"attention.sliding_window": 5}, "phi3.attention.sliding_window=5"),
        ("phi3-mha-partial-rope-tied", "phi3", {"rope.dimension_count": 4}, "phi3.rope.dimension_count=4"),
        ("qwen3-gqa", "qwen3", {"attention.key_length": 20}, "qwen3.attention.key_length=20"),
        ("starcoder2-mha-no-bias-untied", "starcoder2", {"rope.freq_base": 77.0}, r"starcoder2.rope.freq_base=77\.0"),
    ],
)
def test_metadata_that_is_passed_over_is_refused(write, tiny_tokenizer, name, architecture, metadata, culprit):
    path = write(name, architecture, metadata)
    with pytest.raises(UnsupportedConfigError, match=culprit):
        fastinterp.load(path, tokenizer=tiny_tokenizer, device="cpu")


def test_gemma3_files_are_refused(write, tiny_tokenizer):
    path = write("gemma3-mixed-rope", "gemma3", {"attention.key_length": 80, "attention.sliding_window": 5})
    with pytest.raises(UnknownFamilyError, match="gemma3_text"):
        fastinterp.load(path, tokenizer=tiny_tokenizer, device="cpu")
