"""Fused upsamplers: the same numbers, without the image of twice the size."""

import copy

import pytest
import torch
from diffusers.models.upsampling import Upsample2D
from lora_changes import load
from sampling import latents
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from difffast import ops, patched
from difffast.layers import convolution
from difffast.layers.context import CallContext, use_context
from difffast.layers.convolution import Convolution
from difffast.layers.upsampler import Upsampler
from difffast.surgery.subclass import is_swapped

pytestmark = pytest.mark.skipif(ops.missing("cpp") is not None, reason=str(ops.missing("cpp")))


class Interpolations(TorchDispatchMode):
    """Counts them."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += "upsample_nearest2d" in str(function)
        return function(*args, **(kwargs or {}))


def make(dtype=torch.float32, **options):
    torch.manual_seed(0)
    return Upsample2D(24, **{"use_conv": True, "out_channels": 40, **options}).to(dtype)


def fuse(layer):
    holder = nn.Sequential(layer)
    for kind in (Upsampler(), Convolution()):
        kind.put_in(holder)
    return layer


def call(layer, x, *args, **kwargs):
    """Return (result, interpolations)."""
    with (
        torch.no_grad(),
        use_context(CallContext(True, pytest.fail, pytest.fail, within=layer)),
        Interpolations() as seen,
    ):
        return layer(x, *args, **kwargs), seen.count


def images(dtype=torch.float32, size=(2, 24, 9, 14)):
    return (1 + torch.randn(size, generator=torch.Generator().manual_seed(1))).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("size", [(2, 24, 9, 14), (1, 24, 16, 16), (3, 24, 1, 5)], ids=str)
def test_numbers_are_stocks(size, dtype, monkeypatch):
    monkeypatch.setattr(convolution, "advantage", lambda: 1.0)
    convolution._find_way.cache_clear()
    layer, x = make(dtype), images(dtype, size)
    with torch.no_grad():
        stock, exact = layer(x), copy.deepcopy(layer).double()(x.double())
    out, interpolations = call(fuse(layer), x)
    assert interpolations == 0
    assert out.is_contiguous()
    error = float((out - exact).abs().max())
    assert error <= 1.1 * float((stock - exact).abs().max()) + 1e-6 * float(exact.abs().max())
    for args, kwargs in (((None,), {}), ((), {"output_size": None})):  # as UNets call them; and by name
        again, interpolations = call(layer, x, *args, **kwargs)
        assert torch.equal(again, out)
        assert interpolations == 0
    convolution._find_way.cache_clear()


def test_other_calls_run_stock():
    layer, x = make(), images()
    with torch.no_grad():
        stock = [layer(x), layer(x, (18, 28)), layer(x, output_size=(19, 27))]
    fuse(layer)
    for args, kwargs, expected in zip(((), ((18, 28),), ()), ({}, {}, {"output_size": (19, 27)}), stock, strict=True):
        out, interpolations = call(layer, x, *args, **kwargs)
        assert interpolations == bool(args or kwargs)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    last, interpolations = call(layer, x.contiguous(memory_format=torch.channels_last))
    assert interpolations == 1
    torch.testing.assert_close(last, stock[0], rtol=1e-4, atol=1e-5)
    with use_context(CallContext(True, pytest.fail, pytest.fail)):
        leaf = x.clone().requires_grad_()
        layer(leaf).sum().backward()
    assert leaf.grad is not None
    seen = []
    layer.conv.register_forward_pre_hook(lambda _, given: seen.append(given[0].shape))
    with torch.no_grad(), use_context(CallContext(True, print, print, within=layer)):
        layer(x)
    assert seen == [(2, 24, 18, 28)]


def test_layers_that_others_have_changed_run_stock():
    class Quantised(nn.Parameter):
        pass

    x, notes = images(), []
    for change, reasons in [
        (
            lambda layer: layer.register_forward_hook(lambda *_: None),
            ["upsamplers run stock: one has hooks, or a forward of its own"],
        ),
        (
            lambda layer: setattr(layer, "forward", lambda *a: Upsample2D.forward(layer, *a)),
            ["upsamplers run stock: one has hooks, or a forward of its own"],
        ),
        (lambda layer: setattr(layer.conv, "weight", Quantised(layer.conv.weight)), []),
        (lambda layer: nn.utils.parametrizations.weight_norm(layer.conv), []),
    ]:
        layer = make()
        with torch.no_grad():
            expected = layer(x)
        Upsampler().put_in(nn.Sequential(layer))
        change(layer)
        notes.clear()
        with torch.no_grad(), use_context(CallContext(True, notes.append, notes.append)), Interpolations() as seen:
            torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)
        assert seen.count == 1
        assert notes == reasons


@pytest.mark.parametrize(
    "options",
    [
        {"use_conv": False},
        {"use_conv_transpose": True},
        {"interpolate": False},
        {"norm_type": "ln_norm", "eps": 1e-5, "elementwise_affine": True},
        {"name": "Conv2d_0"},
        {"kernel_size": 5, "padding": 2},
        {"out_channels": 8},
    ],
    ids=str,
)
def test_other_kinds_are_left_alone(options):
    layer = make(**options)
    Upsampler().put_in(nn.Sequential(nn.Linear(1, 1), layer))
    assert not is_swapped(layer)


def test_a_pipeline(pipe):
    stock = latents(pipe, steps=2)
    layers = Upsampler().find(pipe.unet).values()
    assert layers
    with Interpolations() as before:
        latents(pipe, steps=2)
    with patched(pipe, "exact") as report, Interpolations() as after:
        ours = latents(pipe, steps=2)
        assert not report.last_run.reasons
    assert before.count > after.count
    assert float((ours - stock).norm() / stock.norm()) <= 1e-5
    assert not any(map(is_swapped, pipe.unet.modules()))
    assert torch.equal(latents(pipe, steps=2), stock)


def test_a_vae(pipe):
    x = torch.randn(1, pipe.vae.config.latent_channels, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        with Interpolations() as before:
            stock = pipe.vae.decode(x).sample
        with patched(pipe, "exact"), Interpolations() as after:
            ours = pipe.vae.decode(x).sample
    assert before.count > after.count
    assert float((ours - stock).norm() / stock.norm()) <= 1e-5


def test_sizes_that_do_not_halve_and_adapters(pipe):
    """The UNet says which size is wanted where halves were rounded up; and LoRA may have taken a convolution."""
    options = {"steps": 2, "height": 8 * 9, "width": 8 * 7}
    stock = latents(pipe, **options)
    with patched(pipe, "exact"):
        assert float((latents(pipe, **options) - stock).norm() / stock.norm()) <= 1e-5
    load(pipe)
    stock = latents(pipe, steps=2)
    with patched(pipe, "exact"):
        assert float((latents(pipe, steps=2) - stock).norm() / stock.norm()) <= 1e-5
