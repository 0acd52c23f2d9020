"""Gradients of metrics at activations: against autograd through TransformerLens, identities, and what they hold."""

import dataclasses

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformer_lens.tools.analysis.attribution_patching import cache_activation_and_gradient

from fastinterp.errors import MetricError, OptionError, SiteRangeError, UnknownActivationError
from fastinterp.gradients import (
    DIFFERENTIABLE,
    RULES,
    Objective,
    Start,
    attributions,
    beginning,
    differentiable,
    gradients,
    kept_bytes,
    quadrature,
    tapped,
)
from fastinterp.metrics import METRICS
from fastinterp.model import final_logits, forward
from fastinterp.names import activation
from fastinterp.prompts import PromptSet
from tests.conftest import float64_stays

EXACT = 1e-10
SITES = ("resid_pre", "q", "k", "v", "pattern", "z", "attn_out", "resid_mid", "post", "mlp_out", "resid_post")


def batch_of(model, prompts, corrupt=None, **columns):
    columns = {"answer": [1] * len(prompts), "wrong": [2] * len(prompts)} | columns
    tokens = PromptSet.of(prompts, corrupt=corrupt, **columns).tokenize(model)
    (batch,) = tokens.batches(1 << 20)
    return batch


def every_key(model, sites=SITES):
    return [
        (site, layer)
        for layer in range(model.spec.n_layers)
        for site in sites
        if site != "resid_mid" or not model.spec.parallel
    ]


def relative(found, expected):
    size = float(expected.abs().max())
    assert size > 1e-2
    return float((found - expected).abs().max()) / size


@pytest.mark.parametrize("name", ["gpt2", "llama-gqa", "gpt-neox", "gemma2-softcaps", "mistral-window"])
def test_autograd_through_transformer_lens(zoo, name):
    """Of every site: values and gradients of the logit difference of one prompt."""
    model, bridge = zoo.model(name, dtype=torch.float64), zoo.bridge(name)
    prompt = [5, 9, 17, 23, 40, 99, 140, 3]
    keys = every_key(model)
    hooks = {key: activation(key[0]).hook.format(layer=key[1]) for key in keys}

    def metric(logits):
        return logits[0, -1, 30] - logits[0, -1, 31]

    with float64_stays():
        cache = cache_activation_and_gradient(
            bridge, torch.tensor([prompt]), metric, names_filter=[*hooks.values(), "hook_embed"]
        )
    batch = batch_of(model, [prompt], answer=[30], wrong=[31])
    objective = Objective(model=model, batch=batch, metric=METRICS["logit_diff"])
    found = gradients(model, beginning(model, batch.tokens), keys, objective)
    assert abs(float(found.metric[0]) - float(cache.metric)) < 1e-6
    for key, hook in hooks.items():
        expected = cache.gradients[hook]
        assert expected is not None, key
        if key[0] == "resid_mid":
            # There the hook is on what the MLP reads, behind the skip connection.
            expected = expected + cache.gradients[hooks["resid_post", key[1]]]
        assert found.gradients[key].shape == expected.shape
        # The bridge folds its weights in float32.
        assert relative(found.gradients[key], expected) < 1e-6, key
        assert relative(found.values[key], cache.activations[hook]) < 1e-6, key
    embedded = cache.gradients["hook_embed"]
    assert relative(found.gradients["resid_pre", 0], embedded) < 1e-6


def test_a_batch_of_mixed_lengths_equals_its_prompts(zoo, token_prompts, answers):
    for name in ("mistral-window", "gemma2-softcaps"):
        model = zoo.model(name, dtype=torch.float64)
        keys = every_key(model)
        batch = batch_of(model, token_prompts, **answers)
        # Whatever stands at padding, and however long it is.
        tokens = torch.where(batch.mask, batch.tokens, 77)
        tokens = torch.cat([tokens, torch.full((len(batch), 3), 78)], dim=1)
        batch = dataclasses.replace(batch, tokens=tokens)
        together = gradients(
            model, beginning(model, tokens), keys, Objective(model=model, batch=batch, metric=METRICS["logprob"])
        )
        for row, index in enumerate(batch.indices):
            prompt = token_prompts[index]
            columns = {column: [values[index]] for column, values in answers.items()}
            alone = batch_of(model, [prompt], **columns)
            objective = Objective(model=model, batch=alone, metric=METRICS["logprob"])
            expected = gradients(model, beginning(model, alone.tokens), keys, objective)
            assert abs(float(together.metric[row] - expected.metric[0])) < EXACT
            for key in keys:
                own, n = together.gradients[key][row], len(prompt)
                if key[0] == "pattern":
                    # What is beyond the diagonal cannot be patched: both runs have 0 there.
                    own = own[:, :n, :n].tril()
                    assert float((own - expected.gradients[key][0].tril()).abs().max()) < EXACT
                    continue
                assert float((own[:n] - expected.gradients[key][0]).abs().max()) < EXACT
                assert float(own[n:].abs().sum()) == 0.0


