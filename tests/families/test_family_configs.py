"""Families: what a config becomes, and that nothing in it is passed over in silence."""

import math

import pytest
import torch

import fastinterp
from fastinterp.errors import CheckpointKeyError, UnknownFamilyError, UnsupportedConfigError
from fastinterp.families import FAMILIES, Config, build_weights, family_of, read_spec
from fastinterp.model.spec import Mlp, ModelSpec, Norm, Position, Rope, RopeScaling


def spec_of(hf_config) -> ModelSpec:
    return family_of(hf_config.model_type).to_spec(Config(hf_config.to_dict()))


# What a config becomes --------------------------------------------------------------------------------------------


def test_gpt2_config():
    from transformers import GPT2Config

    spec = spec_of(GPT2Config())
    assert (spec.n_layers, spec.d_model, spec.d_vocab, spec.n_ctx) == (12, 768, 50257, 1024)
    assert spec.norm == Norm(kind="layer", eps=1e-5)
    assert spec.position == Position(kind="learned")
    assert (spec.n_heads, spec.attention.n_kv_heads, spec.d_head, spec.attention.scale) == (12, 12, 64, 0.125)
    assert spec.attention.window == (None,) * 12
    assert spec.mlp == Mlp(kind="plain", d_mlp=3072, activation="gelu_tanh")


def test_llama_config():
    from transformers import LlamaConfig

    rope = dict(
        rope_type="llama3",
        factor=32.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
        rope_theta=500000.0,
    )
    config = LlamaConfig(num_hidden_layers=2, num_key_value_heads=8, head_dim=64, rope_parameters=rope)
    spec = spec_of(config)
    assert (spec.n_layers, spec.d_model, spec.d_vocab, spec.n_ctx) == (2, 4096, 32000, 2048)
    assert spec.norm == Norm(kind="rms", eps=1e-6)
    assert (spec.n_heads, spec.attention.n_kv_heads, spec.attention.group, spec.d_head) == (32, 8, 4, 64)
    assert spec.mlp == Mlp(kind="gated", d_mlp=11008, activation="silu")
    scaling = RopeScaling(kind="llama3", factor=32.0, original_n_ctx=8192)
    assert spec.position == Position(kind="rotary", rope=(Rope(dims=64, base=500000.0, scaling=scaling),) * 2)


def test_mistral_config():
    from transformers import MistralConfig

    spec = spec_of(MistralConfig(num_hidden_layers=3))
    assert spec.attention.window == (4096,) * 3
    assert (spec.attention.group, spec.d_head) == (4, 128)


FULL, SLIDING = "full_attention", "sliding_attention"

# Per model_type: layers, d_model, heads, KV heads, d_head, d_mlp, d_vocab, n_ctx as its config class has them.
SIZES = {
    "gpt_neo": (24, 2048, 16, 16, 128, 8192, 50257, 2048),
    "gpt_neox": (44, 6144, 64, 64, 96, 24576, 50432, 2048),
    "gptj": (28, 4096, 16, 16, 256, 16384, 50400, 2048),
    "opt": (12, 768, 12, 12, 64, 3072, 50272, 2048),
    "qwen2": (32, 4096, 32, 32, 128, 22016, 151936, 32768),
    "qwen3": (32, 4096, 32, 32, 128, 22016, 151936, 32768),
    "gemma": (28, 3072, 16, 16, 256, 24576, 256000, 8192),
    "gemma2": (26, 2304, 8, 4, 256, 9216, 256000, 8192),
    "gemma3_text": (26, 2304, 8, 4, 256, 9216, 262208, 131072),
    "phi": (24, 2048, 32, 32, 64, 8192, 51200, 2048),
    "phi3": (32, 3072, 32, 32, 96, 8192, 32064, 4096),
    "stablelm": (32, 2560, 32, 32, 80, 6912, 50304, 4096),
    "starcoder2": (30, 3072, 24, 2, 128, 12288, 49152, 4096),
}

