"""ActivationCache: look-ups and slices."""

import numpy as np
import pytest
import torch

from fastinterp.errors import (
    OptionError,
    SiteRangeError,
    UnknownActivationError,
)
from fastinterp.hooked.activation_cache import ActivationCache
from tests.hooked.cache.cache_runs import DERIVED, TOKENS, close, run

# Looking things up ----------------------------------------------------------------------------------------------------


def test_every_way_to_name_an_activation(gpt2):
    _, values = run(gpt2)
    cache = ActivationCache(values, gpt2)
    for key, name in {
        ("pattern", 0): "blocks.0.attn.hook_pattern",
        ("attn", 0): "blocks.0.attn.hook_pattern",
        ("z", -1): "blocks.2.attn.hook_z",
        ("z", -3, "attn"): "blocks.0.attn.hook_z",
        ("resid_post", -1): "blocks.2.hook_resid_post",
        ("resid_post", 1, None): "blocks.1.hook_resid_post",
        ("scale", 1, "ln2"): "blocks.1.ln2.hook_scale",
        ("ln2_scale", 1): "blocks.1.ln2.hook_scale",
        ("attn_raw", 1): "blocks.1.attn.hook_out",
        ("k", np.int64(1)): "blocks.1.attn.hook_k",
        ("k", np.int64(-1)): "blocks.2.attn.hook_k",
        ("normalized", 0, "ln1"): "blocks.0.ln1.hook_normalized",
        ("embed",): "hook_embed",
        ("embed", None): "hook_embed",
        "embed": "hook_embed",
        "pos_embed": "hook_pos_embed",
        "scale": "ln_final.hook_scale",
        "ln_final_scale": "ln_final.hook_scale",
        "k2": "blocks.2.attn.hook_k",
        "scale1ln2": "blocks.1.ln2.hook_scale",
        "blocks.1.mlp.hook_post": "blocks.1.mlp.hook_post",
    }.items():
        assert cache[key] is values[name], key


def test_it_is_a_dictionary_of_what_is_stored(gpt2):
    _, values = run(gpt2)
    cache = ActivationCache(values, gpt2)
    assert list(cache) == list(cache.keys()) == list(values)
    assert len(cache) == len(values)
    assert all(mine is theirs for mine, theirs in zip(cache.values(), values.values(), strict=True))
    assert dict(cache.items()).keys() == values.keys()
    assert "blocks.0.attn.hook_z" in cache
    assert "blocks.0.attn.hook_result" not in cache
    assert cache["result", 0].shape == (3, 7, 4, 48)
    assert "blocks.0.attn.hook_result" not in cache
    assert len(cache) == len(values)
    assert cache.has_embed
    assert cache.has_pos_embed
    again = ActivationCache(cache, gpt2)
    assert again["z", 0] is cache["z", 0]
    again.cache_dict.clear()
    assert len(cache) == len(values)


def test_what_is_derived_equals_what_the_forward_forms(model):
    _, values = run(model, also=DERIVED)
    formed = {name: value for name, value in values.items() if name.split("_", 1)[-1] in DERIVED}
    assert len(formed) == 6 * model.spec.n_layers
    cache = ActivationCache({name: value for name, value in values.items() if name not in formed}, model)
    for name, value in formed.items():
        derived = cache[name]
        close(derived, value, 1e-12)
        layer, short = int(name.split(".")[1]), name.split("_", 1)[-1]
        assert torch.equal(cache[short, layer - model.spec.n_layers], derived)
        if short != "result":
            source = "resid_pre" if short != "mlp_in" or model.spec.parallel else "resid_mid"
            assert derived.untyped_storage().data_ptr() == cache[source, layer].untyped_storage().data_ptr()


