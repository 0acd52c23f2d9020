"""What cannot be loaded: the class of the error, and that its message names the culprit and the remedy."""

import json
import pathlib

import pytest
import torch

import fastinterp
from fastinterp.errors import (
    CheckpointKeyError,
    FastinterpError,
    ModelSourceError,
    NonFiniteError,
    OptionError,
    UnknownFamilyError,
    UnsupportedConfigError,
)

pytestmark = pytest.mark.usefixtures("without_shape_checks")


@pytest.fixture
def saved(tmp_path, zoo):
    """Saves the tiny Llama and returns its directory; keyword arguments change ``config.json``."""

    def save(**changes):
        path = tmp_path / "model"
        zoo.hf("llama-gqa").save_pretrained(path)
        config = json.loads((path / "config.json").read_text()) | changes
        (path / "config.json").write_text(json.dumps(config))
        return path

    return save


def edit_checkpoint(path, change):
    import safetensors.torch

    checkpoint = safetensors.torch.load_file(path / "model.safetensors")
    change(checkpoint)
    safetensors.torch.save_file(checkpoint, path / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    "source", [3, None, b"gpt2", ["gpt2"], torch.nn.Linear(2, 2), pytest.param(object(), id="object")], ids=repr
)
def test_a_source_that_is_no_model(source):
    expected = f"cannot load a model from {type(source).__name__}: give a hub name, a directory, a .gguf file"
    with pytest.raises(ModelSourceError, match=expected):
        fastinterp.load(source)


@pytest.mark.parametrize("path", ["./nowhere", "/no/where", "~/no/where", "a/b/c", pathlib.Path("nowhere")], ids=str)
def test_a_directory_that_is_not_there(path):
    with pytest.raises(ModelSourceError, match=f"there is no directory or .gguf file '{path}'"):
        fastinterp.load(path)


def test_a_hub_name_that_cannot_be_fetched(monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def refuse(*args, **kwargs):
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(ModelSourceError, match=r"'gpt3' is neither a file nor a directory.*check the spelling"):
        fastinterp.load("gpt3")


def test_a_hub_name_loads_the_directory_that_was_fetched(monkeypatch, zoo):
    import huggingface_hub

    asked = []

    def fetch(name, **options):
        asked.append((name, options["revision"]))
        return str(zoo.directory("gpt2"))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    model = fastinterp.load("someone/tiny", revision="abc", device="cpu")
    assert asked == [("someone/tiny", "abc")]
    assert (model.origin.source, model.origin.revision) == ("someone/tiny", "abc")
    assert model.weights_sha256 == zoo.model("gpt2").weights_sha256


def test_a_directory_without_config(tmp_path):
    with pytest.raises(ModelSourceError, match=r"has no config.json \(it has: nothing\).*save_pretrained"):
        fastinterp.load(tmp_path)
    (tmp_path / "notes.txt").write_text("no model")
    with pytest.raises(ModelSourceError, match=r"has no config.json \(it has: notes.txt\)"):
        fastinterp.load(tmp_path)


def test_a_directory_without_weights(saved):
    path = saved()
    (path / "model.safetensors").unlink()
    with pytest.raises(ModelSourceError, match=r"has no weight files \(model.safetensors or pytorch_model.bin\)"):
        fastinterp.load(path)


def test_a_file_that_is_no_directory(saved):
    with pytest.raises(ModelSourceError, match=r"config.json.*give a directory"):
        fastinterp.load(saved() / "config.json")


@pytest.mark.parametrize("model_type", ["notamodel", "bloom"])
def test_a_directory_of_an_unknown_family(saved, model_type):
    with pytest.raises(UnknownFamilyError, match=f"'{model_type}'.*known are gpt2, llama, mistral"):
        fastinterp.load(saved(model_type=model_type))


@pytest.mark.parametrize("text", ["{not json", "[]", "{}"])
def test_a_config_that_cannot_be_read(saved, text):
    path = saved()
    (path / "config.json").write_text(text)
    with pytest.raises(FastinterpError, match=r"config.json|model_type"):
        fastinterp.load(path)


def test_weights_that_break_off(saved):
    file = saved() / "model.safetensors"
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(FastinterpError, match=r"model\.safetensors"):
        fastinterp.load(file.parent)


def test_rope_scaling_that_lacks_a_value(saved):
    path = saved(rope_parameters={"rope_type": "linear", "rope_theta": 1e4})
    with pytest.raises(UnsupportedConfigError, match="factor"):
        fastinterp.load(path)


def test_a_quantised_checkpoint(saved):
    path = saved(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True})
    with pytest.raises(UnsupportedConfigError, match=r"'bitsandbytes' is not supported: load the unquantised"):
        fastinterp.load(path)


def test_an_untied_model_without_its_unembedding(saved):
    path = saved()
    edit_checkpoint(path, lambda checkpoint: checkpoint.pop("lm_head.weight"))
    with pytest.raises(CheckpointKeyError, match=r"lacks 'lm_head.weight'.*does not tie"):
        fastinterp.load(path)


def test_an_untied_model_in_memory_without_its_head(zoo):
    with pytest.raises(CheckpointKeyError, match=r"lacks 'lm_head.weight'"):
        fastinterp.load(zoo.hf("llama-gqa").model)


