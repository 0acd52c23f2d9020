"""An MLP that is computed some rows at a time is the same MLP."""

import dataclasses
import sys
import weakref

import pytest
import torch

from fastinterp import load
from fastinterp.model import Capture, Taps, forward
from fastinterp.model.forward import forward_at
from fastinterp.model.mlp import mlp as of_layer
from fastinterp.model.products import EXACT, SWIFT
from tests.kernels.kernel_checks import allocations

N_ROWS = 23
RESIDUALS = ["gpt2", "llama-gqa", "gemma2-softcaps", "gpt-neox", "opt"]
MODULE = sys.modules["fastinterp.model.mlp"]
# The package has a function of this name.
FORWARD = sys.modules["fastinterp.model.forward"]


@pytest.fixture(params=[1, 2, 5])
def some_rows(request, monkeypatch):
    monkeypatch.setattr(MODULE, "MLP_ROWS", request.param)
    return request.param


def mlp(model, x):
    return of_layer(model.spec, model.weights.blocks[0], 0, x)


def normalized(model):
    torch.manual_seed(0)
    return torch.randn(1, N_ROWS, model.spec.d_model)


@torch.no_grad()
def test_the_same_numbers(zoo, tiny_name, monkeypatch):
    model = zoo.model(tiny_name)
    x = normalized(model)
    expected = mlp(model, x)
    for rows in (1, 2, 5):
        monkeypatch.setattr(MODULE, "MLP_ROWS", rows)
        torch.testing.assert_close(mlp(model, x), expected, atol=1e-5, rtol=1e-5)


def test_no_hidden_layer_of_all_rows_is_allocated(zoo, monkeypatch):
    model = zoo.model("llama-gqa")
    x, hidden = normalized(model), N_ROWS * 2 * model.spec.mlp.d_mlp * 4
    with torch.no_grad():
        assert allocations(lambda: mlp(model, x)).largest == hidden
        monkeypatch.setattr(MODULE, "MLP_ROWS", 2)
        assert allocations(lambda: mlp(model, x)).largest < hidden / 2
    assert allocations(lambda: mlp(model, x.clone().requires_grad_())).largest == hidden


def test_what_is_tapped_has_all_rows(zoo, some_rows):
    model = zoo.model("llama-gqa")
    names = [Capture(name=name) for name in ("pre", "pre_linear", "post")]
    taps = Taps.of(model.spec.n_layers, capture=names)
    tokens = torch.arange(1, 1 + N_ROWS)[None]
    with torch.no_grad():
        tapped = forward(model.spec, model.weights, tokens, taps=taps)
        torch.testing.assert_close(forward(model.spec, model.weights, tokens), tapped, atol=1e-5, rtol=1e-5)
    assert {value.shape[1] for value in taps.values.values()} == {N_ROWS}


def test_gradients_are_those_of_all_rows(zoo, monkeypatch):
    model = zoo.model("llama-gqa")
    found = []
    for rows in (1 << 20, 2):
        monkeypatch.setattr(MODULE, "MLP_ROWS", rows)
        x = normalized(model).requires_grad_()
        mlp(model, x).square().sum().backward()
        found.append(x.grad)
    torch.testing.assert_close(found[1], found[0], atol=0, rtol=0)


def test_how_many_rows():
    sizes = {1: 8, 8: 8, 9: 5, 10: 8, 15: 8, 16: 8, 17: 256, 257: 257, 1024: 256, 1025: 513, 2048: 512, 8000: 2048}
    assert {n: MODULE.mlp_rows(n) for n in sizes} == sizes


def test_no_row_is_left_by_itself():
    for n_rows in range(2, 20_000):
        assert n_rows % MODULE.mlp_rows(n_rows) != 1


@torch.no_grad()
def test_bits_do_not_depend_on_the_pieces(tiny_builders):
    model = load(tiny_builders["gpt2"](n_layer=1, n_embd=64, n_head=4), device="cpu")
    x = torch.randn(300, 64, generator=torch.Generator().manual_seed(0))
    expected = mlp(model, x)
    for n_rows in (*range(2, 18), 257, 258, 272, 299):
        assert torch.equal(mlp(model, x[:n_rows]), expected[:n_rows])


@torch.no_grad()
@pytest.mark.parametrize("name", ["gpt2", "llama-gqa", "opt"])
@pytest.mark.parametrize("n_rows", [7, 23, 300])
def test_only_the_hidden_layer_is_overwritten(zoo, name, n_rows):
    model = zoo.model(name)
    torch.manual_seed(0)
    x = torch.randn(1, n_rows, model.spec.d_model)
    before, weights = x.clone(), model.weights.blocks[0].W_gate_in.clone()
    first = mlp(model, x)
    kept = first.clone()
    # With gradients nothing may be overwritten, and all rows go at once.
    with torch.enable_grad():
        assert torch.equal(mlp(model, x), kept)
    assert torch.equal(mlp(model, x), kept)
    assert torch.equal(x, before)
    assert torch.equal(first, kept)
    assert torch.equal(model.weights.blocks[0].W_gate_in, weights)


@torch.no_grad()
@pytest.mark.parametrize("name", ["gpt2", "llama-gqa"])
def test_autocast_gives_the_same_dtype_for_any_number_of_rows(zoo, name):
    model = zoo.model(name)
    x = torch.randn(1, 300, model.spec.d_model)
    with torch.autocast("cpu", torch.bfloat16):
        found = [mlp(model, x[:, :n_rows]).dtype for n_rows in (8, 16, 300)]
    assert found == [torch.bfloat16] * 3


