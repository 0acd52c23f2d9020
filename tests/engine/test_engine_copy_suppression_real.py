"""SmolLM2-135M: one scan for the loss of every token without a head, against hooks and literal logits."""

import numpy as np
import pytest
import torch

import fastinterp
from fastinterp.prompts import PromptSet

pytestmark = pytest.mark.real

HEADS = [(7, 4), (24, 4), (29, 0)]
N_TOKENS = 40
# Jane Austen, Pride and Prejudice, the first chapter.
TEXTS = [
    "It is a truth universally acknowledged, that a single man in possession of a good fortune, must be in want of a "
    "wife. However little known the feelings or views of such a man may be on his first entering a neighbourhood,",
    '"My dear Mr. Bennet," said his lady to him one day, "have you heard that Netherfield Park is let at last?" Mr. '
    'Bennet replied that he had not. "But it is," returned she; "for Mrs. Long has just been here, and she told me',
    '"Do not you want to know who has taken it?" cried his wife impatiently. "You want to tell me, and I have no '
    'objection to hearing it." This was invitation enough. "Why, my dear, you must know, Mrs. Long says that',
    '"What is his name?" "Bingley." "Is he married or single?" "Oh! single, my dear, to be sure! A single man of large '
    'fortune; four or five thousand a year. What a fine thing for our girls!" "How so? how can it affect them?"',
]


def losses(logits, ids):
    return -logits.double().log_softmax(-1)[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]


@torch.no_grad()
def test_chosen_heads_equal_hooks_and_literal_logits(smollm2, smollm2_bridge, tmp_path):
    bridge, prompts = smollm2_bridge, [list(ids)[:N_TOKENS] for ids in smollm2.encode(TEXTS)]
    assert [len(ids) for ids in prompts] == [N_TOKENS] * 4
    stored = fastinterp.scan(
        smollm2,
        PromptSet.of(prompts),
        tmp_path / "run.zarr",
        analysis="ablation",
        metric="loss",
        mode="zero,mean",
        effect="both",
        units=",".join(f"L{layer}H{head}" for layer, head in HEADS),
    ).load()
    names = [f"blocks.{layer}.attn.hook_z" for layer, _ in HEADS]
    runs = [bridge.run_with_cache(torch.tensor([ids]), names_filter=[*names, "ln_final.hook_scale"]) for ids in prompts]
    largest = 0.0
    for (layer, head), name in zip(HEADS, names, strict=True):
        mean = torch.cat([cache[name][0, :, head] for _, cache in runs]).mean(0)
        for row, (ids, (logits, cache)) in enumerate(zip(prompts, runs, strict=True)):
            clean = losses(logits[0], ids)
            np.testing.assert_allclose(stored["loss_clean"].values[row, :-1], clean, atol=1e-4)
            for mode, value in (("zero", torch.zeros_like(mean)), ("mean", mean)):

                def replace(z, hook, head=head, value=value):
                    z[:, :, head] = value
                    return z

                total = bridge.run_with_hooks(torch.tensor([ids]), fwd_hooks=[(name, replace)])[0]
                written = (cache[name][0, :, head] - value) @ bridge.blocks[layer].attn.W_O[head]
                direct = logits[0] - (written / cache["ln_final.hook_scale"][0]) @ bridge.W_U
                for effect, after in (("total", total), ("direct", direct)):
                    wanted = (losses(after, ids) - clean).numpy()
                    found = stored[f"loss_{mode}_{effect}"].sel(unit=f"L{layer}H{head}").values[row]
                    assert np.isnan(found[-1])
                    assert np.abs(found[:-1] - wanted).max() < 1e-4, (mode, effect, layer, head, row)
                    largest = max(largest, float(np.abs(wanted).max()))
    assert largest > 0.3
