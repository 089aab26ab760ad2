"""Convolutions of many weights and few pixels as one product: the same numbers, and stock where it is needed."""

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


@pytest.fixture(autouse=True)
def counted(monkeypatch):
    """Shapes of the inputs that were multiplied.

    Layers as small as these have many weights, too many for tiles, and it is faster, whatever this machine says.
    """
    shapes, multiply = [], products.multiply_patches
    monkeypatch.setattr(products, "_MANY_WEIGHTS", 256)
    monkeypatch.setattr(products, "patch_advantage", lambda *_: 2.0)
    monkeypatch.setattr(convolution, "_SMALL_WEIGHTS", 0)
    monkeypatch.setattr(
        products, "multiply_patches", lambda layer, x: shapes.append(tuple(x.shape)) or multiply(layer, x)
    )
    convolution._find_way.cache_clear()
    yield shapes
    convolution._find_way.cache_clear()


def fuse(layer):
    """Return a layer as a patched model has it."""
    model = nn.Sequential(layer)
    Convolution().put_in(model)
    return model[0]


def call(layer, x):
    with use_context(CallContext(True, lambda *_: None, lambda *_: None)):
        return layer(x)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize(
    ("settings", "size"),
    [
        ({"kernel_size": 3, "padding": 1}, (4, 4)),
        ({"kernel_size": 3, "padding": 1, "stride": 2}, (8, 8)),
        ({"kernel_size": 3, "padding": 0, "stride": 2}, (9, 5)),  # as a VAE's, which pads by itself
        ({"kernel_size": (3, 5), "padding": (2, 0), "stride": (1, 3), "dilation": (2, 1)}, (7, 11)),
        ({"kernel_size": 1, "padding": 0, "stride": 2}, (4, 4)),
    ],
    ids=str,
)
def test_numbers_are_stocks(settings, size, batch, bias, counted):
    torch.manual_seed(0)
    layer, x = nn.Conv2d(24, 40, **settings, bias=bias), 2 + torch.randn(batch, 24, *size)
    with torch.no_grad():
        stock = layer(x)
        exact = copy.deepcopy(layer).double()(x.double())
        ours = call(fuse(layer), x)
    assert counted == ([] if settings["kernel_size"] == 1 else [tuple(x.shape)])
    assert ours.shape == stock.shape
    assert ours.is_contiguous()
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("layer", "size"),
    [
        (nn.Conv2d(32, 32, 3, padding=1, groups=2), (2, 32, 4, 4)),
        (nn.Conv2d(32, 32, 3, padding=1, padding_mode="circular"), (2, 32, 4, 4)),
        (nn.Conv2d(32, 32, 3, padding="same", stride=1, dilation=2), (2, 32, 4, 4)),
        (nn.Conv2d(32, 32, 3, padding=1, stride=2), (2, 32, 24, 24)),  # 288 results
        (nn.Conv2d(15, 16, 3, padding=1), (2, 15, 4, 4)),  # too few weights
        (nn.Conv2d(32, 32, 3, padding=1), (0, 32, 4, 4)),
        (nn.Conv2d(32, 32, 3, padding=1).to(torch.bfloat16), (1, 32, 4, 4)),
        (nn.Conv2d(32, 32, 3, padding=1).double(), (1, 32, 4, 4)),
    ],
    ids=str,
)
def test_others_are_stocks_own(layer, size, counted):
    x = torch.randn(size, dtype=layer.weight.dtype)
    with torch.no_grad():
        expected = layer(x)
        call(fuse(layer), x)
    assert expected.shape == call(layer, x).shape
    assert not counted


def test_bad_input_gets_stocks_error(counted):
    layer = fuse(nn.Conv2d(32, 32, 5))
    with torch.no_grad():
        for x in (torch.randn(1, 32, 1, 1), torch.randn(1, 32, 4, 9), torch.randn(1, 31, 8, 8)):
            with pytest.raises(RuntimeError):
                call(layer, x)
    assert not counted


def test_layout_and_gradients_stay(counted):
    layer, x = fuse(nn.Conv2d(32, 32, 3, padding=1)), torch.randn(2, 32, 4, 4)
    with torch.no_grad():
        last = call(layer, x.contiguous(memory_format=torch.channels_last))
    assert last.is_contiguous(memory_format=torch.channels_last)
    call(layer, x.requires_grad_()).sum().backward()
    assert x.grad is not None
    assert not counted


def test_a_pipeline(pipe, counted):
    stock = sampled(pipe, steps=3)
    with patched(pipe, "exact") as report:
        assert "of many weights (" in str(report)
        ours = sampled(pipe, steps=3)
        assert len(counted) >= 3
        counted.clear()
        with ops.use_backend("reference", "convolution"):
            sampled(pipe, steps=3)
        assert not counted
    assert float((ours - stock).norm() / stock.norm()) <= 1e-5
    assert not any(map(is_swapped, pipe.unet.modules()))
    assert torch.equal(sampled(pipe, steps=3), stock)


def test_each_shape_is_asked_for_once_and_where_it_is_no_faster_stock_runs(pipe, counted, monkeypatch):
    asked = []

    def advantage(weight, batch, height, width, *settings):
        asked.append((weight, batch, height, width, *settings))
        return 1.0 if batch == 2 else 2.0

    monkeypatch.setattr(products, "patch_advantage", advantage)
    convolution._find_way.cache_clear()
    with patched(pipe, "exact"):
        sampled(pipe, steps=2)
        assert asked
        assert len(asked) == len(set(asked))
        assert not counted
        sampled(pipe, steps=2, guidance_scale=1.0)
        assert {shape[0] for shape in counted} == {1}


def test_the_advantage_is_measured_for_each_shape_and_leaves_nothing_behind(monkeypatch):
    monkeypatch.undo()
    products.patch_advantage.cache_clear()
    state = torch.get_rng_state()
    settings = (1, 1), (1, 1), (1, 1)
    for weight, batch, side in (((40, 24, 3, 3), 2, 4), ((24, 40, 3, 3), 1, 6)):
        assert 0.01 < products.patch_advantage(torch.Size(weight), batch, side, side, *settings) < 100
    assert products.patch_advantage.cache_info().currsize == 2
    assert torch.equal(torch.get_rng_state(), state)


def test_the_faster_way_is_chosen_by_shape(monkeypatch):
    """Whatever is measured: a layer asks for its own shape, and for that of its images."""
    layer = nn.Conv2d(24, 40, 3, padding=1)
    monkeypatch.setattr(
        products, "patch_advantage", lambda weight, batch, height, width, *_: batch * height * width / 9
    )
    for images, pays in (((1, 24, 3, 3), False), ((1, 24, 3, 4), True), ((2, 24, 3, 3), True)):
        assert products.patches_pay(layer, torch.Size(images)) == pays
