"""Which keys a UNet, a VAE and their other uses ask for, and how keys are written."""

import pytest
import torch

import difffast
from difffast import ops
from difffast.ops import _dispatch
from difffast.ops._keys import Key, find_strides, name_layout
from difffast.proofs import collect

CPU = torch.device("cpu")

LAYOUTS = [
    ((2, 3, 4, 5), (60, 20, 5, 1), "contiguous"),
    ((2, 3, 4, 5), (60, 5, 15, 1), "rows"),
    ((2, 3, 4, 5), (60, 1, 15, 3), "channels_last"),
    ((2, 3, 4, 5), (180, 5, 45, 1), "180.5.45.1"),
    ((1, 3, 4, 5), (7, 20, 5, 1), "contiguous"),
    ((2, 3, 4), (12, 4, 1), "contiguous"),
]


@pytest.mark.parametrize(("shape", "strides", "name"), LAYOUTS)
def test_layouts_have_names(shape, strides, name):
    assert name_layout(shape, strides) == name
    assert name_layout(shape, find_strides(shape, name)) == name


def test_keys_are_text_and_back():
    key = Key.of(
        "self_attention", torch.float16, [(2, 8, 64, 40)] * 3, [(20480, 40, 320, 1)] * 3, [("gradient", False)]
    )
    text = "self_attention float16 2x8x64x40,2x8x64x40,2x8x64x40 rows,rows,rows gradient=0"
    assert key.text() == text
    assert Key.parse(text) == key
    assert key.text("graph") == f"{text} graph"


@pytest.fixture(scope="module")
def sd15():
    return collect.collect(collect.make_dry("sd15", torch.float16, CPU), 2, torch.device("cuda"))


@pytest.mark.slow
def test_keys_of_a_published_unet(sd15):
    texts = [key.text() for key in sd15]
    assert "self_attention float16 2x8x4096x40,2x8x4096x40,2x8x4096x40 rows,rows,rows gradient=0" in texts
    assert "cross_attention float16 8x8x4096x40,2x8x77x40,2x8x77x40 rows,rows,rows sink=0,maps=0,gradient=0" in texts, (
        "four steps share the keys of the text"
    )
    norms = "group_norm_silu float16 2x320x64x64 contiguous groups=32,addends=2,whole=0,modulated=0,gradient=0"
    assert norms in texts
    assert any(text.startswith("skip_norm_silu float16 8x640x64x64,2x20x64x64") for text in texts)
    batches = [key.shapes[0][0] for key in sd15]
    assert batches == sorted(batches), "whole calls first"


def test_keys_of_a_pipeline_are_those_that_its_run_asks_for(pipe):
    """Collected without memory, against what operators are asked for by the patched UNet itself."""
    keys = collect.collect(collect.make_dry(pipe.unet, torch.float32, CPU), 2, CPU, decoders=())
    asked = []
    original = _dispatch.choose

    def listen(operator, forced, device, dtype, obstacle, loses=None, case=None):
        if case is not None:
            asked.append(Key.of(operator, dtype, *case))
        return original(operator, forced, device, dtype, obstacle, loses or (lambda _: False), case)

    _dispatch.forget()
    with pytest.MonkeyPatch.context() as monkeypatch, ops.use_backend("reference"):
        monkeypatch.setattr(_dispatch, "choose", listen)
        with difffast.patched(pipe, "exact"), ops.use_backend("cpp"):
            pipe("a cat", num_inference_steps=1, output_type="latent")
    tokens = {key.shapes[1][2] for key in asked if key.operator == "cross_attention"}
    assert tokens == {77}
    assert set(asked) <= set(keys)
    assert {key.operator for key in keys} == {"cross_attention", "geglu", "group_norm_silu", "self_attention"}


def test_keys_of_a_vae_are_those_that_its_decoder_asks_for(pipe, monkeypatch):
    size = pipe.unet.config.sample_size
    keys = collect.collect_decoder(pipe.vae, torch.float32, CPU, (1, pipe.unet.config.in_channels, size, size))
    asked = []
    original = _dispatch.choose

    def listen(operator, forced, device, dtype, obstacle, loses=None, case=None):
        if case is not None and "norm" in operator:
            asked.append(Key.of(operator, dtype, *case))
        return original(operator, forced, device, dtype, obstacle, loses or (lambda _: False), case)

    _dispatch.forget()
    monkeypatch.setattr(_dispatch, "choose", listen)
    with difffast.patched(pipe, "exact"), ops.use_backend("reference"):
        pipe.vae.decode(torch.zeros(1, pipe.unet.config.in_channels, size, size))
    assert {key.operator for key in keys} == {"group_norm_silu"}
    assert set(asked) <= set(keys)
    assert collect.collect_decoder(None, torch.float32, CPU, (1, 4, 8, 8)) == []


def test_maps_and_gradients_are_keys_of_their_own(sd15):
    keys = collect.collect_other_uses(sd15, torch.device("cuda"))
    texts = [key.text() for key in keys]
    attention = "cross_attention float16 2x8x4096x40,2x8x77x40,2x8x77x40 rows,rows,rows sink=0"
    assert f"{attention},maps=1,gradient=0" in texts
    assert f"{attention},maps=1,gradient=1" in texts, "what semantic binding asks for"
    assert f"{attention},maps=0,gradient=1" in texts
    assert not set(keys) & set(sd15)
    maps = [key for key in keys if key.option("maps")]
    assert {key.shapes[0][0] for key in maps} == {2}, "of whole calls alone"
    assert not any(key.option("gradient") for key in collect.collect_other_uses(sd15, CPU))
