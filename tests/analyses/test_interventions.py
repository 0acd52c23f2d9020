"""``intervene``: edits of every kind against hooks of TransformerLens, prompt by prompt, and what is refused."""

import numpy as np
import pytest
import torch

import fastinterp
from fastinterp import Edit, PromptSet
from fastinterp.analyses import Intervention
from fastinterp.errors import (
    FastinterpError,
    MetricError,
    OptionError,
    PromptPairError,
    SiteRangeError,
    UnknownActivationError,
)

LENGTHS = (5, 1, 9, 4, 9)
LONGEST = max(LENGTHS)
METRICS = ("logit_diff", "kl", "loss")
TOLERANCE = 1e-5  # the folded weights of a bridge went through float32


def drawn(seed):
    rng = np.random.default_rng(seed)
    return [rng.integers(1, 370, n).tolist() for n in LENGTHS]


@pytest.fixture(scope="module")
def pairs():
    n = len(LENGTHS)
    return PromptSet.of(drawn(3), corrupt=drawn(4), answer=list(range(n)), wrong=list(range(50, 50 + n)))


def normal(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def some_positions():
    """Where prompt and position add up to an even number, and at every prompt's first token."""
    rows, pos = torch.meshgrid(torch.arange(len(LENGTHS)), torch.arange(LONGEST), indexing="ij")
    return ((rows + pos) % 2 == 0) | (pos == 0)


def variants_of(spec):
    n, d_model, d_head = len(LENGTHS), spec.d_model, spec.d_head
    return {
        "scaled": Edit(site="z", layer=1, head=2, how="scale", replacement=0.5),
        "steered": Edit(site="resid_pre", layer=1, how="add", replacement=normal(d_model)),
        "steered where": Edit(site="resid_pre", layer=1, how="add", replacement=normal(d_model),
                              positions=some_positions()),
        "values of every prompt": Edit(site="mlp_out", layer=0, replacement=normal(n, LONGEST, d_model)),
        "by position": Edit(site="z", layer=0, head=1, replacement=normal(LONGEST, d_head)),
        "by prompt": Edit(site="q", layer=2, head=0, replacement=normal(n, 1, d_head)),
        "a neuron": Edit(site="post", layer=1, neuron=3, how="add", replacement=normal(n, LONGEST)),
        "of the other run": Edit(site="attn_out", layer=1, replacement="source"),
        "from the end": Edit(site="resid_post", layer=-1, how="add", replacement=normal(d_model, seed=2)),
        "together": [
            Edit(site="v", layer=0, head=0, how="scale", replacement=2.0),
            Edit(site="z", layer=0, head=1),
            Edit(site="mlp_out", layer=2, how="add", replacement=normal(d_model, seed=1)),
        ],
    }  # fmt: skip


HOOKS = {
    "z": "attn.hook_z", "q": "attn.hook_q", "v": "attn.hook_v", "resid_pre": "hook_resid_pre", "post": "mlp.hook_post",
    "mlp_out": "hook_mlp_out", "attn_out": "hook_attn_out", "resid_post": "hook_resid_post",
}  # fmt: skip


def expected_value(edit, row, n_pos, current, other):
    """What stands at one prompt's activation ``[pos, ...]`` after an edit, written out by itself."""
    at = (slice(None), edit.head) if edit.head is not None else (slice(None),)
    at = (slice(None), edit.neuron) if edit.neuron is not None else at
    part, given = current[at], edit.replacement
    if isinstance(given, str):
        given = other[at]
    given = torch.as_tensor(given, dtype=torch.float64)
    axes = {"z": 3, "q": 3, "v": 3}.get(edit.site, 3 if edit.neuron is None else 2)
    if given.ndim == axes and given.shape[0] == len(LENGTHS):
        given = given[row]
    if given.ndim >= part.ndim and given.shape[0] == LONGEST:
        given = given[:n_pos]
    new = given.expand_as(part) if edit.how == "set" else part * given if edit.how == "scale" else part + given
    changed = current.clone()
    for p in range(n_pos):
        if edit.positions is None or edit.positions[row, p]:
            changed[(p, *at[1:])] = new[p]
    return changed


def literal(bridge, edits, row, prompt, corrupt):
    """Logits ``[pos, d_vocab]`` of one prompt with the edits made by hooks."""
    names = [f"blocks.{edit.layer % bridge.cfg.n_layers}.{HOOKS[edit.site]}" for edit in edits]
    with torch.no_grad():
        _, cache = bridge.run_with_cache(torch.tensor([corrupt]), names_filter=names)

        def hook_for(edit, name):
            def hook(value, hook):
                value[0] = expected_value(edit, row, len(prompt), value[0].clone(), cache[name][0])
                return value

            return hook

        hooks = [(name, hook_for(edit, name)) for edit, name in zip(edits, names, strict=True)]
        return bridge.run_with_hooks(torch.tensor([prompt]), fwd_hooks=hooks)[0].log_softmax(-1)


@pytest.mark.parametrize("name", ["gpt2", "llama-gqa"])
def test_every_edit_equals_hooks(zoo, pairs, monkeypatch, name):
    model, bridge = zoo.model(name, dtype=torch.float64), zoo.bridge(name)
    variants = variants_of(model.spec)
    # Batches of a few prompts, not in their order.
    monkeypatch.setattr(Intervention, "tokens_per_batch", lambda self, model: 16)
    found = fastinterp.intervene(model, pairs, variants, metric=METRICS)
    assert found["variant"].values.tolist() == list(variants)
    assert found["kl_effect"].dims == ("prompt", "variant")
    assert found["loss_effect"].dims == ("prompt", "pos", "variant")
    for row, (prompt, corrupt) in enumerate(zip(drawn(3), drawn(4), strict=True)):
        with torch.no_grad():
            clean = bridge(torch.tensor([prompt]))[0].log_softmax(-1)
        n, steps = len(prompt), torch.arange(len(prompt) - 1)
        for index, edits in enumerate(variants.values()):
            edits = edits if isinstance(edits, list) else [edits]
            edited = literal(bridge, edits, row, prompt, corrupt)
            effect = found.isel(prompt=row, variant=index)
            difference = (edited - clean)[-1, row] - (edited - clean)[-1, 50 + row]
            assert float(effect["logit_diff_effect"]) == pytest.approx(float(difference), abs=TOLERANCE)
            divergence = (clean[-1].exp() * (clean[-1] - edited[-1])).sum()
            assert float(effect["kl_effect"]) == pytest.approx(float(divergence), abs=TOLERANCE)
            losses = (clean - edited)[steps, torch.tensor(prompt[1:], dtype=torch.long)]
            np.testing.assert_allclose(effect["loss_effect"].values[: n - 1], losses.numpy(), atol=TOLERANCE)
            assert np.isnan(effect["loss_effect"].values[n - 1 :]).all()
    assert (abs(found["kl_effect"]).max("prompt") > 10 * TOLERANCE).all()


def test_positions_of_all_edits(zoo, pairs):
    """``pos`` stands for the positions of those edits that have none."""
    model, n = zoo.model("gpt2", dtype=torch.float64), len(LENGTHS)
    last = torch.arange(LONGEST) == torch.tensor(LENGTHS)[:, None] - 1
    add = {"site": "resid_pre", "layer": 1, "how": "add", "replacement": normal(model.spec.d_model)}
    own = Edit(**add, positions=torch.ones(n, LONGEST, dtype=torch.bool))
    found = fastinterp.intervene(model, pairs, [Edit(**add), own], pos=-1)
    by_mask = fastinterp.intervene(model, pairs, [Edit(**add, positions=last), Edit(**add)])
    np.testing.assert_allclose(found["logit_diff_effect"].values, by_mask["logit_diff_effect"].values, atol=1e-10)
    # A prompt of one token has no other.
    effects = found["logit_diff_effect"].values
    assert np.isclose(effects[:, 0], effects[:, 1]).tolist() == [length == 1 for length in LENGTHS]


def test_named_analyses_are_interventions(zoo, pairs):
    model = zoo.model("llama-gqa", dtype=torch.float64)
    ablated = fastinterp.ablate(model, pairs, units=[(1, 2), [(0, 0), "MLP2"]])
    edits = [
        Edit(site="z", layer=1, head=2),
        [Edit(site="z", layer=0, head=0), Edit(site="mlp_out", layer=2)],
    ]
    found = fastinterp.intervene(model, pairs, edits)
    assert found["variant"].values.tolist() == ["z L1H2 set", "z L0H0 set + mlp_out L2 set"]
    np.testing.assert_allclose(
        found["logit_diff_effect"].values, ablated["logit_diff_zero_total"].values, rtol=0, atol=1e-10
    )
    noise = fastinterp.activation_patch(model, pairs, "k", by="head", direction="noise")
    patches = [Edit(site="k", layer=0, head=head, replacement="source") for head in range(2)]
    found = fastinterp.intervene(model, pairs, patches)
    np.testing.assert_allclose(
        found["logit_diff_effect"].values, noise["logit_diff_patch_k"].values[:, 0], rtol=0, atol=1e-10
    )


def test_nothing_changes_nothing(zoo, pairs):
    model = zoo.model("gpt2")
    edits = [
        Edit(site="z", layer=1, how="scale", replacement=1.0),
        Edit(site="resid_mid", layer=0, how="add"),
        Edit(site="v", layer=1, positions=torch.zeros(len(LENGTHS), LONGEST, dtype=torch.bool)),
    ]
    found = fastinterp.intervene(model, pairs, edits, metric=("logit_diff", "loss"))
    assert float(abs(found["logit_diff_effect"]).max()) < 1e-5
    assert float(abs(found["loss_effect"]).max()) < 1e-5


def test_equal_edits_are_told_apart(zoo, pairs):
    found = fastinterp.intervene(zoo.model("gpt2"), pairs, [Edit(site="z", layer=0, head=h % 2) for h in (0, 1, 2)])
    assert found["variant"].values.tolist() == ["z L0H0 set #0", "z L0H1 set", "z L0H0 set #2"]


def z(**options):
    return Edit(site="z", layer=0, head=0, **options)


REFUSED = {
    "none": ([], {}, OptionError, "give a list of Edit"),
    "a number": (3, {}, OptionError, "variants is int: give a list of Edit"),
    "no edit": (["L0H0"], {}, OptionError, "variants has 'L0H0': give a list of Edit"),
    "an empty one": ([[z()], []], {}, OptionError, r"variants has \[\]"),
    "outside": ([Edit(site="embed", layer=0)], {}, OptionError, "embed is outside of the blocks: edit resid_pre"),
    "absent": ([Edit(site="pre_linear", layer=0)], {}, OptionError, "there is no pre_linear in a gpt2 model"),
    "layer": ([Edit(site="z", layer=3, head=0)], {}, SiteRangeError, "layer"),
    "head": ([Edit(site="z", layer=0, head=4)], {}, SiteRangeError, "head"),
    "width": ([z(replacement=torch.zeros(7))], {}, OptionError, r"has shape \(7,\): give one that broadcasts"),
    "axes": ([z(replacement=torch.zeros(1, 1, 1, 8))], {}, OptionError, r"against \(prompt, pos, d_head\)"),
    "prompts": ([z(replacement=torch.zeros(3, 1, 8))], {}, OptionError, r"here \(5, 9, "),
    "mask": ([z(positions=torch.ones(2, 9, dtype=torch.bool))], {}, OptionError, r"positions of the edit 'z L0H0 set'"),
    "metric": ([z()], {"metric": "los"}, MetricError, "did you mean 'loss'"),
    "pos": ([z()], {"pos": 7}, SiteRangeError, "pos=7 is out of range for prompt 1"),
    "each": ([z()], {"pos": "each"}, OptionError, "pos='each' is for ablate"),
    "precision": ([z()], {"precision": "half"}, FastinterpError, "precision"),
}  # fmt: skip


@pytest.mark.usefixtures("without_shape_checks")
@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_fit_is_refused_before_the_model_runs(zoo, pairs, monkeypatch, case):
    variants, options, error, message = REFUSED[case]
    monkeypatch.setattr("fastinterp.analyses.interventions.sweep_values", None)
    with pytest.raises(error, match=message):
        fastinterp.intervene(zoo.model("gpt2"), pairs, variants, **options)


def test_values_of_another_run_need_one(zoo):
    prompts = PromptSet.of(drawn(3), answer=list(range(5)), wrong=list(range(50, 55)))
    with pytest.raises(PromptPairError, match="takes values of the corrupt prompt"):
        fastinterp.intervene(zoo.model("gpt2"), prompts, [z(replacement="source")])


def test_a_site_that_there_is_not():
    with pytest.raises(UnknownActivationError):
        Edit(site="zz", layer=0)
