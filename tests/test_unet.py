"""The split: decode(encode(x, t), t) is forward(x, t), bit for bit, and a batch of decoders is one at a time."""

import pytest
import torch
import unet_oracle
from sampling import largest
from tolerances import OUTPUT_FLOAT32, OUTPUT_FLOAT64
from unets import CONFIGS, call_for, make

from difffast.surgery.calls import bind_arguments
from difffast.unet import split
from difffast.unet.features import tile


@pytest.mark.parametrize(
    ("name", "size"),
    # IF's resnet up blocks ignore upsample_size upstream: the stock UNet itself fails at odd sizes.
    [(name, size) for name in CONFIGS for size in ((8, 8), (10, 14), (9, 7)) if (name, size) != ("if", (9, 7))],
    ids=str,
)
@torch.no_grad()
def test_two_halves_are_the_whole_bit_for_bit(name, size):
    unet = make(name)
    call = call_for(unet, size=size)
    whole = unet(**call).sample
    (halves,) = split.decode(unet, split.encode(unet, call), call, call["timestep"].reshape(1))
    assert torch.equal(whole, halves)


@pytest.mark.parametrize("batch", [1, 2, 3])
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, OUTPUT_FLOAT32), (torch.float64, OUTPUT_FLOAT64)], ids=str
)
@torch.no_grad()
def test_a_batch_of_decoders_is_one_at_a_time(name, batch, dtype, tolerance):
    unet = make(name, dtype)
    call = call_for(unet, batch=batch, dtype=dtype)
    features = split.encode(unet, call)
    timesteps = torch.tensor([400, 380, 20])
    together = split.decode(unet, features, call, timesteps)
    alone = [split.decode(unet, features, call, t.reshape(1))[0] for t in timesteps]
    assert len(together) == 3
    for a, b in zip(together, alone, strict=True):
        assert largest(a, b) <= tolerance
    assert largest(alone[0], alone[2]) > 100 * tolerance, "the time step must matter"


@torch.no_grad()
def test_matches_the_hand_written_split(pipe):
    unet = pipe.unet
    call = bind_arguments(
        unet, (torch.randn(2, 4, 8, 8), torch.tensor(700)), {"encoder_hidden_states": torch.randn(2, 77, 64)}
    )
    text = call["encoder_hidden_states"]
    skips, mid = unet_oracle.encode(unet, call["sample"], call["timestep"], text)
    features = split.encode(unet, call)
    assert torch.equal(features.outputs["conv_in"], skips[0])
    recorded = [s for i in range(len(unet.down_blocks)) for s in features.outputs[f"down_blocks.{i}"][1]]
    assert all(torch.equal(a, b) for a, b in zip(recorded, skips[1:], strict=True))
    assert torch.equal(features.outputs["mid_block"], mid)
    later = torch.tensor(500)
    (ours,) = split.decode(unet, features, call, later.reshape(1))
    assert torch.equal(ours, unet_oracle.decode(unet, skips, mid, later, text))


@torch.no_grad()
def test_the_decoder_never_reads_the_latents(pipe):
    call = call_for(pipe.unet, encoder_hidden_states=torch.randn(2, 77, 64))
    features = split.encode(pipe.unet, call)
    expected = split.decode(pipe.unet, features, call, torch.tensor([3, 2]))
    spoiled = {**call, "sample": torch.full_like(call["sample"], float("nan"))}
    for a, b in zip(expected, split.decode(pipe.unet, features, spoiled, torch.tensor([3, 2])), strict=True):
        assert torch.equal(a, b)


