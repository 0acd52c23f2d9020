"""SmolLM2-135M: what every one of its 270 heads adds to the logits, against TransformerLens and literal tensors."""

import numpy as np
import pytest
import torch

import fastinterp
from fastinterp.prompts import PromptSet

pytestmark = pytest.mark.real

# Jane Austen, Pride and Prejudice, the first chapter.
TEXT = """It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want
of a wife. However little known the feelings or views of such a man may be on his first entering a
neighbourhood, this truth is so well fixed in the minds of the surrounding families, that he is considered
as the rightful property of some one or other of their daughters. "My dear Mr. Bennet," said his lady to him
one day, "have you heard that Netherfield Park is let at last?" Mr. Bennet replied that he had not. "But it
is," returned she; "for Mrs. Long has just been here, and she told me all about it." Mr. Bennet made no
answer. "Do not you want to know who has taken it?" cried his wife impatiently. "You want to tell me, and I
have no objection to hearing it." This was invitation enough. "Why, my dear, you must know, Mrs. Long says
that Netherfield is taken by a young man of large fortune from the north of England; that he came down on
Monday in a chaise and four to see the place, and was so much delighted with it that he agreed with Mr.
Morris immediately; that he is to take possession before Michaelmas, and some of his servants are to be in
the house by the end of next week." "What is his name?" "Bingley." "Is he married or single?" "Oh! single,
my dear, to be sure! A single man of large fortune; four or five thousand a year. What a fine thing for our
girls!"
"""
N_PROMPTS, K = 32, 10


@pytest.fixture(scope="module")
def texts():
    """Pieces of 6 to 10 words, of different numbers of tokens."""
    words = TEXT.split()
    ends = np.cumsum([6 + row % 5 for row in range(N_PROMPTS)])
    assert ends[-1] <= len(words)
    return [" ".join(words[start:end]) for start, end in zip([0, *ends[:-1]], ends, strict=True)]


@pytest.fixture(scope="module")
def literal(smollm2_bridge, smollm2, texts):
    """Clean logits, contributions [layer, head, d_vocab] and mean contributions at each prompt's last token."""
    names = [f"blocks.{layer}.attn.hook_z" for layer in range(30)]
    runs = []
    for ids in smollm2.encode(texts):
        with torch.no_grad():
            runs.append(
                smollm2_bridge.run_with_cache(torch.tensor([ids]), names_filter=[*names, "ln_final.hook_scale"])
            )
    mean = [torch.cat([cache[name][0] for _, cache in runs]).mean(0) for name in names]

    def logits(cache, z):
        parts = [
            torch.einsum("he,hed->hd", z[layer], smollm2_bridge.blocks[layer].attn.W_O) for layer in range(len(names))
        ]
        return (torch.stack(parts) / cache["ln_final.hook_scale"][0, -1]) @ smollm2_bridge.W_U

    def of(row):
        found, cache = runs[row]
        with torch.no_grad():
            own = logits(cache, [cache[name][0, -1] for name in names])
            return found[0, -1], own, logits(cache, mean)

    return of


def test_the_strongest_tokens_of_every_head(smollm2, texts, literal):
    found = fastinterp.head_logits(smollm2, PromptSet.of(texts), k=K)
    for row in range(N_PROMPTS):
        _, contributions, _ = literal(row)
        for end, largest in (("top", True), ("bottom", False)):
            values, ids = contributions.topk(K, largest=largest)
            ours = torch.from_numpy(found[f"head_{end}_token"][row].values).long()
            logits = torch.from_numpy(found[f"head_{end}_logit"][row].values)
            assert float((logits - values).abs().max()) < 1e-4
            assert float((contributions.gather(-1, ours) - logits).abs().max()) < 1e-4
            # Where neighbours in the order are closer than rounding, either may come first, or be the last.
            gap = (
                torch.cat([values, contributions.topk(K + 1, largest=largest).values[..., -1:]], -1).diff(dim=-1).abs()
            )
            clear = torch.minimum(gap, torch.cat([gap.new_full((30, 9, 1), 1.0), gap[..., :-1]], -1)) > 2e-6
            assert torch.equal(ours[clear], ids[clear])
            assert float(clear.float().mean()) > 0.99


@pytest.mark.parametrize("mode", ["zero", "mean"])
def test_losses_without_every_head(smollm2, texts, literal, mode):
    """The next word's first token as the answer: minus its log-probability is the loss there."""
    following = [[token] for token in (260, 284, 314, 28) * 8]
    prompts = PromptSet.of(texts, answer=following)
    found = fastinterp.direct_effect(smollm2, prompts, mode=mode, metric="logprob")[f"logprob_{mode}_direct"]
    for row in range(0, N_PROMPTS, 4):
        clean, own, mean = literal(row)
        taken = own if mode == "zero" else own - mean
        token = following[row][0]
        expected = (clean - taken).log_softmax(-1)[..., token] - clean.log_softmax(-1)[token]
        assert np.abs(found[row].values - expected.numpy()).max() < 1e-4
    assert float(np.abs(found).max()) > 0.5