def test_runs_that_begin_at_a_layer(zoo, token_prompts, answers):
    model = zoo.model("gpt-neox", dtype=torch.float64)
    batch = batch_of(model, token_prompts, **answers)
    objective = Objective(model=model, batch=batch, metric=METRICS["logit_diff"])
    whole = gradients(model, beginning(model, batch.tokens), every_key(model), objective)
    start = Start(layer=1, resid=whole.values["resid_pre", 1])
    keys = [key for key in every_key(model) if key[1] >= 1]
    part = gradients(model, start, keys, objective)
    assert torch.equal(part.metric, whole.metric)
    for key in keys:
        assert float((part.gradients[key] - whole.gradients[key]).abs().max()) < EXACT
    values = tapped(model, start, [("z", 1)])
    assert float((values.values["z", 1] - whole.values["z", 1]).abs().max()) < EXACT
    assert float((values.resid - whole.values["resid_pre", 2]).abs().max()) < EXACT
    # Another value of an activation, and the gradient there: a finite difference along a direction.
    key = ("mlp_out", 1)
    other = whole.values[key] + 0.3 * torch.randn_like(whole.values[key])
    direction = torch.randn_like(other)
    found = gradients(model, start, [key], objective, replaced={key: other})
    assert torch.equal(found.values[key], other)
    sides = [
        objective(tapped(model, start, replaced={key: other + h * direction}, stop=model.spec.n_layers).resid)
        for h in (1e-5, -1e-5)
    ]
    slope = (found.gradients[key] * direction).flatten(1).sum(-1)
    assert float(((sides[0] - sides[1]) / 2e-5 - slope).abs().max()) < 1e-6
    assert float(slope.abs().max()) > 1e-3


def of_logits(name, logits, batch, clean):
    """The metrics, as they are written down, of all logits."""
    last = logits[torch.arange(len(batch)), batch.last]
    logprobs = last.log_softmax(-1)
    if name == "kl":
        before = clean[torch.arange(len(batch)), batch.last].log_softmax(-1)
        return (before.exp() * (before - logprobs)).sum(-1)
    if name == "loss":
        every = -logits.log_softmax(-1)[:, :-1].gather(-1, batch.tokens[:, 1:, None])[..., 0]
        return torch.stack([row[: n - 1].mean() for row, n in zip(every, batch.n_tokens.tolist())])
    right = [[int(i) for i in row if i >= 0] for row in batch.answer]
    wrong = [[int(i) for i in row if i >= 0] for row in batch.wrong]
    if name in ("logprob", "prob"):
        value = torch.stack([row[ids].logsumexp(-1) for row, ids in zip(logprobs, right)])
        return value.exp() if name == "prob" else value
    value = torch.stack([row[ids].mean() for row, ids in zip(last, right)])
    return value - torch.stack([row[ids].mean() for row, ids in zip(last, wrong)]) if name == "logit_diff" else value


