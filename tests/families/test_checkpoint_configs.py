"""Directories whose ``config.json`` and keys are spelt as published checkpoints spell them, at a small size."""

import json
import re
import warnings
from typing import Any

import pytest
import safetensors.torch
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import fastinterp
from fastinterp.errors import CheckpointKeyError, UnsupportedConfigError
from fastinterp.load.hf import assemble
from fastinterp.model.model import Origin
from fastinterp.model.spec import Rope, RopeScaling

TOKENS: dict[str, Any] = dict(vocab_size=400, bos_token_id=0, eos_token_id=0)
SUMMARY = dict(
    summary_activation=None, summary_first_dropout=0.1, summary_proj_to_labels=True, summary_type="cls_index"
)
LLAMA_LIKE: dict[str, Any] = TOKENS | dict(
    attention_dropout=0.0,
    hidden_act="silu",
    hidden_size=48,
    initializer_range=0.02,
    intermediate_size=112,
    max_position_embeddings=64,
    num_attention_heads=6,
    num_hidden_layers=3,
    num_key_value_heads=2,
    rms_norm_eps=1e-6,
    torch_dtype="float32",
    transformers_version="4.40.0",
    use_cache=True,
)
GEMMA_LIKE: dict[str, Any] = LLAMA_LIKE | dict(
    attention_bias=False, head_dim=16, hidden_size=64, num_attention_heads=4, pad_token_id=0
)