def test_an_unknown_name_says_what_there_is(gpt2, zoo):
    _, values = run(gpt2)
    cache = ActivationCache(values, gpt2)
    for key, message in {
        ("patern", 0): "pattern",
        "blocks.0.attn.hook_patern": "blocks.0.attn.hook_pattern",
        "z": r"cache\['z', 0\]",
        ("rot_q", 1): "not rotated",
        ("z", 0, "ln1", 4): "names no activation",
        (3, 0): "names no activation",
    }.items():
        with pytest.raises(UnknownActivationError, match=message):
            cache[key]
    for layer in (3, -4):
        with pytest.raises(SiteRangeError):
            cache["z", layer]
    few = ActivationCache({"blocks.0.hook_resid_post": values["blocks.0.hook_resid_post"]}, gpt2)
    with pytest.raises(UnknownActivationError, match=r"blocks\.1\.attn\.hook_z"):
        few["result", 1]
    with pytest.raises(UnknownActivationError, match="names_filter"):
        few["z", 1]
    parallel = zoo.model("gpt-neox", dtype=torch.float64)
    with pytest.raises(UnknownActivationError, match="same residual"):
        ActivationCache(run(parallel)[1], parallel)["resid_mid", 0]


def test_without_a_model_only_looking_up_works(gpt2):
    cache = ActivationCache(run(gpt2)[1])
    assert cache["z", 1].shape == (3, 7, 4, 12)
    for attempt in (lambda: cache["z", -1], cache.decompose_resid, cache.stack_head_results):
        with pytest.raises(OptionError, match="no model"):
            attempt()
    with pytest.raises(UnknownActivationError):
        cache["result", 0]


def test_gradients_lie_beside_activations(gpt2):
    _, values = run(gpt2)
    cache = ActivationCache(values | {f"{name}_grad": -value for name, value in values.items()}, gpt2)
    assert torch.equal(cache["z_grad", -1], -cache["z", 2])
    assert torch.equal(cache["blocks.1.attn.hook_pattern_grad"], -cache["pattern", 1])
    assert torch.equal(cache["scale_grad", 1, "ln2"], -cache["scale", 1, "ln2"])
    with pytest.raises(UnknownActivationError):
        cache["result_grad", 0]
    some = cache.at_positions((2, 5))
    assert some["pattern_grad", 0].shape == (3, 4, 3, 7)
    # A cache of nothing but gradients stacks as any other: only what is stored, as it is.
    name = "blocks.{}.attn.hook_result"
    gradients = ActivationCache({name.format(layer): torch.randn(3, 7, 4, 48) for layer in range(3)}, gpt2)
    stack = gradients.stack_head_results(-1)
    assert torch.equal(stack[4 * 2 + 1], gradients["result", 2][:, :, 1])


# Slices ---------------------------------------------------------------------------------------------------------------


def test_one_prompt_equals_the_same_prompt_without_batch_axis(model):
    _, values = run(model)
    one = ActivationCache(values, model).apply_slice_to_batch_dim(1)
    other = ActivationCache(run(model, TOKENS[1:2])[1], model)
    assert other.remove_batch_dim() is other
    assert not one.has_batch_dim
    assert not other.remove_batch_dim().has_batch_dim
    for name in values:
        assert one[name].ndim == values[name].ndim - 1
        close(torch.nan_to_num(one[name]), torch.nan_to_num(other[name]))
    for method in ("decompose_resid", "accumulated_resid", "stack_head_results", "get_full_resid_decomposition"):
        for apply_ln in (False, True):
            whole = getattr(ActivationCache(values, model), method)(apply_ln=apply_ln, pos_slice=(1, 4))
            part = getattr(one, method)(apply_ln=apply_ln, pos_slice=(1, 4))
            close(part, whole[:, 1])
    with pytest.raises(OptionError, match="no batch axis"):
        one.apply_slice_to_batch_dim(0)
    with pytest.raises(OptionError, match="3 prompts"):
        ActivationCache(values, model).remove_batch_dim()