@pytest.mark.parametrize("name", ["llama-gqa", "gemma2-softcaps", "gpt2"])
def test_every_metric_has_the_gradient_of_its_definition(zoo, name):
    model = zoo.model(name, dtype=torch.float64)
    prompts = [[5, 6, 7, 8], [9, 8, 7, 6, 5, 4], [11, 12]]
    columns = {"answer": [[30, 31], [40], [50]], "wrong": [[32], [41, 42, 43], [51]]}
    batch = batch_of(model, prompts, **columns)
    clean = forward(model.spec, model.weights, batch.tokens)
    changed = clean + 0.3 * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0), dtype=clean.dtype)
    plain = Objective(model=model, batch=batch, metric=METRICS["kl"])
    reference = plain.normalized(clean)
    assert set(DIFFERENTIABLE) == set(METRICS) - {"rank", "top1"}
    for metric in DIFFERENTIABLE:
        objective = Objective(model=model, batch=batch, metric=differentiable(metric), reference=reference)
        results = []
        for of in (
            objective,
            lambda x, metric=metric: of_logits(
                metric,
                final_logits(model.spec, model.weights, x),
                batch,
                final_logits(model.spec, model.weights, clean),
            ),
        ):
            leaf = changed.clone().requires_grad_()
            value = of(leaf)
            assert value.shape == (3,)
            results.append((value.detach(), *torch.autograd.grad(value.sum(), leaf)))
        (value, gradient), (expected, expected_gradient) = results
        assert float((value - expected).abs().max()) < EXACT, metric
        assert float((gradient - expected_gradient).abs().max()) < EXACT, metric
        assert float(gradient.abs().max()) > 1e-4
        # Copies of the batch, one behind the other.
        twice = objective.repeated(2)(torch.cat([changed, clean]))
        assert float((twice[:3] - value).abs().max()) < EXACT
        assert float((twice[3:] - objective(clean)).abs().max()) < EXACT


@pytest.mark.parametrize("rule", RULES)
def test_rules_integrate(rule):
    for steps in (1, 2, 5):
        alpha, weight = np.array(quadrature(rule, steps)).T
        assert len(alpha) == steps + (rule == "trapezoid")
        assert ((alpha >= 0) & (alpha <= 1)).all()
        assert abs(weight.sum() - 1) < 1e-14
        degree = {"gauss": 2 * steps - 1, "midpoint": 1, "trapezoid": 1}.get(rule, 0)
        assert abs(weight @ alpha**degree - 1 / (degree + 1)) < 1e-14
    errors = [abs(sum(w * np.exp(a) for a, w in quadrature(rule, n)) - np.e + 1) for n in (4, 8)]
    order = {"left": 2, "right": 2, "midpoint": 4, "trapezoid": 4}.get(rule)
    assert errors[1] < 1e-12 if order is None else errors[0] / errors[1] == pytest.approx(order, rel=0.1)


def test_rules_that_there_are_not(without_shape_checks):
    with pytest.raises(OptionError, match="rule='simpson' is not known: choose from 'midpoint'"):
        quadrature("simpson", 4)
    for steps in (0, -1, 2.5, True):
        with pytest.raises(OptionError, match="give a positive number of steps"):
            quadrature("midpoint", steps)


def test_sums_over_axes():
    generator = torch.Generator().manual_seed(0)
    mask = torch.tensor([[True, True, True], [True, False, False]])

    def three(*shape):
        return [torch.randn(2, *shape, generator=generator, dtype=torch.float64) for _ in range(3)]

    real = mask[..., None, None]
    source, base, gradient = three(3, 4, 5)
    product = (source - base) * gradient * real
    for reduce, expected in {
        (): product.sum(-1),
        ("pos",): product.sum((1, 3)),
        ("head",): product.sum((2, 3)),
        ("pos", "head", "neuron"): product.sum((1, 2, 3)),
    }.items():
        torch.testing.assert_close(attributions("z", source, base, gradient, mask, reduce), expected)
    # Gradients at padding are 0.
    source, base, gradient = three(3, 7)
    gradient = gradient * mask[..., None]
    product = (source - base) * gradient
    for reduce, expected in {
        (): product,
        ("pos",): product.sum(1),
        ("neuron",): product.sum(2),
        ("neuron", "pos"): product.sum((1, 2)),
    }.items():
        torch.testing.assert_close(attributions("post", source, base, gradient, mask, reduce), expected)
    source, base, gradient = (x.tril() for x in three(4, 3, 3))
    product = (source - base) * gradient * mask[:, None, :, None] * mask[:, None, None]
    for reduce, expected in {
        (): product,
        ("pos",): product.sum((2, 3)),
        ("head",): product.sum(1),
        ("head", "pos"): product.sum((1, 2, 3)),
    }.items():
        torch.testing.assert_close(attributions("pattern", source, base, gradient, mask, reduce), expected)