@torch.no_grad()
def test_controlnet_residuals_and_adapter_states():
    unet = make("sd")
    call = call_for(unet)
    shapes = [(2, 32, 8, 8)] * 3 + [(2, 32, 4, 4)] + [(2, 64, 4, 4)] * 2
    residuals = [torch.randn(shape) for shape in shapes]
    control = {
        **call,
        "down_block_additional_residuals": residuals,
        "mid_block_additional_residual": torch.randn(2, 64, 4, 4),
    }
    (halves,) = split.decode(unet, split.encode(unet, control), control, torch.tensor([400]))
    assert torch.equal(unet(**control).sample, halves)

    states = [torch.randn(2, 32, 4, 4), torch.randn(2, 64, 4, 4)]
    states[0] = torch.randn(2, 32, 8, 8)
    adapter = {**call, "down_intrablock_additional_residuals": list(states)}
    features = split.encode(unet, adapter)
    assert len(adapter["down_intrablock_additional_residuals"]) == 2, "the caller's list must survive"
    (halves,) = split.decode(unet, features, adapter, torch.tensor([400]))
    assert torch.equal(unet(**{**call, "down_intrablock_additional_residuals": list(states)}).sample, halves)


@torch.no_grad()
def test_freeu_writes_into_a_copy(pipe):
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
    call = call_for(pipe.unet, encoder_hidden_states=torch.randn(2, 77, 64))
    whole = pipe.unet(**call).sample
    features = split.encode(pipe.unet, call)
    for _ in range(2):  # the second time shows whether the first one damaged the cache
        assert torch.equal(split.decode(pipe.unet, features, call, torch.tensor([400]))[0], whole)
        batch = split.decode(pipe.unet, features, call, torch.tensor([400, 1]))
        assert largest(batch[0], whole) <= OUTPUT_FLOAT32


@torch.no_grad()
def test_channels_last_stays_channels_last(pipe):
    unet = pipe.unet.to(memory_format=torch.channels_last)
    call = call_for(unet, encoder_hidden_states=torch.randn(2, 77, 64))
    call["sample"] = call["sample"].to(memory_format=torch.channels_last)
    features = split.encode(unet, call)
    assert features.outputs["conv_in"].is_contiguous(memory_format=torch.channels_last)
    assert tile(features.outputs, features.batch, 3)["conv_in"].is_contiguous(memory_format=torch.channels_last)
    (halves,) = split.decode(unet, features, call, torch.tensor([400]))
    assert torch.equal(unet(**call).sample, halves)


@torch.no_grad()
def test_the_unet_is_never_written_to(pipe):
    unet = pipe.unet
    before = {name: (type(m), dict(vars(m))) for name, m in unet.named_modules()}
    call = call_for(unet, encoder_hidden_states=torch.randn(2, 77, 64))
    split.decode(unet, split.encode(unet, call), call, torch.tensor([400, 300]))
    for name, module in unet.named_modules():
        kind, attributes = before[name]
        assert type(module) is kind
        assert vars(module).keys() == attributes.keys()
        assert all(vars(module)[key] is value for key, value in attributes.items())


def test_tile_is_batch_major():
    x = torch.arange(4).reshape(2, 2)
    assert tile(x, 2, 3)[:, 0].tolist() == [0, 0, 0, 2, 2, 2]
    # four rows for a batch of two: two rows a sample, which stay together
    assert tile(torch.arange(4), 2, 2).tolist() == [0, 1, 0, 1, 2, 3, 2, 3]
    nested = tile({"a": [x, "text", 3], "b": (None, torch.ones(1, 5))}, 2, 2)
    assert nested["a"][0].shape == (4, 2)
    assert nested["a"][1:] == ["text", 3]
    assert nested["b"][1].shape == (1, 5), "a first size of 1 broadcasts"
    assert tile(torch.tensor(7.0), 2, 3).shape == ()
    with pytest.raises(ValueError, match=r"shape \(3, 5\) cannot be repeated for a batch of 2"):
        tile(torch.ones(3, 5), 2, 2)


def test_tile_copies_a_shared_tensor_once():
    x = torch.ones(2, 3)
    a, (b,) = tile([x, (x,)], 2, 2)
    assert a is b