# Keys and their spelling as in the config.json of a published model of that name.
PUBLISHED: dict[str, dict[str, Any]] = {
    "pythia": TOKENS
    | dict(
        architectures=["GPTNeoXForCausalLM"],
        model_type="gpt_neox",
        hidden_act="gelu",
        hidden_size=64,
        initializer_range=0.02,
        intermediate_size=256,
        layer_norm_eps=1e-05,
        max_position_embeddings=64,
        num_attention_heads=4,
        num_hidden_layers=3,
        rotary_emb_base=500,
        rotary_pct=0.5,
        tie_word_embeddings=False,
        torch_dtype="float32",
        transformers_version="4.24.0",
        use_cache=True,
        use_parallel_residual=True,
    ),
    "gpt-neo": TOKENS
    | SUMMARY
    | dict(
        architectures=["GPTNeoForCausalLM"],
        model_type="gpt_neo",
        activation_function="gelu_new",
        attention_dropout=0,
        attention_layers=["global", "local", "global"],
        attention_types=[[["global", "local"], 1], [["global"], 1]],
        embed_dropout=0,
        gradient_checkpointing=False,
        hidden_size=64,
        initializer_range=0.02,
        intermediate_size=None,
        layer_norm_epsilon=1e-05,
        max_position_embeddings=64,
        num_heads=4,
        num_layers=3,
        resid_dropout=0.1,
        classifier_dropout=0.2,
        use_cache=True,
        window_size=5,
    ),
    "gpt-j": TOKENS
    | SUMMARY
    | dict(
        architectures=["GPTJForCausalLM"],
        model_type="gptj",
        activation_function="gelu_new",
        attn_pdrop=0.1,
        embd_pdrop=0.0,
        gradient_checkpointing=False,
        initializer_range=0.02,
        layer_norm_epsilon=1e-05,
        n_embd=64,
        n_head=4,
        n_inner=None,
        n_layer=3,
        n_positions=64,
        resid_pdrop=0.0,
        rotary=True,
        rotary_dim=8,
        scale_attn_weights=True,
        task_specific_params={"text-generation": {"do_sample": True, "max_length": 50, "temperature": 1.0}},
        tie_word_embeddings=False,
        tokenizer_class="GPT2Tokenizer",
        transformers_version="4.18.0.dev0",
        use_cache=True,
    ),
    "opt": TOKENS
    | dict(
        _name_or_path="opt",
        _remove_final_layer_norm=False,
        activation_dropout=0.1,
        activation_function="relu",
        architectures=["OPTForCausalLM"],
        attention_dropout=0.1,
        do_layer_norm_before=True,
        dropout=0.2,
        ffn_dim=150,
        hidden_size=64,
        init_std=0.01,
        layerdrop=0.1,
        max_position_embeddings=64,
        model_type="opt",
        num_attention_heads=4,
        num_hidden_layers=3,
        pad_token_id=1,
        prefix="</s>",
        word_embed_proj_dim=64,
    ),
    "qwen2.5-yarn": LLAMA_LIKE
    | dict(
        architectures=["Qwen2ForCausalLM"],
        model_type="qwen2",
        max_window_layers=2,
        rope_scaling={"factor": 4.0, "original_max_position_embeddings": 16, "type": "yarn"},
        rope_theta=1000.0,
        sliding_window=5,
        tie_word_embeddings=True,
        use_mrope=False,
        use_sliding_window=False,
    ),
    "qwen3": LLAMA_LIKE
    | dict(
        architectures=["Qwen3ForCausalLM"],
        attention_bias=False,
        head_dim=16,
        max_window_layers=2,
        model_type="qwen3",
        rope_scaling=None,
        rope_theta=5000,
        sliding_window=None,
        use_sliding_window=False,
    ),
    "llama-3.2": LLAMA_LIKE
    | dict(
        architectures=["LlamaForCausalLM"],
        attention_bias=False,
        head_dim=16,
        mlp_bias=False,
        model_type="llama",
        pretraining_tp=1,
        rope_scaling={
            "factor": 32.0,
            "high_freq_factor": 4.0,
            "low_freq_factor": 1.0,
            "original_max_position_embeddings": 32,
            "rope_type": "llama3",
        },
        rope_theta=500.0,
        tie_word_embeddings=True,
    ),
    "gemma": GEMMA_LIKE
    | dict(
        architectures=["GemmaForCausalLM"],
        hidden_act="gelu",
        hidden_activation=None,
        model_type="gemma",
        rope_scaling=None,
        rope_theta=1000.0,
    ),
    "gemma-2": GEMMA_LIKE
    | dict(
        architectures=["Gemma2ForCausalLM"],
        attn_logit_softcapping=5.0,
        cache_implementation="hybrid",
        final_logit_softcapping=4.0,
        hidden_act="gelu_pytorch_tanh",
        hidden_activation="gelu_pytorch_tanh",
        model_type="gemma2",
        query_pre_attn_scalar=20,
        rope_theta=1000.0,
        sliding_window=5,
    ),
    "gemma-3": {key: value for key, value in GEMMA_LIKE.items() if key != "hidden_act"}
    | dict(
        architectures=["Gemma3ForCausalLM"],
        attn_logit_softcapping=None,
        cache_implementation="hybrid",
        final_logit_softcapping=None,
        hidden_activation="gelu_pytorch_tanh",
        model_type="gemma3_text",
        query_pre_attn_scalar=20,
        rope_local_base_freq=50.0,
        rope_scaling={"factor": 8.0, "rope_type": "linear"},
        rope_theta=1000.0,
        sliding_window=5,
        sliding_window_pattern=3,
    ),
    "phi-2": TOKENS
    | dict(
        architectures=["PhiForCausalLM"],
        attention_dropout=0.0,
        embd_pdrop=0.0,
        hidden_act="gelu_new",
        hidden_size=64,
        initializer_range=0.02,
        intermediate_size=150,
        layer_norm_eps=1e-05,
        max_position_embeddings=64,
        model_type="phi",
        num_attention_heads=4,
        num_hidden_layers=3,
        num_key_value_heads=None,
        partial_rotary_factor=0.25,
        qk_layernorm=False,
        resid_pdrop=0.1,
        rope_scaling=None,
        rope_theta=1000.0,
        tie_word_embeddings=False,
    ),
    "phi-3": LLAMA_LIKE
    | dict(
        architectures=["Phi3ForCausalLM"],
        attention_bias=False,
        auto_map={"AutoConfig": "configuration_phi3.Phi3Config"},
        embd_pdrop=0.0,
        model_type="phi3",
        original_max_position_embeddings=64,
        pad_token_id=0,
        resid_pdrop=0.0,
        rope_scaling=None,
        rope_theta=1000.0,
        sliding_window=5,
        tie_word_embeddings=False,
    ),
    "stablelm": {key: value for key, value in LLAMA_LIKE.items() if key != "rms_norm_eps"}
    | dict(
        architectures=["StableLmForCausalLM"],
        hidden_dropout=0.0,
        layer_norm_eps=1e-05,
        model_type="stablelm",
        partial_rotary_factor=0.5,
        qk_layernorm=False,
        rope_theta=1000,
        tie_word_embeddings=False,
        use_parallel_residual=False,
        use_qkv_bias=True,
    ),
    "starcoder2": {key: value for key, value in LLAMA_LIKE.items() if key != "rms_norm_eps"}
    | dict(
        architectures=["Starcoder2ForCausalLM"],
        attention_softmax_in_fp32=True,
        embedding_dropout=0.1,
        hidden_act="gelu_pytorch_tanh",
        layer_norm_epsilon=1e-05,
        mlp_type="default",
        model_type="starcoder2",
        norm_epsilon=1e-05,
        norm_type="layer_norm",
        residual_dropout=0.1,
        rope_theta=999.4,
        scale_attention_softmax_in_fp32=True,
        scale_attn_weights=True,
        sliding_window=5,
        use_bias=True,
    ),
}

