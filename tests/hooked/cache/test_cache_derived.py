"""What a full cache computes when it is read, against a run that keeps everything."""

import copy
import gc
import pickle

import pytest
import torch

import fastinterp
from fastinterp.hooked.activation_cache import ActivationCache
from fastinterp.hooked.activations import Activations
from fastinterp.model import Taps, forward
from tests.hooked.cache.cache_runs import TOKENS, run
from tests.tiny_models import tiny_gpt2, tiny_llama


def hooked(model):
    return fastinterp.HookedTransformer(model)


@pytest.fixture(params=[tiny_gpt2, tiny_llama], ids=["gpt2", "llama"])
def deep(request):
    """Ten layers: the residual stream is held in front of two of them."""
    layers = {"n_layer": 10} if request.param is tiny_gpt2 else {"num_hidden_layers": 10}
    return fastinterp.load(request.param(**layers), dtype=torch.float64)


def same(ours, theirs):
    """Equal but for rounding; -inf, where a query may not look, in the same places."""
    torch.testing.assert_close(ours, theirs, rtol=0.0, atol=1e-11)


def compare(cache, values):
    # The output of a sublayer has two names, and only one of them is in a cache where nothing comes in between.
    missing = set(values) - set(cache)
    assert all(name.endswith(("attn.hook_out", "mlp.hook_out")) for name in missing)
    assert len(missing) <= len(values) / 4
    for name in set(values) - missing:
        same(cache[name], values[name])


def test_everything_is_as_a_run_had_it(model):
    compare(hooked(model).run_with_cache(TOKENS)[1], run(model)[1])


def test_everything_is_as_a_deep_run_had_it(deep):
    _, cache = hooked(deep).run_with_cache(TOKENS)
    compare(cache, run(deep)[1])
    held = cache.cache_dict.held()
    assert {name for name in held if name.endswith("hook_resid_pre")} == {
        "blocks.0.hook_resid_pre",
        "blocks.8.hook_resid_pre",
    }
    assert not any(name.endswith(("hook_resid_post", "hook_resid_mid")) for name in held)


def test_sums_and_elementwise_steps_are_exact(deep):
    values = run(deep)[1]
    _, cache = hooked(deep).run_with_cache(TOKENS)
    # The attention is fused where nobody sees its pattern, which rounds what comes behind it.
    first = [name for name in values if name.startswith("blocks.0.") and ".ln2" not in name]
    for name in first:
        if name.endswith(("ln1.hook_normalized", "hook_rot_q", "hook_rot_k", "hook_resid_pre")):
            assert torch.equal(cache[name], values[name]), name
    for layer in range(10):
        assert torch.equal(cache["resid_mid", layer], cache["resid_pre", layer] + cache["attn_out", layer])
        assert torch.equal(cache["resid_post", layer], cache["resid_mid", layer] + cache["mlp_out", layer])


def test_half_of_it_is_not_held(deep):
    _, cache = hooked(deep).run_with_cache(TOKENS)
    distinct = {
        value.untyped_storage().data_ptr(): value.untyped_storage() for value in cache.cache_dict.held().values()
    }
    held = sum(storage.nbytes() for storage in distinct.values())
    values = run(deep)[1]
    distinct = {value.untyped_storage().data_ptr(): value.untyped_storage() for value in values.values()}
    assert held < 0.66 * sum(storage.nbytes() for storage in distinct.values())


def test_the_attention_stays_fused(deep, monkeypatch):
    """A full cache does not form patterns in the forward: with long prompts they would be most of its memory."""
    calls = []
    fused = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        "fastinterp.model.attention.F.scaled_dot_product_attention",
        lambda *arguments, **options: calls.append(1) or fused(*arguments, **options),
    )
    hooked(deep).run_with_cache(TOKENS)
    assert len(calls) == 10


def test_what_is_asked_for_alone_is_held(deep):
    for site in ("mlp.hook_post", "attn.hook_pattern", "hook_resid_post", "ln1.hook_normalized", "attn.hook_rot_q"):
        _, cache = hooked(deep).run_with_cache(TOKENS, names_filter=lambda name, site=site: name.endswith(site))
        assert len(cache) == len(cache.cache_dict.held()) == 10 or "rot" in site


