"""What is derived and read several times in a row is computed twice at most, and stays right whatever readers do."""

import pytest
import torch

from fastinterp import HookedTransformer
from fastinterp.hooked import activations

TOKENS = (torch.arange(2 * 60).reshape(2, 60) * 7) % 400
NAME = "blocks.1.attn.hook_pattern"


@pytest.fixture(params=["gpt2", "llama-gqa"])
def model(zoo, request):
    return HookedTransformer(zoo.model(request.param, dtype=torch.float64))


@pytest.fixture(params=["whole", "without batch", "some prompts"])
def cache(model, request):
    if request.param == "without batch":
        return model.run_with_cache(TOKENS[:1], remove_batch_dim=True)[1]
    _, cache = model.run_with_cache(TOKENS)
    return cache if request.param == "whole" else cache.apply_slice_to_batch_dim([1])


@pytest.fixture
def computed(monkeypatch):
    """Counts how often scores are computed."""
    calls = []
    original = activations.attention_scores

    def counted(*args):
        calls.append(1)
        return original(*args)

    monkeypatch.setattr(activations, "attention_scores", counted)
    return calls


def thrice(cache):
    cache["pattern", 1], cache["pattern", 1]
    return cache["pattern", 1]


def test_reading_head_by_head_computes_twice(cache, computed):
    heads = [cache["pattern", 1][..., head, :, :] for head in range(4)]
    assert len(computed) == 2
    whole = cache["pattern", 1]
    assert all(torch.equal(head, whole[..., number, :, :]) for number, head in enumerate(heads))
    cache["pattern", 2], cache["pattern", 1]
    assert len(computed) == 4


def test_readers_cannot_change_what_others_read(cache):
    expected = cache["pattern", 1].clone()
    readings = [cache["pattern", 1] for _ in range(4)]
    for reading in readings:
        reading.zero_()
        assert torch.equal(cache["pattern", 1], expected)
    assert len({reading.data_ptr() for reading in (*readings, cache["pattern", 1])}) == 5


@pytest.mark.parametrize("edit", ["in place", "data", "numpy"])
def test_it_follows_its_sources(model, edit):
    _, cache = model.run_with_cache(TOKENS)
    before = thrice(cache)
    q = cache["q", 1]
    match edit:
        case "in place":
            q.mul_(0)
        case "data":
            q.data[:] = 0
        case "numpy":
            q.numpy()[:] = 0
    after = cache["pattern", 1]
    assert not torch.allclose(after, before)
    # Without queries, attention is spread evenly.
    assert torch.allclose(after[..., -1, :], torch.full_like(after[..., -1, :], 1 / 60))


def test_assigning_replaces_it(cache):
    before = thrice(cache)
    cache.cache_dict[NAME] = before * 2
    assert torch.equal(cache["pattern", 1], before * 2)
    assert torch.equal(cache["pattern", 1], before * 2)
    del cache.cache_dict[NAME]
    assert NAME not in cache


def test_assigning_a_source_leaves_it(cache):
    before = thrice(cache)
    cache.cache_dict["blocks.1.attn.hook_q"] = cache["q", 1] * 0
    assert torch.equal(cache["pattern", 1], before)


def test_short_prompts_keep_nothing(model):
    _, cache = model.run_with_cache(TOKENS[:, :6])
    for _ in range(3):
        cache["pattern", 1], cache["pattern", 1]
    assert cache.cache_dict._memo.value is None