@torch.no_grad()
def test_many_models_at_a_time(zoo):
    model = zoo.model("gpt2")
    x = normalized(model)
    w = model.weights.blocks[0]
    scales = torch.tensor([1.0, 2.0])

    def scaled(scale):
        return of_layer(model.spec, dataclasses.replace(w, W_out=scale * w.W_out), 0, x[:, :16])

    expected = torch.stack([scaled(scale) for scale in scales])
    torch.testing.assert_close(torch.func.vmap(scaled)(scales), expected)


@torch.no_grad()
@pytest.mark.parametrize("name", ["gpt2", "llama-gqa"])
@pytest.mark.parametrize("at_last", [False, True])
def test_what_attention_read_is_freed_before(zoo, name, at_last, monkeypatch):
    model = zoo.model(name)
    attended, alive = [], []
    some = MODULE._mlp_of_some

    def watch(attend):
        def watched(spec, layer, q, k, v, *args):
            attended[:] = map(weakref.ref, (q, k, v))
            return attend(spec, layer, q, k, v, *args)

        return watched

    def looked(*args):
        alive.append([made() is not None for made in attended])
        return some(*args)

    for attend in ("attend", "attend_from"):
        monkeypatch.setattr(FORWARD, attend, watch(getattr(FORWARD, attend)))
    monkeypatch.setattr(MODULE, "_mlp_of_some", looked)
    tokens = torch.arange(1, 8)[None]
    if at_last:
        forward_at(model.spec, model.weights, tokens, torch.tensor([7]), torch.tensor([6]))
    else:
        forward(model.spec, model.weights, tokens)
    assert alive == [[False] * 3] * model.spec.n_layers


@torch.no_grad()
@pytest.mark.parametrize("name", RESIDUALS)
def test_no_rows_at_all(zoo, name):
    model = zoo.model(name)
    empty = torch.empty(2, 0, model.spec.d_model)
    assert mlp(model, empty).shape == empty.shape
    assert MODULE.mlp_residual(model.spec, model.weights.blocks[0], 0, empty).shape == empty.shape


@pytest.mark.parametrize("name", RESIDUALS)
@pytest.mark.parametrize("n_pos", [3, 40])
def test_what_is_captured_without_gradients_can_be_added_to_with_them(zoo, name, n_pos, monkeypatch):
    monkeypatch.setattr(MODULE, "MLP_ROWS", 16)
    model = zoo.model(name)
    with torch.no_grad():
        steered = model.run(torch.arange(1, 1 + n_pos)[None], capture=["resid_post"])["resid_post", 0]
    vector = torch.ones(model.spec.d_model, requires_grad=True)
    steered[:, -1] += vector
    steered.sum().backward()
    assert vector.grad.sum() == model.spec.d_model


AROUND = ["mlp_in", "ln2_scale", "ln2_normalized", "mlp_raw", "mlp_out"]
BEHIND = ["ln2_post_scale", "ln2_post_normalized"]


@torch.no_grad()
@pytest.mark.parametrize("name", RESIDUALS)
@pytest.mark.parametrize("n_pos", [1, 3, 7, 40])
@pytest.mark.parametrize("products", [EXACT, SWIFT], ids=["exact", "swift"])
def test_norms_and_sums_by_rows_are_those_of_all_rows(zoo, name, n_pos, products, monkeypatch):
    """Whoever reads what is around an MLP has it computed for all rows."""
    monkeypatch.setattr(MODULE, "MLP_ROWS", 16)
    model = zoo.model(name, dtype=torch.float64)
    spec, n_layers = model.spec, model.spec.n_layers
    weights = dataclasses.replace(model.weights, blocks=tuple(w.multiplied_by(products) for w in model.weights.blocks))
    tokens = torch.arange(3 * n_pos).view(3, n_pos) % spec.d_vocab
    for site in AROUND + (BEHIND if spec.post_norms else []):
        taps = Taps.of(n_layers, capture=[Capture(name=site)])
        torch.testing.assert_close(
            forward(spec, weights, tokens), forward(spec, weights, tokens, taps=taps), rtol=1e-9, atol=1e-9
        )
        assert len(taps.values) == n_layers, site


@torch.no_grad()
@pytest.mark.parametrize("name", RESIDUALS)
def test_what_is_read_is_not_written_over(zoo, name, monkeypatch):
    monkeypatch.setattr(MODULE, "MLP_ROWS", 16)
    model = zoo.model(name, dtype=torch.float64)
    spec, n_layers = model.spec, model.spec.n_layers
    weights = dataclasses.replace(model.weights, blocks=tuple(w.multiplied_by(SWIFT) for w in model.weights.blocks))
    tokens = torch.arange(120).view(3, 40) % spec.d_vocab
    sites = ["resid_pre", "resid_post", "attn_out"] + ([] if spec.parallel else ["resid_mid"])
    for site in sites:
        found, expected = (
            Taps.of(n_layers, capture=[Capture(name=each) for each in names]) for names in ([site], [site, "mlp_in"])
        )
        forward(spec, weights, tokens, taps=found)
        forward(spec, weights, tokens, taps=expected)
        for layer in range(n_layers):
            torch.testing.assert_close(found.values[site, layer], expected.values[site, layer], rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_a_sweep_writes_over_what_nobody_reads(zoo):
    model = zoo.model("llama-gqa")
    w = model.weights.blocks[0]
    resid = torch.randn(1, 300, model.spec.d_model)
    mine = resid.clone()
    kept = MODULE.mlp_residual(model.spec, w, 0, mine)
    torch.testing.assert_close(mine, resid, rtol=0, atol=0)
    found = MODULE.mlp_residual(model.spec, w.multiplied_by(SWIFT), 0, mine, reuse=True)
    assert found.data_ptr() == mine.data_ptr()
    torch.testing.assert_close(found, kept)
    again = MODULE.mlp_residual(model.spec, w, 0, resid, reuse=True)
    assert again.data_ptr() != resid.data_ptr()