ROPES: dict[str, tuple[Rope, ...]] = {
    "pythia": (Rope(dims=8, base=500.0),) * 3,
    "gpt-neo": (),
    "opt": (),
    "gpt-j": (Rope(dims=8, layout="interleaved"),) * 3,
    "qwen3": (Rope(dims=16, base=5000.0),) * 3,
    "gemma": (Rope(dims=16, base=1000.0),) * 3,
    "gemma-2": (Rope(dims=16, base=1000.0),) * 3,
    "gemma-3": (Rope(dims=16, base=50.0),) * 2
    + (Rope(dims=16, base=1000.0, scaling=RopeScaling(kind="linear", factor=8.0)),),
    "llama-3.2": (Rope(dims=16, base=500.0, scaling=RopeScaling(kind="llama3", factor=32.0, original_n_ctx=32)),) * 3,
    "phi-2": (Rope(dims=4, base=1000.0),) * 3,
    "phi-3": (Rope(dims=8, base=1000.0),) * 3,
    "stablelm": (Rope(dims=4, base=1000.0),) * 3,
}

WINDOWS = {
    "gpt-neo": (None, 5, None),
    "gemma-2": (5, None, 5),
    "gemma-3": (5, 5, None),
    "phi-3": (5, 5, 5),
    "starcoder2": (5, 5, 5),
}


@pytest.fixture(scope="module")
def published(tmp_path_factory, realistic):
    """Writes a published config's directory and returns it with the model that Hugging Face makes of it."""
    made: dict[str, Any] = {}

    def make(name: str) -> Any:
        if name not in made:
            path = tmp_path_factory.mktemp(name)
            (path / "config.json").write_text(json.dumps(PUBLISHED[name]))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                config = AutoConfig.from_pretrained(path)
                realistic(AutoModelForCausalLM.from_config(config)).save_pretrained(path)
                # The library wrote its newer spelling beside the weights.
                (path / "config.json").write_text(json.dumps(PUBLISHED[name]))
                hf_model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="eager").eval()
            made[name] = path, hf_model
        return made[name]

    return make


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_give_the_logits_of_hugging_face(
    published, name, token_prompts, padded, logits_of, hf_logits
):
    path, hf_model = published(name)
    model = fastinterp.load(path, processing="none", device="cpu")
    assert model.spec.attention.window == WINDOWS.get(name, (None,) * 3)
    if name in ROPES:
        assert model.spec.position.rope == ROPES[name]
    batch = logits_of(model, padded(token_prompts))
    for row, prompt in zip(batch, token_prompts, strict=True):
        assert float((row[: len(prompt)] - hf_logits(hf_model, prompt)).abs().max()) < 1e-4


def test_yarn_of_a_published_config(published):
    path, _ = published("qwen2.5-yarn")
    (rope,) = set(fastinterp.load(path, device="cpu").spec.position.rope)
    assert (rope.dims, rope.base) == (8, 1000.0)
    assert (rope.scaling.kind, rope.scaling.factor, rope.scaling.original_n_ctx) == ("yarn", 4.0, 16)
    assert rope.scaling.attention_factor == pytest.approx(1.1386294)


@pytest.mark.parametrize("name", ["pythia", "gpt-j", "gemma-3", "phi-2"])
def test_unknown_keys_of_a_published_config_are_refused(published, name):
    path, _ = published(name)
    config = json.loads((path / "config.json").read_text())
    try:
        (path / "config.json").write_text(json.dumps(config | {"residual_multiplier": 0.5}))
        with pytest.raises(UnsupportedConfigError, match=r"residual_multiplier=0\.5"):
            fastinterp.load(path, device="cpu")
    finally:
        (path / "config.json").write_text(json.dumps(config))


def test_longrope_is_refused_by_name(published):
    path, _ = published("phi-3")
    config = json.loads((path / "config.json").read_text())
    scaling = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    try:
        (path / "config.json").write_text(json.dumps(config | {"rope_scaling": scaling}))
        with pytest.raises(UnsupportedConfigError, match="'longrope' is not supported"):
            fastinterp.load(path, device="cpu")
    finally:
        (path / "config.json").write_text(json.dumps(config))


