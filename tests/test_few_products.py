"""Convolutions with few products: the same pictures, weights that are never stale, nothing kept after unpatch."""

import copy
import gc
import weakref

import peft
import pytest
import torch
from attention_operands import absent
from sampling import distance
from sampling import latents as sampled
from torch import nn

from difffast import EncoderPropagation, ops, patch, patched, unpatch
from difffast.layers import convolution, transformed
from difffast.layers.context import CallContext, use_context
from difffast.layers.convolution import Convolution, Way, choose_way
from difffast.ops import _installed
from difffast.surgery.subclass import is_swapped

pytestmark = pytest.mark.skipif(absent("cpp") is not None, reason=str(absent("cpp")))
KIND = Convolution()


def latents(pipe, *args, **options):
    return sampled(pipe, *args, **{"steps": 3, **options})


@pytest.fixture
def counted(monkeypatch):
    """The weights that have been transformed."""
    made, prepare = [], transformed.convolution_weights
    monkeypatch.setattr(transformed, "convolution_weights", lambda w, tile: made.append(w) or prepare(w, tile))
    return made


def kept_layers(unet):
    return [layer for layer in KIND.find(unet).values() if layer in transformed._kept]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_pictures_are_stocks(pipe, dtype, monkeypatch, counted):
    monkeypatch.setattr(convolution, "advantage", lambda: 1.0)
    monkeypatch.setattr(_installed, "INSTRUCTION_SET", "avx512")  # with AMX, bfloat16 stays PyTorch's
    pipe = copy.deepcopy(pipe).to(dtype=dtype)
    stock = latents(pipe)
    with patched(pipe, "exact") as report:
        assert "few products (cpp)" in str(report)
        ours = latents(pipe)
        assert not report.last_run.reasons
        assert "MiB, convolutions' transformed weights" in str(report)
        assert kept_layers(pipe.unet)
        assert len(counted) == len(kept_layers(pipe.unet)), "once for all steps"
        assert torch.equal(latents(pipe), ours)
        assert len(counted) == len(kept_layers(pipe.unet)), "and for the next picture"
    assert distance(ours, stock) <= (1e-5 if dtype == torch.float32 else 0.05)
    assert not kept_layers(pipe.unet)
    assert not any(map(is_swapped, pipe.unet.modules()))
    assert torch.equal(latents(pipe), stock)


def test_they_can_be_switched_off(pipe, counted):
    with ops.use_backend("reference", "convolution"), patched(pipe, "exact") as report:
        assert "few products" not in str(report)
        latents(pipe)
    assert not counted


def test_lora_fused_and_taken_out(pipe):
    pipe = copy.deepcopy(pipe)
    pipe.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["conv1", "conv2"], init_lora_weights=False))
    with torch.no_grad():
        for name, weight in pipe.unet.named_parameters():
            if "lora_" in name:
                weight.mul_(0.05)
    stock = {}
    fuse, unfuse = (lambda: pipe.unet.fuse_lora(), lambda: pipe.unet.unfuse_lora())
    for name, change in (("fused", fuse), ("taken out", unfuse)):
        change()
        stock[name] = latents(pipe)
    with patched(pipe, "exact"):
        latents(pipe)
        for name, change in (("fused", fuse), ("taken out", unfuse), ("fused", fuse)):
            change()
            assert distance(latents(pipe), stock[name]) <= 1e-5


def test_two_pipelines_and_the_last_one_to_go(pipe):
    other = type(pipe)(**pipe.components)
    patch(pipe, "exact")
    patch(other, "exact")
    latents(other)
    unpatch(pipe)
    assert distance(latents(other), sampled(pipe, steps=3)) <= 1e-5
    unpatch(other)
    assert not kept_layers(pipe.unet)


def test_what_is_kept_goes_with_the_layer():
    layer = nn.Conv2d(32, 32, 3, padding=1)
    with torch.no_grad():
        KIND.forward(layer, torch.randn(1, 32, 16, 16))
    kept = weakref.ref(transformed._kept[layer].weights.transformed)
    del layer
    gc.collect()
    assert kept() is None


@torch.no_grad()
def decode(pipe):
    made = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return pipe("a red circle", num_inference_steps=1, latents=made, output_type="pt").images


def test_a_vae_too(pipe, counted):
    pipe = copy.deepcopy(pipe)
    stock = decode(pipe)
    with patched(pipe, "exact"):
        ours = decode(pipe)
        of_vae = {id(layer.weight) for layer in KIND.find(pipe.vae.decoder).values()}
        assert any(id(weight) in of_vae for weight in counted)
    assert distance(ours, stock) <= 1e-5
    assert not kept_layers(pipe.vae.decoder)


