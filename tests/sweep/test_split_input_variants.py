"""Edits of heads' own copies of the residual enter a sweep by those heads: against one forward per variant."""

import dataclasses

import pytest
import torch

from fastinterp.model import Edit, Taps, forward
from fastinterp.sweep import Variant, entering, run_variants
from fastinterp.sweep import stack as stacks

EXACT = 1e-9
INPUTS = ("q_input", "k_input", "v_input")
MODELS = [
    "gpt2", "llama-gqa", "llama-biases-mqa-head-dim", "mistral-window", "qwen3-gqa", "gemma2-softcaps", "gpt-neox",
    "gpt2-one-head-one-layer",
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


def whole_forward(model, tokens, variant, source=None):
    edits = variant.edits
    if source is not None:
        taps = Taps.of(model.spec.n_layers, capture=sorted({edit.site for edit in edits}))
        forward(model.spec, model.weights, source, taps=taps)
        edits = [
            edit.sourced(taps.values[edit.site, edit.layer]) if isinstance(edit.replacement, str) else edit
            for edit in edits
        ]
    return forward(model.spec, model.weights, tokens, taps=Taps.of(model.spec.n_layers, edits=edits))


@torch.no_grad()
def assert_equal(model, tokens, n_tokens, variants, source=None):
    """Everywhere and at the last tokens; and every variant differs from the clean run."""
    real, rows = torch.arange(tokens.shape[1]) < n_tokens[:, None], torch.arange(len(tokens))
    clean = forward(model.spec, model.weights, tokens)
    expected = [whole_forward(model, tokens, variant, source) for variant in variants]
    for variant, each in zip(variants, expected, strict=True):
        assert float((each - clean)[real].abs().max()) > 1e-6, variant
    for at in (None, n_tokens - 1):
        seen = set()
        for indices, residuals in run_variants(model, tokens, variants, n_tokens=n_tokens, at=at, source=source):
            for index, found in zip(indices, residuals, strict=True):
                difference = (found - expected[index])[real] if at is None else found - expected[index][rows, at]
                assert float(difference.abs().max()) < EXACT, (variants[index], at)
                seen.add(index)
        assert seen == set(range(len(variants)))


def several(spec, shape, positions=None):
    """Edits of the inputs of heads: alone, of all heads, with one another and with edits of other sites."""
    generator = torch.Generator().manual_seed(2)
    top, n_kv = spec.n_layers - 1, spec.attention.n_kv_heads
    where = {"positions": positions}

    def randn(*size):
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    def added(site, layer, head, **other):
        return Edit(site=site, layer=layer, head=head, replacement=randn(*shape, spec.d_model), how="add", **where)

    alone = []
    for site in INPUTS:
        n_heads = spec.n_heads if site == "q_input" else n_kv
        alone += [(added(site, layer, head),) for layer in (0, top) for head in (0, n_heads - 1)]
        alone += [
            (Edit(site=site, layer=0, head=-1, replacement=randn(spec.d_model), **where),),
            (Edit(site=site, layer=top, head=0, replacement=-0.5, how="scale", **where),),
            (Edit(site=site, layer=0, replacement=randn(n_heads, spec.d_model), how="add", **where),),
            (Edit(site=site, layer=top, replacement=randn(*shape, n_heads, spec.d_model), **where),),
        ]
    z = Edit(site="z", layer=0, head=spec.n_heads - 1, replacement=randn(spec.d_head), **where)
    together = [
        (added("q_input", 0, 0), added("q_input", 0, 0)),
        (added("q_input", 0, 0), added("q_input", 0, spec.n_heads - 1)),
        (added("q_input", top, 0), added("k_input", top, n_kv - 1), added("v_input", top, 0)),
        (added("k_input", 0, 0), Edit(site="k_input", layer=0, replacement=0.5, how="scale", **where)),
        (added("q_input", 0, 0), z),
        (added("v_input", 0, n_kv - 1), dataclasses.replace(z, replacement=0.5, how="scale")),
        (z, added("q_input", top, 0), added("k_input", 0, 0)),
        (added("q_input", 0, 0), Edit(site="q", layer=0, head=0, replacement=randn(spec.d_head), how="add", **where)),
        (added("k_input", 0, 0), Edit(site="pattern", layer=0, head=0, replacement=0.5, how="scale", **where)),
        (added("v_input", 0, 0), Edit(site="v", layer=0, head=n_kv - 1, replacement=1.5, how="scale", **where)),
        (added("v_input", 0, 0), Edit(site="result", layer=0, head=0, replacement=randn(spec.d_model), how="add")),
        (added("q_input", 0, 0), Edit(site="attn_out", layer=0, replacement=2.0, how="scale", **where)),
        (added("v_input", 0, 0), Edit(site="mlp_out", layer=0, replacement=0.3, **where)),
        (added("q_input", 0, 0), Edit(site="resid_pre", layer=0, replacement=1.2, how="scale", **where)),
        (Edit(site="z", layer=0, head=0, **where), added("q_input", top, 0), added("v_input", top, n_kv - 1)),
        (added("q_input", 0, 0), added("v_input", top, 0), Edit(site="resid_post", layer=top, replacement=0.9,
                                                               how="scale")),
    ]  # fmt: skip
    if spec.attention.group == 1:
        together += [(added("q_input", 0, 0), Edit(site="attn_in", layer=0, head=0, replacement=1.2, how="scale"))]
    return [Variant(edits=each) for each in alone + together]


def test_edits_of_heads_inputs_equal_whole_forwards(model, tokens, n_tokens):
    assert_equal(model, tokens, n_tokens, several(model.spec, tokens.shape))


@pytest.mark.parametrize("name", ["llama-gqa", "gemma2-softcaps", "gpt-neox"])
@pytest.mark.parametrize("begin", [3, -1])
def test_edits_from_a_position_on_equal_whole_forwards(zoo, name, tokens, n_tokens, begin):
    model = zoo.model(name, dtype=torch.float64)
    first = n_tokens + begin if begin < 0 else torch.full_like(n_tokens, begin)
    positions = torch.arange(tokens.shape[1]) >= first.clamp(min=0)[:, None]
    assert_equal(model, tokens, n_tokens, several(model.spec, tokens.shape, positions))


def test_values_of_a_source_run(model, tokens, n_tokens):
    source, spec = (tokens * 7 + 3) % 50, model.spec
    last = torch.arange(tokens.shape[1]) == (n_tokens - 1)[:, None]
    edits = [Edit(site=site, layer=layer, head=head, positions=positions, replacement="source")
             for site in INPUTS for layer in {0, spec.n_layers - 1}
             for head, positions in ((-1, None), (0, last), (None, None))]  # fmt: skip
    variants = [Variant(edits=(edit,)) for edit in edits]
    variants += [Variant(edits=(edits[0], Edit(site="z", layer=0, head=0, replacement="source")))]
    assert_equal(model, tokens, n_tokens, variants, source=source)


def test_only_edited_heads_are_computed_again(zoo, tokens, n_tokens, monkeypatch):
    model = zoo.model("llama-gqa")
    spec = model.spec
    n_heads, blocks = [], []
    attend, block = entering.attend, stacks.block
    monkeypatch.setattr(entering, "attend", lambda *args: n_heads.append(args[2].shape[-2]) or attend(*args))
    monkeypatch.setattr(stacks, "block", lambda *args: blocks.append(args[2]) or block(*args))
    for site, layer, again in (("q_input", 1, 1), ("k_input", 1, 3), ("v_input", 0, 3), ("q", 2, 1)):
        variants = [Variant(edits=(Edit(site=site, layer=layer, head=1, replacement=0.5, how="scale"),))]
        assert variants[0].stage(spec) == "heads"
        n_heads.clear()
        blocks.clear()
        list(run_variants(model, tokens, variants, n_tokens=n_tokens))
        assert n_heads == [again]
        assert blocks == list(range(layer + 1, spec.n_layers))


def test_where_variants_of_inputs_leave_the_clean_run(zoo):
    sequential, parallel = zoo.model("llama-gqa").spec, zoo.model("gpt-neox").spec
    own = Edit(site="k_input", layer=1, head=0)
    for spec in (sequential, parallel):
        for other in ("z", "q", "v_input", "pattern", "result"):
            assert Variant(edits=(own, Edit(site=other, layer=1, head=0))).stage(spec) == "heads"
        for other in ("resid_pre", "attn_in", "ln1_scale"):
            assert Variant(edits=(own, Edit(site=other, layer=1))).stage(spec) == "block"
        assert Variant(edits=(own, Edit(site="resid_pre", layer=2))).stage(spec) == "heads"
    assert Variant(edits=(own, Edit(site="mlp_out", layer=1))).stage(sequential) == "heads"
    assert Variant(edits=(own, Edit(site="mlp_out", layer=1))).stage(parallel) == "block"
