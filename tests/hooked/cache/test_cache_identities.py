"""ActivationCache: the residual stream taken apart, against identities, and what that holds in memory."""

import dataclasses
import itertools

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
from fastinterp.model import Norm, NormWeights
from tests.hooked.cache.cache_runs import MODELS, TOKENS, close, run

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