# What differs from: layer norm 1e-5, 1/sqrt(d_head), no window, no softcap, sequential, no norms after sublayers.
CHOICES = {
    "gpt_neo": dict(mlp=("plain", "gelu_tanh"), rope=None, scale=1.0, window=(None, 256) * 12),
    "gpt_neox": dict(mlp=("plain", "gelu"), rope=Rope(dims=24), parallel=True, bos=False),
    "gptj": dict(mlp=("plain", "gelu_tanh"), rope=Rope(dims=64, layout="interleaved"), parallel=True),
    "opt": dict(mlp=("plain", "relu"), rope=None),
    "qwen2": dict(mlp=("gated", "silu"), rope=Rope(dims=128), norm=Norm(kind="rms", eps=1e-6), bos=False),
    "qwen3": dict(mlp=("gated", "silu"), rope=Rope(dims=128), norm=Norm(kind="rms", eps=1e-6), qk_norm=True)
    | dict(bos=False),
    "gemma": dict(mlp=("gated", "gelu_tanh"), rope=Rope(dims=256), norm=Norm(kind="rms", eps=1e-6)),
    "gemma2": dict(
        mlp=("gated", "gelu_tanh"),
        rope=Rope(dims=256),
        norm=Norm(kind="rms", eps=1e-6),
        window=(4096, None) * 13,
        softcaps=(50.0, 30.0),
        post_norms=True,
    ),
    "gemma3_text": dict(
        mlp=("gated", "gelu_tanh"),
        norm=Norm(kind="rms", eps=1e-6),
        window=((4096,) * 5 + (None,)) * 4 + (4096,) * 2,
        qk_norm=True,
        post_norms=True,
    ),
    "phi": dict(mlp=("plain", "gelu_tanh"), rope=Rope(dims=32), parallel=True, bos=False),
    "phi3": dict(mlp=("gated", "silu"), rope=Rope(dims=96), norm=Norm(kind="rms", eps=1e-5)),
    "stablelm": dict(mlp=("gated", "silu"), rope=Rope(dims=20)),
    "starcoder2": dict(mlp=("plain", "gelu_tanh"), rope=Rope(dims=128), bos=False),
}


@pytest.mark.parametrize("model_type", SIZES)
def test_the_default_config_of_every_family(model_type):
    from transformers import AutoConfig

    hf_config = AutoConfig.for_model(model_type)
    family, spec = read_spec(hf_config.to_dict(), type(hf_config)().to_dict())
    assert model_type in family.model_types
    attention, choices = spec.attention, CHOICES[model_type]
    n_heads = (attention.n_heads, attention.n_kv_heads)
    sizes = (spec.n_layers, spec.d_model, *n_heads, spec.d_head, spec.mlp.d_mlp, spec.d_vocab, spec.n_ctx)
    assert sizes == SIZES[model_type]
    assert (spec.mlp.kind, spec.mlp.activation) == choices["mlp"]
    assert spec.norm == choices.get("norm", Norm(kind="layer", eps=1e-5))
    assert attention.scale == pytest.approx(choices.get("scale", spec.d_head**-0.5), rel=1e-12)
    assert attention.window == choices.get("window", (None,) * spec.n_layers)
    assert attention.qk_norm == choices.get("qk_norm", False)
    assert (attention.softcap, spec.final_softcap) == choices.get("softcaps", (None, None))
    assert spec.parallel == choices.get("parallel", False)
    assert spec.post_norms == choices.get("post_norms", False)
    assert spec.default_prepend_bos == choices.get("bos", True)
    if model_type == "gemma3_text":
        ropes = {SLIDING: Rope(dims=256, base=10000.0), FULL: Rope(dims=256, base=1000000.0)}
        expected = tuple(ropes[FULL if window is None else SLIDING] for window in attention.window)
    else:
        rope = choices["rope"]
        expected = () if rope is None else (rope,) * spec.n_layers
    assert spec.position == Position(kind="rotary" if expected else "learned", rope=expected)


def test_windows_of_qwen_begin_at_a_layer():
    from transformers import Qwen2Config, Qwen3Config

    for make in (Qwen2Config, Qwen3Config):
        changes = dict(num_hidden_layers=4, sliding_window=7, max_window_layers=1)
        assert spec_of(make(use_sliding_window=True, **changes)).attention.window == (None, 7, 7, 7)
        assert spec_of(make(use_sliding_window=False, **changes)).attention.window == (None,) * 4


def test_yarn_multiplies_queries_and_keys_as_the_config_says():
    from transformers import Qwen2Config

    def factor_of(**changes):
        rope = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=8192, rope_theta=1e6) | changes
        spec = spec_of(Qwen2Config(num_hidden_layers=1, rope_parameters=rope))
        (read,) = spec.position.rope
        assert (read.base, read.scaling.factor, read.scaling.original_n_ctx) == (1e6, 4.0, 8192)
        return read.scaling.attention_factor

    assert factor_of() == pytest.approx(0.1 * math.log(4) + 1)
    assert factor_of(attention_factor=1.25) == 1.25
    both = factor_of(mscale=2.0, mscale_all_dim=0.5)
    assert both == pytest.approx((0.2 * math.log(4) + 1) / (0.05 * math.log(4) + 1))