def test_weights_are_compared_once_in_a_pipelines_call(monkeypatch):
    layer, seen = nn.Conv2d(32, 32, 3, padding=1), []
    fingerprint = transformed.fingerprint
    monkeypatch.setattr(transformed, "fingerprint", lambda weights: seen.append(1) or fingerprint(weights))

    class Call:
        pass

    calls = [Call(), Call()]
    x = torch.randn(1, 32, 16, 16)
    with torch.no_grad():
        for within, expected in ((None, 1), (None, 2), (calls[0], 3), (calls[0], 3), (calls[1], 4), (calls[0], 5)):
            with use_context(CallContext(True, print, print, within=within)):
                KIND.forward(layer, x)
            assert len(seen) == expected
        layer.weight.mul_(2)
        with use_context(CallContext(True, print, print, within=calls[0])):
            assert distance(KIND.forward(layer, x), layer(x)) < 1e-6


@pytest.mark.parametrize(
    ("layer", "side", "tile"),
    [
        (nn.Conv2d(64, 64, 3, padding=1), 16, 4),
        (nn.Conv2d(640, 640, 3, padding=1), 16, 2),
        (nn.Conv2d(640, 640, 3, padding=1), 24, 4),
        (nn.Conv2d(64, 64, 3, padding=1), 8, 2),
        (nn.Conv2d(64, 64, 3, padding=1), 4, 2),
        (nn.Conv2d(320, 320, 3, padding=1), 4, 0),
        (nn.Conv2d(1280, 1280, 3, padding=1), 8, 0),
        (nn.Conv2d(4, 64, 3, padding=1), 32, 0),
        (nn.Conv2d(64, 4, 3, padding=1), 32, 0),
        (nn.Conv2d(64, 64, 3, padding=1, stride=2), 16, 0),
        (nn.Conv2d(64, 64, 3), 16, 0),
        (nn.Conv2d(64, 64, 3, padding=2, dilation=2), 16, 0),
        (nn.Conv2d(64, 64, 3, padding=1, groups=2), 16, 0),
        (nn.Conv2d(64, 64, 3, padding="same"), 16, 0),
        (nn.Conv2d(64, 64, 1), 16, 0),
        (nn.Conv2d(64, 64, (3, 1), padding=(1, 0)), 16, 0),
        (nn.Conv2d(64, 64, 3, padding=1).double(), 16, 0),
        (nn.Conv2d(64, 64, 3, padding=1).to(memory_format=torch.channels_last), 16, 0),
    ],
    ids=str,
)
def test_which_layers(layer, side, tile, monkeypatch):
    monkeypatch.setattr(convolution.products, "patches_pay", lambda *_: False)  # whatever is faster here
    convolution._find_way.cache_clear()
    x = torch.randn(1, layer.in_channels, side, side, dtype=layer.weight.dtype)
    assert choose_way(layer, x) == tile
    # As a VAE's attention hands it on.
    assert choose_way(layer, x.contiguous(memory_format=torch.channels_last)) == tile
    assert KIND.pays(layer, x) == (tile > 0)
    if tile:
        with torch.no_grad():
            for layout in (torch.contiguous_format, torch.channels_last):
                assert distance(KIND.forward(layer, x.contiguous(memory_format=layout)), layer(x)) < 3e-6
    convolution._find_way.cache_clear()


def test_what_runs_stock_and_why():
    layer, x = nn.Conv2d(64, 64, 3, padding=1), torch.randn(1, 64, 16, 16)
    assert KIND.refuse(layer, x, (), {}) == ""  # a gradient may be wanted
    assert not KIND.pays(layer, x.bfloat16())
    assert choose_way(layer, x[:, :, :1]) is Way.STOCK
    assert choose_way(layer, x[0]) is Way.STOCK
    with torch.no_grad():
        assert KIND.refuse(layer, x, (), {}) is None
        reflecting = nn.Conv2d(64, 64, 3, padding=1, padding_mode="reflect")
        assert "pads" in KIND.refuse(reflecting, x, (), {})
        layer.register_forward_hook(lambda *_: None)
        assert "hooks" in KIND.refuse(layer, x, (), {})


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("own", "given"), [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16)], ids=str)
def test_other_dtypes_than_the_weights_are_stocks_to_refuse(monkeypatch, own, given, bias):
    monkeypatch.setattr(convolution, "advantage", lambda: 1.0)
    layers = nn.Sequential(nn.Conv2d(64, 64, 3, padding=1, bias=bias).to(own))
    x = torch.randn(1, 64, 16, 16, dtype=given)
    with torch.no_grad():
        with pytest.raises(RuntimeError) as stock:
            layers(x)
        KIND.put_in(layers)
        with use_context(CallContext(True, print, print)), pytest.raises(RuntimeError) as ours:
            layers(x)
    assert str(ours.value) == str(stock.value)


def test_bfloat16_where_its_products_are_much_faster(monkeypatch):
    layer, x = nn.Conv2d(64, 64, 3, padding=1).bfloat16(), torch.randn(1, 64, 16, 16).bfloat16()
    monkeypatch.setattr(convolution, "advantage", lambda: 0.2)
    monkeypatch.setattr(_installed, "INSTRUCTION_SET", "avx512")
    assert choose_way(layer, x) is Way.STOCK
    assert not KIND.may_pay(layer.weight)
    monkeypatch.setattr(convolution, "advantage", lambda: 0.7)
    assert choose_way(layer, x) is Way.LARGE_TILES