def test_prompts_are_taken_as_transformer_lens_takes_them(cache):
    some = cache.apply_slice_to_batch_dim([2, 0])
    assert some.has_batch_dim
    assert torch.equal(some["z", 1], cache["z", 1][[2, 0]])
    assert torch.equal(cache.apply_slice_to_batch_dim((1, 3))["embed"], cache["embed"][1:3])
    assert torch.equal(cache.apply_slice_to_batch_dim(torch.tensor(2))["embed"], cache["embed"][2])
    shared = ActivationCache(dict(cache.items()) | {"table": torch.arange(20)}, cache.model)
    assert torch.equal(shared.apply_slice_to_batch_dim(0)["table"], torch.arange(20))
    with pytest.raises(SiteRangeError, match="prompt 3"):
        cache.apply_slice_to_batch_dim(3)


@pytest.mark.parametrize(
    ("pos_slice", "chosen"),
    [
        (-1, [6]),
        ((2, 6), [2, 3, 4, 5]),
        ((0, 7, 2), [0, 2, 4, 6]),
        ([5, 1], [5, 1]),
        (slice(3, None), [3, 4, 5, 6]),
        (torch.arange(7) > 4, [5, 6]),
        (None, list(range(7))),
    ],
    ids=str,
)
def test_positions_are_taken_of_everything(cache, pos_slice, chosen):
    some = cache.at_positions(pos_slice)
    assert list(some) == list(cache)
    for name, value in cache.items():
        axis = 2 if "pattern" in name or "attn_scores" in name else 1
        assert torch.equal(some[name], value.index_select(axis, torch.tensor(chosen))), name
        assert some[name].untyped_storage().nbytes() == some[name].numel() * some[name].element_size()
    if pos_slice is not None:
        close(some.stack_head_results(apply_ln=True), cache.stack_head_results(apply_ln=True, pos_slice=chosen))
        close(some.get_full_resid_decomposition(), cache.get_full_resid_decomposition(pos_slice=chosen))
    without = cache.apply_slice_to_batch_dim(0).at_positions(pos_slice)
    assert torch.equal(without["pattern", 0], some["pattern", 0][0])


def test_positions_of_what_is_not_known(gpt2):
    _, values = run(gpt2)
    cache = ActivationCache(values | {"sae.hook_latents": torch.arange(3 * 7 * 5).view(3, 7, 5)}, gpt2)
    assert torch.equal(cache.at_positions(2)["sae.hook_latents"], cache["sae.hook_latents"][:, 2:3])
    patterns = {name: value[0] for name, value in values.items() if "pattern" in name}
    few = ActivationCache(patterns | {"latents": torch.arange(35).view(7, 5)}, gpt2, has_batch_dim=False)
    assert torch.equal(few.at_positions([6, 0])["latents"], few["latents"][[6, 0]])
    assert torch.equal(few.at_positions(2)["pattern", 0], few["pattern", 0][:, 2:3])
    odd = ActivationCache(values | {"constant": torch.ones(4)}, gpt2)
    with pytest.raises(OptionError, match="constant"):
        odd.at_positions(2)


@pytest.mark.parametrize("method", ["decompose_resid", "stack_head_results", "accumulated_resid"])
def test_slices_that_are_not_there(gpt2, method, without_shape_checks):
    cache = ActivationCache(run(gpt2)[1], gpt2)
    for pos_slice in (7, -8, [0, 9]):
        with pytest.raises(SiteRangeError, match="position"):
            getattr(cache, method)(pos_slice=pos_slice)
    with pytest.raises(OptionError):
        getattr(cache, method)(pos_slice=[[1, 2], [3, 4]])
    for layer in (4, -2):
        with pytest.raises(SiteRangeError, match="final residual"):
            getattr(cache, method)(layer)


def test_to_moves_in_place(gpt2):
    cache = ActivationCache(run(gpt2)[1], gpt2)
    assert cache.to("meta") is cache
    assert {value.device.type for value in cache.values()} == {"meta"}
    assert cache.model.device.type == "cpu"
    assert cache.to("meta", move_model=False).to("meta")["z", 0].device.type == "meta"


def test_toggle_autodiff(gpt2):
    cache = ActivationCache(run(gpt2)[1], gpt2)
    with torch.enable_grad():
        cache.toggle_autodiff()
        assert not torch.is_grad_enabled()
        cache.toggle_autodiff(True)
        assert torch.is_grad_enabled()
