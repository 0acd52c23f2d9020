"""Edits that get in each other's way, inside of one variant or between two: against whole forwards."""

import dataclasses
import itertools

import pytest
import torch

from fastinterp.errors import OptionError, UnknownActivationError
from fastinterp.model import Capture, Edit, Taps, forward
from fastinterp.model.intervene import SOURCE
from fastinterp.sweep import Variant, clean_weights, run_variants, runner
from fastinterp.sweep import stack as stacks

EXACT = 1e-9


@pytest.fixture
def tokens(token_prompts, padded):
    return padded(token_prompts)


@pytest.fixture
def n_tokens(token_prompts):
    return torch.tensor([len(prompt) for prompt in token_prompts])


@pytest.fixture
def last(tokens, n_tokens):
    return torch.arange(tokens.shape[1]) == n_tokens[:, None] - 1


def scaled(site, layer, by=1.5, **where):
    return Edit(site=site, layer=layer, replacement=by, how="scale", **where)


def swept(model, tokens, variants, **options):
    found = {}
    for indices, residuals in run_variants(model, tokens, variants, **options):
        found |= {index: residual.clone() for index, residual in zip(indices, residuals, strict=True)}
    return [found[index] for index in range(len(variants))]


@torch.no_grad()
def whole_forward(model, tokens, edits):
    return forward(model.spec, model.weights, tokens, taps=Taps.of(model.spec.n_layers, edits=edits))


@torch.no_grad()
def assert_equal(model, tokens, n_tokens, variants):
    """At all real tokens and at the last ones, together; and no edit of any variant is without effect."""
    real, rows = torch.arange(tokens.shape[1]) < n_tokens[:, None], torch.arange(len(tokens))
    expected = [whole_forward(model, tokens, variant.edits) for variant in variants]
    for variant, each in zip(variants, expected, strict=True):
        for i in range(len(variant.edits)):
            without = whole_forward(model, tokens, variant.edits[:i] + variant.edits[i + 1 :])
            assert float((each - without)[real].abs().max()) > 1e-6, variant.edits[i]
    for at in (None, n_tokens - 1):
        for found, right, variant in zip(
            swept(model, tokens, variants, n_tokens=n_tokens, at=at), expected, variants, strict=True
        ):
            difference = (found - right)[real] if at is None else found - right[rows, at]
            assert float(difference.abs().max()) < EXACT, (variant, at)


def never_runs(monkeypatch):
    for name in ("embed", "forward", "forward_at"):
        monkeypatch.setattr(runner, name, lambda *args, **options: pytest.fail("it ran"))


@pytest.mark.parametrize("site", ["pattern", "attn_scores"])
@pytest.mark.parametrize("name", ["gpt2", "llama-gqa", "mistral-window", "gemma2-softcaps", "gpt-neox"])
def test_patterns_in_a_block_that_is_run_at_the_ends_of_prompts(zoo, tokens, n_tokens, last, name, site):
    model = zoo.model(name, dtype=torch.float64)
    edits = [scaled(site, 1, 0.5, positions=last), scaled(site, 1, 0.5, head=1, positions=last)]
    others = [scaled("resid_pre", 1, positions=last), scaled("ln1_normalized", 1, positions=last)]
    if model.spec.parallel:
        # What only the MLP writes: the attention of the same block is run with it.
        others += [Edit(site="mlp_out", layer=1, positions=last)]
    if model.spec.post_norms:
        others += [scaled("ln1_post_scale", 1, positions=last)]
    variants = [Variant(edits=pair) for pair in itertools.product(others, edits)]
    assert_equal(model, tokens, n_tokens, variants)
    # Scores of all heads are of no use to those of which only the ends are computed: both kinds in one sweep.
    ends = [Variant(edits=(edit,)) for edit in others] + [Variant(edits=(scaled("z", 0, positions=last),))]
    assert_equal(model, tokens, n_tokens, [*variants[:1], *ends])


def test_only_edited_patterns_of_blocks_that_are_run_need_whole_prompts(zoo, last):
    sequential, parallel = zoo.model("llama-gqa").spec, zoo.model("gpt-neox").spec
    pattern, mlp = scaled("pattern", 1, positions=last), Edit(site="mlp_out", layer=1, positions=last)
    for spec in (sequential, parallel):
        assert not Variant(edits=(pattern,)).needs_whole_sequences(spec)
        assert not Variant(edits=(pattern, scaled("z", 1, positions=last))).needs_whole_sequences(spec)
        assert not Variant(edits=(scaled("resid_pre", 1, positions=last),)).needs_whole_sequences(spec)
        assert Variant(edits=(pattern, scaled("resid_pre", 1, positions=last))).needs_whole_sequences(spec)
        assert Variant(edits=(pattern, scaled("z", 0, positions=last))).needs_whole_sequences(spec)
    assert not Variant(edits=(pattern, mlp)).needs_whole_sequences(sequential)
    assert Variant(edits=(pattern, mlp)).needs_whole_sequences(parallel)


