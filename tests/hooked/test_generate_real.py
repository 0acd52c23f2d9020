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
def batch(smollm2_raw, prompts):
    """What is added to all prompts in one batch."""
    end = smollm2_raw.tokenizer.eos_token_id
    return generate_tokens(smollm2_raw, prompts, max_new_tokens=N_NEW, stop_tokens=[end])


@pytest.mark.parametrize("row", range(len(TEXTS)))
def test_every_token_is_the_most_likely_one(smollm2_hf, smollm2_raw, prompts, batch, row):
    """All of them by one forward of Hugging Face, which reads what was generated."""
    new, end = batch[row], smollm2_raw.tokenizer.eos_token_id
    assert len(set(new)) > 10
    # The first one comes to an end.
    assert (end in new) == (row == 0)
    assert new[-1] == end if row == 0 else len(new) == N_NEW
    with torch.no_grad():
        logits = smollm2_hf(torch.tensor([prompts[row] + new])).logits[0, len(prompts[row]) - 1 : -1]
    assert logits.argmax(-1).tolist() == new


# One with a prompt that was padded in the batch, one with the longest.
@pytest.mark.parametrize("row", [0, 1])
def test_equals_generate_of_hugging_face(smollm2_hf, smollm2, prompts, batch, row):
    tokens, end = torch.tensor([prompts[row]]), smollm2.tokenizer.eos_token_id
    whole = smollm2_hf.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=N_NEW,
        do_sample=False,
        eos_token_id=end,
        pad_token_id=end,
    )
    expected = whole[0, tokens.shape[1] :].tolist()
    assert batch[row] == expected
    # And by itself, with processed weights.
    assert generate_tokens(smollm2, [prompts[row]], max_new_tokens=N_NEW, stop_tokens=[end]) == [expected]
