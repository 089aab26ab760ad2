"""The shared-skip decoder computes what the plain one computes, and less of it."""

import copy

import peft
import pytest
import torch
from sampling import largest
from tolerances import OUTPUT_FLOAT32, OUTPUT_FLOAT64
from torch.utils.flop_counter import FlopCounterMode
from unets import CONFIGS, call_for, make

from difffast.surgery.trees import map_tensors
from difffast.unet import shared_skips, split
from difffast.unet.features import Features, find_skips

TIMES = torch.tensor([400, 380, 20])


def both(unet, call, times=TIMES):
    """-> (plain outputs, shared outputs, {resnet that did not share: reason})"""
    plain, shared = split.encode(unet, call), split.encode(unet, call, share=True)
    assert not plain.parts
    return split.decode(unet, plain, call, times), split.decode(unet, shared, call, times), shared.unshared


def error(outputs, expected):
    """Root mean square, over all time steps."""
    return (torch.stack(outputs).double() - torch.stack(expected)).square().mean().sqrt()


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("size", [(8, 8), (10, 14), (9, 7)], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_it_is_the_plain_decoder(name, size, batch):
    if (name, size) == ("if", (9, 7)):
        size = (10, 6)  # IF's resnet up blocks ignore upsample_size upstream: the stock UNet itself fails at odd sizes
    for dtype, tolerance in ((torch.float32, OUTPUT_FLOAT32), (torch.float64, OUTPUT_FLOAT64)):
        unet = make(name, dtype)
        call = call_for(unet, batch=batch, size=size, dtype=dtype)
        for times in (TIMES, TIMES[1:2]):
            plain, shared, unshared = both(unet, call, times)
            assert not unshared
            for a, b in zip(plain, shared, strict=True):
                assert largest(a, b) <= tolerance


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_half_precision_loses_no_more_than_the_plain_decoder(name, dtype):
    plain, shared = [], []
    for seed in range(3):
        exact = make(name, torch.float64, seed=seed)
        rounded = copy.deepcopy(exact).to(dtype)
        exact.load_state_dict(rounded.state_dict())
        call = call_for(rounded, dtype=dtype)
        in_float64 = map_tensors(lambda x: x.double() if x.is_floating_point() else x, call)
        features, sharing = split.encode(rounded, call), split.encode(rounded, call, share=True)
        in_features = Features(map_tensors(torch.Tensor.double, features.outputs), features.batch)
        expected = split.decode(exact, in_features, in_float64, TIMES)
        plain.append(error(split.decode(rounded, features, call, TIMES), expected))
        shared.append(error(split.decode(rounded, sharing, call, TIMES), expected))
    assert sum(shared) <= 1.1 * sum(plain)


@pytest.mark.parametrize("name", CONFIGS)
@torch.no_grad()
def test_the_layouts_above_have_straddling_groups_and_aligned_ones(name):
    unet = make(name)
    skips = find_skips(split.encode(unet, call_for(unet)).outputs)
    norms = [resnet.norm1 for block in unet.up_blocks for resnet in block.resnets]
    remainders = [
        (norm.num_channels - skip.shape[1]) % (norm.num_channels // norm.num_groups)
        for norm, skip in zip(norms, reversed(skips), strict=True)
    ]
    assert any(remainders)
    assert not all(remainders)


@torch.no_grad()
def test_the_shared_part_is_computed_once():
    unet = make("sd")
    call = call_for(unet)

    def flops(share):
        """-> (of encode, of decode)"""
        with FlopCounterMode(display=False) as encoding:
            features = split.encode(unet, call, share=share)
        with FlopCounterMode(display=False) as decoding:
            split.decode(unet, features, call, TIMES)
        return encoding.get_total_flops(), decoding.get_total_flops()

    skips = 0  # of convolutions over the skip's channels, one time step
    first = unet.up_blocks[0].resnets[0]
    resnets = [resnet for block in unet.up_blocks for resnet in block.resnets]
    for resnet, skip in zip(resnets, find_skips(split.encode(unet, call).outputs)[::-1], strict=True):
        channels = resnet.conv1.in_channels if resnet is first else skip.shape[1]
        pixels = skip.shape[0] * skip.shape[2] * skip.shape[3]
        skips += 2 * pixels * channels * resnet.conv1.out_channels * (9 + 1)
    (plain_encode, plain_decode), (encode, decode) = flops(False), flops(True)
    straddling = decode - (plain_decode - 3 * skips)  # their channels stay with each step
    assert 0 <= straddling < 3 * 0.05 * skips
    assert encode - plain_encode == pytest.approx(skips, rel=0.05)


@torch.no_grad()
def test_new_weights_are_noticed_between_decodes():
    unet = make("sd")
    call = call_for(unet)
    plain_features, features = split.encode(unet, call), split.encode(unet, call, share=True)
    before = split.decode(unet, features, call, TIMES)
    resnet = unet.up_blocks[1].resnets[0]
    for change in (
        lambda: resnet.conv1.weight.neg_(),
        lambda: resnet.norm1.weight.neg_(),
        lambda: setattr(resnet.conv_shortcut, "weight", torch.nn.Parameter(2 * resnet.conv_shortcut.weight)),
    ):
        change()
        shared = split.decode(unet, features, call, TIMES)
        plain = split.decode(unet, plain_features, call, TIMES)
        assert largest(plain[0], shared[0]) <= OUTPUT_FLOAT32
        assert largest(before[0], shared[0]) > 100 * OUTPUT_FLOAT32
        before = shared


@pytest.mark.parametrize("index", [(0, 0), (0, 1), (1, 0)], ids=str)
@torch.no_grad()
def test_wrapped_layers_run_as_they_are(index):
    block, resnet = index
    unet = make("sd", torch.float64)
    call = call_for(unet, dtype=torch.float64)
    name = f"up_blocks.{block}.resnets.{resnet}"
    adapted = unet.get_submodule(name)
    handle = adapted.conv1.register_forward_hook(lambda module, args, output: output * 2)
    plain, shared, unshared = both(unet, call)
    assert largest(plain[0], shared[0]) <= OUTPUT_FLOAT64
    assert list(unshared) == [name]
    assert unshared[name].startswith("conv1 is wrapped")
    handle.remove()
    unet.add_adapter(peft.LoraConfig(r=2, target_modules=[f"{name}.conv1"], init_lora_weights=False))
    plain, shared, unshared = both(unet, call)
    assert largest(plain[0], shared[0]) <= OUTPUT_FLOAT64
    assert list(unshared) == [name]


@torch.no_grad()
def test_whole_calls_that_cannot_share_say_why():
    unet = make("sd", torch.float64)
    call = call_for(unet, dtype=torch.float64)
    unet.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    plain, shared, unshared = both(unet, call)
    assert torch.equal(plain[0], shared[0])
    assert unshared == {"up_blocks": "FreeU changes the skips"}


@torch.no_grad()
def test_with_residuals():
    unet = make("sd", torch.float64)
    call = call_for(unet, dtype=torch.float64)
    residuals = [torch.randn_like(skip) for skip in find_skips(split.encode(unet, call).outputs)]
    mid = torch.randn(2, 64, 4, 4, dtype=torch.float64)
    call |= {"down_block_additional_residuals": residuals, "mid_block_additional_residual": mid}
    plain, shared, unshared = both(unet, call, call["timestep"].expand(1))
    assert not unshared
    expected = unet(**call).sample
    assert largest(plain[0], expected) <= OUTPUT_FLOAT64
    assert largest(shared[0], expected) <= OUTPUT_FLOAT64


def test_gradients_pass_through():
    unet = make("sd", torch.float64)
    call = call_for(unet, dtype=torch.float64)
    call["encoder_hidden_states"].requires_grad_()
    gradients = []
    for share in (False, True):
        outputs = split.decode(unet, split.encode(unet, call, share=share), call, TIMES)
        gradients.append(torch.autograd.grad(sum(x.square().sum() for x in outputs), call["encoder_hidden_states"])[0])
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


def test_every_obstacle_of_a_resnet_is_named():
    resnet = make("sd").up_blocks[1].resnets[0]
    assert shared_skips.refuse_resnet(resnet) is None
    for change, reason in (
        (lambda r: setattr(r, "forward", r.conv1.forward), "the ResnetBlock2D is wrapped"),
        (lambda r: setattr(r, "upsample", torch.nn.Identity()), "it resamples"),
        (lambda r: setattr(r, "conv_shortcut", None), "conv_shortcut is wrapped"),
        (lambda r: r.conv1.to("meta"), "conv1 is wrapped, quantised, offloaded"),
        (lambda r: setattr(r.conv1, "padding_mode", "circular"), "conv1 is grouped, or padded"),
        (lambda r: setattr(r, "norm1", torch.nn.Identity()), "norm1 is wrapped"),
    ):
        changed = copy.deepcopy(resnet)
        change(changed)
        assert shared_skips.refuse_resnet(changed).startswith(reason)
