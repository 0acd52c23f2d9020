"""Which library multiplies: the same numbers, gradients, and rows that do not depend on their company."""

from collections.abc import Iterator

import pytest
import torch
from torch.autograd import forward_ad

from fastinterp.model import products
from fastinterp.model.products import EXACT, STEADY_ROWS, SWIFT
from tests.kernels.kernel_checks import allocations

N_IN, N_OUT = 320, 448

onednn = pytest.mark.skipif(
    products._ONEDNN is None or not torch.backends.cpu.get_cpu_capability().startswith("AVX512"),
    reason="oneDNN with AVX-512 is not here",
)


def swift(x: torch.Tensor, W: torch.Tensor, b: torch.Tensor | None) -> torch.Tensor:
    return SWIFT("W_out", x, W, b)


@pytest.fixture
def drawn() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, W, b = (torch.randn(shape, generator=generator) for shape in ((300, N_IN), (N_IN, N_OUT), (N_OUT,)))
    return x, W / N_IN**0.5, b


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every product that oneDNN has made, none known before."""
    made: list[int] = []
    monkeypatch.setattr(products, "_known", set())
    product = products._ONEDNN

    def counted(x: torch.Tensor, *rest: object) -> torch.Tensor:
        made.append(x.shape[:-1].numel())
        found: torch.Tensor = product(x, *rest)
        return found

    if product is not None:
        monkeypatch.setattr(products, "_ONEDNN", counted)
    return made


@onednn
@pytest.mark.parametrize("order", ["rows", "columns"])
@pytest.mark.parametrize("bias", [True, False])
def test_large_matrices_are_multiplied_by_onednn(drawn, calls, order, bias):
    x, W, b = drawn
    W, b = (W if order == "rows" else W.t().contiguous().t()), (b if bias else None)
    expected = x.double() @ W.double() + (0 if b is None else b.double())
    for shape in ((300, N_IN), (3, 100, N_IN), (2, 1, 150, N_IN)):
        found = swift(x.view(shape), W, b)
        assert found.shape == (*shape[:-1], N_OUT)
        assert float((found.view(300, N_OUT) - expected).abs().max()) < 2e-5
    assert calls == [300] * 3


@pytest.fixture(params=[1, 2])
def threads(request: pytest.FixtureRequest) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield
    torch.set_num_threads(before)


@onednn
@pytest.mark.usefixtures("threads")
def test_rows_have_the_same_bits_in_any_company(drawn, calls):
    x, W, b = drawn
    whole = swift(x, W, b)
    for n_rows in (1, 2, 3, 5, STEADY_ROWS, 9, 31, 100, 299):
        assert torch.equal(swift(x[:n_rows], W, b), whole[:n_rows]), n_rows
        assert torch.equal(swift(x[-n_rows:], W, b), whole[-n_rows:]), n_rows
    assert torch.equal(swift(x[7], W, b), whole[7])
    assert torch.equal(swift(x[:1, None], W, b), whole[:1, None])
    assert min(calls) == 8


@onednn
def test_shapes_are_few(drawn, calls, monkeypatch):
    x, W, b = drawn
    x = x.repeat(2, 1)
    whole = swift(x, W, b)
    for n_rows in range(1, 128):
        assert torch.equal(swift(x[:n_rows], W, b), whole[:n_rows]), n_rows
    assert set(calls) == {600, 16, 8}
    monkeypatch.setattr(products, "_MOST_SHAPES", 5)
    for n_rows in (128, 130, 200, *range(550, 600)):
        assert torch.equal(swift(x[-n_rows:].view(n_rows, 1, N_IN), W, b), whole[-n_rows:, None]), n_rows
    assert set(calls) == {600, 128, 130, 200, 550, 256, 64, 16, 8}
    calls.clear()
    swift(x, W.flip(1)[:, :440].contiguous(), None)
    swift(x, W, b)
    assert calls == [256, 256, 64, 16, 8, 600], "only the shapes that are known, of another matrix none"


@onednn
@torch.no_grad()
def test_a_few_rows_have_one_copy(drawn, calls):
    x, W, b = drawn
    few = x[:15].contiguous()
    swift(few, W, b)
    seen = allocations(lambda: swift(few, W, b))
    assert seen.peak <= 16 * (N_IN + N_OUT) * 4 + 1024
    assert torch.equal(swift(few, W, b), swift(x, W, b)[:15])
    assert calls == [16, 16, 16, 300]


@onednn
def test_rows_that_lie_apart(drawn, calls):
    x, W, b = drawn
    apart = torch.stack([x, -x], dim=1)[:, 0]
    assert not apart.is_contiguous()
    assert torch.equal(swift(apart, W, b), swift(x, W, b))
    assert torch.equal(swift(x[:1].expand(40, -1), W, b), swift(x[:1], W, b).expand(40, -1))
    assert calls == [300, 300, 16, 16, 8, 8]


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda x, W, b: (x[:, :16], W[:16], b), id="small matrix"),
        pytest.param(lambda x, W, b: (x, torch.cat([W, W], 1)[:, 100:548], b), id="columns of a wider one"),
        pytest.param(lambda x, W, b: (x.double(), W.double(), b.double()), id="float64"),
        pytest.param(lambda x, W, b: (x.bfloat16(), W.bfloat16(), b.bfloat16()), id="bfloat16"),
        pytest.param(lambda x, W, b: (x[:0], W, b), id="no rows"),
        pytest.param(lambda x, W, b: (x, W, torch.stack([b, -b], 1)[:, 0]), id="bias that lies apart"),
        pytest.param(lambda x, W, b: (x, W, b[:1].expand(N_OUT)), id="one bias for all"),
        pytest.param(lambda x, W, b: (x, W.requires_grad_(), b), id="gradient of the matrix"),
        pytest.param(lambda x, W, b: (x, W, b.requires_grad_()), id="gradient of the bias"),
    ],
)
def test_what_is_left_to_torch(drawn, calls, change):
    x, W, b = change(*drawn)
    found = swift(x, W, b)
    expected = (x.double() @ W.double() + b.double()).to(x.dtype)
    tolerance = 2e-2 if x.dtype == torch.bfloat16 else 2e-5
    torch.testing.assert_close(found.detach(), expected.detach(), rtol=tolerance, atol=tolerance)
    assert found.requires_grad == (W.requires_grad or b.requires_grad)
    assert not calls


def test_only_sweeps_use_it(drawn, calls):
    x, W, b = drawn
    EXACT("W_out", x, W, b)
    assert not calls
    assert SWIFT.at(torch.arange(3)) is SWIFT


def test_without_onednn(drawn, monkeypatch):
    x, W, b = drawn
    expected = swift(x, W, b)
    monkeypatch.setattr(products, "_ONEDNN", None)
    torch.testing.assert_close(swift(x, W, b), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("n_rows", [1, 3, 300])
def test_gradients_of_activations(drawn, n_rows):
    x, W, b = drawn
    x = x[:n_rows].requires_grad_()
    wide = x.detach().double().requires_grad_()
    for row, to in ((x, torch.float32), (wide, torch.float64)):
        (swift(row, W.to(to), b.to(to)).square().sum(-1).sin().sum()).backward()
    assert float((x.grad - wide.grad).abs().max()) < 1e-3 * float(wide.grad.abs().max())
    # A second derivative.
    y = x.detach().requires_grad_()
    (first,) = torch.autograd.grad(swift(y, W, b).square().sum(), y, create_graph=True)
    (second,) = torch.autograd.grad(first.square().sum(), y)
    expected = 8 * (wide.detach() @ W.double() + b.double())
    expected = (expected @ W.double().t()) @ (W.double() @ W.double().t())
    torch.testing.assert_close(second.double(), expected, rtol=1e-4, atol=1e-3 * float(expected.abs().max()))


@pytest.mark.parametrize("shape", [(N_IN,), (1, N_IN), (4, N_IN), (2, 3, N_IN)])
def test_results_with_a_gradient_can_be_written_to(drawn, shape):
    _, W, b = drawn
    x = torch.ones(shape, requires_grad=True)
    y = swift(x, W, b)
    y[..., 0] = 0.0
    y /= 2.0
    y.sum().backward()
    expected = W[:, 1:].sum(1) / 2
    torch.testing.assert_close(x.grad, expected.expand(shape), rtol=0, atol=1e-4)


# What torch itself loads for them.
@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:DeprecationWarning")
def test_forward_derivatives(drawn):
    x, W, b = drawn
    for requires_grad in (False, True):
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x.detach().requires_grad_(requires_grad), torch.ones_like(x))
            tangent = forward_ad.unpack_dual(swift(dual, W, b)).tangent
            torch.testing.assert_close(tangent, W.sum(0).expand(300, -1), rtol=0, atol=1e-4)


def test_autocast_and_flags_of_torch(drawn, calls):
    x, W, b = drawn
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert swift(x, W, b).dtype == torch.bfloat16
    # As in torch.backends.mkldnn.flags(enabled=False), which warns.
    torch._C._set_mkldnn_enabled(False)
    try:
        assert swift(x, W, b).dtype == torch.float32
    finally:
        torch._C._set_mkldnn_enabled(True)
    assert not calls


def test_inside_torch_func(drawn):
    x, W, b = drawn
    found = torch.func.grad(lambda rows: swift(rows, W, b).square().sum())(x[:20])
    expected = 2 * (x[:20].double() @ W.double() + b.double()) @ W.double().t()
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-4)
    mapped = torch.func.vmap(lambda rows: swift(rows, W, b))(x.view(10, 30, N_IN))
    torch.testing.assert_close(mapped.flatten(0, 1), swift(x, W, b), rtol=0, atol=2e-5)


@torch.inference_mode()
def test_in_inference_mode(drawn):
    x, W, b = (each.clone() for each in drawn)
    torch.testing.assert_close(swift(x, W, b), x @ W + b, rtol=0, atol=2e-5)
