"""Convolutions of 1x1 pixels as matrix products: the same numbers, and stock where it is asked for or needed."""

import copy

import pytest
import torch
from sampling import latents as sampled
from torch import nn

from difffast import ops, patched
from difffast.layers import convolution, products
from difffast.layers.context import CallContext, use_context
from difffast.layers.convolution import Convolution
from difffast.surgery.subclass import is_swapped

KIND = Convolution()


@pytest.fixture(autouse=True)
def counted(monkeypatch):
    """Shapes of the inputs that were multiplied; it is faster here, whatever this machine says."""
    shapes, multiply = [], products.multiply_pixels
    monkeypatch.setattr(products, "pixel_advantage", lambda: 2.0)
    monkeypatch.setattr(
        products, "multiply_pixels", lambda layer, x: shapes.append(tuple(x.shape)) or multiply(layer, x)
    )
    convolution._find_way.cache_clear()
    yield shapes
    convolution._find_way.cache_clear()


def fuse(layer):
    """Return a layer as a patched model has it."""
    model = nn.Sequential(layer)
    KIND.put_in(model)
    return model[0]


def call(layer, x):
    with use_context(CallContext(True, lambda *_: None, lambda *_: None)):
        return layer(x)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(1, 8, 1, 1), (2, 16, 5, 3), (3, 33, 16, 16), (0, 8, 4, 4)], ids=str)
def test_numbers_are_stocks(shape, bias, counted):
    torch.manual_seed(0)
    layer, x = nn.Conv2d(shape[1], 24, 1, bias=bias), 2 + torch.randn(shape)
    with torch.no_grad():
        stock = layer(x)
        ours = call(fuse(layer), x)
        exact = copy.deepcopy(layer).double()(x.double())
    assert counted == [shape]
    assert ours.shape == stock.shape
    assert ours.is_contiguous()
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(8, 8, 1, stride=2),
        nn.Conv2d(8, 8, 1, padding=1),
        nn.Conv2d(8, 8, 1, groups=2),
        nn.Conv2d(8, 8, (1, 3)),
    ],
    ids=str,
)
def test_others_are_stocks_own(layer, counted):
    x = torch.randn(2, 8, 6, 6)
    with torch.no_grad():
        assert torch.equal(call(fuse(layer), x), layer(x))
    assert not counted


def test_layout_and_dtype_stay(counted):
    layer, x = nn.Conv2d(8, 16, 1), torch.randn(2, 8, 6, 6)
    with torch.no_grad():
        last = call(fuse(layer), x.contiguous(memory_format=torch.channels_last))
        assert last.is_contiguous(memory_format=torch.channels_last)
        assert not counted
        with pytest.raises(RuntimeError):
            call(layer, x.double())
        with pytest.raises(RuntimeError, match="expected input"):
            call(layer, x[:, :4])
        assert call(layer, x[0]).shape == (16, 6, 6)  # without a batch, as stock takes it
    assert not counted


def test_gradients_are_stocks(counted):
    layer, x = fuse(nn.Conv2d(8, 16, 1)), torch.randn(2, 8, 6, 6, requires_grad=True)
    out = call(layer, x)
    assert not counted
    out.sum().backward()
    assert x.grad is not None
    assert layer.weight.grad is not None


def test_a_pipeline(pipe, counted):
    stock = sampled(pipe, steps=3)
    with patched(pipe, "exact") as report:
        assert "convolutions of 1x1 (" in str(report)
        ours = sampled(pipe, steps=3)
        assert len(counted) >= 3
        counted.clear()
        with ops.use_backend("reference", "convolution"):
            sampled(pipe, steps=3)
        assert not counted
    assert float((ours - stock).norm() / stock.norm()) <= 1e-5
    assert not any(map(is_swapped, pipe.unet.modules()))
    assert torch.equal(sampled(pipe, steps=3), stock)


def test_where_it_is_no_faster_nothing_changes(pipe, counted, monkeypatch):
    monkeypatch.setattr(products, "pixel_advantage", lambda: 0.9)
    convolution._find_way.cache_clear()
    with patched(pipe, "exact"):
        sampled(pipe, steps=2)
    assert not counted


def test_the_advantage_is_measured(monkeypatch):
    monkeypatch.undo()
    products.pixel_advantage.cache_clear()
    assert 0.05 < products.pixel_advantage() < 100
