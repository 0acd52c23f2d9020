"""Every source gives the same model: directory, object in memory, bridge, GGUF file."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM

import fastinterp
from fastinterp.errors import ModelSourceError, UnsupportedConfigError


def assert_same(model, other, tolerance=0.0):
    assert model.spec == other.spec
    ours, theirs = dict(model.weights.named()), dict(other.weights.named())
    # A source may spell a bias that is not there as zeros.
    for name in ours.keys() ^ theirs.keys():
        assert ".b_" in f".{name}", name
        assert not ours.get(name, theirs.get(name)).any(), name
    for name in ours.keys() & theirs.keys():
        assert ours[name].shape == theirs[name].shape, name
        assert float((ours[name] - theirs[name]).abs().max()) <= tolerance, name


@pytest.mark.parametrize("processing", ["none", "transformer_lens"])
def test_object_in_memory_equals_directory(zoo, tiny_name, processing):
    model = fastinterp.load(zoo.hf(tiny_name), processing=processing, device="cpu")
    assert_same(model, zoo.model(tiny_name, processing=processing))
    assert model.origin.processing == processing


def test_loading_neither_changes_nor_shares_the_source(zoo, tiny_name):
    hf_model = zoo.hf(tiny_name)
    before = {key: value.clone() for key, value in hf_model.state_dict().items()}
    for processing in ("none", "transformer_lens"):
        model = fastinterp.load(hf_model, processing=processing, device="cpu")
        theirs = {value.untyped_storage().data_ptr() for value in hf_model.state_dict().values()}
        assert not theirs & {value.untyped_storage().data_ptr() for _, value in model.weights.named()}
        assert not any(value.requires_grad for _, value in model.weights.named())
    assert all(torch.equal(before[key], value) for key, value in hf_model.state_dict().items())


@pytest.mark.parametrize(
    "tiny_name", ["gpt2", "llama-gqa", "llama-biases-mqa-head-dim", "mistral-window"], indirect=True
)
@pytest.mark.parametrize("compatibility", [False, True])
def test_a_bridge_gives_the_same_model(zoo, tiny_name, compatibility, token_prompts, padded, logits_of):
    bridge = zoo.bridge(tiny_name, compatibility=compatibility, dtype=torch.float32)
    expected = zoo.model(tiny_name)
    tokens = padded(token_prompts)
    model = fastinterp.load(bridge, device="cpu")
    assert_same(model, expected, tolerance=1e-5)
    difference = logits_of(model, tokens) - logits_of(expected, tokens)
    assert float(difference.abs().max()) < 1e-4
    assert model.tokenizer is bridge.tokenizer
    assert model.origin.processing == "transformer_lens"


@pytest.mark.parametrize("tiny_name", ["gpt2", "llama-gqa", "mistral-window"], indirect=True)
def test_a_bridge_as_it_boots_keeps_its_raw_weights(zoo, tiny_name):
    bridge = zoo.bridge(tiny_name, compatibility=False, dtype=torch.float32)
    model = fastinterp.load(bridge, processing="none", device="cpu")
    assert_same(model, zoo.model(tiny_name, processing="none"))
    assert model.origin.processing == "none"


def test_a_bridge_in_compatibility_mode_stays_processed(zoo):
    bridge = zoo.bridge("gpt2", dtype=torch.float32)
    model = fastinterp.load(bridge, processing="none", device="cpu")
    assert_same(model, zoo.model("gpt2"), tolerance=1e-5)
    assert model.origin.processing == "transformer_lens"


def test_a_bridge_is_neither_changed_nor_shared(zoo):
    bridge = zoo.bridge("llama-gqa", dtype=torch.float32)
    before = {key: value.clone() for key, value in bridge.tl_parameters().items()}
    model = fastinterp.load(bridge, processing="none", device="cpu")
    for _, tensor in model.weights.named():
        tensor.zero_()
    assert all(torch.equal(before[key], value) for key, value in bridge.tl_parameters().items())


@pytest.mark.parametrize("key", ["final_logit_softcapping", "residual_multiplier"])
def test_the_config_of_a_bridge_is_read_as_strictly(zoo, monkeypatch, key):
    bridge = zoo.bridge("llama-gqa", dtype=torch.float32)
    monkeypatch.setattr(bridge.original_model.config, key, 0.5, raising=False)
    with pytest.raises(UnsupportedConfigError, match=f"{key}=0.5"):
        fastinterp.load(bridge)


def test_a_directory_brings_its_tokenizer(zoo, tiny_tokenizer):
    model = zoo.model("gpt2")
    text = "When John and Mary went"
    plain = tiny_tokenizer(text)["input_ids"]
    assert model.encode([text], prepend_bos=False) == [plain]
    assert model.encode([text], prepend_bos=True) == [[tiny_tokenizer.bos_token_id, *plain]]
    assert "".join(model.token_strings(plain)) == text
    assert model.tokenizer_hash == fastinterp.load(zoo.hf("gpt2"), tokenizer=tiny_tokenizer).tokenizer_hash
    assert model.origin.source == str(zoo.directory("gpt2"))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_the_dtype_asked_for_is_the_dtype_of_every_parameter(zoo, dtype):
    model = fastinterp.load(zoo.hf("llama-gqa"), dtype=dtype, device="cpu")
    assert {tensor.dtype for _, tensor in model.weights.named()} == {dtype}
    exact = dict(zoo.model("llama-gqa").weights.named())
    if dtype != torch.float64:
        assert all(torch.equal(tensor, exact[name].to(dtype)) for name, tensor in model.weights.named())


def test_folding_is_exact_for_a_reduced_checkpoint(zoo):
    import copy

    half = copy.deepcopy(zoo.hf("llama-gqa")).to(torch.bfloat16)
    exact = copy.deepcopy(half).float()
    assert_same(fastinterp.load(half, device="cpu"), fastinterp.load(exact, device="cpu"))


def test_shards_and_bin_files(zoo, tmp_path):
    hf_model, expected = zoo.hf("llama-gqa"), zoo.model("llama-gqa")
    hf_model.save_pretrained(tmp_path / "shards", max_shard_size="50KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 2
    assert_same(fastinterp.load(tmp_path / "shards", device="cpu"), expected)
    (tmp_path / "bin").mkdir()
    hf_model.config.save_pretrained(tmp_path / "bin")
    torch.save(hf_model.state_dict(), tmp_path / "bin" / "pytorch_model.bin")
    assert_same(fastinterp.load(str(tmp_path / "bin"), device="cpu"), expected)


def test_the_same_weights_in_another_layout_beside_them_are_left_alone(zoo, tmp_path):
    # Mistral's repositories hold consolidated.safetensors, in its own names, beside the Hugging Face files.
    import safetensors.torch

    path = tmp_path / "mistral"
    zoo.hf("mistral-window").save_pretrained(path)
    safetensors.torch.save_file({"tok_embeddings.weight": torch.zeros(2, 2)}, path / "consolidated.safetensors")
    assert_same(fastinterp.load(path, device="cpu"), zoo.model("mistral-window"))


def test_an_unembedding_of_its_own_beats_a_config_that_ties_it(zoo, tmp_path, logits_of, hf_logits):
    import safetensors.torch

    path = tmp_path / "tied"
    zoo.hf("llama-mha-tied").save_pretrained(path)
    checkpoint = safetensors.torch.load_file(path / "model.safetensors")
    generator = torch.Generator().manual_seed(2)
    checkpoint["lm_head.weight"] = 0.6 * torch.randn(400, 48, generator=generator)
    safetensors.torch.save_file(checkpoint, path / "model.safetensors", metadata={"format": "pt"})
    expected = hf_logits(AutoModelForCausalLM.from_pretrained(path), range(9))
    got = logits_of(fastinterp.load(path, processing="none", device="cpu"), torch.arange(9)[None])[0]
    assert float((got - expected).abs().max()) < 1e-4


def test_configs_of_older_checkpoints(zoo, tmp_path, logits_of, hf_logits):
    path = tmp_path / "old"
    zoo.hf("llama-gqa").save_pretrained(path)
    config = json.loads((path / "config.json").read_text())
    del config["rope_parameters"], config["head_dim"]
    config |= {"rope_theta": 77.0, "rope_scaling": {"type": "linear", "factor": 2.0}}
    (path / "config.json").write_text(json.dumps(config))
    expected = hf_logits(AutoModelForCausalLM.from_pretrained(path), range(50, 80))
    got = logits_of(fastinterp.load(path, processing="none", device="cpu"), torch.arange(50, 80)[None])[0]
    assert float((got - expected).abs().max()) < 1e-4


def test_a_model_without_its_head_loads_if_the_head_is_tied(zoo):
    assert_same(fastinterp.load(zoo.hf("gpt2").transformer, device="cpu"), zoo.model("gpt2"))


def test_to_moves_every_parameter(zoo):
    model = zoo.model("gpt2")
    moved = model.to(dtype=torch.float64)
    assert moved.dtype == torch.float64
    assert {tensor.dtype for _, tensor in moved.weights.named()} == {torch.float64}
    assert model.dtype == torch.float32
    assert model.to("cpu").weights.W_E is model.weights.W_E
    assert moved.weights_sha256 != model.weights_sha256


def test_a_model_spread_over_devices_is_refused(tiny_builders):
    hf_model = tiny_builders["gpt2"]()
    hf_model.hf_device_map = {"transformer": 0}
    with pytest.raises(ModelSourceError, match="device_map"):
        fastinterp.load(hf_model)


def test_a_bridge_says_whether_its_weights_are_processed(zoo, monkeypatch):
    from transformer_lens.model_bridge import TransformerBridge

    bridge = TransformerBridge.boot_transformers(str(zoo.directory("gpt2")), dtype=torch.float32)
    bridge.enable_compatibility_mode(disable_warnings=True, no_processing=True)
    model = fastinterp.load(bridge, processing="none", device="cpu")
    assert model.origin.processing == "none"
    assert model.weights.blocks[0].ln1.w is not None
    assert fastinterp.load(bridge, device="cpu").origin.processing == "transformer_lens"
    stored = {id(p.untyped_storage()) for p in bridge.parameters()} | {p.data_ptr() for p in bridge.parameters()}
    assert not [name for name, tensor in model.weights.named() if tensor.data_ptr() in stored]


def test_a_bridge_brings_its_bos_habit(zoo, monkeypatch):
    bridge = zoo.bridge("gpt2")
    monkeypatch.setattr(bridge.cfg, "default_prepend_bos", False)
    model = fastinterp.load(bridge, device="cpu")
    assert model.encode(["the dog"]) == model.encode(["the dog"], prepend_bos=False)
