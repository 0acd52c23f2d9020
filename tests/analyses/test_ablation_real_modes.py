"""SmolLM2-135M: zero, mean and resample ablation, total and direct, against hooks of TransformerLens."""

import itertools

import numpy as np
import pytest
import torch

from fastinterp.analyses import ablate
from fastinterp.prompts import PromptSet
from tests.analyses.literal_ablation import Hooked, Loop

pytestmark = pytest.mark.real

TEXTS = [
    "When John and Mary went to the shops, John gave the bag to",
    "Then Alice and Bob had a long argument, and afterwards Bob said to",
    "The capital of France is",
    "The capital of Japan is",
    "It was a bright cold day in April, and the clocks were striking",
    "Paris",
    "Water freezes at zero degrees, and it boils at one",
    "def main",
]
ANSWERS = [" Mary", " Alice", " Paris", " Tokyo", " thirteen", ",", " hundred", "():"]
WRONG = [" John", " Bob", " London", " Kyoto", " twelve", " is", " thousand", "("]
UNITS = [(0, 0), (7, 4), (23, 3), (29, 1), "MLP11", ["ATTN22", (29, 8)]]
PARTS = [
    [("z", 0, 0)],
    [("z", 7, 4)],
    [("z", 23, 3)],
    [("z", 29, 1)],
    [("mlp_out", 11, None)],
    [("attn_out", 22, None), ("z", 29, 8)],
]
MODES = ("zero", "mean", "resample")


class Direct(Hooked):
    """The bridge, with what TransformerLens's activations say a part adds to the logits."""

    def without(self, prompt, puts):
        with torch.no_grad():
            logits, cache = self.bridge.run_with_cache(torch.tensor([prompt]))
            logits = logits[0].double()
            for put in puts:
                site, layer, head = put.part
                value = self.cache(prompt, {(site, layer)})[site, layer]
                change = put.values - (value[:, head] if site == "z" else value)
                change = change @ self.bridge.blocks[layer].attn.W_O[head] if site == "z" else change
                logits += ((change / cache["ln_final.hook_scale"][0]) @ self.bridge.W_U).double()
        return logits


def test_units_equal_hooks(smollm2, smollm2_bridge):
    tokens = PromptSet.of(TEXTS, answer=ANSWERS, wrong=WRONG).tokenize(smollm2, answer_token="first")
    prompts = [ids.tolist() for ids in tokens.tokens]
    # Each prompt's partner: the tokens of the next one, cut or repeated to its length.
    other = [(prompts[i - 1] * 20)[: len(ids)] for i, ids in enumerate(prompts)]
    answer, wrong = ([[int(row[0])] for row in column] for column in (tokens.answer, tokens.wrong))
    given = PromptSet.of(prompts, answer=answer, wrong=wrong, corrupt=other)
    metrics = ("logit_diff", "loss")
    data = ablate(smollm2, given, units=UNITS, mode=MODES, metric=metrics, effect="both")
    sites = {part[:2] for unit in PARTS for part in unit}
    loop = Loop(Direct(smollm2_bridge), smollm2.spec, prompts, answer, wrong, corrupt=other, sites=sites)
    ways = list(itertools.product(range(len(UNITS)), MODES, ("total", "direct")))
    largest = 0.0
    for row, ids in enumerate(prompts):
        # Every combination of them once, of one prompt or another.
        for index, mode, effect in ways[row :: len(prompts)]:
            wanted = loop.effect(row, PARTS[index], mode, range(len(ids)), effect)
            for metric in metrics:
                got = data[f"{metric}_{mode}_{effect}"][row].values[..., index]
                if metric == "loss":
                    assert np.isnan(got[len(ids) - 1 :]).all()
                    got = got[: len(ids) - 1]
                where = (metric, mode, effect, UNITS[index], row)
                assert np.abs(got - wanted[metric][0]).max(initial=0.0) < 1e-4, where
                largest = max(largest, float(np.abs(got).max(initial=0.0)))
    assert largest > 0.3
