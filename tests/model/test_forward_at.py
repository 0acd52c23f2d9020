"""The packed forward at one position per prompt: the same numbers as the whole forward, with less work."""

import pytest
import torch

from fastinterp.errors import FastinterpError
from fastinterp.model import Edit, Taps, forward
from fastinterp.model.forward import forward_at
from fastinterp.model.prefix import POSITIONS_MULTIPLE, prefix_tree
from fastinterp.model.products import STEADY_ROWS, affine

EXACT = 1e-11
MODELS = ["gpt2", "gpt2-one-head-one-layer", "llama-gqa", "llama-one-head-one-layer", "mistral-window"]

# Prompts that begin alike: a repetition, a beginning of another prompt, a fork after one token, none in common.
ALIKE = [[7, 8, 9, 10, 11], [7, 8, 9], [7, 8, 9, 10, 11], [7, 30, 9, 10], [8, 9, 10, 11], [7], [7, 8, 9, 10, 11, 12]]

# What the packed forward says that it can capture.
CAPTURED = ("embed", "resid_pre", "z", "attn_out", "resid_mid", "post", "mlp_out", "resid_post")


@pytest.fixture(params=["mixed", "alike"])
def prompts(request, token_prompts):
    return token_prompts if request.param == "mixed" else ALIKE


@pytest.fixture
def tokens(prompts, padded):
    return padded(prompts)


@pytest.fixture
def n_tokens(prompts):
    return torch.tensor([len(prompt) for prompt in prompts])


