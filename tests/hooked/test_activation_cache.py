"""ActivationCache: look-ups, slices, and the residual stream taken apart, against TransformerLens and identities."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fastinterp
from fastinterp import HookedTransformer
from fastinterp.errors import (
    AnswerTokenError,
    OptionError,
    SiteRangeError,
    TokenRangeError,
    UnknownActivationError,
)
from fastinterp.hooked.activation_cache import ActivationCache
from fastinterp.hooked.contributions import Readout
from fastinterp.model import Norm, NormWeights, Taps, final_logits, forward
from fastinterp.model.forward import missing_because
from fastinterp.names import ACTIVATIONS

DERIVED = {"result", "attn_in", "q_input", "k_input", "v_input", "mlp_in"}
TOKENS = torch.randint(1, 379, (3, 7), generator=torch.Generator().manual_seed(2))
# Layer norm with biases; grouped queries; biases everywhere; parallel blocks; post-norms; a norm before q and k.
MODELS = [
    "gpt2",
    "llama-gqa",
    "llama-biases-mqa-head-dim",
    "gpt-neox",
    "gptj",
    "gemma2-softcaps",
    "gemma3-mha-biases-final-softcap-untied",
    "opt",
]
ORACLES = [(name, processing) for name in ("gpt2", "llama-gqa") for processing in ("transformer_lens", "none")]


@pytest.fixture(autouse=True)
def no_gradients():
    with torch.no_grad():
        yield


def run(model, tokens=TOKENS, also=()):
    """The logits and a dictionary of everything that is not derived."""
    names = [name for name in ACTIVATIONS if missing_because(model.spec, name) is None]
    names = [name for name in names if name not in DERIVED or name in also]
    taps = Taps.of(model.spec.n_layers, capture=names)
    logits = final_logits(model.spec, model.weights, forward(model.spec, model.weights, tokens, taps=taps), taps=taps)
    return logits, {ACTIVATIONS[name].hook.format(layer=layer): value for (name, layer), value in taps.values.items()}


@pytest.fixture(params=MODELS)
def model(zoo, request):
    return zoo.model(request.param, dtype=torch.float64)


@pytest.fixture(params=MODELS)
def raw(zoo, request):
    return zoo.model(request.param, dtype=torch.float64, processing="none")


@pytest.fixture
def gpt2(zoo):
    return zoo.model("gpt2", dtype=torch.float64)


@pytest.fixture
def cache(model):
    return ActivationCache(run(model)[1], model)


def close(ours, theirs, atol=1e-9):
    assert ours.shape == theirs.shape
    assert ours.numel() == 0 or float((ours - theirs).abs().max()) <= atol


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


# Against TransformerLens ----------------------------------------------------------------------------------------------


class Pair:
    """The same tensors in both libraries' caches, over the same weights."""

    def __init__(self, zoo, name, processing):
        from transformer_lens import ActivationCache as Theirs

        self.bridge = zoo.bridge(name, compatibility=processing == "transformer_lens")
        # Its own processed weights, which went through float32.
        self.model = fastinterp.load(self.bridge, dtype=torch.float64, device="cpu", processing="none")
        self.logits, self.values = run(self.model)
        self.ours = ActivationCache(self.values, self.model)
        self.theirs = Theirs(dict(self.values), self.bridge)
        self.weight = self.model.weights.ln_final.w

    def check(self, method, *args, linear_norm=None, **options):
        """Compares values, shapes and labels. ``linear_norm``: the weight that TransformerLens leaves out."""
        ours = getattr(self.ours, method)(*args, **options)
        theirs = getattr(self.theirs, method)(*args, **options)
        if options.get("return_labels"):
            assert ours[1] == theirs[1]
            ours, theirs = ours[0], theirs[0]
        close(ours, theirs if linear_norm is None else theirs * linear_norm)


@pytest.fixture(params=ORACLES, ids="-".join)
def pair(zoo, request, float64_rms_norm):
    return Pair(zoo, *request.param)


POSITIONS = [None, -1, (1, 5), [4, 0, 2]]


