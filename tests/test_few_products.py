"""Convolutions with few products: the same pictures, weights that are never stale, nothing kept after unpatch."""

import copy
import gc
import weakref

import peft
import pytest
import torch
from attention_operands import absent
from sampling import latents as sampled
from torch import nn

from difffast import ops, patch, patched, unpatch
from difffast.layers import convolution, transformed
from difffast.layers.context import CallContext, use_context
from difffast.layers.convolution import Convolution, choose_tile
from difffast.surgery.subclass import is_swapped

pytestmark = pytest.mark.skipif(absent("cpp") is not None, reason=str(absent("cpp")))
KIND = Convolution()


def latents(pipe, *args, **options):
    return sampled(pipe, *args, **{"steps": 3, **options})


def distance(found, right):
    return float((found.double() - right.double()).norm() / right.double().norm())


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


def change_in_place(layer):
    with torch.no_grad():
        layer.weight.mul_(1.5)


def change_past_the_version(layer):
    layer.weight.data += 0.25


def change_one_number(layer):
    layer.weight.data.view(-1)[-1] += 3.0


def replace_data(layer):
    layer.weight.data = layer.weight.data * 1.5


def replace_parameter(layer):
    layer.weight = nn.Parameter(layer.weight.detach() * 1.5, requires_grad=False)


def load(layer):
    layer.load_state_dict({name: 1.5 * value for name, value in layer.state_dict().items()})


CHANGES = (change_in_place, change_past_the_version, change_one_number, replace_data, replace_parameter, load)


@pytest.mark.parametrize("change", CHANGES)
def test_weights_that_have_changed_are_seen(pipe, change):
    pipe = copy.deepcopy(pipe)
    with patched(pipe, "exact"):
        before = latents(pipe)
        for layer in kept_layers(pipe.unet):
            change(layer)
        after = latents(pipe)
    right = latents(pipe)
    assert distance(after, before) > 1e-3
    assert distance(after, right) <= 1e-5


@pytest.mark.parametrize("change", [change_in_place, replace_data, replace_parameter, load])
def test_weights_that_change_in_the_middle_of_a_run_are_seen(pipe, change):
    def run():
        mine = copy.deepcopy(pipe)

        def at_the_second_step(_pipe, step, _timestep, given):
            if step == 1:
                for layer in KIND.find(mine.unet).values():
                    change(layer)
            return given

        return mine, lambda: latents(mine, callback_on_step_end=at_the_second_step)

    _, stock = run()
    mine, ours = run()
    with patched(mine, "exact"):
        found = ours()
    assert distance(found, stock()) <= 1e-5


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
def test_which_layers(layer, side, tile):
    x = torch.randn(1, layer.in_channels, side, side, dtype=layer.weight.dtype)
    assert choose_tile(layer, x) == tile
    # As a VAE's attention hands it on.
    assert choose_tile(layer, x.contiguous(memory_format=torch.channels_last)) == tile
    assert KIND.pays(layer, x) == (tile > 0)
    if tile:
        with torch.no_grad():
            for layout in (torch.contiguous_format, torch.channels_last):
                assert distance(KIND.forward(layer, x.contiguous(memory_format=layout)), layer(x)) < 3e-6


def test_what_runs_stock_and_why():
    layer, x = nn.Conv2d(64, 64, 3, padding=1), torch.randn(1, 64, 16, 16)
    assert KIND.refuse(layer, x, (), {}) == ""  # a gradient may be wanted
    assert not KIND.pays(layer, x.bfloat16())
    assert choose_tile(layer, x[:, :, :1]) == 0
    assert choose_tile(layer, x[0]) == 0
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
    assert choose_tile(layer, x) == 0
    assert not KIND.may_pay(layer.weight)
    monkeypatch.setattr(convolution, "advantage", lambda: 0.7)
    assert choose_tile(layer, x) == 4