OF_ATTENTION = ["z", "q", "rot_k", "v", "k_input", "pattern", "result", "attn_raw", "attn_out", "resid_mid"]


@pytest.mark.parametrize(
    ("name", "norm"), [("gemma2-softcaps", "ln1_post_scale"), ("gemma3-mixed-rope", "ln1_post_normalized")]
)
def test_the_norm_of_what_the_attention_writes_with_every_other_site(zoo, tokens, n_tokens, last, name, norm):
    model = zoo.model(name, dtype=torch.float64)
    variants = []
    for i, site in enumerate(OF_ATTENTION):
        layer = (0, model.spec.n_layers - 1)[i % 2]
        where = {} if site in ("attn_raw", "attn_out", "resid_mid") else {"head": 0}
        # The norm would take a factor of all that it is of away again.
        edit = Edit(site=site, layer=layer, replacement=0.3, how="set" if site == "attn_raw" else "add", **where)
        if site in ("pattern", "rot_k"):
            edit = scaled(site, layer, 0.5, **where)
        variants += [Variant(edits=(edit, scaled(norm, layer)))]
        variants += [Variant(edits=(scaled(norm, layer, positions=last), dataclasses.replace(edit, positions=last)))]
    assert_equal(model, tokens, n_tokens, variants)


def clashing(spec, last):
    """Alone each can be run; of the block of layer 1 some edit the norm, and some what every head norms by itself."""
    below = Edit(site="z", layer=0, head=0)
    some = torch.randn(spec.d_model, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def moved(site, **where):
        return Edit(site=site, layer=1, replacement=some, how="add", **where)

    own = [Variant(edits=(moved("attn_in", head=1),))] if spec.attention.group == 1 else []
    return [
        Variant(edits=(scaled("ln1_scale", 1),)),
        Variant(edits=(below, moved("q_input", head=0))),
        Variant(edits=(below, scaled("ln1_normalized", 1, positions=last))),
        Variant(edits=(below,)),
        Variant(edits=(scaled("resid_pre", 1), moved("k_input"))),
        Variant(edits=(below, scaled("ln1_normalized", 1))),
        Variant(edits=(scaled("mlp_out", 0, 0.5), moved("v_input", head=-1, positions=last))),
        Variant(edits=(scaled("mlp_out", 0, 0.5), scaled("ln1_scale", 1, 0.5))),
        *own,
        Variant(edits=(scaled("z", 0, 0.7), scaled("ln1_scale", 1, 0.5))),
    ]


@pytest.mark.parametrize("name", ["gpt2", "llama-gqa", "gemma2-softcaps", "gpt-neox"])
def test_variants_that_clash_equal_each_alone(zoo, tokens, n_tokens, last, name):
    model = zoo.model(name, dtype=torch.float64)
    variants = clashing(model.spec, last)
    assert_equal(model, tokens, n_tokens, variants)
    # Of the ends of prompts too.
    ends = [Variant(edits=tuple(dataclasses.replace(e, positions=last) for e in v.edits)) for v in variants]
    assert_equal(model, tokens, n_tokens, ends)


def test_no_more_steps_than_variants_that_clash_need(zoo, tokens, n_tokens, monkeypatch):
    model = zoo.model("gpt2", dtype=torch.float64)
    steps, block = [], stacks.block

    def counted(spec, w, layer, resid, *rest):
        steps.append((layer, len(resid)))
        return block(spec, w, layer, resid, *rest)

    monkeypatch.setattr(stacks, "block", counted)
    norm = [Variant(edits=(Edit(site="z", layer=0, head=h), scaled("ln1_scale", 1))) for h in range(4)]
    inputs = [Variant(edits=(Edit(site="z", layer=0, head=h), scaled("q_input", 1, head=h))) for h in range(4)]
    plain = [Variant(edits=(Edit(site="z", layer=0, head=h),)) for h in range(4)]
    mixed = [one for three in zip(norm, inputs, plain, strict=True) for one in three]
    for variants, expected in (
        (norm + plain, [(1, 8), (2, 8)]),
        (inputs + plain, [(1, 8), (2, 8)]),
        (mixed, [(1, 8), (1, 4), (2, 12)]),
    ):
        steps.clear()
        list(run_variants(model, tokens, variants, n_tokens=n_tokens))
        assert steps == expected


@pytest.mark.parametrize("norm", ["ln1_scale", "ln1_normalized"])
@pytest.mark.parametrize("name", ["gpt2", "llama-gqa"])
def test_a_variant_that_clashes_with_itself_is_refused_before_anything_runs(zoo, tokens, monkeypatch, name, norm):
    model = zoo.model(name, dtype=torch.float64)
    inputs = ["q_input", "k_input", "v_input", "attn_in"]
    # The same layer, counted from either side.
    variants = [(Edit(site="z", layer=0), scaled(norm, 1), scaled(site, layer)) for site in inputs for layer in (1, -2)]
    messages = []
    for edits in variants:
        with pytest.raises(OptionError) as refused:
            whole_forward(model, tokens, edits)
        messages.append(str(refused.value))
    assert messages[0] == (
        f"{norm} of layer 1 is replaced, but q_input gives every head a norm of its own: hook one or the other"
    )
    never_runs(monkeypatch)
    for edits, message in zip(variants, messages, strict=True):
        # Outside of the blocks as well, where the whole model is run.
        for some in (edits, edits[::-1], (scaled("embed", 0), *edits)):
            with pytest.raises(OptionError) as refused:
                list(run_variants(model, tokens, [Variant(edits=(Edit(site="z", layer=1),)), Variant(edits=some)]))
            assert str(refused.value) == message


def test_copies_for_query_heads_that_share_kv_heads_are_refused_before_anything_runs(zoo, tokens, monkeypatch):
    model = zoo.model("llama-gqa", dtype=torch.float64)
    edits = (scaled("attn_in", 2, head=0),)
    with pytest.raises(OptionError, match="use q_input, k_input, v_input") as refused:
        whole_forward(model, tokens, edits)
    never_runs(monkeypatch)
    with pytest.raises(OptionError) as before:
        list(run_variants(model, tokens, [Variant(edits=(dataclasses.replace(edits[0], layer=-1),))]))
    assert str(before.value) == str(refused.value)


@pytest.mark.parametrize(
    ("name", "site"),
    [
        ("gpt-neox", "resid_mid"), ("llama-gqa", "ln1_post_scale"), ("llama-gqa", "pos_embed"), ("gpt2", "pre_linear"),
        ("gpt2", "rot_q"), ("gpt2", "ln2_post_normalized"),
    ],
)  # fmt: skip
def test_sites_that_the_model_does_not_have_are_refused_before_anything_runs(zoo, tokens, monkeypatch, name, site):
    model = zoo.model(name, dtype=torch.float64)
    edits = (Edit(site="z", layer=0, head=0), Edit(site=site, layer=1, replacement=5.0))
    with pytest.raises(UnknownActivationError, match=f"there is no {site} ") as refused:
        whole_forward(model, tokens, edits)
    never_runs(monkeypatch)
    for some in (edits, edits[1:], (edits[0], dataclasses.replace(edits[1], layer=-2))):
        with pytest.raises(UnknownActivationError) as before:
            list(run_variants(model, tokens, [Variant(edits=some)]))
        assert str(before.value) == str(refused.value)


@pytest.mark.parametrize("site", ["ln_final_scale", "ln_final_normalized"])
def test_sites_behind_the_final_residual_are_refused_before_anything_runs(zoo, tokens, monkeypatch, site):
    model = zoo.model("gpt2", dtype=torch.float64)
    never_runs(monkeypatch)
    for replacement in (0.5, SOURCE):
        edits = (Edit(site=site, layer=0, replacement=replacement), Edit(site="z", layer=0))
        with pytest.raises(OptionError, match=f"{site} is behind the final residual.*resid_post of layer 2"):
            list(run_variants(model, tokens, [Variant(edits=edits)], source=tokens))


@pytest.mark.parametrize("precision", ["bf16", "tf32", "delta", "exact"])
@torch.no_grad()
def test_the_source_of_a_whole_forward_is_rounded_as_the_run_is(zoo, tokens, n_tokens, precision):
    model = zoo.model("gpt2")
    spec, weights = model.spec, clean_weights(model, precision)
    source = (tokens * 7 + 3) % 50
    taps = Taps.of(spec.n_layers, capture=[Capture(name="z", layers=(1,)), Capture(name="embed")])
    forward(spec, weights, source, taps=taps)
    variants = [
        Variant(edits=(scaled("embed", 0, 1.0), Edit(site="z", layer=1, replacement=SOURCE))),
        Variant(edits=(Edit(site="embed", layer=0, replacement=SOURCE), Edit(site="z", layer=1, replacement=SOURCE))),
    ]
    found = swept(model, tokens, variants, n_tokens=n_tokens, source=source, precision=precision)
    for variant, each in zip(variants, found, strict=True):
        edits = [
            edit.sourced(taps.values[edit.site, None if edit.site == "embed" else edit.layer]) for edit in variant.edits
        ]
        expected = forward(spec, weights, tokens, taps=Taps.of(spec.n_layers, edits=edits))
        assert torch.equal(each, expected)
    # The run itself as its source: nothing is changed.
    same = swept(model, tokens, variants, n_tokens=n_tokens, source=tokens, precision=precision)
    clean = forward(spec, weights, tokens)
    assert all(torch.equal(each, clean) for each in same)
