"""Edits from some position on, from another run, scaled and added, of neurons: against one forward per variant."""

import dataclasses

import pytest
import torch

from fastinterp.errors import OptionError, SiteRangeError
from fastinterp.model import Edit, Taps, forward
from fastinterp.sweep import Variant, run_variants, runner, sweep
from fastinterp.sweep import stack as stacks

EXACT = 1e-9
MODELS = [
    "gpt2", "llama-gqa", "mistral-window", "gemma2-softcaps", "gemma3-mixed-rope", "gpt-neo", "gpt-neox", "opt",
    "qwen3-biases-mha-wide-head-windows-tied", "llama-one-head-one-layer", "gpt2-one-head-one-layer",
]  # fmt: skip


@pytest.fixture(params=MODELS)
def model(request, zoo):
    return zoo.model(request.param, dtype=torch.float64)


@pytest.fixture
def tokens(token_prompts, padded):
    return padded(token_prompts)


@pytest.fixture
def n_tokens(token_prompts):
    return torch.tensor([len(prompt) for prompt in token_prompts])


def swept(model, tokens, variants, **options):
    found = {}
    for indices, residuals in run_variants(model, tokens, variants, **options):
        for index, residual in zip(indices, residuals, strict=True):
            assert index not in found
            found[index] = residual.clone()
    assert sorted(found) == list(range(len(variants)))
    return torch.stack([found[index] for index in range(len(variants))])


def captured(model, source, variants):
    """What the source run has at every site that the variants edit."""
    taps = Taps.of(model.spec.n_layers, capture=sorted({edit.site for each in variants for edit in each.edits}))
    forward(model.spec, model.weights, source, taps=taps)
    return taps.values


def whole_forward(model, tokens, variant, values=None):
    edits = variant.edits
    if values is not None:
        edits = [
            edit.sourced(values[edit.site, edit.layer % model.spec.n_layers])
            if isinstance(edit.replacement, str)
            else edit
            for edit in edits
        ]
    return forward(model.spec, model.weights, tokens, taps=Taps.of(model.spec.n_layers, edits=edits))


