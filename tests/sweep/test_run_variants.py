"""The prefix-sharing runner against its definition: one whole forward per variant."""

import weakref

import pytest
import torch

from fastinterp.errors import FastinterpError, SiteRangeError
from fastinterp.model import Edit, Taps, forward
from fastinterp.model.prefix import prefix_tree
from fastinterp.sweep import Variant, Variants, head_variants, resident, run_variants, runner
from fastinterp.sweep.groups import Planned

EXACT = 1e-11
"""Float64: what the two ways may differ by is rounding."""

MODELS = ["gpt2", "gpt2-one-head-one-layer", "llama-gqa", "llama-one-head-one-layer", "mistral-window"]


# Prompts that begin alike: a repetition, a beginning of another prompt, a fork after one token, none in common.
ALIKE = [[7, 8, 9, 10, 11], [7, 8, 9], [7, 8, 9, 10, 11], [7, 30, 9, 10], [8, 9, 10, 11], [7], [7, 8, 9, 10, 11, 12]]


@pytest.fixture(params=["mixed", "alike"])
def prompts(request, token_prompts):
    return token_prompts if request.param == "mixed" else ALIKE


@pytest.fixture
def tokens(prompts, padded):
    return padded(prompts)


@pytest.fixture
def n_tokens(prompts):
    return torch.tensor([len(prompt) for prompt in prompts])


@pytest.fixture
def last(n_tokens):
    return n_tokens - 1


def swept(model, tokens, variants, *, at=None, **options):
    """Final residuals of all variants, in their order; every variant must come once."""
    found = {}
    for indices, residuals in run_variants(model, tokens, variants, at=at, **options):
        assert len(indices) == len(residuals)
        for index, residual in zip(indices, residuals, strict=True):
            assert index not in found
            found[index] = residual.clone()
    assert sorted(found) == list(range(len(variants)))
    return torch.stack([found[index] for index in range(len(variants))])


def one_by_one(model, tokens, variants, at=None):
    """The definition."""
    finals = []
    for variant in variants:
        taps = Taps.of(model.spec.n_layers, edits=variant.edits)
        with torch.no_grad():
            final = forward(model.spec, model.weights, tokens, taps=taps)
        finals.append(final if at is None else final[torch.arange(len(at)), at])
    return torch.stack(finals)


def assert_equal(model, tokens, variants, at, n_tokens=None, tolerance=EXACT):
    """Compares with the definition: everywhere, or at real tokens where their number is given."""
    expected = one_by_one(model, tokens, variants, at)
    got = swept(model, tokens, variants, at=at, n_tokens=n_tokens)
    assert got.shape == expected.shape
    difference = (got - expected).abs()
    if n_tokens is not None and at is None:
        difference = difference[:, torch.arange(tokens.shape[1]) < n_tokens[:, None]]
    assert float(difference.max()) < tolerance


def test_head_variants_zero_each_head_once(zoo):
    variants = head_variants(zoo.model("llama-gqa").spec)
    assert len(variants) == 18
    seen = [(edit.site, edit.layer, edit.head, edit.replacement) for v in variants for edit in v.edits]
    assert seen == [("z", layer, head, 0.0) for layer in range(3) for head in range(6)]
    assert all(variant.enters_by_heads for variant in variants)


@pytest.mark.parametrize("tiny_name", MODELS, indirect=True)
@pytest.mark.parametrize("where", ["everywhere", "last", "first"])
@pytest.mark.parametrize("lengths", ["known", "unknown"])
def test_zeroed_heads_equal_whole_forwards(zoo, tiny_name, tokens, n_tokens, where, lengths):
    model = zoo.model(tiny_name, dtype=torch.float64)
    at = {"everywhere": None, "last": n_tokens - 1, "first": torch.zeros_like(n_tokens)}[where]
    variants = head_variants(model.spec)
    assert_equal(model, tokens, variants, at, n_tokens if lengths == "known" else None)