def test_older_configs_keep_rotary_values_elsewhere():
    values = dict(
        num_hidden_layers=1,
        hidden_size=8,
        num_attention_heads=2,
        vocab_size=10,
        max_position_embeddings=16,
        rms_norm_eps=1e-5,
        intermediate_size=12,
        rope_theta=77.0,
        rope_scaling={"type": "linear", "factor": 2.0},
    )
    spec = family_of("llama").to_spec(Config(values))
    scaling = RopeScaling(kind="linear", factor=2.0)
    assert spec.position == Position(kind="rotary", rope=(Rope(dims=4, base=77.0, scaling=scaling),))
    assert (spec.attention.n_kv_heads, spec.d_head, spec.mlp.activation) == (2, 4, "silu")


def test_specs_are_plain_json():
    import json

    from transformers import MistralConfig

    spec = spec_of(MistralConfig(num_hidden_layers=2))
    values = json.loads(json.dumps(spec.to_dict()))
    assert values["attention"]["window"] == [4096, 4096]
    assert [rope["scaling"] for rope in values["position"]["rope"]] == [None, None]


def test_no_two_families_read_the_same_model_type():
    types = [model_type for family in FAMILIES for model_type in family.model_types]
    assert len(set(types)) == len(types)
    assert {"gpt2", "llama", "mistral"} <= set(types)


# What is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("given", "message"), [("gpt3", "did you mean .*'gpt2'"), ("bert", "llama, mistral")])
def test_unknown_model_types(given, message):
    with pytest.raises(UnknownFamilyError, match=f"'{given}' is not supported.*{message}"):
        family_of(given)


def test_a_model_of_another_family():
    from transformers import BloomConfig, BloomForCausalLM

    config = BloomConfig(hidden_size=16, n_layer=1, n_head=2, vocab_size=20)
    with pytest.raises(UnknownFamilyError, match="'bloom' is not supported"):
        fastinterp.load(BloomForCausalLM(config))


DYNAMIC = {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}}
PARTIAL = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}
ODD = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.3}}
UNKNOWN = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "high": 2}}
NESTED = {"rope_parameters": {"full_attention": {"rope_theta": 1e4}, "sliding_attention": {"rope_theta": 1e4}}}
LONG = {"rope_parameters": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [2.0], "rope_theta": 1e4}}


