"""Weights of convolutions that are kept as their kernels want them: those with few products, and packed ones."""

import contextlib
import copy

import pytest
import torch
from attention_operands import absent
from sampling import distance
from sampling import latents as sampled
from torch import nn

from difffast import ops, patched
from difffast.layers import convolution, packed, transformed
from difffast.layers.convolution import Convolution, Way, choose_way
from difffast.ops import _installed

pytestmark = pytest.mark.skipif(absent("cpp") is not None, reason=str(absent("cpp")))
KIND = Convolution()


def latents(pipe, *args, **options):
    return sampled(pipe, *args, **{"steps": 3, **options})


@pytest.fixture(params=["few products", "packed"])
def changing(pipe, request, monkeypatch):
    """A pipeline whose convolutions' weights are kept in either way, how it runs without, and how far from that."""
    pipe = copy.deepcopy(pipe)
    if request.param == "few products":
        return pipe, lambda pipe: contextlib.nullcontext(), 1e-5
    pack_here(monkeypatch)

    @contextlib.contextmanager
    def unpacked(pipe):
        with monkeypatch.context() as context, patched(pipe, "exact"):
            context.setattr(packed, "can_be", lambda *_: False)
            yield

    return pipe.to(dtype=torch.bfloat16), unpacked, 0.0


def pack_here(monkeypatch):
    """Let weights be packed on any processor that oneDNN knows bfloat16 on."""
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        pytest.skip("oneDNN has no bfloat16 here")
    monkeypatch.setattr(convolution, "advantage", lambda: 1 / 3)
    monkeypatch.setattr(_installed, "INSTRUCTION_SET", "amx")


def kept_layers(unet):
    return [layer for layer in KIND.find(unet).values() if layer in transformed._kept]


def change_in_place(layer):
    with torch.no_grad():
        layer.weight.mul_(1.5)


def change_past_the_version(layer):
    layer.weight.data += 0.25


def change_one_number(layer):
    layer.weight.data[-1, -1, -1, -1] += 3.0


def replace_data(layer):
    layer.weight.data = layer.weight.data * 1.5


def replace_parameter(layer):
    layer.weight = nn.Parameter(layer.weight.detach() * 1.5, requires_grad=False)


def load(layer):
    layer.load_state_dict({name: 1.5 * value for name, value in layer.state_dict().items()})


CHANGES = (change_in_place, change_past_the_version, change_one_number, replace_data, replace_parameter, load)


@pytest.mark.parametrize("change", CHANGES)
def test_weights_that_have_changed_are_seen(changing, change):
    pipe, without, near = changing
    with patched(pipe, "exact"):
        before = latents(pipe)
        kept = kept_layers(pipe.unet)
        assert kept
        for layer in kept:
            change(layer)
        after = latents(pipe)
    with without(pipe):
        right = latents(pipe)
    assert distance(after, before) > 1e-3
    assert distance(after, right) <= near


@pytest.mark.parametrize("change", [change_in_place, replace_data, replace_parameter, load])
def test_weights_that_change_in_the_middle_of_a_run_are_seen(changing, change):
    pipe, without, near = changing

    def run():
        mine = copy.deepcopy(pipe)

        def at_the_second_step(_pipe, step, _timestep, given):
            if step == 1:
                for layer in KIND.find(mine.unet).values():
                    change(layer)
            return given

        return mine, lambda: latents(mine, callback_on_step_end=at_the_second_step)

    mine, ours = run()
    with patched(mine, "exact"):
        found = ours()
    mine, plainly = run()
    with without(mine):
        assert distance(found, plainly()) <= near


def test_packed_weights_give_the_same_bits(pipe, monkeypatch):
    """In channels_last the convolutions are stock's own, of weights that are laid out once."""
    pack_here(monkeypatch)
    pipe = copy.deepcopy(pipe).to(dtype=torch.bfloat16)
    stock, made, pack = latents(pipe), [], packed.pack
    monkeypatch.setattr(packed, "pack", lambda *args: made.append(1) or pack(*args))
    with monkeypatch.context() as context, patched(pipe, "exact"):
        context.setattr(packed, "can_be", lambda *_: False)
        unpacked = latents(pipe)
        assert not kept_layers(pipe.unet)
    with patched(pipe, "exact") as report:
        assert "weights laid out once (oneDNN), where pixels are few" in str(report)
        for _ in range(2):
            assert torch.equal(latents(pipe), unpacked)
            assert len(made) == len(kept_layers(pipe.unet)) > 0, "once for all steps and pictures"
        assert "MiB, convolutions' transformed weights" in str(report)
    assert not kept_layers(pipe.unet)
    assert torch.equal(latents(pipe), stock)


@pytest.mark.parametrize(
    ("layer", "side", "way"),
    [
        (nn.Conv2d(64, 64, 3, padding=1), 32, Way.PACKED),
        (nn.Conv2d(64, 64, 3, padding=1), 33, Way.STOCK),
        (nn.Conv2d(64, 64, 3, padding=1, stride=2), 16, Way.STOCK),
        (nn.Conv2d(64, 64, 1), 16, Way.STOCK),
    ],
    ids=str,
)
def test_which_weights_are_packed(layer, side, way, monkeypatch):
    pack_here(monkeypatch)
    x = torch.randn(2, 64, side, side).bfloat16()
    layer = copy.deepcopy(layer).to(torch.bfloat16, memory_format=torch.channels_last)
    assert choose_way(layer, x) is way
    with torch.no_grad():
        for layout in (torch.contiguous_format, torch.channels_last):
            given, expected = x.contiguous(memory_format=layout), layer(x)
            if way is Way.PACKED:
                assert torch.equal(KIND.forward(layer, given), expected)
                # What was packed for these images serves others.
                assert torch.equal(KIND.forward(layer, given[:1, :, :9, :7]), layer(given[:1, :, :9, :7]))
    with ops.use_backend("reference", "convolution"):
        assert choose_way(layer, x) is Way.STOCK
    assert choose_way(layer, x[:, :32], 32) is Way.STOCK, "a part of the channels"
    assert choose_way(layer.float(), x.float()) is Way.STOCK


def test_packed_layers_are_written_in_any_way_and_refused_as_stocks_are(monkeypatch):
    pack_here(monkeypatch)
    x = torch.randn(1, 64, 8, 8).bfloat16()
    layer = nn.Conv2d(64, 64, 3, padding=1).to(torch.bfloat16, memory_format=torch.channels_last)
    layer.padding = 1
    with torch.no_grad():
        assert choose_way(layer, x) is Way.PACKED
        assert torch.equal(KIND.forward(layer, x), layer(x))
        layer.bias.data = layer.bias.data.float()
        assert choose_way(layer, x) is Way.STOCK
    bare = nn.Conv2d(64, 64, 3, padding=1, bias=False).to(torch.bfloat16, memory_format=torch.channels_last)
    with torch.no_grad():
        assert choose_way(bare, x) is Way.PACKED
        assert torch.equal(KIND.forward(bare, x), bare(x))
    # Whoever trains biases alone gets their gradients.
    layer.weight.requires_grad_(False)
    assert KIND.refuse(layer, x, (), {}) == ""
    layer.bias.requires_grad_(False)
    assert KIND.refuse(layer, x, (), {}) is None