def test_accumulated_resid_equals_transformer_lens(pair):
    for layer, incl_mid, pos_slice in itertools.product((None, -1, 0, 2, 3), (False, True), POSITIONS):
        options = dict(layer=layer, incl_mid=incl_mid, pos_slice=pos_slice, return_labels=True)
        pair.check("accumulated_resid", **options)
        if layer in (None, -1, 3):
            pair.check("accumulated_resid", apply_ln=True, **options)
        else:
            pair.check("accumulated_resid", apply_ln=True, linear_norm=weight(pair, layer), **options)
            pair.check("accumulated_resid", mlp_input=True, **options)


def weight(pair, layer, mlp_input=False):
    """The norm's own weight, which TransformerLens leaves out where it is not folded into the next matrix."""
    if layer in (None, -1, 3):
        return pair.model.weights.ln_final.w
    block = pair.model.weights.blocks[layer]
    return (block.ln2 if mlp_input else block.ln1).w


def test_decompose_resid_equals_transformer_lens(pair):
    for layer, mode, pos_slice in itertools.product((None, 0, 2), ("all", "attn", "mlp"), POSITIONS):
        options = dict(layer=layer, mode=mode, pos_slice=pos_slice, return_labels=True)
        pair.check("decompose_resid", **options)
        pair.check("decompose_resid", apply_ln=True, linear_norm=weight(pair, layer), **options)
        if layer:
            pair.check("decompose_resid", incl_embeds=False, **options)
            pair.check("decompose_resid", mlp_input=True, **options)
            linear = weight(pair, layer, True)
            pair.check("decompose_resid", mlp_input=True, apply_ln=True, linear_norm=linear, **options)


def test_stack_head_results_equals_transformer_lens(pair):
    for layer, remainder, pos_slice in itertools.product((-1, None, 1, 3), (False, True), POSITIONS):
        options = dict(layer=layer, incl_remainder=remainder, pos_slice=pos_slice, return_labels=True)
        pair.check("stack_head_results", **options)
        pair.check("stack_head_results", apply_ln=True, linear_norm=weight(pair, layer), **options)
    pair.check("stack_head_results", 0, return_labels=True, pos_slice=-1)


def test_neuron_results_equal_transformer_lens(pair):
    one, several = torch.randn(2, 48, dtype=torch.float64)[0], torch.randn(48, 3, dtype=torch.float64)
    for pos_slice, neurons, project in itertools.product(
        (None, -1, [4, 0]), (None, 5, (2, 6), [7, 3]), (None, one, several)
    ):
        if neurons is None and pos_slice is None and project is None:
            continue
        options = dict(pos_slice=pos_slice, neuron_slice=neurons, project_output_onto=project)
        pair.check("get_neuron_results", 1, **options)
        options |= dict(return_labels=True)
        for remainder in (False, True):
            pair.check("stack_neuron_results", 2, incl_remainder=remainder, **options)
            pair.check("stack_neuron_results", 1, incl_remainder=remainder, mlp_input=True, **options)
            if pair.weight is None or project is None:
                linear = weight(pair, -1)
                pair.check(
                    "stack_neuron_results", -1, apply_ln=True, incl_remainder=remainder, linear_norm=linear, **options
                )


def test_the_full_decomposition_equals_transformer_lens(pair):
    several = torch.randn(48, 3, dtype=torch.float64)
    method = "get_full_resid_decomposition"
    for layer, expand, pos_slice in itertools.product((None, 0, 2), (False, True), (None, -1, [4, 0])):
        options = dict(layer=layer, expand_neurons=expand, pos_slice=pos_slice, return_labels=True)
        pair.check(method, **options)
        pair.check(method, apply_ln=True, linear_norm=weight(pair, layer), **options)
        if layer is not None:
            pair.check(method, mlp_input=True, **options)
        if layer == 0 or pair.model.spec.family == "llama":
            continue  # without biases, theirs are float32 zeros, which cannot be projected by float64
        for project in (several, several[:, 0]):
            pair.check(method, project_output_onto=project, **options)
            if pair.weight is None:
                pair.check(method, project_output_onto=project, apply_ln=True, **options)


def test_stack_activation_and_head_results_equal_transformer_lens(pair):
    for args in (("z",), ("pattern", 2), ("resid_pre", None), ("scale", -1, "ln2"), ("mlp_out", 1)):
        pair.check("stack_activation", *args)
    pair.ours.compute_head_results()
    pair.theirs.compute_head_results()
    for layer in range(3):
        close(pair.ours.cache_dict[f"blocks.{layer}.attn.hook_result"], pair.theirs["result", layer])