@pytest.mark.parametrize("n_layers", [2, 4])
def test_a_config_with_another_number_of_layers(saved, n_layers):
    with pytest.raises(CheckpointKeyError, match=r"layers\.[23]\.input_layernorm.weight"):
        fastinterp.load(saved(num_hidden_layers=n_layers))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 401}, r"'W_E' has shape \(400, 48\), the config asks for \(401, 48\)"),
        ({"head_dim": 4}, r"48 inputs.*6 heads x 4"),
        ({"num_key_value_heads": 3}, r"'blocks.0.W_QKV' has shape"),
        ({"intermediate_size": 111}, r"'blocks.0.W_gate_in' has shape \(48, 224\).*\(48, 222\)"),
    ],
    ids=str,
)
def test_a_config_that_does_not_fit_the_weights(saved, changes, message):
    with pytest.raises(CheckpointKeyError, match=message):
        fastinterp.load(saved(**changes))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("processing", ["none", "transformer_lens"])
def test_weights_that_are_not_finite(saved, value, processing):
    path = saved()

    def change(checkpoint):
        checkpoint["model.layers.1.mlp.up_proj.weight"][5, 5] = value

    edit_checkpoint(path, change)
    with pytest.raises(NonFiniteError, match=r"'blocks.1.W_gate_in' holds NaN or infinity"):
        fastinterp.load(path, processing=processing)


def test_weights_that_overflow_the_dtype_asked_for(tiny_builders):
    hf_model = tiny_builders["llama"]()
    hf_model.model.embed_tokens.weight.data[3, 3] = 1e5
    assert fastinterp.load(hf_model, device="cpu").spec.n_layers == 3
    with pytest.raises(NonFiniteError, match=r"'W_E'.*dtype=torch.float32"):
        fastinterp.load(hf_model, dtype=torch.float16, device="cpu")


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, torch.float8_e4m3fn])
def test_a_dtype_that_is_not_offered(zoo, dtype):
    with pytest.raises(OptionError, match=f"dtype={dtype} is not a compute dtype: choose from torch.float32"):
        fastinterp.load(zoo.hf("gpt2"), dtype=dtype)


def test_a_processing_that_is_not_offered(zoo):
    with pytest.raises(OptionError, match="processing='fold_ln' is not known: choose from 'transformer_lens', 'none'"):
        fastinterp.load(zoo.hf("gpt2"), processing="fold_ln")


@pytest.mark.parametrize(("flag", "key"), [("attention_bias", "self_attn.q_proj"), ("mlp_bias", "mlp.gate_proj")])
def test_biases_that_the_config_promises(saved, flag, key):
    with pytest.raises(CheckpointKeyError, match=f"lacks 'layers.0.{key}.bias'"):
        fastinterp.load(saved(**{flag: True}))


def test_biases_that_the_config_denies(saved):
    path = saved()
    name = "model.layers.1.self_attn.o_proj.bias"
    edit_checkpoint(path, lambda checkpoint: checkpoint.update({name: torch.ones(48)}))
    with pytest.raises(CheckpointKeyError, match=r"does not know: 'layers.1.self_attn.o_proj.bias'"):
        fastinterp.load(path)


def test_one_parameter_under_two_names(saved):
    path = saved()
    edit_checkpoint(path, lambda checkpoint: checkpoint.update({"norm.weight": torch.full((48,), 99.0)}))
    with pytest.raises(CheckpointKeyError, match=r"has both '(model.)?norm.weight' and '(model.)?norm.weight'"):
        fastinterp.load(path)


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64])
def test_a_parameter_that_is_not_a_float(saved, dtype):
    path, name = saved(), "model.layers.0.mlp.down_proj.weight"
    edit_checkpoint(path, lambda checkpoint: checkpoint.update({name: checkpoint[name].to(dtype)}))
    with pytest.raises(CheckpointKeyError, match=f"'layers.0.mlp.down_proj.weight' has dtype {dtype}"):
        fastinterp.load(path)


def test_a_tokenizer_that_cannot_be_read(saved):
    path = saved()
    (path / "tokenizer.json").write_text("{}")
    with pytest.raises(ModelSourceError, match=r"the tokenizer of .* cannot be read.*tokenizer=\.\.\."):
        fastinterp.load(path)


def test_a_device_that_is_not_there(zoo):
    with pytest.raises(OptionError, match=r"device='nonsense' cannot be used here.*try device='cpu' \(--device cpu\)"):
        fastinterp.load(zoo.directory("gpt2"), device="nonsense")


def test_a_model_that_overflows_when_it_is_moved(tiny_builders):
    hf_model = tiny_builders["gpt2"]()
    hf_model.transformer.wte.weight.data[3] = 1e6
    model = fastinterp.load(hf_model, processing="none", device="cpu")
    with pytest.raises(NonFiniteError, match="'W_E'"):
        model.to(dtype=torch.float16)


def test_one_file_beside_the_index_of_another_format(saved):
    path = saved()
    (path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {"a": "pytorch_model-1-of-2.bin"}}))
    assert fastinterp.load(path, device="cpu").spec.n_layers == 3
    (path / "model.safetensors").unlink()
    with pytest.raises(ModelSourceError, match=r"lacks pytorch_model-1-of-2.bin, which its index names"):
        fastinterp.load(path)
