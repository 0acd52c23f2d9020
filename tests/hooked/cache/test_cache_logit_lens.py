"""cache.logit_lens against TransformerLens's, and against the model's own logits."""

import pytest
import torch

from fastinterp import HookedTransformer
from fastinterp.errors import AnswerTokenError, OptionError, SiteRangeError, TokenRangeError

TOKENS = torch.tensor([[5, 6, 7, 8, 9], [9, 8, 7, 6, 5]])


@pytest.fixture(params=["gpt2", "llama-gqa"])
def pair(zoo, request):
    """Our cache of a run and TransformerLens's."""
    model = HookedTransformer(zoo.model(request.param, dtype=torch.float64))
    return model.run_with_cache(TOKENS)[1], zoo.bridge(request.param).run_with_cache(TOKENS)[1]


OPTIONS = [
    {},
    {"positions": None, "return_type": "log_probs"},
    {"incl_mid": True, "return_type": "probs", "batch_slice": 1},
    {"layers": [0, -1], "positions": (1, 4)},
    {"vocab": [3, 1, 399]},
    {"targets": [7, 8]},
    {"targets": torch.tensor([3, 17]), "return_type": "log_probs"},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_it_equals_transformer_lens(pair, options):
    ours, theirs = (cache.logit_lens(**options) for cache in pair)
    assert ours.labels == theirs.labels
    assert ours.values.shape == theirs.values.shape
    assert torch.allclose(ours.values, theirs.values.double(), atol=1e-5)
    assert torch.allclose(ours.entropy, theirs.readout.entropy.double(), atol=1e-5)
    if "targets" in options:
        assert torch.equal(ours.target_ranks, theirs.readout.target_ranks)
        assert torch.equal(ours.target_ids.expand_as(theirs.readout.target_ids), theirs.readout.target_ids)


def test_the_largest_tokens(pair):
    ours, theirs = (cache.logit_lens(top_k=4) for cache in pair)
    assert torch.equal(ours.readout.top_ids, theirs.readout.top_ids)
    assert torch.allclose(ours.values, theirs.values.double(), atol=1e-5)


@pytest.mark.parametrize("name", ["gpt2", "gptj", "gemma2-softcaps", "phi"])
@pytest.mark.parametrize("processing", ["transformer_lens", "none"])
def test_the_last_entry_has_the_models_logits(zoo, name, processing):
    model = HookedTransformer(zoo.model(name, processing=processing, dtype=torch.float64))
    logits, cache = model.run_with_cache(TOKENS)
    lens = cache.logit_lens(positions=None)
    assert lens.labels[-1] == "final_post"
    assert torch.allclose(lens.values[-1], logits, atol=1e-10)
    assert lens.values.shape == (model.cfg.n_layers + 1, 2, 5, model.cfg.d_vocab)


def test_without_a_batch_axis(zoo):
    model = HookedTransformer(zoo.model("gpt2", dtype=torch.float64))
    whole = model.run_with_cache(TOKENS)[1].logit_lens(batch_slice=0)
    _, cache = model.run_with_cache(TOKENS[:1], remove_batch_dim=True)
    assert torch.allclose(cache.logit_lens().values, whole.values)


def test_what_cannot_be_asked_for(zoo):
    _, cache = HookedTransformer(zoo.model("gpt2")).run_with_cache(TOKENS)
    for options, error, match in (
        ({"layers": [4]}, SiteRangeError, "entry 4 is out of range: there are 4, 0_pre to final_post"),
        ({"top_k": 3, "targets": 4}, OptionError, "give one of them"),
        ({"top_k": 401}, OptionError, "1 to 400"),
        ({"targets": [400]}, TokenRangeError, "0 to 399"),
        ({"targets": "John and Mary"}, AnswerTokenError, "not one token"),
        ({"targets": torch.tensor([1, 2, 3])}, OptionError, "a tensor of targets has one for each row"),
    ):
        with pytest.raises(error, match=match):
            cache.logit_lens(**options)