def test_apply_ln_to_stack_equals_transformer_lens(pair):
    stack = torch.randn(4, 3, 7, 48, dtype=torch.float64)
    for layer, mlp_input in ((None, False), (-1, False), (1, False), (1, True), (3, False)):
        linear = weight(pair, layer, mlp_input)
        for batch_slice in (None, 1, [2, 0]):
            options = dict(mlp_input=mlp_input, batch_slice=batch_slice)
            pair.check("apply_ln_to_stack", stack, layer, linear_norm=linear, **options)
            pair.check("apply_ln_to_stack", stack[:, :, [1, 3]], layer, linear_norm=linear, pos_slice=[1, 3], **options)
    # The notebooks' shapes: one residual without a component axis, and a stack of layers of heads.
    pair.check("apply_ln_to_stack", stack[0, :, -1], layer=-1, pos_slice=-1, linear_norm=weight(pair, -1))
    heads = torch.randn(2, 4, 3, 48, dtype=torch.float64)
    pair.check("apply_ln_to_stack", heads, layer=-1, pos_slice=-1, linear_norm=weight(pair, -1))
    pair.check("apply_ln_to_stack", stack, recompute_ln=True)


TOKEN_INPUTS = [
    (5, None),
    (torch.tensor(5), torch.tensor(9)),
    (torch.tensor([5, 6, 7]), torch.tensor([1, 2, 3])),
    (torch.arange(7) + 3, None),
    (torch.arange(21).view(3, 7), torch.arange(21).view(3, 7) + 40),
    (torch.arange(7)[None], None),
    (torch.tensor([5]), torch.tensor([6])),
]


@pytest.mark.parametrize("tokens", TOKEN_INPUTS, ids=range(len(TOKEN_INPUTS)))
@pytest.mark.parametrize("name", ["gpt2", "llama-gqa"])
def test_logit_attrs_equal_transformer_lens(zoo, name, tokens):
    pair = Pair(zoo, name, "transformer_lens")
    stack = pair.ours.decompose_resid()
    pair.check("logit_attrs", stack, *tokens)
    if not isinstance(tokens[0], torch.Tensor) or tokens[0].shape in ((), (1,)):
        pair.check("logit_attrs", stack, *tokens, batch_slice=[2, 0])
        pair.check("logit_attrs", stack, *tokens, batch_slice=1)
        pair.check("logit_attrs", pair.ours.decompose_resid(pos_slice=[1, 3]), *tokens, pos_slice=[1, 3])
    if not isinstance(tokens[0], torch.Tensor) or tokens[0].shape == (3,):
        pair.check("logit_attrs", pair.ours.decompose_resid(pos_slice=-1), *tokens, pos_slice=-1)


@pytest.mark.parametrize("name", ["gpt2", "llama-gqa"])
def test_a_cache_that_transformer_lens_made(zoo, name, float64_rms_norm):
    bridge = zoo.bridge(name)
    _, theirs = bridge.run_with_cache(TOKENS)
    ours = ActivationCache(theirs.cache_dict, fastinterp.load(bridge, dtype=torch.float64, processing="none"))
    for method in ("decompose_resid", "accumulated_resid", "stack_head_results", "get_full_resid_decomposition"):
        for options in (dict(), dict(apply_ln=True), dict(pos_slice=-1, apply_ln=True)):
            expected, labels = getattr(theirs, method)(return_labels=True, **options)
            stack, own_labels = getattr(ours, method)(return_labels=True, **options)
            close(stack, expected)
            assert own_labels == labels


# Identities -----------------------------------------------------------------------------------------------------------


def layers(spec):
    return [None, -1, *range(spec.n_layers + 1)]


