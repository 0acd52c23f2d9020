"""Models for the tests of the hooking surface."""

import pytest

# One of every family, and the variants that take another path.
GRADIENT_MODELS = [
    "gpt2",
    "llama-gqa",
    "mistral-window",
    "gpt-neo",
    "gpt-neox",
    "gptj",
    "opt",
    "qwen2-gqa-tied",
    "qwen3-gqa",
    "gemma-mha-biases-untied",
    "gemma2-softcaps",
    "gemma3-mixed-rope",
    "phi",
    "phi3-gqa-window",
]


@pytest.fixture(params=GRADIENT_MODELS)
def gradient_name(request):
    """The name of a tiny model of every family."""
    return request.param
