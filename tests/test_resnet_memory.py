"""The sum of a fused resnet goes where memory is already, and never where anybody else would notice."""

import copy

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import nn

from difffast import ops
from difffast.layers import convolution, resnet
from difffast.layers.context import CallContext, use_context
from difffast.layers.convolution import Convolution
from difffast.layers.resnet import Resnet

pytestmark = [
    pytest.mark.skipif(ops.missing("cpp") is not None, reason=str(ops.missing("cpp"))),
    pytest.mark.usefixtures("_chosen"),
]

SIZE = (2, 32, 24, 24)


@pytest.fixture
def _chosen(monkeypatch):
    monkeypatch.setattr(resnet, "_LARGE", 0)
    with ops.use_backend("cpp", "group_norm_silu"):  # by itself it is chosen for larger operands only
        yield


@pytest.fixture
def written(monkeypatch):
    """Addresses of (what was written, what was added) by convolutions into memory that was there."""
    places, run_into = [], convolution.run_into
    monkeypatch.setattr(
        convolution,
        "run_into",
        lambda out, x, weights, bias, addend: (
            places.append((out.data_ptr(), addend.data_ptr())),
            run_into(out, x, weights, bias, addend),
        ),
    )
    return places


def make(dtype=torch.float32, **options):
    torch.manual_seed(0)
    layer = ResnetBlock2D(**{"in_channels": 32, "temb_channels": None, "groups": 8, **options}).to(dtype).eval()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.1)
    return layer


def fuse(layer):
    holder = nn.ModuleDict({"resnet": layer})
    for kind in (Resnet(), Convolution()):
        kind.put_in(holder)
    return layer


def call(layer, x, record=pytest.fail):
    context = CallContext(True, pytest.fail, record, within=layer)
    with torch.no_grad(), use_context(context):
        return layer(x, None)


def images(dtype=torch.float32):
    return torch.randn(SIZE, generator=torch.Generator().manual_seed(1)).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "options",
    [{}, {"out_channels": 48}, {"output_scale_factor": 2.0}, {"dropout": 0.5}],
    ids=["plain", "shortcut", "scaled", "dropout"],
)
def test_numbers_are_stocks_and_the_input_stays(options, dtype, written, monkeypatch):
    monkeypatch.setattr(convolution, "advantage", lambda: 1.0)
    convolution._find_way.cache_clear()
    layer, x = make(dtype, **options), images(dtype)
    with torch.no_grad():
        stock, exact = layer(x, None), copy.deepcopy(layer).double()(x.double(), None)
    given = x.clone()
    out = call(fuse(layer), x)
    assert torch.equal(x, given)
    assert out.is_contiguous()
    scale = float(exact.abs().max())
    assert float((out - exact).abs().max()) <= 1.1 * float((stock - exact).abs().max()) + 1e-6 * scale
    assert len(written) == 1
    assert (written[0][0] == written[0][1]) == ("out_channels" in options), "the shortcut's own result takes the sum"
    assert x.data_ptr() not in {place for place, _ in written}
    convolution._find_way.cache_clear()


def test_one_result_less_is_allocated():
    layer, x, sizes = fuse(make()), images(), []

    class Seeing(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            made = function(*args, **(kwargs or {}))
            if isinstance(made, torch.Tensor) and made.nbytes == x.nbytes:
                sizes.append(made.data_ptr())
            return made

    call(layer, x)
    with Seeing():
        out = call(layer, x)
    assert len(set(sizes)) == 2  # of the first norm and of the first convolution; the sum takes the first one's place
    assert out.data_ptr() in sizes


@pytest.mark.parametrize("name", ["conv1", "conv2", "conv_shortcut", "dropout"])
def test_what_somebody_keeps_stays(name, written):
    layer, x, kept = make(out_channels=48), images(), []
    fuse(layer)
    getattr(layer, name).register_forward_hook(
        lambda _, given, made: kept.append([(each, each.clone()) for each in (*given, made)])
    )
    call(layer, x, record=lambda reason: None)
    assert all(torch.equal(one, other) for one, other in kept[0])
    assert (len(written) == 1) == (name == "dropout")


def test_elsewhere_the_sum_is_stocks_own(written):
    layer, x = fuse(make()), images()
    expected = call(layer, x)
    assert written.pop()
    last = call(layer, x.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(last, expected, rtol=1e-4, atol=1e-5)
    with use_context(CallContext(True, pytest.fail, lambda *_: None)):
        leaf = x.clone().requires_grad_()
        layer(leaf, None).sum().backward()
    assert leaf.grad is not None
    with ops.use_backend("reference", "convolution"):
        convolution._find_way.cache_clear()
        torch.testing.assert_close(call(layer, x), expected, rtol=1e-4, atol=1e-5)
    assert not written


def test_memory_that_does_not_fit_is_left_alone(written):
    conv, x = nn.Conv2d(32, 32, 3, padding=1), images()
    Convolution().put_in(nn.Sequential(conv))
    good = torch.zeros(SIZE)
    for addend, memory in [
        (good, good[:1]),
        (good.double(), good),
        (good, good.double()),
        (good, good.transpose(2, 3)),
        (good.contiguous(memory_format=torch.channels_last), good),
        (torch.zeros(2, 1, 24, 24), good),
    ]:
        with torch.no_grad(), use_context(CallContext(True, pytest.fail, pytest.fail)):
            assert convolution.convolve_onto(conv, x, addend, memory) is None
    with torch.no_grad():
        assert convolution.convolve_onto(conv, x, good, good) is None  # in no call of ours
    assert not written
    assert not good.any()


def test_small_results_are_left_alone(written, monkeypatch):
    layer, x = fuse(make()), images()
    for large, count in ((x.nbytes + 1, 0), (x.nbytes, 1)):
        monkeypatch.setattr(resnet, "_LARGE", large)
        call(layer, x)
        assert len(written) == count


def test_a_layer_that_is_not_fused_is_left_alone(written):
    layer, x = make(), images()
    Resnet().put_in(nn.ModuleDict({"resnet": layer}))
    call(layer, x)
    assert not written
    assert resnet._has_made_its_own(layer.conv2)