def test_decompositions_sum_to_the_residual(cache):
    spec = cache.model.spec
    for layer, mlp_input in itertools.product(layers(spec), (False, True)):
        final = layer in (None, -1, spec.n_layers)
        if mlp_input and final:
            for method in (cache.decompose_resid, cache.get_full_resid_decomposition, cache.accumulated_resid):
                with pytest.raises(SiteRangeError, match="mlp_input"):
                    method(layer, mlp_input=True)
            continue
        whole = cache["resid_post", -1] if final else cache["mlp_in" if mlp_input else "resid_pre", layer]
        close(cache.decompose_resid(layer, mlp_input).sum(0), whole)
        for expand in (False, True):
            full, labels = cache.get_full_resid_decomposition(layer, mlp_input, expand, return_labels=True)
            assert len(full) == len(labels) == len(set(labels))
            close(full.sum(0), whole)
        neurons = cache.stack_neuron_results(layer, incl_remainder=True, mlp_input=mlp_input)
        close(neurons.sum(0), whole)
        if not mlp_input:
            close(cache.stack_head_results(layer, incl_remainder=True).sum(0), whole)


def test_heads_and_neurons_and_biases_sum_to_what_was_written(model):
    _, values = run(model, also=("result",))
    spec, blocks = model.spec, model.weights.blocks
    results = {name for name in values if "hook_result" in name}
    scales = {name for name in values if "_post.hook_scale" in name}
    raws = {name for name in values if name.endswith(("attn.hook_out", "mlp.hook_out"))}
    zs = {name for name in values if "hook_z" in name}
    # Whatever of it is stored, the frozen post-norm and the heads are the same.
    for missing in (results, results | scales, results | scales | raws, scales | raws | zs, zs | raws):
        cache = ActivationCache({name: value for name, value in values.items() if name not in missing}, model)
        heads = cache.stack_head_results().unflatten(0, (spec.n_layers, spec.n_heads)).sum(1)
        neurons = cache.stack_neuron_results(-1).unflatten(0, (spec.n_layers, -1)).sum(1)
        for layer, w in enumerate(blocks):
            rest = values[f"blocks.{layer}.hook_attn_out"] - heads[layer]
            b_O = torch.zeros_like(rest) if w.b_O is None else w.b_O.expand_as(rest)
            if w.ln1_post is not None:
                b_O = b_O * w.ln1_post.w / values[f"blocks.{layer}.ln1_post.hook_scale"]
            close(rest, b_O)
            rest = values[f"blocks.{layer}.hook_mlp_out"] - neurons[layer]
            b_out = torch.zeros_like(rest) if w.b_out is None else w.b_out.expand_as(rest)
            assert w.ln2_post is None or w.b_out is None
            close(rest, b_out)


@pytest.mark.parametrize("processing", ["transformer_lens", "none"])
@pytest.mark.parametrize("name", MODELS)
def test_attributions_sum_to_the_logit_difference(zoo, name, processing):
    model = zoo.model(name, dtype=torch.float64, processing=processing)
    logits, values = run(model)
    cap = model.spec.final_softcap
    logits = logits if cap is None else cap * torch.atanh(logits / cap)
    cache = ActivationCache(values, model)
    right, wrong = torch.tensor([3, 40, 77]), torch.tensor([200, 11, 5])
    rows = torch.arange(3)
    difference = logits[rows, :, right] - logits[rows, :, wrong]
    u = (model.weights.W_U[:, right] - model.weights.W_U[:, wrong]).t()
    b_U, b = model.weights.b_U, model.weights.ln_final.b
    constant = 0.0 if b_U is None else (b_U[right] - b_U[wrong])[:, None]
    constant = constant if b is None else constant + (u @ b)[:, None]
    tolerance = 1e-9 if cap is None else 1e-6  # atanh close to the cap
    for stack in (
        cache.decompose_resid(),
        cache.get_full_resid_decomposition(),
        cache.get_full_resid_decomposition(expand_neurons=False),
        cache.stack_head_results(incl_remainder=True),
    ):
        attributions = cache.logit_attrs(stack, right, wrong)
        close(attributions.sum(0) + constant, difference, tolerance)
        by_hand = torch.einsum("cbpd,bd->cbp", cache.apply_ln_to_stack(stack), u)
        close(attributions, by_hand)
        last = cache.logit_attrs(stack[:, :, -1], right, wrong, pos_slice=-1)
        close(last, attributions[:, :, -1])
    close(cache.accumulated_resid(apply_ln=True)[-1] @ model.weights.W_U + (0 if b_U is None else b_U), logits, 1e-6)