@pytest.mark.parametrize("tiny_name", MODELS, indirect=True)
@pytest.mark.parametrize("where", ["last", "first", "middle"])
def test_residual_and_captures_equal_the_whole_forward(zoo, tiny_name, tokens, n_tokens, where):
    model = zoo.model(tiny_name, dtype=torch.float64)
    at = {"last": n_tokens - 1, "first": 0 * n_tokens, "middle": n_tokens // 2}[where]
    names = [*CAPTURED, "pos_embed"] if model.spec.position.kind == "learned" else CAPTURED
    whole, packed = (Taps.of(model.spec.n_layers, capture=names) for _ in range(2))
    with torch.no_grad():
        expected = forward(model.spec, model.weights, tokens, taps=whole)
        got = forward_at(model.spec, model.weights, tokens, n_tokens, at, taps=packed)
    rows = torch.arange(len(at))
    assert float((got - expected[rows, at]).abs().max()) < EXACT
    assert packed.values.keys() == whole.values.keys()
    for key, value in whole.values.items():
        assert packed.values[key].shape == value[rows, at].shape, key
        assert float((packed.values[key] - value[rows, at]).abs().max()) < EXACT, key


@pytest.mark.parametrize("tiny_name", ["gpt2", "mistral-window"], indirect=True)
def test_what_stands_at_padding_does_not_matter(zoo, tiny_name, tokens, n_tokens):
    model = zoo.model(tiny_name)
    first = forward_at(model.spec, model.weights, tokens, n_tokens, n_tokens - 1)
    padding = torch.arange(tokens.shape[1]) >= n_tokens[:, None]
    others = tokens.masked_fill(padding, 3)
    assert torch.equal(first, forward_at(model.spec, model.weights, others, n_tokens, n_tokens - 1))


@pytest.mark.parametrize("prompts", ["mixed"], indirect=True)
@pytest.mark.parametrize("name", ["q", "k", "v", "ln1_scale", "ln2_normalized", "pattern", "pre", "result"])
def test_other_captures_are_right_or_refused(zoo, tokens, n_tokens, name):
    # A capture that was asked for must not be missing, nor hold something else than its name says.
    model, at = zoo.model("llama-gqa", dtype=torch.float64), n_tokens - 1
    whole, packed = (Taps.of(3, capture=[name]) for _ in range(2))
    forward(model.spec, model.weights, tokens, taps=whole)
    try:
        forward_at(model.spec, model.weights, tokens, n_tokens, at, taps=packed)
    except FastinterpError:
        return
    assert packed.values.keys() == whole.values.keys()
    for key, value in whole.values.items():
        expected = value[torch.arange(len(at)), at] if name != "pattern" else value
        assert packed.values[key].shape == expected.shape
        assert float((packed.values[key] - expected).abs().max()) < EXACT


EDITS = {
    "z of a head": dict(site="z", layer=1, head=0),
    "z of the last layer": dict(site="z", layer=2, head=0),
    "q": dict(site="q", layer=2, head=1),
    "resid_post": dict(site="resid_post", layer=0, replacement=0.1),
    "some positions": dict(site="z", layer=0, positions=True, replacement=2.0),
    "a norm": dict(site="ln1_scale", layer=2, replacement=2.0),
}


@pytest.mark.parametrize("prompts", ["mixed"], indirect=True)
@pytest.mark.parametrize("name", EDITS)
def test_edits_are_made_or_refused(zoo, tokens, n_tokens, name):
    model, at, options = zoo.model("llama-gqa", dtype=torch.float64), n_tokens - 1, dict(EDITS[name])
    if "positions" in options:
        options["positions"] = torch.arange(tokens.shape[1]).expand(tokens.shape) % 2 == 0
    edit = Edit(**options)
    expected = forward(model.spec, model.weights, tokens, taps=Taps.of(3, edits=[edit]))
    try:
        got = forward_at(model.spec, model.weights, tokens, n_tokens, at, taps=Taps.of(3, edits=[edit]))
    except FastinterpError:
        return
    assert float((got - expected[torch.arange(len(at)), at]).abs().max()) < EXACT


# The tree ---------------------------------------------------------------------------------------------------------


def beginnings(prompts):
    return {tuple(prompt[: end + 1]) for prompt in prompts for end in range(len(prompt))}


def test_a_node_for_every_distinct_beginning(prompts, tokens, n_tokens):
    tree = prefix_tree(tokens, n_tokens)
    assert tree.n_nodes == len(beginnings(prompts))
    for b, prompt in enumerate(prompts):
        for p in range(len(prompt)):
            node = int(tree.node[b, p])
            row, pos = int(tree.row[node]), int(tree.pos[node])
            assert pos == p
            assert prompts[row][: p + 1] == prompt[: p + 1]


def test_without_sharing_every_real_token_is_a_node(prompts, tokens, n_tokens):
    tree = prefix_tree(tokens, n_tokens, share=False)
    assert tree.n_nodes == sum(map(len, prompts))
    real = [(b, p) for b, prompt in enumerate(prompts) for p in range(len(prompt))]
    assert list(zip(tree.row.tolist(), tree.pos.tolist(), strict=True)) == real
    assert [int(tree.node[b, p]) for b, p in real] == list(range(len(real)))


def test_without_lengths_every_position_counts(tokens):
    assert prefix_tree(tokens, share=False).n_nodes == tokens.numel()
    rows = [tuple(row.tolist()) for row in tokens]
    assert prefix_tree(tokens).n_nodes == len(beginnings(rows))


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("lengths", ["known", "unknown"])
def test_packing_and_spreading_undo_each_other(tokens, n_tokens, share, lengths):
    tree = prefix_tree(tokens, n_tokens if lengths == "known" else None, share=share)
    values = torch.randn(2, tree.n_nodes, 3)
    spread = tree.spread(values)
    assert tree.n_pos >= tokens.shape[1]
    assert spread.shape == (2, len(tokens), tree.n_pos, 3)
    assert torch.equal(tree.pack(spread), values)
    for b, n in enumerate(n_tokens.tolist()):
        assert torch.equal(spread[:, b, :n], values[:, tree.node[b, :n]])


def test_a_prompt_is_summed_in_the_same_order_whatever_its_company():
    tree = prefix_tree(torch.tensor([[7], [7]]))
    assert tree.n_pos == POSITIONS_MULTIPLE
    assert tree.n_nodes == 2
    assert tree.row.tolist() == [0, 0]
    assert prefix_tree(torch.zeros(1, POSITIONS_MULTIPLE + 1).long()).n_pos == 2 * POSITIONS_MULTIPLE


@pytest.mark.parametrize("n_rows", [2, 3, STEADY_ROWS - 1, STEADY_ROWS])
def test_few_rows_give_what_they_give_among_many(n_rows):
    x, W, b = torch.randn(40, 64), torch.randn(64, 48), torch.randn(48)
    assert torch.allclose(affine(x[:n_rows], W, b), affine(x, W, b)[:n_rows], rtol=0, atol=1e-6)
    batched = affine(x[:6].unflatten(0, (2, 3)), W, None)
    assert batched.shape == (2, 3, 48)
    assert torch.allclose(batched.flatten(0, 1), x[:6] @ W, atol=1e-4)
