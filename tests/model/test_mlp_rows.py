"""An MLP that is computed some rows at a time is the same MLP."""

import dataclasses
import sys
import weakref

import pytest
import torch

from fastinterp import load
from fastinterp.model import Capture, Taps, forward
from fastinterp.model.forward import mlp as of_layer
from tests.kernels.kernel_checks import allocations

N_ROWS = 23
# The package has a function of this name.
MODULE = sys.modules["fastinterp.model.forward"]


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
def test_what_attention_read_is_freed_before(zoo, name, monkeypatch):
    model = zoo.model(name)
    attended, alive = [], []
    attend, some = MODULE.attend, MODULE.mlp

    def watched(spec, layer, q, k, v, frame, taps):
        attended[:] = map(weakref.ref, (q, k, v))
        return attend(spec, layer, q, k, v, frame, taps)

    def looked(*args):
        alive.append([made() is not None for made in attended])
        return some(*args)

    monkeypatch.setattr(MODULE, "attend", watched)
    monkeypatch.setattr(MODULE, "mlp", looked)
    forward(model.spec, model.weights, torch.arange(1, 8)[None])
    assert alive == [[False] * 3] * model.spec.n_layers
