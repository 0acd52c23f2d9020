"""Random Hugging Face models of every family, small, with activations and logits of realistic size."""

import copy
from collections.abc import Callable
from typing import Any

import torch

FINAL_NORMS = (
    "transformer.ln_f.weight",
    "model.norm.weight",
    "model.final_layernorm.weight",
    "model.decoder.final_layer_norm.weight",
    "gpt_neox.final_layer_norm.weight",
)


def realistic_(hf_model: Any, seed: int = 0) -> Any:
    """Rescales random weights in place so that activations, patterns and logits have the size that trained models have.

    Norm weights and biases get a spread as well, since identities would hide a fold that was forgotten.
    """
    generator = torch.Generator().manual_seed(seed)
    kind = hf_model.config.model_type
    d_model = hf_model.get_input_embeddings().weight.shape[1]
    # Gemma multiplies its embedding by sqrt(d_model), and adds 1 to the weights of its norms.
    embedding_scale = d_model**0.5 if kind.startswith("gemma") else 1.0
    without_one = 1.0 if kind.startswith("gemma") else 0.0
    for name, parameter in hf_model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)
        if parameter.ndim == 1:
            norm = ("norm" in name or "ln_" in name) and name.endswith("weight")
            one = 1.0 if norm else 0.0
            # The final norm sets the size of the logits: a spread of about 2, top probabilities of about 0.2.
            size = 0.5 * embedding_scale * (48 / d_model) ** 0.5 if name in FINAL_NORMS else 1.0
            parameter.data = size * (one + 0.2 * noise) - (without_one if norm else 0.0)
        elif any(part in name for part in ("embed", "wte", "wpe", "lm_head")):
            parameter.data = 0.6 / embedding_scale * noise
        else:
            fan_in = parameter.shape[0] if "c_" in name and kind == "gpt2" else parameter.shape[1]
            parameter.data = noise * (1.3 / fan_in**0.5)
            if kind == "gpt_neo" and name.endswith(("q_proj.weight", "k_proj.weight")):
                # Its scores are not divided by sqrt(d_head).
                parameter.data = parameter.data / (d_model // hf_model.config.num_heads) ** 0.25
    return hf_model.eval()


def tiny_gpt2(**changes: Any) -> Any:
    """A random GPT-2; config values can be changed."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = dict(n_embd=48, n_layer=3, n_head=4, vocab_size=400, n_positions=64, bos_token_id=0, eos_token_id=0)
    config |= dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    return realistic_(GPT2LMHeadModel(GPT2Config(**(config | changes))))


def tiny_llama(**changes: Any) -> Any:
    """A random Llama with grouped-query attention; config values can be changed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config: dict[str, Any] = dict(hidden_size=48, intermediate_size=112, num_hidden_layers=3, num_attention_heads=6)
    config |= dict(num_key_value_heads=2, vocab_size=400, max_position_embeddings=64, bos_token_id=0, eos_token_id=0)
    return realistic_(LlamaForCausalLM(LlamaConfig(**(config | changes))))


def tiny_mistral(**changes: Any) -> Any:
    """A random Mistral whose window is shorter than the prompts of the tests."""
    from transformers import MistralConfig, MistralForCausalLM

    config: dict[str, Any] = dict(hidden_size=48, intermediate_size=112, num_hidden_layers=3, num_attention_heads=6)
    config |= dict(num_key_value_heads=2, vocab_size=400, max_position_embeddings=64, head_dim=16, sliding_window=5)
    return realistic_(MistralForCausalLM(MistralConfig(**(config | dict(bos_token_id=0, eos_token_id=0) | changes))))


TINY_MODELS: dict[str, Callable[[], Any]] = {
    "gpt2": tiny_gpt2,
    "gpt2-one-head-one-layer": lambda: tiny_gpt2(n_layer=1, n_head=1),
    "gpt2-gelu-wide-mlp": lambda: tiny_gpt2(activation_function="gelu", n_inner=100),
    "llama-gqa": tiny_llama,
    "llama-mha-tied": lambda: tiny_llama(num_key_value_heads=6, tie_word_embeddings=True),
    "llama-biases-mqa-head-dim": lambda: tiny_llama(
        attention_bias=True, mlp_bias=True, num_key_value_heads=1, head_dim=10, rms_norm_eps=1e-5
    ),
    "llama-one-head-one-layer": lambda: tiny_llama(num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1),
    "mistral-window": tiny_mistral,
}


WIDTH: dict[str, Any] = dict(num_hidden_layers=3, max_position_embeddings=64)
LLAMA_LIKE = WIDTH | dict(hidden_size=48, intermediate_size=112, num_attention_heads=6, num_key_value_heads=2)
GEMMA_LIKE = WIDTH | dict(hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2)
DEFAULTS: dict[str, dict[str, Any]] = {
    "gpt_neo": dict(num_layers=3, hidden_size=64, num_heads=4, max_position_embeddings=64, window_size=5)
    | dict(attention_types=[[["global", "local"], 1], [["local"], 1]]),
    "gpt_neox": WIDTH | dict(hidden_size=96, num_attention_heads=4, intermediate_size=200),
    "gptj": dict(n_layer=3, n_embd=64, n_head=4, n_positions=64, rotary_dim=8),
    "opt": WIDTH | dict(hidden_size=64, num_attention_heads=4, ffn_dim=150),
    "llama": LLAMA_LIKE,
    "qwen2": LLAMA_LIKE,
    "qwen3": LLAMA_LIKE | dict(head_dim=20),
    "gemma": GEMMA_LIKE | dict(head_dim=24),
    "gemma2": GEMMA_LIKE | dict(head_dim=32, query_pre_attn_scalar=24, sliding_window=5),
    "gemma3_text": GEMMA_LIKE | dict(head_dim=24, query_pre_attn_scalar=20, sliding_window=5),
    "phi": WIDTH | dict(hidden_size=64, num_attention_heads=4, intermediate_size=150),
    "phi3": LLAMA_LIKE,
    "starcoder2": LLAMA_LIKE,
    "stablelm": LLAMA_LIKE,
}
"""Small sizes of every model_type, three layers, a context of 64."""


def tiny_family(model_type: str, **changes: Any) -> Any:
    """A random model of any family, with explicit attention as Hugging Face writes it down; config values can change.

    d_model of the Gemmas stays a square number: Hugging Face rounds its root to float32 in float64 too.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    tokens = dict(vocab_size=400, bos_token_id=0, eos_token_id=0, pad_token_id=0)
    config = AutoConfig.for_model(model_type, **copy.deepcopy(DEFAULTS[model_type] | tokens | changes))
    return realistic_(AutoModelForCausalLM.from_config(config, attn_implementation="eager"))


YARN = dict(rope_type="yarn", factor=4.0, original_max_position_embeddings=16, rope_theta=10000.0)
LLAMA3 = dict(rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, rope_theta=500.0)
LLAMA3_ROPE: dict[str, Any] = LLAMA3 | dict(original_max_position_embeddings=32)
GEMMA3_ROPE = {
    "full_attention": dict(rope_type="linear", factor=8.0, rope_theta=1000.0),
    "sliding_attention": dict(rope_type="default", rope_theta=100.0),
}
ONE_HEAD = dict(num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1)
SLIDING_THEN_FULL = ["sliding_attention", "sliding_attention", "full_attention"]

FAMILY_MODELS: dict[str, Callable[[], Any]] = {
    "gpt-neo": lambda: tiny_family("gpt_neo"),
    "gpt-neo-one-head-one-layer-untied": lambda: tiny_family(
        "gpt_neo",
        num_layers=1,
        num_heads=1,
        attention_types=[[["local"], 1]],
        intermediate_size=100,
        tie_word_embeddings=False,
    ),
    "gpt-neox": lambda: tiny_family("gpt_neox"),
    "gpt-neox-sequential-no-attention-bias-wide-head": lambda: tiny_family(
        "gpt_neox",
        use_parallel_residual=False,
        attention_bias=False,
        hidden_size=160,
        num_attention_heads=2,
        rope_parameters=dict(rope_type="default", rope_theta=1000.0, partial_rotary_factor=0.4),
    ),
    "gpt-neox-one-head-one-layer-tied": lambda: tiny_family(
        "gpt_neox", num_hidden_layers=1, num_attention_heads=1, tie_word_embeddings=True, hidden_act="gelu_new"
    ),
    "gptj": lambda: tiny_family("gptj"),
    "gptj-wide-head-tied": lambda: tiny_family(
        "gptj", n_embd=160, n_head=2, rotary_dim=64, n_inner=100, n_layer=2, tie_word_embeddings=True
    ),
    "opt": lambda: tiny_family("opt"),
    "opt-no-bias-gelu-untied": lambda: tiny_family(
        "opt", enable_bias=False, activation_function="gelu", tie_word_embeddings=False
    ),
    "llama3-rope": lambda: tiny_family("llama", head_dim=32, rope_parameters=LLAMA3_ROPE),
    "llama-linear-rope": lambda: tiny_family(
        "llama", rope_parameters=dict(rope_type="linear", factor=3.0, rope_theta=10000.0)
    ),
    "qwen2-gqa-tied": lambda: tiny_family("qwen2", tie_word_embeddings=True),
    "qwen2-yarn-mha-wide-head": lambda: tiny_family(
        "qwen2", hidden_size=160, num_attention_heads=2, num_hidden_layers=2, rope_parameters=YARN
    ),
    "qwen2-windows": lambda: tiny_family(
        "qwen2", use_sliding_window=True, sliding_window=5, max_window_layers=1, num_key_value_heads=3
    ),
    "qwen3-gqa": lambda: tiny_family("qwen3"),
    "qwen3-biases-mha-wide-head-windows-tied": lambda: tiny_family(
        "qwen3",
        attention_bias=True,
        head_dim=80,
        num_attention_heads=2,
        num_key_value_heads=2,
        use_sliding_window=True,
        sliding_window=5,
        max_window_layers=2,
        tie_word_embeddings=True,
    ),
    "gemma-mqa-wide-head": lambda: tiny_family("gemma", head_dim=256, num_attention_heads=2, num_key_value_heads=1),
    "gemma-mha-biases-untied": lambda: tiny_family(
        "gemma", attention_bias=True, num_key_value_heads=4, tie_word_embeddings=False
    ),
    "gemma2-softcaps": lambda: tiny_family("gemma2", attn_logit_softcapping=5.0, final_logit_softcapping=4.0),
    "gemma2-one-head-one-layer-no-softcaps": lambda: tiny_family(
        "gemma2",
        **ONE_HEAD,
        head_dim=256,
        query_pre_attn_scalar=200,
        attn_logit_softcapping=None,
        final_logit_softcapping=None,
        tie_word_embeddings=False,
    ),
    "gemma3-mixed-rope": lambda: tiny_family(
        "gemma3_text", layer_types=SLIDING_THEN_FULL, rope_parameters=GEMMA3_ROPE, head_dim=80
    ),
    "gemma3-mha-biases-final-softcap-untied": lambda: tiny_family(
        "gemma3_text",
        attention_bias=True,
        num_key_value_heads=4,
        final_logit_softcapping=4.0,
        tie_word_embeddings=False,
    ),
    "phi": lambda: tiny_family("phi"),
    "phi-gqa-wide-head": lambda: tiny_family(
        "phi",
        hidden_size=160,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_hidden_layers=2,
        rope_parameters=dict(rope_type="default", rope_theta=1000.0, partial_rotary_factor=0.4),
    ),
    "phi3-gqa-window": lambda: tiny_family("phi3", sliding_window=5),
    "phi3-mha-partial-rope-tied": lambda: tiny_family(
        "phi3",
        num_key_value_heads=6,
        tie_word_embeddings=True,
        rope_parameters=dict(rope_type="default", rope_theta=1000.0, partial_rotary_factor=0.5),
    ),
    "starcoder2-gqa-window": lambda: tiny_family("starcoder2", sliding_window=5),
    "starcoder2-mha-no-bias-untied": lambda: tiny_family(
        "starcoder2", num_key_value_heads=6, use_bias=False, tie_word_embeddings=False
    ),
    "stablelm-gqa": lambda: tiny_family("stablelm"),
    "stablelm-mha-biases-tied": lambda: tiny_family(
        "stablelm", num_key_value_heads=6, use_qkv_bias=True, tie_word_embeddings=True
    ),
}
"""The other families; apart from TINY_MODELS, which most tests run over."""
