"""SmolLM2-135M goes on as in Hugging Face."""

import pytest
import torch

from fastinterp.hooked.generation import generate_tokens

pytestmark = [pytest.mark.real, pytest.mark.slow]

TEXTS = [
    "When John and Mary went to the shops, John gave the bag to",
    "The capital of France is",
    "Once upon a time, in a village by the sea, there lived",
    "def fibonacci(n):",
    "Water",
]
N_NEW = 64


@pytest.fixture(scope="module")
def prompts(smollm2_raw):
    prompts = smollm2_raw.encode(TEXTS)
    assert len({len(prompt) for prompt in prompts}) > 3
    return prompts


@pytest.fixture(scope="module")
def expected(smollm2_hf, smollm2_raw, prompts):
    """What Hugging Face adds to each prompt by itself."""
    end = smollm2_raw.tokenizer.eos_token_id
    found = []
    for prompt in prompts:
        tokens = torch.tensor([prompt])
        whole = smollm2_hf.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=N_NEW,
            do_sample=False,
            eos_token_id=end,
            pad_token_id=end,
        )
        found.append(whole[0, len(prompt) :].tolist())
    return found


def test_in_one_batch(smollm2_raw, prompts, expected):
    end = smollm2_raw.tokenizer.eos_token_id
    assert generate_tokens(smollm2_raw, prompts, max_new_tokens=N_NEW, stop_tokens=[end]) == expected


def test_one_by_one_with_processed_weights(smollm2, prompts, expected):
    end = smollm2.tokenizer.eos_token_id
    for prompt, tokens in zip(prompts, expected, strict=True):
        assert generate_tokens(smollm2, [prompt], max_new_tokens=N_NEW, stop_tokens=[end]) == [tokens]
