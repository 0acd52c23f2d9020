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


class Literal:
    """Clean logits, contributions [layer, head, d_vocab] and mean contributions at each prompt's last token."""

    def __init__(self, bridge, runs, names):
        self.bridge, self.runs, self.names = bridge, runs, names

    def clean(self, row):
        return self.runs[row][0][0, -1]

    def own(self, row):
        cache = self.runs[row][1]
        return self._logits(cache, [cache[name][0, -1] for name in self.names])

    def mean(self, row, rows):
        """Of what the heads have at all tokens of the prompts ``rows``, at the scale of one of them."""
        mean = [torch.cat([self.runs[other][1][name][0] for other in rows]).mean(0) for name in self.names]
        return self._logits(self.runs[row][1], mean)

    @torch.no_grad()
    def _logits(self, cache, z):
        parts = [torch.einsum("he,hed->hd", own, self.bridge.blocks[layer].attn.W_O) for layer, own in enumerate(z)]
        return (torch.stack(parts) / cache["ln_final.hook_scale"][0, -1]) @ self.bridge.W_U


@pytest.fixture(scope="module")
def literal(smollm2_bridge, smollm2, texts):
    names = [f"blocks.{layer}.attn.hook_z" for layer in range(30)]
    runs = []
    for ids in smollm2.encode(texts):
        with torch.no_grad():
            runs.append(
                smollm2_bridge.run_with_cache(torch.tensor([ids]), names_filter=[*names, "ln_final.hook_scale"])
            )
    return Literal(smollm2_bridge, runs, names)


def test_the_strongest_tokens_of_every_head(smollm2, texts, literal):
    found = fastinterp.head_logits(smollm2, PromptSet.of(texts), k=K)
    for row in range(N_PROMPTS):
        contributions = literal.own(row)
        for end, largest in (("top", True), ("bottom", False)):
            best, order = contributions.topk(K + 1, largest=largest)
            values, ids = best[..., :K], order[..., :K]
            ours = torch.from_numpy(found[f"head_{end}_token"][row].values).long()
            logits = torch.from_numpy(found[f"head_{end}_logit"][row].values)
            assert float((logits - values).abs().max()) < 1e-4
            assert float((contributions.gather(-1, ours) - logits).abs().max()) < 1e-4
            # Where neighbours in the order are closer than rounding, either may come first, or be the last.
            gap = best.diff(dim=-1).abs()
            clear = torch.minimum(gap, torch.cat([gap.new_full((30, 9, 1), 1.0), gap[..., :-1]], -1)) > 2e-6
            assert torch.equal(ours[clear], ids[clear])
            assert float(clear.float().mean()) > 0.99


@pytest.mark.parametrize("mode", ["zero", "mean"])
def test_losses_without_every_head(smollm2, texts, literal, mode):
    """The next word's first token as the answer: minus its log-probability is the loss there."""
    rows = range(0, N_PROMPTS, 4)
    following = [[token] for token in (260, 284, 314, 28) * 2]
    prompts = PromptSet.of([texts[row] for row in rows], answer=following)
    found = fastinterp.direct_effect(smollm2, prompts, mode=mode, metric="logprob")[f"logprob_{mode}_direct"]
    for index, row in enumerate(rows):
        clean, taken = literal.clean(row), literal.own(row)
        taken = taken if mode == "zero" else taken - literal.mean(row, rows)
        token = following[index][0]
        expected = (clean - taken).log_softmax(-1)[..., token] - clean.log_softmax(-1)[token]
        assert np.abs(found[index].values - expected.numpy()).max() < 1e-4
    assert float(np.abs(found).max()) > 0.5
