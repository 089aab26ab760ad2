"""Convolutions in bfloat16 multiply in float32 where that is faster, and run stock where it is not or cannot be.

Those with few products, which come first, are switched off here: tests/test_few_products.py.
"""

import copy
import threading

import peft
import pytest
import torch
from sampling import distance
from sampling import latents as sampled
from torch import nn

from difffast import patch, patched
from difffast.layers import convolution
from difffast.layers.convolution import Convolution
from difffast.ops import _installed
from difffast.surgery.subclass import is_swapped

KIND = Convolution()


def latents(pipe, *args, **options):
    return sampled(pipe, *args, **{"steps": 4, **options})


@pytest.fixture(autouse=True)
def _pays(monkeypatch):
    """As on a processor without instructions for bfloat16, and for layers as small as these pipelines'."""
    monkeypatch.setattr(convolution, "advantage", lambda: 2.0)
    monkeypatch.setattr(convolution, "_FEW", 8)
    monkeypatch.setattr(convolution, "_SMALL", 0)
    monkeypatch.setattr(convolution, "_has_few_products", lambda weight: False)
    monkeypatch.setattr(convolution, "choose_way", lambda layer, hidden, channels=None: convolution.Way.STOCK)


@pytest.fixture
def half(pipe):
    return copy.deepcopy(pipe).to(dtype=torch.bfloat16)


@pytest.fixture
def counted(monkeypatch):
    """The shapes of weights that have been widened."""
    shapes, widen = [], convolution._widen
    monkeypatch.setattr(convolution, "_widen", lambda weight: shapes.append(tuple(weight.shape)) or widen(weight))
    return shapes


def test_a_patched_pipeline_is_nearer_to_float32_than_stock(pipe, half, counted):
    several = {"num_images_per_prompt": 8}  # one alone may be nearer by chance
    right, stock = latents(pipe, **several), latents(half, **several)
    layers = KIND.find(half.unet)
    with patched(half, "exact") as report:
        assert f"bfloat16 convolutions ({len(layers)}) products in float32, 2.0 times as fast here" in " ".join(
            str(report).split()
        )
        ours = latents(half, **several)
        assert not report.last_run.reasons
    assert len(counted) == 4 * len(layers)
    assert distance(ours, right) <= distance(stock, right)
    assert not any(map(is_swapped, half.unet.modules()))
    counted.clear()
    assert torch.equal(latents(half, **several), stock)
    assert not counted


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(16, 24, 3, padding=1), (2, 16, 9, 7)),
        (nn.Conv2d(16, 24, 3, stride=2, padding=1, bias=False), (2, 16, 8, 8)),
        (nn.Conv2d(16, 32, (1, 3), padding=(0, 1), groups=4, dilation=1), (1, 16, 8, 8)),
        (nn.Conv2d(33, 17, 1), (2, 33, 8, 8)),
    ],
    ids=str,
)
@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_a_product_is_rounded_once(layer, shape, offset):
    layer, x = layer.bfloat16(), (torch.randn(shape) + offset).bfloat16()
    right = copy.deepcopy(layer).double()(x.double())
    with torch.no_grad():
        found = KIND.forward(layer, x)
    assert found.dtype == torch.bfloat16
    # Half of a unit in the last of 8 digits, and float32's own rounding of sums in which numbers cancel.
    slack = 1e-6 * float(x.double().abs().max()) * layer.weight.double().abs().flatten(1).sum(1).max()
    assert bool(((found.double() - right).abs() <= right.abs() * 2**-8 + slack).all())


def test_memory_is_taken_again_and_results_are_not_in_it(counted):
    layers = [nn.Conv2d(16, size, 3).bfloat16() for size in (8, 64, 8)]
    x = torch.randn(1, 16, 8, 8).bfloat16()
    with torch.inference_mode():
        first = [KIND.forward(layer, x) for layer in layers]
        kept = [each.clone() for each in first]
    with torch.no_grad():  # the memory is no inference tensor
        held = convolution._local.held
        again = [KIND.forward(layer, x) for layer in reversed(layers)][::-1]
        assert convolution._local.held is held
    for result in (kept, again):
        assert all(torch.equal(a, b) for a, b in zip(first, result, strict=True))


