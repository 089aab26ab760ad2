"""channels_last weights: put in and exactly out again."""

import contextlib
import copy

import pytest
import torch
from sampling import largest, latents
from torch import nn

import difffast
from difffast.layers import channels_last, convolution
from difffast.ops import _installed
from difffast.surgery.memory_format import ChannelsLast, find_weights, lies_channels_last, suits_channels_last
from difffast.surgery.subclass import is_swapped


def test_weights_are_laid_out_and_exactly_back(pipe):
    unet = pipe.unet
    before = copy.deepcopy(unet)
    parameters = {name: parameter for name, parameter in unet.named_parameters()}
    layout = ChannelsLast()
    layout.put_in(unet)
    assert lies_channels_last(unet)
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in find_weights(unet))
    for (name, ours), (_, theirs) in zip(unet.named_parameters(), before.named_parameters(), strict=True):
        assert ours is parameters[name], "references to parameters stay"
        assert torch.equal(ours, theirs)
    layout.take_out()
    layout.take_out()  # twice does no harm
    assert not lies_channels_last(unet)
    for ours, theirs in zip(unet.parameters(), before.parameters(), strict=True):
        assert ours.stride() == theirs.stride()
        assert torch.equal(ours, theirs)


def test_what_the_user_has_laid_out_or_replaced_is_left():
    user, replaced = (nn.Conv2d(4, 4, 3).to(memory_format=format) for format in (torch.channels_last, None))
    model = nn.Sequential(user, replaced)
    layout = ChannelsLast()
    layout.put_in(model)
    replaced.weight = nn.Parameter(torch.randn(4, 4, 3, 3).to(memory_format=torch.channels_last))
    layout.take_out()
    assert all(not weight.is_contiguous() for weight in find_weights(model))


@pytest.mark.parametrize("calls", range(4))
def test_an_interruption_leaves_nothing(calls, monkeypatch):
    model = nn.Sequential(*(nn.Conv2d(4, 4, 3) for _ in range(3)))
    layout, left = ChannelsLast(), [calls]
    plain = torch.Tensor.contiguous

    def contiguous(tensor, **options):
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        return plain(tensor, **options)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "contiguous", contiguous)
        with contextlib.suppress(KeyboardInterrupt):
            layout.put_in(model)
    layout.take_out()
    assert all(weight.is_contiguous() for weight in find_weights(model))


@pytest.mark.parametrize("instruction_set", ["amx", "avx512_bf16", None])
def test_half_precision_on_cuda_and_bfloat16_with_amx_are_faster_so(instruction_set, monkeypatch):
    monkeypatch.setattr(_installed, "INSTRUCTION_SET", instruction_set)
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    assert suits_channels_last(cuda, torch.float16)
    assert suits_channels_last(cuda, torch.bfloat16)
    assert not suits_channels_last(cuda, torch.float32)
    assert suits_channels_last(cpu, torch.bfloat16) == (instruction_set == "amx")
    assert not suits_channels_last(cpu, torch.float32)
    assert not suits_channels_last(cpu, torch.float16)


@pytest.fixture
def _amx(monkeypatch):
    """What is chosen on a processor with AMX."""
    monkeypatch.setattr(_installed, "INSTRUCTION_SET", "amx")
    convolution.advantage.cache_clear()
    yield
    convolution.advantage.cache_clear()


@pytest.mark.usefixtures("_amx")
def test_a_unet_that_is_cast_runs_as_if_it_had_been_patched_then(pipe):
    """In either direction: how its weights lie, and which layers are put in."""
    twin = copy.deepcopy(pipe)
    difffast.patch(pipe, "exact")
    for dtype in (torch.bfloat16, torch.float32, torch.bfloat16):
        pipe.to(dtype)
        twin.to(dtype)
        with difffast.patched(twin, "exact"):
            anew = latents(twin, steps=2)
            swapped = {name for name, layer in twin.unet.named_modules() if is_swapped(layer)}
        assert torch.equal(latents(pipe, steps=2), anew)
        with torch.no_grad():
            pipe.vae.decode(anew)
        for part in (pipe.unet, pipe.vae.decoder):
            assert lies_channels_last(part) == (dtype == torch.bfloat16)
        assert swapped <= {name for name, layer in pipe.unet.named_modules() if is_swapped(layer)}
    difffast.unpatch(pipe)
    assert all(weight.is_contiguous() for part in (pipe.unet, pipe.vae) for weight in find_weights(part))
    assert not any(map(is_swapped, [*pipe.unet.modules(), *pipe.vae.modules()]))