@pytest.mark.parametrize(
    ("family", "changes", "culprit"),
    [
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True.*only False"),
        ("gpt2", {"add_cross_attention": True}, "add_cross_attention=True"),
        ("gpt2", {"activation_function": "mish"}, "activation_function='mish'.*'gelu_new'.*'relu'"),
        ("gpt2", {"logit_scale": 2.0}, "logit_scale=2.0"),
        ("llama", {"hidden_act": "mish"}, "hidden_act='mish'.*'silu'"),
        ("llama", DYNAMIC, "rope_type='dynamic'.*'default' or 'linear' or 'llama3'"),
        ("llama", PARTIAL, "partial_rotary_factor.*0.5"),
        ("llama", {"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0"),
        ("llama", {"residual_multiplier": 0.2}, "residual_multiplier=0.2"),
        ("llama", {"is_causal": False}, "is_causal=False"),
        ("mistral", {"hidden_act": "tanh"}, "hidden_act='tanh'"),
        ("gpt_neo", {"activation_function": "mish"}, "activation_function='mish'"),
        ("gpt_neox", {"hidden_act": "mish"}, "hidden_act='mish'"),
        ("gpt_neox", DYNAMIC, "rope_type='dynamic'"),
        ("gpt_neox", ODD, "partial_rotary_factor=0.3.*7 of 24"),
        ("gptj", {"rotary": False}, "rotary=False"),
        ("gptj", {"scale_attn_weights": False}, "scale_attn_weights=False"),
        ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before=False.*only True"),
        ("opt", {"word_embed_proj_dim": 32}, "word_embed_proj_dim=32.*only 64"),
        ("opt", {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine=False"),
        ("opt", {"_remove_final_layer_norm": True}, "_remove_final_layer_norm=True"),
        ("qwen2", PARTIAL, "partial_rotary_factor=0.5"),
        ("qwen2", {"use_mrope": True}, "use_mrope=True"),
        ("qwen2", UNKNOWN, "rope_parameters.*'high'.*=2 is not supported"),
        ("qwen3", {"num_experts": 8}, "num_experts=8"),
        ("gemma", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ("gemma", {"hidden_act": "silu"}, "hidden_act='silu'"),
        ("gemma", {"final_logit_softcapping": 30.0}, "final_logit_softcapping=30.0"),
        ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ("gemma2", {"hidden_activation": "silu"}, "hidden_activation='silu'"),
        ("gemma2", NESTED, "rope_parameters.*'full_attention'"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention=True"),
        ("gemma3_text", {"rope_parameters": {"rope_theta": 1e4}}, "rope_parameters.*'rope_theta'"),
        ("gemma3_text", {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, "lacks 'sliding_attention'"),
        ("gemma3_text", {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping=50.0"),
        ("phi", {"qk_layernorm": True}, "qk_layernorm=True.*only False"),
        ("phi3", LONG, "rope_type='longrope'"),
        ("phi3", {"hidden_act": "mish"}, "hidden_act='mish'"),
        ("qwen2", {"layer_types": ["full_attention", "chunked_attention", "full_attention"]}, "'chunked_attention'"),
        ("gemma3_text", {"sliding_window": None}, "lacks 'sliding_window'"),
        ("gemma3_text", {"layer_types": ["full_attention"]}, "layer_types=.*for 3 layers"),
        ("gpt_neo", {"attention_layers": ["global", "sparse", "local"]}, "'sparse'"),
        ("stablelm", {"qk_layernorm": True}, "qk_layernorm=True"),
        ("stablelm", {"use_parallel_residual": True}, "use_parallel_residual=True"),
        ("starcoder2", {"norm_type": "rms"}, "norm_type='rms'"),
        ("starcoder2", PARTIAL, "partial_rotary_factor=0.5"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_config_values_that_are_not_implemented(tiny_builders, family, changes, culprit):
    hf_model = tiny_builders[family]()
    for key, value in changes.items():
        setattr(hf_model.config, key, value)
    with pytest.raises(UnsupportedConfigError, match=culprit):
        fastinterp.load(hf_model)


@pytest.mark.parametrize("key", ["some_flag", "logit_scale"])
def test_keys_without_a_value_are_harmless(tiny_builders, key):
    hf_model = tiny_builders["llama"]()
    setattr(hf_model.config, key, None)
    assert fastinterp.load(hf_model).spec.n_layers == 3


def test_a_window_in_a_llama_config_is_not_taken_for_mistrals(tiny_builders, logits_of, hf_logits):
    # Hugging Face's Llama attends everywhere whatever sliding_window says: refuse the key, or do as it does.
    hf_model, prompt = tiny_builders["llama"](sliding_window=3), list(range(30, 42))
    try:
        model = fastinterp.load(hf_model, processing="none", device="cpu")
    except UnsupportedConfigError:
        return
    difference = logits_of(model, torch.tensor([prompt]))[0] - hf_logits(hf_model, prompt)
    assert float(difference.abs().max()) < 1e-4


@pytest.mark.parametrize(
    ("rope_type", "missing"), [("linear", "factor"), ("llama3", "low_freq_factor"), ("llama3", "factor")]
)
def test_rope_scaling_that_lacks_a_value(tiny_builders, rope_type, missing):
    hf_model = tiny_builders["llama"]()
    rope = dict(rope_type=rope_type, rope_theta=1e4, factor=2.0)
    if rope_type == "llama3":
        rope |= dict(low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=32)
    del rope[missing]
    hf_model.config.rope_parameters = rope
    with pytest.raises(UnsupportedConfigError, match=missing):
        fastinterp.load(hf_model)


@pytest.mark.parametrize("key", ["n_layer", "n_embd", "vocab_size", "n_positions", "layer_norm_epsilon"])
def test_config_values_that_are_missing(key):
    from transformers import GPT2Config

    values = GPT2Config().to_dict()
    del values[key]
    with pytest.raises(UnsupportedConfigError, match=f"lacks '{key}'"):
        family_of("gpt2").to_spec(Config(values))


# Checkpoint keys --------------------------------------------------------------------------------------------------


def built(hf_model, checkpoint):
    family = family_of(hf_model.config.model_type)
    spec = family.to_spec(Config(hf_model.config.to_dict()))
    return build_weights(family, spec, checkpoint, hf_model.config.to_dict(), dtype=torch.float32, device="cpu")


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("gpt2", "transformer.h.1.attn.c_attn.bias"),
        ("gpt2", "transformer.wpe.weight"),
        ("gpt2", "transformer.ln_f.bias"),
        ("llama-gqa", "model.layers.2.self_attn.k_proj.weight"),
        ("llama-gqa", "model.norm.weight"),
        ("llama-gqa", "model.embed_tokens.weight"),
    ],
)
def test_a_missing_key_is_named(zoo, name, key):
    checkpoint = zoo.hf(name).state_dict()
    del checkpoint[key]
    with pytest.raises(CheckpointKeyError, match=f"lacks '{key.split('.', 1)[1]}'"):
        built(zoo.hf(name), checkpoint)


def test_a_misspelt_key_is_suggested(zoo):
    checkpoint = zoo.hf("gpt2").state_dict()
    checkpoint["transformer.wpe.weigth"] = checkpoint.pop("transformer.wpe.weight")
    with pytest.raises(CheckpointKeyError, match=r"lacks 'wpe.weight'; did you mean .*'wpe.weigth'"):
        built(zoo.hf("gpt2"), checkpoint)


def test_biases_that_only_some_of_a_layer_have(zoo):
    hf_model = zoo.hf("llama-biases-mqa-head-dim")
    checkpoint = hf_model.state_dict()
    del checkpoint["model.layers.1.self_attn.k_proj.bias"]
    with pytest.raises(CheckpointKeyError, match=r"lacks 'layers.1.self_attn.k_proj.bias'"):
        built(hf_model, checkpoint)


@pytest.mark.parametrize(
    "key", ["model.layers.0.self_attn.q_norm.weight", "model.layers.3.input_layernorm.weight", "x"]
)
def test_an_unknown_key_is_named(zoo, key):
    checkpoint = zoo.hf("llama-gqa").state_dict() | {key: torch.zeros(8)}
    with pytest.raises(CheckpointKeyError, match=f"1 keys.*llama family does not know: '{key.removeprefix('model.')}'"):
        built(zoo.hf("llama-gqa"), checkpoint)


def test_buffers_of_older_checkpoints_are_let_pass(zoo):
    old = {"transformer.h.0.attn.bias": torch.ones(1, 1, 64, 64), "transformer.h.0.attn.masked_bias": torch.ones(1)}
    assert built(zoo.hf("gpt2"), zoo.hf("gpt2").state_dict() | old).W_E.shape == (400, 48)
    old = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    assert built(zoo.hf("llama-gqa"), zoo.hf("llama-gqa").state_dict() | old).W_E.shape == (400, 48)


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize(
    ("name", "key", "size"),
    [
        ("gpt2", "transformer.wte.weight", (401, 48)),
        ("gpt2", "transformer.h.0.mlp.c_fc.weight", (48, 191)),
        ("gpt2", "transformer.h.2.ln_2.bias", (47,)),
        ("llama-gqa", "model.layers.0.self_attn.v_proj.weight", (24, 48)),
        ("llama-gqa", "model.layers.1.self_attn.o_proj.weight", (48, 56)),
        ("llama-gqa", "model.layers.1.mlp.down_proj.weight", (48, 111)),
        ("llama-gqa", "lm_head.weight", (399, 48)),
    ],
)
def test_a_wrong_shape_is_named(zoo, name, key, size):
    checkpoint = zoo.hf(name).state_dict()
    checkpoint[key] = torch.zeros(size)
    with pytest.raises(CheckpointKeyError, match=r"has shape|inputs"):
        built(zoo.hf(name), checkpoint)


@pytest.mark.usefixtures("without_shape_checks")
def test_gpt2_matrices_that_are_transposed_are_refused(zoo):
    checkpoint = zoo.hf("gpt2").state_dict()
    key = "transformer.h.0.mlp.c_fc.weight"
    checkpoint[key] = checkpoint[key].t()
    with pytest.raises(CheckpointKeyError, match=r"'blocks.0.W_gate_in' has shape \(192, 48\).*\(48, 192\)"):
        built(zoo.hf("gpt2"), checkpoint)


@pytest.mark.parametrize("name", ["gpt2", "llama-mha-tied"])
def test_bare_checkpoints_leave_out_the_prefix(zoo, name):
    hf_model = zoo.hf(name)
    prefix = family_of(hf_model.config.model_type).prefix
    bare = {key.removeprefix(prefix): value for key, value in hf_model.state_dict().items() if key != "lm_head.weight"}
    full = dict(built(hf_model, hf_model.state_dict()).named())
    for key, value in built(hf_model, bare).named():
        assert torch.equal(value, full[key])