def test_threads_have_memory_of_their_own():
    layers = [nn.Conv2d(64, 64, 3).bfloat16() for _ in range(2)]
    x = torch.randn(1, 64, 16, 16).bfloat16()
    with torch.no_grad():
        right = [KIND.forward(layer, x) for layer in layers]
    wrong = []

    def run(layer, expected):
        with torch.no_grad():
            for _ in range(50):
                if not torch.equal(KIND.forward(layer, x), expected):
                    wrong.append(layer)

    threads = [threading.Thread(target=run, args=each) for each in zip(layers, right, strict=True)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_what_runs_stock_and_why():
    x, layer = torch.randn(2, 32, 8, 8).bfloat16(), nn.Conv2d(32, 32, 3).bfloat16()
    assert KIND.refuse(layer, x, (), {}) == ""  # a gradient may be wanted
    with torch.no_grad():
        assert KIND.refuse(layer, x, (), {}) is None
        assert "more than its input" in KIND.refuse(layer, x, (1.0,), {})
        reflecting = nn.Conv2d(32, 32, 3, padding=1, padding_mode="reflect").bfloat16()
        assert "pads" in KIND.refuse(reflecting, x, (), {})
        with torch.autocast("cpu", torch.bfloat16):
            assert "autocast" in KIND.refuse(layer, x, (), {})
        layer.register_forward_hook(lambda *_: None)
        assert "hooks" in KIND.refuse(layer, x, (), {})
    assert KIND.pays(layer, x)
    assert not KIND.pays(layer, x[:, :, :1, :2])
    assert not KIND.pays(layer, x.float())
    assert not KIND.pays(nn.Conv2d(32, 32, 3), x)
    assert not KIND.may_pay(torch.empty(1, dtype=torch.float64))
    assert not KIND.may_pay(torch.empty(1, dtype=torch.bfloat16, device="meta"))


def test_where_bfloat16_is_as_fast_layers_are_left_alone(half, monkeypatch, counted):
    monkeypatch.setattr(convolution, "advantage", lambda: 1.0)
    monkeypatch.setattr(_installed, "INSTRUCTION_SET", "avx512")  # with AMX, weights are packed
    stock = latents(half)
    with patched(half, "exact", fused=True) as report:
        assert "bfloat16 convolutions" not in str(report)
        assert distance(latents(half), stock) <= 0.05
        assert not any(is_swapped(layer) for layer in KIND.find(half.unet).values())
    assert not counted


def test_the_advantage_is_measured(monkeypatch):
    monkeypatch.undo()
    convolution.advantage.cache_clear()
    assert 0.05 < convolution.advantage() < 50


def test_lora_around_the_layers(half, counted):
    config = peft.LoraConfig(r=2, target_modules=["conv1"], init_lora_weights=False)
    half.unet.add_adapter(config)
    half.unet.to(torch.bfloat16)
    stock = latents(half)
    with patched(half, "exact") as report:
        assert distance(latents(half), stock) <= 0.05
        assert not report.last_run.reasons
    assert counted
    assert torch.equal(latents(half), stock)


def test_a_vae_is_widened_too(half, counted):
    with torch.no_grad():
        picture = torch.randn(1, 4, 8, 8).bfloat16()
    patch(half, "exact")
    layers = KIND.find(half.vae.decoder)
    assert all(is_swapped(layer) for layer in layers.values())
    before = len(counted)
    half("a red circle", num_inference_steps=1, latents=picture, output_type="pt")
    assert any(shape == tuple(half.vae.decoder.conv_in.weight.shape) for shape in counted[before:])