@pytest.mark.parametrize(
    "site",
    [
        "hook_resid_pre", "attn.hook_q", "attn.hook_rot_k", "attn.hook_attn_scores", "attn.hook_pattern",
        "attn.hook_z", "hook_attn_out", "hook_resid_mid", "hook_mlp_in", "ln1.hook_scale", "ln1.hook_normalized",
        "ln2.hook_scale", "ln2.hook_normalized", "mlp.hook_pre", "mlp.hook_post", "hook_mlp_out", "hook_resid_post",
        "ln_final.hook_scale",
    ],
)  # fmt: skip
def test_with_a_hook_it_is_what_the_hooked_run_had(zoo, site):
    """Every name, kept alone in a run with the same hook, equals the full cache of one."""
    model = hooked(zoo.model("llama-gqa", dtype=torch.float64))
    name = site if site.startswith("ln_final") else f"blocks.1.{site}"
    model.add_hook(name, lambda value, hook: value * 0.5)
    _, cache = model.run_with_cache(TOKENS)
    assert not torch.allclose(cache["ln_final_normalized"], hooked(model.model).run_with_cache(TOKENS)[1]["normalized"])
    taps = Taps.of(3, capture=[])
    edits = model.points.taps().edits
    wanted = frozenset(point.key for point in model.points if point.name in cache)
    everything = Taps(wanted=wanted, edits={**taps.edits, **edits})
    resid = forward(model.model.spec, model.model.weights, TOKENS, taps=everything)
    fastinterp.model.final_logits(model.model.spec, model.model.weights, resid, taps=everything)
    for point in model.points:
        if point.name in cache:
            same(cache[point.name], everything.values[point.key])


def test_part_of_a_run(deep):
    model = hooked(deep)
    _, whole = model.run_with_cache(TOKENS)
    _, start = model.run_with_cache(TOKENS, stop_at_layer=5)
    compare(start, {name: whole[name] for name in start})
    _, end = model.run_with_cache(whole["resid_pre", 5], start_at_layer=5)
    assert "blocks.5.hook_resid_pre" in end.cache_dict.held()
    compare(end, {name: whole[name] for name in end})
    _, none = model.run_with_cache(TOKENS, return_type=None)
    compare(none, dict(whole.items()))


def test_slices_moves_and_dropped_axes(model):
    ours, kept = hooked(model), ActivationCache(run(model)[1], model)
    names = set(kept) & set(ours.run_with_cache(TOKENS)[1])
    for change in (
        lambda cache: cache.apply_slice_to_batch_dim(slice(1, 3)),
        lambda cache: cache.apply_slice_to_batch_dim(1),
        lambda cache: cache.apply_slice_to_batch_dim([2]).remove_batch_dim(),
        lambda cache: cache.at_positions([1, -1]),
        lambda cache: cache.to("cpu"),
    ):
        cache, expected = change(ours.run_with_cache(TOKENS)[1]), change(ActivationCache(kept, model))
        for name in names:
            same(cache[name], expected[name])


def test_assigning_changes_nothing_else(gpt2):
    _, cache = hooked(gpt2).run_with_cache(TOKENS)
    before = {name: value.clone() for name, value in cache.items()}
    cache.cache_dict["blocks.1.mlp.hook_pre"] = torch.zeros_like(cache["pre", 1])
    del cache.cache_dict["blocks.0.hook_attn_out"]
    cache.cache_dict["mine"] = torch.ones(2)
    assert float(cache["pre", 1].abs().max()) == 0.0
    for name in set(before) - {"blocks.1.mlp.hook_pre", "blocks.0.hook_attn_out"}:
        assert torch.equal(cache[name], before[name]), name
    assert "blocks.0.hook_attn_out" not in cache
    assert torch.equal(cache.cache_dict["mine"], torch.ones(2))
    with pytest.raises(KeyError):
        del cache.cache_dict["blocks.9.hook_attn_out"]


def test_a_derived_tensor_can_be_replaced(gpt2):
    _, cache = hooked(gpt2).run_with_cache(TOKENS)
    cache.cache_dict["blocks.1.mlp.hook_post"] = torch.zeros_like(cache["post", 1])
    assert float(cache["post", 1].abs().max()) == 0.0
    assert float(cache["pre", 1].abs().max()) > 0.0


def test_copies_and_files_are_plain_dictionaries(gpt2):
    model = hooked(gpt2)
    _, cache = model.run_with_cache(TOKENS)
    for other in (
        copy.deepcopy(cache.cache_dict),
        pickle.loads(pickle.dumps(cache.cache_dict)),
        model.run_with_cache(TOKENS, return_cache_object=False)[1],
    ):
        assert type(other) is dict
        assert all(isinstance(value, torch.Tensor) for value in other.values())
        compare(cache, other)
    twice = ActivationCache(cache, model)
    del cache.cache_dict["hook_embed"]
    assert "hook_embed" in twice


def test_a_cache_is_freed_at_once(gpt2):
    """No cycle of references keeps the tensors until the garbage collector comes by."""
    import weakref

    gc.collect()
    gc.disable()
    try:
        _, cache = hooked(gpt2).run_with_cache(TOKENS)
        alive = weakref.ref(cache["z", 0])
        assert cache["pattern", 0].shape == (3, 4, 7, 7)
        del cache
        assert alive() is None
    finally:
        gc.enable()


def test_the_dictionary_by_itself():
    entries = Activations({"a": torch.ones(2), "b": lambda all_of_them: all_of_them["a"] * 2})
    assert list(entries) == ["a", "b"]
    assert len(entries) == 2
    assert torch.equal(entries["b"], torch.full((2,), 2.0))
    assert list(entries.held()) == ["a"]
    assert torch.equal(entries.mapped(lambda _, value: value + 1)["b"], torch.full((2,), 3.0))
    assert "Activations" in repr(entries)