# What is held ---------------------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """Notes the shapes of all tensors that are made, and what autograd keeps of them."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        torch.utils._pytree.tree_map_only(torch.Tensor, lambda x: self.shapes.add(tuple(x.shape)), result)
        return result


def kept(model, batch, keys, start=None):
    """Bytes that autograd keeps in a run with gradients, and the shapes of all tensors."""
    objective = Objective(model=model, batch=batch, metric=METRICS["logit_diff"])
    weights = {w.untyped_storage().data_ptr() for block in model.weights.blocks for w in (block.W_QKV, block.W_O)}
    weights |= {
        w.untyped_storage().data_ptr() for block in model.weights.blocks for w in (block.W_gate_in, block.W_out)
    }
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            storages[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), Largest() as seen:
        gradients(model, start or beginning(model, batch.tokens), keys, objective)
    return sum(storages.values()), seen.shapes


@pytest.mark.parametrize("name", ["gpt2", "llama-gqa", "gemma2-softcaps", "qwen3-gqa"])
def test_what_is_kept(zoo, name):
    model = zoo.model(name)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(1, 379, (6, 40), generator=generator).tolist()
    batch = batch_of(model, prompts)
    n_tokens, n_layers = batch.tokens.numel(), model.spec.n_layers
    last = [("z", n_layers - 1)]
    sizes = {}
    for what, keys in (("last", last), ("z", [("z", i) for i in range(n_layers)]), ("all", every_key(model))):
        sizes[what], shapes = kept(model, batch, keys)
        estimate = n_tokens * kept_bytes(model, 40, keys)
        # Masks, rotations and the metric's few columns are on top.
        assert sizes[what] < estimate + 200_000
        if what == "z":
            assert estimate < 3 * sizes[what]
        d_model, n_heads = model.spec.d_model, model.spec.n_heads
        rows = {shape for shape in shapes if torch.Size(shape).numel() >= n_tokens * n_heads}
        assert not {shape for shape in rows if len(shape) > 3 and shape[-2:] == (n_heads, d_model)}
        assert not {shape for shape in rows if shape[-1:] == (model.spec.d_vocab,) and shape[0] != d_model}
    # Of layers below the first tapped one, nothing.
    assert sizes["last"] < 1.5 * sizes["z"] / n_layers
    # Tapped activations are mostly what is kept anyway.
    widths = sum(n_tokens * 4 * model.spec.d_model for _ in range(n_layers))
    assert sizes["all"] - sizes["z"] < 20 * widths


# What is refused ------------------------------------------------------------------------------------------------


def test_what_there_is_not(zoo):
    model = zoo.model("gpt-neox")
    batch = batch_of(model, [[5, 6, 7]])
    objective = Objective(model=model, batch=batch, metric=METRICS["logit"])
    start = beginning(model, batch.tokens)
    with pytest.raises(UnknownActivationError, match="there is no resid_mid of layer 0 in a"):
        gradients(model, start, [("resid_mid", 0)], objective)
    with pytest.raises(UnknownActivationError, match="did you mean 'resid_pre'"):
        tapped(model, start, [("resid_prev", 0)])
    with pytest.raises(SiteRangeError, match="layer 3 is out of range"):
        gradients(model, start, [("z", 3)], objective)
    for name in ("rank", "top1"):
        with pytest.raises(MetricError, match=f"'{name}' counts tokens and has no gradient: choose from logit_diff"):
            differentiable(name)
    with pytest.raises(MetricError, match="did you mean 'logprob'"):
        differentiable("log_prob")


def test_a_function_that_looks_at_padding(zoo):
    model = zoo.model("gpt2")
    batch = batch_of(model, [[5, 6, 7], [5, 6]])
    objective = Objective(
        model=model, batch=batch, metric=METRICS["logit"], function=lambda logits, tokens, n_tokens: logits[:, -1, 0]
    )
    with pytest.raises(MetricError, match="looks at logits behind a prompt's last token"):
        gradients(model, beginning(model, batch.tokens), [("z", 0)], objective)