def test_a_projection_equals_projecting_afterwards(raw):
    cache = ActivationCache(run(raw)[1], raw)
    directions = torch.randn(raw.spec.d_model, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for apply_ln, pos_slice, expand in itertools.product((False, True), (None, -1, (1, 4)), (False, True)):
        options = dict(apply_ln=apply_ln, pos_slice=pos_slice)
        full = cache.get_full_resid_decomposition(expand_neurons=expand, **options)
        for several in (directions, directions[:, 0]):
            projected = cache.get_full_resid_decomposition(
                expand_neurons=expand, project_output_onto=several, **options
            )
            close(projected, full @ several)
        neurons = cache.stack_neuron_results(2, neuron_slice=[3, 8], **options)
        projected = cache.stack_neuron_results(2, neuron_slice=[3, 8], project_output_onto=directions, **options)
        close(projected, neurons @ directions)


def test_the_norm_of_a_decomposition_is_what_the_sublayer_reads(raw):
    _, values = run(raw)
    cache, spec = ActivationCache(values, raw), raw.spec
    for layer, mlp_input in itertools.product(range(spec.n_layers), (False, True)):
        w = raw.weights.blocks[layer]
        norm, name = (w.ln2, "ln2") if mlp_input else (w.ln1, "ln1")
        reads = values[f"blocks.{layer}.{name}.hook_normalized"]
        reads = reads if norm.w is None else reads * norm.w
        close(cache.decompose_resid(layer, mlp_input, apply_ln=True).sum(0), reads)
        close(cache.get_full_resid_decomposition(layer, mlp_input, apply_ln=True).sum(0), reads)


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_a_readout_goes_through_its_norms_in_order(kind):
    generator = torch.Generator().manual_seed(4)

    def random(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    first, second = ((random(2, 5, 1).exp(), NormWeights(w=random(8), b=random(8))) for _ in range(2))
    x, W, directions = random(2, 5, 3, 4), random(3, 4, 8), random(8, 2)
    expected = torch.einsum("bpue,ued->ubpd", x, W)
    for scale, weights in (first, second):
        expected = expected - expected.mean(-1, keepdim=True) if kind == "layer" else expected
        expected = expected / scale * weights.w
    readout = Readout(norm=Norm(kind=kind, eps=1e-5), project=directions).after(*second).after(*first)
    close(readout.unit(x, W), expected @ directions, 1e-12)
    close(readout(torch.einsum("bpue,ued->ubpd", x, W)), expected @ directions, 1e-12)
    close(dataclasses.replace(readout, project=None).unit(x, W), expected, 1e-12)


def test_parallel_blocks_have_no_middle(zoo):
    model = zoo.model("gpt-neox", dtype=torch.float64)
    cache = ActivationCache(run(model)[1], model)
    for options in (dict(incl_mid=True), dict(layer=1, mlp_input=True)):
        with pytest.raises(UnknownActivationError, match="same residual"):
            cache.accumulated_resid(**options)
    assert cache.accumulated_resid(return_labels=True)[1] == ["0_pre", "1_pre", "2_pre", "final_post"]


def test_heads_are_those_of_the_shared_keys(zoo):
    model = zoo.model("llama-gqa", dtype=torch.float64)
    cache = ActivationCache(run(model)[1], model)
    assert cache["k_input", 0].shape == (3, 7, 2, 48)
    assert cache["q_input", 0].shape == (3, 7, 6, 48)
    stack, labels = cache.stack_head_results(return_labels=True)
    index = labels.index("L1H4")
    close(stack[index], cache["z", 1][:, :, 4] @ model.weights.blocks[1].W_O[4])


def test_tokens_that_are_not_there(gpt2, without_shape_checks):
    cache = ActivationCache(run(gpt2)[1], gpt2)
    stack = cache.decompose_resid()
    text = gpt2.token_strings([60])[0]
    close(cache.logit_attrs(stack, text), cache.logit_attrs(stack, 60))
    with pytest.raises(AnswerTokenError, match="is not one token"):
        cache.logit_attrs(stack, text * 3 + " shops")
    with pytest.raises(AnswerTokenError, match="shape"):
        cache.logit_attrs(stack, torch.tensor([1, 2, 3]), 5)
    for tokens in (400, -1, torch.tensor([0, 400, 3])):
        with pytest.raises(TokenRangeError):
            cache.logit_attrs(stack, tokens)
    with pytest.raises(OptionError, match="mode"):
        cache.decompose_resid(mode="heads")


def test_embeddings_are_not_left_out_in_silence(gpt2):
    _, values = run(gpt2)
    del values["hook_embed"]
    cache = ActivationCache(values, gpt2)
    for method in (cache.decompose_resid, cache.get_full_resid_decomposition):
        with pytest.raises(UnknownActivationError, match="hook_embed"):
            method()
    assert len(cache.decompose_resid(incl_embeds=False)) == 6


@pytest.mark.parametrize("layer", [0, 1])
def test_gradients_go_through_a_stack(gpt2, layer):
    # With those of the first layer, the stack is made in another way.
    _, values = run(gpt2)
    name = f"blocks.{layer}.attn.hook_z"
    with torch.enable_grad():
        z = values[name].clone().requires_grad_()
        cache = ActivationCache(values | {name: z}, gpt2)
        for stack in (cache.stack_head_results(), cache.get_full_resid_decomposition(expand_neurons=False)):
            (gradient,) = torch.autograd.grad(stack.square().sum(), z)
            heads = torch.einsum("bphe,hed->bphd", z, gpt2.weights.blocks[layer].W_O)
            (expected,) = torch.autograd.grad(heads.square().sum(), z)
            close(gradient, expected)
            close(stack[4 * layer + 2].detach(), heads[:, :, 2].detach())


def test_bfloat16_stays_bfloat16(zoo):
    model = zoo.model("gpt2", dtype=torch.bfloat16)
    cache = ActivationCache(run(model)[1], model)
    heads = cache.stack_head_results(apply_ln=True)
    assert heads.dtype == cache.decompose_resid(apply_ln=True).dtype == torch.bfloat16
    exact = zoo.model("gpt2", dtype=torch.float64)
    wide = ActivationCache({name: value.double() for name, value in cache.items()}, exact)
    reference = wide.stack_head_results(apply_ln=True)
    assert float((heads.double() - reference).norm() / reference.norm()) < 0.02
    assert cache.logit_attrs(heads, 5).dtype == torch.float32


# As notebooks use it --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "gemma2-softcaps"])
def test_attributions_from_the_hooks_of_a_notebook(zoo, name):
    """Hooks fill plain dictionaries; caches are made of them, moved, and stacked."""
    model = HookedTransformer(zoo.model(name, dtype=torch.float64))
    spec = model.model.spec
    exact = ActivationCache(run(model.model)[1], model)
    cache, gradients = {}, {}
    with torch.enable_grad():
        model.add_hook(lambda name: "z" in name, lambda value, hook: cache.update({hook.name: value.detach()}), "fwd")
        model.add_hook(lambda name: "z" in name, lambda value, hook: gradients.update({hook.name: value}), "bwd")
        logits = model(TOKENS)
        logits[:, -1, 5].sum().backward()
        model.reset_hooks()
    cache = ActivationCache(ActivationCache(cache, model), model).to("cpu")
    gradients = ActivationCache(gradients, model).to("cpu")
    assert cache.stack_activation("z").shape == (spec.n_layers, 3, 7, spec.n_heads, spec.d_head)
    close(cache.stack_head_results(-1)[:, :, -1], exact.stack_head_results()[:, :, -1])
    assert gradients.stack_activation("z", -1, "attn").shape == cache.stack_activation("z").shape
    # The gradient times z is exact where z enters linearly: last position, last layer, frozen norms aside.
    assert float(gradients["z", -1][:, :-1].abs().max()) < 1e-12
    assert float(gradients["z", -1][:, -1].abs().min()) > 0


def test_the_caches_of_run_with_cache(zoo):
    model = HookedTransformer(zoo.model("gpt2", dtype=torch.float64))
    logits, cache = model.run_with_cache(TOKENS)
    for pos_slice in (-1, 3):
        residual, labels = cache.get_full_resid_decomposition(
            layer=-1, pos_slice=pos_slice, return_labels=True, expand_neurons=False
        )
        scaled = cache.apply_ln_to_stack(residual, layer=-1, pos_slice=pos_slice)
        directions = model.tokens_to_residual_directions(torch.tensor([5, 6, 7]))
        total = torch.einsum("cbd,bd->b", scaled, directions) + model.b_U[[5, 6, 7]]
        close(total, logits[torch.arange(3), pos_slice, torch.tensor([5, 6, 7])])
        assert len(labels) == 4 * 3 + 3 + 3
        close(cache.logit_attrs(residual, torch.tensor([5, 6, 7]), pos_slice=pos_slice).sum(0), total - model.b_U[5:8])
    _, few = model.run_with_cache(TOKENS[:1], pos_slice=-1, remove_batch_dim=True)
    assert few["resid_post", -1].shape == (1, 48)
    assert few["pattern", 0].shape == (4, 1, 7)
    close(few.stack_head_results(apply_ln=True)[:, 0], cache.stack_head_results(apply_ln=True, pos_slice=-1)[:, 0])


# Memory ---------------------------------------------------------------------------------------------------------------

N_PROMPTS, N_POS, N_LAYERS, N_HEADS, D_MODEL, D_MLP = 4, 64, 2, 8, 64, 96
RESULT = N_PROMPTS * N_POS * N_HEADS * D_MODEL
LAST_HEADS = N_PROMPTS * N_LAYERS * N_HEADS * D_MODEL


class LargestAllocation(TorchDispatchMode):
    """Remembers the largest tensor that an operation made; views of what was there before do not count."""

    def __init__(self):
        super().__init__()
        self.numbers, self.operation = 0, ""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = set()
        torch.utils._pytree.tree_map_only(
            torch.Tensor, lambda tensor: given.add(tensor.untyped_storage().data_ptr()), (args, kwargs or {})
        )
        result = function(*args, **(kwargs or {}))

        def note(tensor):
            storage = tensor.untyped_storage()
            numbers = storage.nbytes() // tensor.element_size()
            if storage.data_ptr() not in given and numbers > self.numbers:
                self.numbers, self.operation = numbers, f"{function}: {tuple(tensor.shape)}"

        torch.utils._pytree.tree_map_only(torch.Tensor, note, result)
        return result


@pytest.fixture(scope="module", params=["llama", "gemma2"])
def wide_cache(tiny_builders, request):
    sizes = dict(hidden_size=D_MODEL, intermediate_size=D_MLP, num_hidden_layers=N_LAYERS)
    sizes |= dict(num_attention_heads=N_HEADS, num_key_value_heads=N_HEADS, head_dim=4, vocab_size=400)
    model = fastinterp.load(tiny_builders[request.param](**sizes), device="cpu")
    tokens = torch.randint(0, 400, (N_PROMPTS, N_POS), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return ActivationCache(run(model, tokens)[1], model)


def largest(function, *args, **options):
    with LargestAllocation() as seen:
        function(*args, **options)
    return seen


def test_the_instrument_sees_results(wide_cache):
    assert largest(wide_cache.stack_head_results).numbers >= N_LAYERS * RESULT
    assert largest(lambda: wide_cache["result", 0]).numbers == RESULT


@pytest.mark.parametrize("apply_ln", [False, True])
def test_heads_at_one_position_need_the_memory_of_one_position(wide_cache, apply_ln):
    seen = largest(wide_cache.stack_head_results, pos_slice=-1, apply_ln=apply_ln)
    assert seen.numbers <= LAST_HEADS < RESULT // 4, seen.operation


def test_a_projection_forms_neither_heads_nor_neurons(wide_cache):
    direction = torch.randn(D_MODEL)
    seen = largest(wide_cache.get_full_resid_decomposition, apply_ln=True, project_output_onto=direction)
    components = N_LAYERS * (N_HEADS + D_MLP) + 2
    assert seen.numbers <= N_PROMPTS * N_POS * components < N_PROMPTS * N_POS * D_MLP * D_MODEL // 8, seen.operation


def test_a_stack_is_not_held_twice(wide_cache):
    seen = largest(wide_cache.stack_head_results, apply_ln=True)
    assert seen.numbers == N_LAYERS * RESULT, seen.operation
    with LargestAllocation() as copies:
        wide_cache.logit_attrs(wide_cache.decompose_resid(), 5)
    assert copies.numbers <= (2 * N_LAYERS + 1) * N_PROMPTS * N_POS * D_MODEL