@torch.no_grad()
def assert_equal(model, tokens, n_tokens, variants, source=None, expected=None, **options):
    """At all real tokens, at the last ones, and at the first ones (in front of where the edits begin)."""
    real, rows = torch.arange(tokens.shape[1]) < n_tokens[:, None], torch.arange(len(tokens))
    places = [None, n_tokens - 1, torch.zeros_like(n_tokens), (n_tokens - 1) // 2]
    if expected is None:
        values = None if source is None else captured(model, source, variants)
        expected = [whole_forward(model, tokens, variant, values) for variant in variants]
    for at in places:
        found = swept(model, tokens, variants, n_tokens=n_tokens, at=at, source=source, **options)
        for one, right, variant in zip(found, expected, variants, strict=True):
            difference = (one - right)[real] if at is None else one - right[rows, at]
            assert float(difference.abs().max()) < EXACT, (variant, at)
    return expected


def positions_from(n_tokens, tokens, begin):
    """True at and behind ``begin`` (negatives count from a prompt's own end), as ``[batch, pos]``."""
    first = n_tokens + begin if begin < 0 else torch.full_like(n_tokens, begin)
    return torch.arange(tokens.shape[1]) >= first.clamp(min=0)[:, None]


def edits_of_every_kind(spec, positions, generator, shape):
    def randn(*size):
        return torch.randn(*shape, *size, generator=generator, dtype=torch.float64)

    top, where = spec.n_layers - 1, {"positions": positions}
    edits = [
        (Edit(site="z", layer=0, head=0, **where),),
        (Edit(site="z", layer=top, head=-1, replacement=randn(spec.d_head), **where),),
        (Edit(site="q", layer=0, head=spec.n_heads - 1, replacement=randn(spec.d_head), **where),),
        (Edit(site="k", layer=0, head=-1, replacement=randn(spec.d_head), **where),),
        (Edit(site="v", layer=top, head=0, replacement=1.5, how="scale", **where),),
        (Edit(site="v", layer=0, replacement=0.1, **where),),
        (Edit(site="pattern", layer=0, head=0, **where),),
        (Edit(site="pattern", layer=top, replacement=0.5, how="scale", **where),),
        (Edit(site="result", layer=0, head=0, replacement=randn(spec.d_model), how="add", **where),),
        (Edit(site="attn_out", layer=0, **where),),
        (Edit(site="attn_raw", layer=top, replacement=2.0, how="scale", **where),),
        (Edit(site="mlp_out", layer=0, **where),),
        (Edit(site="mlp_raw", layer=top, replacement=randn(spec.d_model), **where),),
        (Edit(site="post", layer=0, neuron=3, **where),),
        tuple(Edit(site="post", layer=0, neuron=neuron, **where) for neuron in range(70)),
        (Edit(site="post", layer=top, neuron=-1, replacement=randn(), how="add", **where),),
        (Edit(site="post", layer=0, replacement=0.2, **where),),
        (Edit(site="pre", layer=0, neuron=1, replacement=1.0, **where),),
        (Edit(site="resid_pre", layer=0, replacement=randn(spec.d_model), how="add", **where),),
        (Edit(site="resid_pre", layer=top, **where),),
        (Edit(site="resid_post", layer=0, replacement=0.5, how="scale", **where),),
        # Several at once: in one layer, and in several.
        (Edit(site="z", layer=0, head=0, **where), Edit(site="mlp_out", layer=0, **where)),
        (Edit(site="attn_out", layer=0, **where), Edit(site="post", layer=0, neuron=2, **where)),
        (Edit(site="post", layer=0, neuron=2, **where), Edit(site="post", layer=0, neuron=5, replacement=1.0, **where)),
        (Edit(site="q", layer=0, head=0, **where), Edit(site="z", layer=0, head=-1, **where)),
        tuple(Edit(site="z", layer=layer, **where) for layer in range(spec.n_layers)),
        tuple(Edit(site="mlp_out", layer=layer, replacement=0.1, **where) for layer in range(spec.n_layers)),
        (Edit(site="z", layer=0, head=0, **where), Edit(site="pattern", layer=top, head=0, **where)),
        (Edit(site="resid_pre", layer=0, replacement=1.1, how="scale", **where), Edit(site="k", layer=top, **where)),
    ]
    if not spec.parallel:
        edits += [(Edit(site="resid_mid", layer=top, **where),)]
    return [Variant(edits=each) for each in edits]


# Every model from a position inside of the prompts on, and from the first or the last one on.
BEGINS = [(name, begin) for i, name in enumerate(MODELS) for begin in (3, (0, -1)[i % 2])]


@pytest.mark.parametrize(("model", "begin"), BEGINS, indirect=["model"])
def test_edits_from_a_position_on_equal_whole_forwards(model, tokens, n_tokens, begin):
    generator = torch.Generator().manual_seed(begin + 5)
    positions = positions_from(n_tokens, tokens, begin)
    variants = edits_of_every_kind(model.spec, positions, generator, tokens.shape)
    expected = assert_equal(model, tokens, n_tokens, variants)
    with torch.no_grad():
        clean = forward(model.spec, model.weights, tokens)
    real = torch.arange(tokens.shape[1]) < n_tokens[:, None]
    assert min(float((each - clean)[real].abs().max()) for each in expected) > 1e-6


def test_every_position_as_its_own_variant(model, tokens, n_tokens):
    variants = []
    for p in range(tokens.shape[1]):
        positions = (torch.arange(tokens.shape[1]) == p).expand_as(tokens)
        variants += [
            Variant(edits=(Edit(site="z", layer=0, head=0, positions=positions),)),
            Variant(edits=(Edit(site="resid_pre", layer=-1, positions=positions),)),
            Variant(edits=(Edit(site="k", layer=0, head=0, replacement=0.3, positions=positions),)),
        ]
    expected = assert_equal(model, tokens, n_tokens, variants)
    # One variant at a time: those of every third position.
    some = [i for i in range(len(variants)) if i // 3 % 3 == 1]
    chosen, right = ([each[i] for i in some] for each in (variants, expected))
    assert_equal(model, tokens, n_tokens, chosen, expected=right, residual_bytes=1)


def test_values_of_a_source_run(model, tokens, n_tokens):
    source = (tokens * 7 + 3) % 50
    last = positions_from(n_tokens, tokens, -1)
    spec = model.spec
    sites = ["resid_pre", "attn_out", "mlp_out", "z", "q", "k", "v", "pattern", "post", "resid_post"]
    sites += [] if spec.parallel else ["resid_mid"]
    variants = []
    for site in sites:
        for layer in range(spec.n_layers):
            edit = Edit(site=site, layer=layer, replacement="source")
            variants += [Variant(edits=(edit,)), Variant(edits=(dataclasses.replace(edit, positions=last),))]
            if site in ("z", "q", "k", "v", "pattern"):
                variants += [Variant(edits=(dataclasses.replace(edit, head=-1, positions=last),))]
            if site == "post":
                variants += [Variant(edits=(dataclasses.replace(edit, neuron=4),))]
    variants += [Variant(edits=tuple(Edit(site="z", layer=i, replacement="source") for i in range(spec.n_layers)))]
    assert_equal(model, tokens, n_tokens, variants, source=source)


def test_everything_from_the_source_run_is_the_source_run(model, tokens, n_tokens):
    source = (tokens * 7 + 3) % 50
    variants = [Variant(edits=(Edit(site="resid_pre", layer=0, replacement="source"),))]
    with torch.no_grad():
        expected = forward(model.spec, model.weights, source)
    real = torch.arange(tokens.shape[1]) < n_tokens[:, None]
    found = swept(model, tokens, variants, n_tokens=n_tokens, source=source)[0]
    assert float((found - expected)[real].abs().max()) < EXACT
    unchanged = swept(model, tokens, variants, n_tokens=n_tokens, source=tokens)[0]
    with torch.no_grad():
        clean = forward(model.spec, model.weights, tokens)
    assert float((unchanged - clean)[real].abs().max()) < EXACT


def test_only_the_ends_are_computed(zoo, tokens, n_tokens, monkeypatch):
    model = zoo.model("llama-gqa")
    positions = positions_from(n_tokens, tokens, -1)
    variants = [Variant(edits=(Edit(site="z", layer=0, head=head, positions=positions),)) for head in range(6)]
    rows = []
    block = stacks.block
    monkeypatch.setattr(stacks, "block", lambda *args: rows.append(args[3].shape[1]) or block(*args))
    for found in sweep(model, tokens, variants, n_tokens=n_tokens):
        assert found.start is not None
        assert found.start.tolist() == (n_tokens - 1).tolist()
        assert found.resid.shape == (6, len(tokens), 1, model.spec.d_model)
    assert rows
    assert set(rows) == {len(tokens)}


def test_a_step_may_hold_few_scores(model, tokens, n_tokens, monkeypatch):
    positions = positions_from(n_tokens, tokens, -2)
    variants = [Variant(edits=(Edit(site="z", layer=0, head=0, replacement=float(i), positions=positions),))
                for i in range(4)]  # fmt: skip
    whole = swept(model, tokens, variants, n_tokens=n_tokens)
    monkeypatch.setattr(runner, "score_bytes", lambda device: 1)
    stepped = swept(model, tokens, variants, n_tokens=n_tokens)
    real = torch.arange(tokens.shape[1]) < n_tokens[:, None]
    assert float((whole - stepped)[:, real].abs().max()) < EXACT


def test_running_out_of_memory_halves_the_group(zoo, tokens, n_tokens, monkeypatch):
    from fastinterp.sweep import head_variants

    model = zoo.model("llama-gqa", dtype=torch.float64)
    variants = head_variants(model.spec)
    whole = swept(model, tokens, variants, n_tokens=n_tokens, at=n_tokens - 1)
    tried = []
    stack = runner.Stack

    def full(model, rows, members, **options):
        tried.append(len(members))
        if len(members) > 5:
            raise torch.OutOfMemoryError("no memory left")
        return stack(model, rows, members, **options)

    monkeypatch.setattr(runner, "Stack", full)
    halved = swept(model, tokens, variants, n_tokens=n_tokens, at=n_tokens - 1)
    assert tried == [18, 9, 4, 5, 9, 4, 5]
    assert float((whole - halved).abs().max()) < EXACT

    def never(*args, **options):
        raise torch.OutOfMemoryError("no memory left")

    monkeypatch.setattr(runner, "Stack", never)
    with pytest.raises(torch.OutOfMemoryError):
        swept(model, tokens, variants, n_tokens=n_tokens)


def test_bad_edits_are_refused_before_anything_runs(zoo, tokens, monkeypatch):
    from fastinterp.sweep import runner

    model = zoo.model("llama-gqa")
    monkeypatch.setattr(runner, "embed", lambda *args, **options: pytest.fail("it ran"))
    for edit, message in (
        (Edit(site="z", layer=0, head=6), "head 6 is out of range: the model has 6"),
        (Edit(site="k", layer=0, head=2), "kv_head 2 is out of range: the model has 2"),
        (Edit(site="post", layer=0, neuron=10_000), "neuron 10000 is out of range"),
        (Edit(site="z", layer=3, head=0), "layer 3 is out of range"),
    ):
        with pytest.raises(SiteRangeError, match=message):
            list(run_variants(model, tokens, [Variant(edits=(edit,))]))
    with pytest.raises(OptionError, match="no source: give source=tokens"):
        list(run_variants(model, tokens, [Variant(edits=(Edit(site="z", layer=0, replacement="source"),))]))