@pytest.mark.parametrize(
    ("layer", "side"),
    [
        (nn.Conv2d(64, 48, 3, padding=1), 16),
        (nn.Conv2d(64, 48, 3, padding=1), 8),
        (nn.Conv2d(1280, 480, 3, padding=1), 4),
        (nn.Conv2d(64, 48, 1), 16),
        (nn.Conv2d(64, 4, 3, padding=1), 16),
        (nn.Conv2d(64, 48, 3, padding=1).to(memory_format=torch.channels_last), 16),
        (nn.Conv2d(64, 48, 3, padding=1).bfloat16(), 16),
        (nn.Conv2d(64, 4, 3, padding=1).bfloat16(), 16),
    ],
    ids=str,
)
@pytest.mark.parametrize("advantage", [0.1, 1.0, 2.0])
def test_parts_of_a_layer(layer, side, advantage, monkeypatch):
    """By every way that the whole layer may go, and from what is kept of the whole layer's weights."""
    monkeypatch.setattr(convolution, "advantage", lambda: advantage)
    monkeypatch.setattr(convolution, "_FEW", 8)
    monkeypatch.setattr(convolution, "_SMALL", 0)
    monkeypatch.setattr(convolution.products, "patches_pay", lambda *_: True)
    monkeypatch.setattr(convolution.products, "pixel_advantage", lambda: 2.0)
    convolution._find_way.cache_clear()
    channels, x = layer.in_channels, torch.randn(2, layer.in_channels, side, side).to(layer.weight.dtype)
    cut = channels // 3
    with torch.no_grad(), use_context(CallContext(True, print, print, within=layer)):
        whole = layer.double()(x.double())
        layer.to(x.dtype)
        before = KIND.forward(layer, x) if KIND.pays(layer, x) else layer(x)
        kept = transformed._kept.get(layer)
        parts = [
            convolution.convolve_channels(layer, x[:, :cut], slice(cut), layer.bias),
            convolution.convolve_channels(layer, x[:, cut:], slice(cut, None), None),
        ]
        assert transformed._kept.get(layer) is kept
    limit = 2e-6 if x.dtype == torch.float32 else 8e-3
    assert distance(before, whole) <= limit
    assert distance(parts[0].double() + parts[1].double(), whole) <= limit
    convolution._find_way.cache_clear()


def test_time_steps_that_share_skips_take_few_products(pipe, monkeypatch, counted):
    """Of the layers that are computed by parts as well, from the weights that whole steps use."""
    table = EncoderPropagation(key_steps=(0, 1, 4, 6), max_parallel=2)
    parts, kernel = [], convolution._kernel
    monkeypatch.setattr(convolution, "_kernel", lambda *args: parts.append(args[5:]) or kernel(*args))
    with patched(pipe, propagation=table, fused=False):
        stock = latents(pipe, steps=8)
    assert not counted
    with patched(pipe, propagation=table) as report:
        assert distance(latents(pipe, steps=8), stock) <= 1e-5
        assert not report.last_run.reasons
        assert len(counted) == len(kept_layers(pipe.unet))
    assert any(parts)


def test_where_no_kernel_may_run_parts_are_stocks():
    layer, x = nn.Conv2d(64, 48, 3, padding=1), torch.randn(1, 40, 16, 16)
    for context in (None, CallContext(False, print, print), CallContext(True, print, print, only_text=True)):
        with torch.no_grad(), use_context(context):
            convolution.convolve_channels(layer, x, slice(24, None), None)
    with use_context(CallContext(True, print, print)):
        convolution.convolve_channels(layer, x, slice(24, None), None).sum().backward()
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            assert convolution.convolve_channels(layer, x, slice(24, None), None).dtype == torch.bfloat16
    assert layer.weight.grad[:, 24:].abs().min() > 0
    assert layer not in transformed._kept


@pytest.mark.parametrize("unfused", [3, 99])
def test_a_lora_that_callbacks_fuse_and_unfuse(pipe, unfused):
    """PEFT merges through ``.data``, which PyTorch does not count."""
    pipe.unet.add_adapter(peft.LoraConfig(r=2, init_lora_weights=False, target_modules=["conv1", "conv2", "to_k"]))

    def change(pipe, step, time, tensors):
        changes = {1: lambda unet: unet.fuse_lora(lora_scale=2.0), unfused: lambda unet: unet.unfuse_lora()}
        changes.get(step, lambda unet: None)(pipe.unet)
        return tensors

    before, stock = latents(pipe, steps=6), latents(copy.deepcopy(pipe), steps=6, callback_on_step_end=change)
    with patched(pipe, "exact"):
        ours = latents(pipe, steps=6, callback_on_step_end=change)
    assert distance(stock, before) > 0.01
    assert distance(ours, stock) <= 1e-5
