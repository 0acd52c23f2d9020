"""ActivationCache: the residual stream taken apart, against TransformerLens."""

import itertools

import pytest
import torch

import fastinterp
from fastinterp.hooked.activation_cache import ActivationCache
from tests.hooked.cache.cache_runs import ORACLES, TOKENS, close, run

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