@pytest.mark.usefixtures("_amx")
def test_outputs_lie_in_memory_as_stocks_do(pipe, monkeypatch):
    """Callbacks and schedulers may call ``view``; who works in channels_last stays in it."""
    pipe.to(torch.bfloat16)
    steps, plain = [], type(pipe.scheduler).step
    monkeypatch.setattr(
        type(pipe.scheduler), "step", lambda *args, **options: (steps.append(args[1]), plain(*args, **options))[1]
    )
    with difffast.patched(pipe, "exact"), torch.no_grad():
        picture = pipe("a cat", num_inference_steps=2, guidance_scale=1.0, output_type="pt", height=32, width=24).images
        assert lies_channels_last(pipe.unet)
        assert lies_channels_last(pipe.vae.decoder)
        last = torch.randn(1, 4, 4, 3, dtype=torch.bfloat16).to(memory_format=torch.channels_last)
        assert pipe.vae.decode(last).sample.is_contiguous(memory_format=torch.channels_last)
    assert all(each.is_contiguous() for each in [*steps, picture])


@pytest.mark.usefixtures("_amx")
def test_weights_lie_so_for_as_long_as_any_pipeline_is_patched(pipe):
    pipe.to(torch.bfloat16)
    other = type(pipe)(**pipe.components, requires_safety_checker=False)
    for each in (pipe, other):
        difffast.patch(each, "exact")
    difffast.unpatch(pipe)
    assert lies_channels_last(pipe.unet)
    difffast.unpatch(other)
    assert all(weight.is_contiguous() for weight in find_weights(pipe.unet))


@pytest.mark.parametrize("linear", [False, True], ids=["convolutions", "linear projections"])
def test_a_picture_in_bfloat16_with_amx(pipe, linear, request):
    """What is chosen there: as near to float32 as stock in bfloat16, and exactly back."""
    config = {**pipe.unet.config, "use_linear_projection": linear}
    pipe.unet = type(pipe.unet).from_config(config).eval()

    def run():
        generator = torch.Generator().manual_seed(0)
        return pipe("a cat", num_inference_steps=4, generator=generator, output_type="latent").images.double()

    exact = run()
    with difffast.patched(pipe, "exact") as report:
        assert "narrow" not in str(report), "nothing of it in float32"
    pipe.to(torch.bfloat16)
    stock = run()
    request.getfixturevalue("_amx")
    report = difffast.patch(pipe, "exact")
    assert lies_channels_last(pipe.unet)
    ours = run()
    assert (ours - exact).square().mean() <= 1.2**2 * (stock - exact).square().mean()
    assert "narrow" in str(report)
    difffast.unpatch(pipe)
    assert all(weight.is_contiguous() for weight in find_weights(pipe.unet))
    assert torch.equal(run(), stock)


@pytest.mark.parametrize("linear", [False, True], ids=["convolutions", "linear projections"])
def test_transformers_hand_on_the_format_and_the_values(pipe, linear, monkeypatch):
    """The layers of GPUs, put in on a CPU: nothing but where values lie in memory changes."""
    unet = type(pipe.unet).from_config({**pipe.unet.config, "use_linear_projection": linear}).eval()
    sample, text = torch.randn(2, 4, 8, 8), torch.randn(2, 5, unet.config.cross_attention_dim)
    with torch.no_grad():
        expected = unet(sample, 3, text).sample
    layout, kind = ChannelsLast(), channels_last.TransformerOutput()
    layout.put_in(unet)
    monkeypatch.setattr(channels_last, "DEVICES", ("cpu",))
    kind.put_in(unet)
    formats = []
    for layer in kind.find(unet).values():
        layer.register_forward_hook(
            lambda module, args, output: formats.append(output[0].is_contiguous(memory_format=torch.channels_last))
        )
    with torch.no_grad():
        found = unet(sample.to(memory_format=torch.channels_last), 3, text).sample
    assert formats
    assert all(formats)
    assert largest(found, expected) < 1e-5
    kind.take_out(unet)
    layout.take_out()
    assert type(next(iter(kind.find(unet).values()))).__name__ == "Transformer2DModel"
    assert not any(is_swapped(module) for module in unet.modules())
