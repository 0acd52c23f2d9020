"""GGUF files, written here as llama.cpp writes them, against the Hugging Face model they were made of."""

import gguf
import numpy as np
import pytest
import torch

import fastinterp
from fastinterp.errors import CheckpointKeyError, ModelSourceError, NonFiniteError, UnsupportedConfigError


def permuted(W, n_heads):
    """llama.cpp's order of the rows of query and key matrices: rotary pairs lie side by side."""
    return W.reshape(n_heads, 2, W.shape[0] // n_heads // 2, -1).swapaxes(1, 2).reshape(W.shape)


@pytest.fixture
def write(tmp_path, zoo):
    """Writes the tiny Llama as GGUF; ``change`` may alter the tensors on the way."""

    def write(name="llama-gqa", change=lambda tensors: None, metadata=()):
        hf_model = zoo.hf(name)
        config = hf_model.config
        table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
        tensors = {}
        for key, value in hf_model.state_dict().items():
            if key == "lm_head.weight" and config.tie_word_embeddings:
                continue
            W = value.numpy()
            if "q_proj" in key or "k_proj" in key:
                n_heads = config.num_attention_heads if "q_proj" in key else config.num_key_value_heads
                W = permuted(W, n_heads)
            tensors[table.get_name(key.removesuffix(".weight")) + ".weight"] = W.astype(np.float32)
        change(tensors)
        path = tmp_path / "tiny.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        writer.add_context_length(config.max_position_embeddings)
        writer.add_embedding_length(config.hidden_size)
        writer.add_block_count(config.num_hidden_layers)
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count(config.num_attention_heads)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
        writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
        writer.add_rope_dimension_count(config.head_dim)
        writer.add_vocab_size(config.vocab_size)
        for key, value in metadata:
            (writer.add_string if isinstance(value, str) else writer.add_float32)(f"llama.{key}", value)
        for key, value in tensors.items():
            writer.add_tensor(key, np.ascontiguousarray(value))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return write


@pytest.mark.parametrize("name", ["llama-gqa", "llama-mha-tied", "llama-one-head-one-layer"])
def test_a_gguf_file_gives_the_same_model(zoo, write, tiny_tokenizer, name):
    model = fastinterp.load(write(name), tokenizer=tiny_tokenizer, processing="none", device="cpu")
    expected = zoo.model(name, processing="none")
    assert model.spec.attention == expected.spec.attention
    assert model.spec.position == expected.spec.position
    assert (model.spec.d_vocab, model.spec.n_ctx) == (400, 64)
    assert model.spec.norm.eps == pytest.approx(expected.spec.norm.eps, rel=1e-6)
    ours = dict(model.weights.named())
    assert ours.keys() == dict(expected.weights.named()).keys()
    assert all(torch.equal(ours[key], value) for key, value in expected.weights.named())
    assert model.tokenizer is tiny_tokenizer
    assert model.origin.source == "tiny.gguf"


def test_quantised_tensors_are_expanded_to_what_the_file_says(zoo, write, tiny_tokenizer):
    quantised = {}

    def change(tensors):
        # 48 and 112 columns are no multiple of a block of 32, so the quantised values are written out in full.
        W = tensors["blk.1.ffn_up.weight"].reshape(-1, 32)
        blocks = gguf.quantize(W, gguf.GGMLQuantizationType.Q4_1)
        tensors["blk.1.ffn_up.weight"] = gguf.dequantize(blocks, gguf.GGMLQuantizationType.Q4_1).reshape(112, 48)
        quantised["W_in"] = torch.tensor(tensors["blk.1.ffn_up.weight"]).t()

    model = fastinterp.load(write(change=change), tokenizer=tiny_tokenizer, processing="none", device="cpu")
    assert torch.equal(model.weights.blocks[1].W_in, quantised["W_in"])
    assert not torch.equal(
        model.weights.blocks[1].W_in, zoo.model("llama-gqa", processing="none").weights.blocks[1].W_in
    )


def test_a_tensor_that_the_model_does_not_know_is_named(write, tiny_tokenizer):
    path = write(change=lambda tensors: tensors.update({"blk.0.attn_q_norm.weight": np.ones(8, np.float32)}))
    with pytest.raises(CheckpointKeyError, match=r"'blk\.0\.attn_q_norm\.weight'"):
        fastinterp.load(path, tokenizer=tiny_tokenizer)


def test_rescaled_rotary_frequencies_are_refused(write, tiny_tokenizer):
    path = write(change=lambda tensors: tensors.update({"rope_freqs.weight": np.ones(4, np.float32)}))
    with pytest.raises(CheckpointKeyError, match=r"'rope_freqs\.weight'"):
        fastinterp.load(path, tokenizer=tiny_tokenizer)


def test_a_missing_tensor_is_named(write, tiny_tokenizer):
    path = write(change=lambda tensors: tensors.pop("blk.2.attn_v.weight"))
    with pytest.raises(CheckpointKeyError, match=r"lacks 'layers.2.self_attn.v_proj.weight'"):
        fastinterp.load(path, tokenizer=tiny_tokenizer)


def test_nan_in_a_tensor_is_refused(write, tiny_tokenizer):
    def change(tensors):
        tensors["blk.0.ffn_down.weight"][2, 2] = np.nan

    with pytest.raises(NonFiniteError, match=r"'blocks.0.W_out'"):
        fastinterp.load(write(change=change), tokenizer=tiny_tokenizer)


def test_a_file_that_is_not_gguf(tmp_path):
    path = tmp_path / "bad.gguf"
    path.write_bytes(b"this is no GGUF file" * 50)
    with pytest.raises(ModelSourceError, match=r"bad.gguf.*cannot be read"):
        fastinterp.load(path)


def test_a_file_that_breaks_off(write, tiny_tokenizer):
    path = write()
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ModelSourceError, match=r"tiny\.gguf"):
        fastinterp.load(path, tokenizer=tiny_tokenizer)


@pytest.mark.parametrize("path", ["nowhere.gguf", "./no/where.gguf"])
def test_a_file_that_is_not_there(path):
    with pytest.raises(ModelSourceError, match=f"there is no file '{path}'"):
        fastinterp.load(path)


@pytest.mark.parametrize(
    ("key", "value"), [("rope.scaling.type", "yarn"), ("rope.scaling.factor", 4.0), ("logit_scale", 3.0)]
)
def test_metadata_that_nobody_reads_is_refused(write, tiny_tokenizer, key, value):
    path = write(metadata=[(key, value)])
    with pytest.raises(UnsupportedConfigError, match=f"llama.{key}={value!r} is not supported"):
        fastinterp.load(path, tokenizer=tiny_tokenizer, device="cpu")


def test_metadata_that_changes_nothing_is_accepted(write, tiny_tokenizer):
    path = write(metadata=[("rope.scaling.type", "none"), ("rope.scaling.factor", 1.0)])
    assert fastinterp.load(path, tokenizer=tiny_tokenizer, device="cpu").spec.position.rope[0].scaling is None