@pytest.mark.parametrize("tiny_name", ["gpt2", "llama-gqa", "mistral-window"], indirect=True)
def test_every_zeroed_head_does_something(zoo, tiny_name, tokens, last):
    # So that none of the comparisons here is one of the clean run with itself.
    model = zoo.model(tiny_name)
    clean = forward(model.spec, model.weights, tokens)[torch.arange(len(last)), last]
    change = (swept(model, tokens, head_variants(model.spec), at=last) - clean).abs().amax(-1)
    assert float(change.min()) > 1e-3


def several(model, tokens):
    """Variants that enter by heads, each in another manner."""
    spec, generator = model.spec, torch.Generator().manual_seed(4)

    def randn(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    positions = torch.rand(tokens.shape, generator=generator) < 0.4
    batch, pos = tokens.shape
    top = spec.n_layers - 1
    z = {"site": "z"}
    return {
        "value per feature": (Edit(**z, layer=0, head=1, replacement=randn(spec.d_head)),),
        "value per prompt": (Edit(**z, layer=top, head=0, replacement=randn(batch, 1, spec.d_head)),),
        "another run's values": (Edit(**z, layer=1, head=2, replacement=randn(batch, pos, spec.d_head)),),
        "values of the last layer": (Edit(**z, layer=top, head=2, replacement=randn(batch, pos, spec.d_head)),),
        "one prompt's values for all": (Edit(**z, layer=top, head=1, replacement=randn(1, pos, spec.d_head)),),
        "all heads": (Edit(**z, layer=1, replacement=randn(batch, pos, spec.n_heads, spec.d_head)),),
        "all heads of the last layer": (Edit(**z, layer=top, replacement=randn(spec.n_heads, spec.d_head)),),
        "some positions": (Edit(**z, layer=0, head=3, positions=positions, replacement=1.5),),
        "some positions of the last layer": (
            Edit(**z, layer=top, head=3, positions=positions, replacement=randn(batch, pos, spec.d_head)),
        ),
        "all heads at some positions": (Edit(**z, layer=top, positions=positions),),
        "two heads": (Edit(**z, layer=1, head=0), Edit(**z, layer=1, head=3, replacement=0.7)),
        "one head twice": (Edit(**z, layer=1, head=0, replacement=9.0), Edit(**z, layer=1, head=0, replacement=0.3)),
        "a head, then all": (Edit(**z, layer=0, head=0, replacement=9.0), Edit(**z, layer=0, replacement=0.3)),
        "all, then a head": (Edit(**z, layer=0, replacement=0.3), Edit(**z, layer=0, head=0, replacement=2.0)),
        "counted from the end": (Edit(**z, layer=1, head=-1),),
    }


@pytest.mark.parametrize("tiny_name", ["gpt2", "llama-gqa", "mistral-window"], indirect=True)
@pytest.mark.parametrize("at_last", [False, True])
def test_edits_of_heads_equal_whole_forwards(zoo, tiny_name, tokens, n_tokens, at_last):
    model = zoo.model(tiny_name, dtype=torch.float64)
    at = n_tokens - 1 if at_last else None
    for edits in several(model, tokens).values():
        variant = Variant(edits=edits)
        assert variant.enters_by_heads
        assert_equal(model, tokens, [variant], at, n_tokens)


OTHER_SITES = {
    "resid_post": dict(site="resid_post", layer=1, replacement=0.2),
    "resid_pre": dict(site="resid_pre", layer=0, replacement=0.2),
    "attn_out": dict(site="attn_out", layer=2),
    "mlp_out": dict(site="mlp_out", layer=0),
    "pattern of a head": dict(site="pattern", layer=1, head=1),
    "q of a head": dict(site="q", layer=1, head=3),
    "k of a KV head": dict(site="k", layer=1, head=1, replacement=1.0),
    "v of a KV head": dict(site="v", layer=0, head=0),
    "result of a head": dict(site="result", layer=1, head=2, replacement=0.5),
    "post": dict(site="post", layer=2, replacement=0.1),
    "a norm's scale": dict(site="ln1_scale", layer=1, replacement=2.0),
    "embed": dict(site="embed", layer=0, replacement=0.3),
}


@pytest.mark.parametrize("tiny_name", ["gpt2", "llama-gqa", "mistral-window"], indirect=True)
@pytest.mark.parametrize("at_last", [False, True])
def test_all_kinds_of_variants_together_equal_whole_forwards(zoo, tiny_name, tokens, n_tokens, at_last):
    model = zoo.model(tiny_name, dtype=torch.float64)
    edits = {name: Edit(**options) for name, options in OTHER_SITES.items()}
    variants = [Variant(edits=(edit,)) for edit in edits.values()]
    variants += [Variant(edits=edits) for edits in several(model, tokens).values()]
    variants += [
        Variant(edits=(Edit(site="z", layer=0, head=0), Edit(site="z", layer=2, head=1))),
        Variant(edits=(Edit(site="z", layer=2, head=1), Edit(site="resid_post", layer=0, replacement=0.1))),
        Variant(edits=(edits["q of a head"], edits["v of a KV head"], edits["mlp_out"])),
    ]
    order = torch.randperm(len(variants), generator=torch.Generator().manual_seed(0)).tolist()
    variants = [variants[i] for i in order]
    assert_equal(model, tokens, variants, n_tokens - 1 if at_last else None, n_tokens)


@pytest.mark.parametrize("tiny_name", MODELS, indirect=True)
@pytest.mark.parametrize("residual_bytes", [1, 200_000])
def test_groups_change_nothing(zoo, tiny_name, tokens, last, residual_bytes):
    model = zoo.model(tiny_name)
    variants = head_variants(model.spec)
    for at in (None, last):
        whole = swept(model, tokens, variants, at=at)
        grouped = swept(model, tokens, variants, at=at, residual_bytes=residual_bytes)
        assert float((whole - grouped).abs().max()) < 1e-5


def test_groups_stay_below_the_bytes_given(zoo, tokens):
    model = zoo.model("llama-gqa")
    each = prefix_tree(tokens).node.numel() * model.spec.d_model * 4
    sizes = [
        len(indices) for indices, _ in run_variants(model, tokens, head_variants(model.spec), residual_bytes=5 * each)
    ]
    assert sizes == [5, 5, 5, 3]


@pytest.mark.parametrize("tiny_name", ["gpt2", "llama-gqa", "mistral-window"], indirect=True)
@pytest.mark.parametrize("step", [1, 25])
def test_steps_change_nothing(zoo, tiny_name, tokens, last, monkeypatch, step):
    model = zoo.model(tiny_name, dtype=torch.float64)
    variants = head_variants(model.spec)
    for at in (None, last):
        whole = swept(model, tokens, variants, at=at)
        monkeypatch.setattr(runner, "step_tokens", lambda device: step)
        stepped = swept(model, tokens, variants, at=at)
        monkeypatch.undo()
        assert float((whole - stepped).abs().max()) < EXACT


@pytest.mark.parametrize("tiny_name", MODELS, indirect=True)
def test_replacing_heads_by_themselves_changes_nothing(zoo, tiny_name, tokens, last):
    model = zoo.model(tiny_name, dtype=torch.float64)
    taps = Taps.of(model.spec.n_layers, capture=["z"])
    with torch.no_grad():
        clean = forward(model.spec, model.weights, tokens, taps=taps)
    variants = [
        Variant(edits=(Edit(site="z", layer=layer, head=head, replacement=taps.values["z", layer][:, :, head]),))
        for layer in range(model.spec.n_layers)
        for head in range(model.spec.n_heads)
    ]
    variants.append(Variant(edits=(Edit(site="z", layer=0, replacement=taps.values["z", 0]),)))
    assert float((swept(model, tokens, variants) - clean).abs().max()) < EXACT
    at_last = clean[torch.arange(len(last)), last]
    assert float((swept(model, tokens, variants, at=last) - at_last).abs().max()) < EXACT


@pytest.mark.parametrize("tiny_name", ["gpt2", "mistral-window"], indirect=True)
def test_nothing_leaks_between_variants_or_runs(zoo, tiny_name, tokens, last):
    model = zoo.model(tiny_name)
    variants, given = head_variants(model.spec), tokens.clone()
    replacement = torch.full((model.spec.d_head,), 3.0)
    loud = Variant(edits=(Edit(site="z", layer=0, head=0, replacement=replacement),))
    clean = forward(model.spec, model.weights, tokens)
    before = swept(model, tokens, variants, at=last)
    swept(model, tokens, [loud, *variants, loud], at=last)
    after = swept(model, tokens, variants, at=last)
    assert torch.equal(before, after)
    assert torch.equal(forward(model.spec, model.weights, tokens), clean)
    assert torch.equal(tokens, given)
    assert replacement.tolist() == [3.0] * model.spec.d_head
    assert model.weights.sha256() == model.weights_sha256


def test_a_variant_is_the_same_in_any_company(zoo, tokens, last):
    model = zoo.model("llama-gqa", dtype=torch.float64)
    variants = head_variants(model.spec)
    together = swept(model, tokens, variants[::-1] + variants, at=last)
    assert float((together[: len(variants)].flip(0) - together[len(variants) :]).abs().max()) < EXACT
    for index in (0, 7, 17):
        alone = swept(model, tokens, [variants[index]], at=last)[0]
        assert float((alone - together[len(variants) + index]).abs().max()) < EXACT


# What is refused, and what is not ---------------------------------------------------------------------------------

TOKENS = torch.arange(12).view(2, 6)


def test_no_variants_give_nothing(zoo):
    assert list(run_variants(zoo.model("gpt2"), TOKENS, [])) == []


@pytest.mark.parametrize("tiny_name", ["gpt2", "llama-one-head-one-layer"], indirect=True)
@pytest.mark.parametrize("at_last", [False, True])
def test_layers_count_from_the_end_too(zoo, tiny_name, at_last):
    # forward takes negative layers, so a sweep of the same edits has to.
    model = zoo.model(tiny_name, dtype=torch.float64)
    variants = [Variant(edits=(Edit(site="z", layer=layer, head=0),)) for layer in (-1, -model.spec.n_layers, 0)]
    assert_equal(model, TOKENS, variants, TOKENS[:, 0] * 0 + 5 if at_last else None)


def test_layers_that_name_the_same_layer_are_one_layer(zoo):
    model = zoo.model("gpt2", dtype=torch.float64)
    edits = (Edit(site="z", layer=-2, head=0), Edit(site="z", layer=1, head=1))
    assert_equal(model, TOKENS, [Variant(edits=edits)], None)


@pytest.mark.parametrize("layer", [3, -4, 99])
def test_a_layer_that_is_not_there_is_refused(zoo, layer):
    variants = [*head_variants(zoo.model("gpt2").spec), Variant(edits=(Edit(site="z", layer=layer, head=0),))]
    with pytest.raises(SiteRangeError, match=f"layer {layer} is out of range"):
        list(run_variants(zoo.model("gpt2"), TOKENS, variants))


@pytest.mark.parametrize("head", [4, -5])
def test_a_head_that_is_not_there_is_refused(zoo, head):
    variants = [Variant(edits=(Edit(site="z", layer=1, head=head),))]
    with pytest.raises(SiteRangeError, match=f"head {head} is out of range"):
        list(run_variants(zoo.model("gpt2"), TOKENS, variants))


@pytest.mark.parametrize("layer", [0, 2])
@pytest.mark.parametrize("with_positions", [False, True])
@pytest.mark.parametrize("n_prompts", [7, 5])
def test_a_replacement_per_position_broadcasts_over_prompts(
    zoo, token_prompts, padded, layer, with_positions, n_prompts
):
    # "replacement broadcasts against the replaced part", [batch, pos, d_head] here: so may a [pos, d_head]. Of as many
    # prompts as positions it must not be taken for one value per prompt.
    model = zoo.model("gpt2", dtype=torch.float64)
    kept = token_prompts[:n_prompts] if n_prompts == 7 else [[7, 8, 9, 10, 11]] * 2 + [[1, 2, 3], [4], [5, 6]]
    tokens, last = padded(kept), torch.tensor([len(prompt) - 1 for prompt in kept])
    assert tokens.shape == (n_prompts, 12 if n_prompts == 7 else 5)
    generator = torch.Generator().manual_seed(6)
    replacement = torch.randn(tokens.shape[1], model.spec.d_head, generator=generator, dtype=torch.float64)
    positions = torch.rand(tokens.shape, generator=generator) < 0.5 if with_positions else None
    edit = Edit(site="z", layer=layer, head=1, replacement=replacement, positions=positions)
    assert_equal(model, tokens, [Variant(edits=(edit,))], last)


def test_a_variant_without_edits_is_the_clean_run_or_is_refused(zoo):
    model = zoo.model("gpt2")
    try:
        got = swept(model, TOKENS, [Variant(edits=())])[0]
    except FastinterpError:
        return
    assert float((got - forward(model.spec, model.weights, TOKENS)).abs().max()) < 1e-5


def test_variants_are_made_when_they_are_asked_for(zoo, monkeypatch):
    model = zoo.model("llama-gqa")
    made = weakref.WeakSet()
    most = []

    def make(index):
        layer, head = divmod(index, model.spec.n_heads)
        variant = Variant(edits=(Edit(site="z", layer=layer, head=head),))
        made.add(variant)
        return variant

    n_variants = model.spec.n_layers * model.spec.n_heads
    variants = Variants(n_variants, make)
    assert len(variants) == n_variants
    assert variants[-1].edits[0].layer == model.spec.n_layers - 1
    assert [variant.edits for variant in variants[1:3]] == [variant.edits for variant in list(variants)[1:3]]
    with pytest.raises(IndexError):
        variants[n_variants]
    check = resident.Resident.check
    monkeypatch.setattr(resident.Resident, "check", lambda self: most.append(len(made)) or check(self))
    tokens = torch.tensor([[1, 2, 3], [4, 5, 6]])
    found = dict(pairs(model, tokens, variants))
    assert 0 < max(most) < n_variants
    for index, residual in pairs(model, tokens, list(variants)):
        torch.testing.assert_close(found[index], residual, atol=0, rtol=0)


def pairs(model, tokens, variants):
    for indices, residuals in run_variants(model, tokens, variants, residual_bytes=1):
        yield from zip(indices, residuals.clone(), strict=True)


def test_variants_that_begin_at_the_same_positions_share_them(zoo, tokens, n_tokens):
    model = zoo.model("gpt2")
    last = torch.arange(tokens.shape[1]) == n_tokens[:, None] - 1
    at_last = Variant(edits=(Edit(site="z", layer=0, head=0, positions=last),))
    tree, starts = prefix_tree(tokens, n_tokens), {}
    planned = [Planned.of(model, tree, n_tokens, i, at_last, starts) for i in range(2)]
    assert planned[0].start is not None
    assert planned[0].start is planned[1].start
    assert list(starts) == [planned[0].start]


@torch.no_grad()
def test_residuals_are_not_made_before_the_first_variant_enters(zoo, padded, token_prompts, monkeypatch):
    model = zoo.model("gpt2")
    last = model.spec.n_layers - 1
    made = {}
    step = runner._Pass._clean_step

    def looked(self, layer, *args):
        found = step(self, layer, *args)
        made[layer] = [stack._resid is not None for stack in self.stacks]
        return found

    monkeypatch.setattr(runner._Pass, "_clean_step", looked)
    swept(model, padded(token_prompts), [Variant(edits=(Edit(site="z", layer=last, head=0),))])
    assert made == {layer: [False] for layer in range(model.spec.n_layers)}