# Keys of older checkpoints ----------------------------------------------------------------------------------------


def rewritten(path, target, change):
    """Copies a directory with another checkpoint."""
    checkpoint = change(safetensors.torch.load_file(path / "model.safetensors"))
    (target / "config.json").write_text((path / "config.json").read_text())
    safetensors.torch.save_file(checkpoint, target / "model.safetensors", metadata={"format": "pt"})
    return target


def test_pythia_checkpoints_hold_masks_and_call_the_unembedding_embed_out(published, tmp_path):
    path, hf_model = published("pythia")

    def older(checkpoint):
        checkpoint["embed_out.weight"] = checkpoint.pop("lm_head.weight", checkpoint.get("embed_out.weight"))
        for layer in range(3):
            prefix = f"gpt_neox.layers.{layer}.attention."
            checkpoint[prefix + "bias"] = torch.ones(1, 1, 64, 64, dtype=torch.bool)
            checkpoint[prefix + "masked_bias"] = torch.tensor(-1e9)
            checkpoint[prefix + "rotary_emb.inv_freq"] = torch.ones(4)
        return checkpoint

    model = fastinterp.load(rewritten(path, tmp_path, older), processing="none", device="cpu")
    assert torch.equal(model.weights.W_U, hf_model.lm_head.weight.t())


@pytest.mark.parametrize("name", ["gpt-neo", "gpt-j"])
def test_older_checkpoints_hold_masks(published, tmp_path, name):
    path, hf_model = published(name)

    def older(checkpoint):
        attention = "attn.attention." if name == "gpt-neo" else "attn."
        for layer in range(3):
            checkpoint[f"transformer.h.{layer}.{attention}bias"] = torch.ones(1, 1, 64, 64, dtype=torch.bool)
            checkpoint[f"transformer.h.{layer}.{attention}masked_bias"] = torch.tensor(-1e9)
        return checkpoint

    model = fastinterp.load(rewritten(path, tmp_path, older), processing="none", device="cpu")
    assert torch.equal(model.weights.W_E, hf_model.transformer.wte.weight)


@pytest.mark.parametrize("name", ["pythia", "gpt-j", "phi-2", "phi-3"])
def test_an_untied_checkpoint_without_unembedding_is_refused(published, tmp_path, name):
    path, _ = published(name)

    def headless(checkpoint):
        return {
            key: value for key, value in checkpoint.items() if "lm_head.weight" not in key and "embed_out" not in key
        }

    with pytest.raises(CheckpointKeyError, match=r"lacks 'lm_head.weight'.*does not tie"):
        fastinterp.load(rewritten(path, tmp_path, headless), device="cpu")


@pytest.mark.parametrize("name", ["gpt-j", "phi-2"])
def test_a_missing_bias_of_the_unembedding_is_named(published, tmp_path, name):
    path, _ = published(name)

    def cut(checkpoint):
        return {key: value for key, value in checkpoint.items() if key != "lm_head.bias"}

    with pytest.raises(CheckpointKeyError, match=r"lacks 'lm_head.bias'"):
        fastinterp.load(rewritten(path, tmp_path, cut), device="cpu")


@pytest.mark.parametrize("name", PUBLISHED)
def test_every_key_of_a_layer_must_be_there(published, name):
    _, hf_model = published(name)
    options: dict[str, Any] = dict(tokenizer=None, device=torch.device("cpu"), dtype=torch.float32)
    options["origin"] = Origin(source=name, processing="none")
    checkpoint = hf_model.state_dict()
    keys = [key for key in checkpoint if ".1." in key]
    assert len(keys) >= 6
    for key in keys:
        rest = {other: value for other, value in checkpoint.items() if other != key}
        with pytest.raises(CheckpointKeyError, match=re.escape(key.split(".", 1)[1])):
            assemble(hf_model.config, rest, **options)
    unknown = keys[0].replace(".weight", ".scale")
    with pytest.raises(CheckpointKeyError, match=r"1 keys that the .* family does not know"):
        assemble(hf_model.config, checkpoint | {unknown: torch.ones(3)}, **options)


def test_gpt_neox_values_of_a_wrong_size_are_named(published, tmp_path):
    path, _ = published("pythia")
    name = "gpt_neox.layers.1.attention.query_key_value.weight"

    def cut(checkpoint):
        return checkpoint | {name: checkpoint[name][:-1].contiguous()}

    with pytest.raises(CheckpointKeyError, match="191 rows, the config asks for 3 x 4 heads x 16"):
        fastinterp.load(rewritten(path, tmp_path, cut), device="cpu")
