"""The UNet passes of semantic binding against full calls of a stock UNet, on SD- and SDXL-like UNets."""

import contextlib
import functools

import pytest
import torch
from sampling import largest
from tolerances import OUTPUT_FLOAT64
from torch.utils.flop_counter import FlopCounterMode
from unets import call_for, make

from difffast.layers.cross_attention import CrossAttention, find_layers
from difffast.steering.binding.extension import choose_map_layers
from difffast.steering.passes import Passes, drop_pooled_text, shift_latents, take_rows
from difffast.surgery.freezing import freeze

KINDS = ("sd-three-levels", "sdxl")


@contextlib.contextmanager
def passes(kind):
    unet = make(kind, torch.float64)
    CrossAttention().put_in(unet)
    yield unet, Passes(unet, choose_map_layers(unet, None), True, lambda reason: None)
    CrossAttention().take_out(unet)


def arguments(unet):
    call = call_for(unet, dtype=torch.float64)
    return call, call.pop("encoder_hidden_states")


@pytest.mark.parametrize("kind", KINDS)
def test_the_pass_that_stops_early_is_the_full_one(kind):
    with passes(kind) as (unet, early):
        call, text = arguments(unet)
        results, flops = [], []
        for stop in (True, False):
            # Before Diffusers 0.36, LoRA layers would stay scaled: with a scale, no pass stops early.
            given = call if stop else {**call, "cross_attention_kwargs": {"scale": 1.0}}
            leaf, sample = text.clone().requires_grad_(), call["sample"].clone().requires_grad_()
            with FlopCounterMode(display=False) as counter:
                maps, size = early.maps({**given, "sample": sample}, leaf)
            results.append((maps, *torch.autograd.grad(maps.square().sum(), (leaf, sample))))
            flops.append(counter.get_total_flops())
            assert size[0] * size[1] == maps.shape[1]
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
        assert flops[0] < 0.9 * flops[1]


@pytest.mark.parametrize("kind", KINDS)
def test_maps_are_probabilities_of_the_chosen_layers(kind):
    with passes(kind) as (unet, early):
        call, text = arguments(unet)
        maps, _ = early.maps(call, text)
        kept = []
        for name in early.layers:

            def keep(layer, hidden, *_args, encoder_hidden_states, **_kwargs):
                q, k = (
                    to(x).unflatten(-1, (layer.heads, -1)).transpose(1, 2)
                    for to, x in ((layer.to_q, hidden), (layer.to_k, encoder_hidden_states))
                )
                kept.append((q @ k.mT * q.shape[-1] ** -0.5).softmax(-1).mean(1).detach())
                return type(layer).forward(layer, hidden, encoder_hidden_states=encoder_hidden_states)

            layer = unet.get_submodule(name)
            layer.forward = functools.partial(keep, layer)
        unet(**call, encoder_hidden_states=text)
        assert largest(maps.detach(), torch.stack(kept).mean(0)) <= OUTPUT_FLOAT64


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_zeros_are_a_sink(kind):
    with passes(kind) as (unet, early):
        call, text = arguments(unet)
        text[:, [2, 5]] = 0
        results = []
        for absorbed in ((), (2, 5)):
            sample = call["sample"].clone().requires_grad_()
            maps, _ = early.maps({**call, "sample": sample}, text, absorbed)
            results.append((maps.detach(), torch.autograd.grad(maps.square().sum(), sample)[0]))
        for all_rows, compact in zip(*results, strict=True):
            assert largest(all_rows, compact) <= OUTPUT_FLOAT64
        next(iter(find_layers(unet).values())).to_k.bias = torch.nn.Parameter(torch.zeros(()))
        with pytest.raises(RuntimeError, match="bias"):
            early.maps(call, text, (2, 5))


@pytest.mark.parametrize("kind", KINDS)
def test_one_token_needs_no_queries_or_keys(kind):
    with passes(kind) as (unet, short):
        call, text = arguments(unet)
        results, flops = [], []
        for run in (
            short.prediction,
            lambda call, text: unet(**call, encoder_hidden_states=text, return_dict=False)[0],
        ):
            leaf = text[:, :1].clone().requires_grad_()
            with FlopCounterMode(display=False) as counter:
                out = run(call, leaf)
            results.append((out, *torch.autograd.grad(out.square().sum(), leaf)))
            flops.append(counter.get_total_flops())
        assert largest(results[0][0].detach(), results[1][0].detach()) <= OUTPUT_FLOAT64
        assert largest(results[0][1], results[1][1]) <= OUTPUT_FLOAT64 * float(results[1][1].abs().max())
        assert flops[0] < flops[1]


@torch.no_grad()
def test_passes_of_one_call_all_have_its_adapters_states():
    with passes("sd") as (unet, early):
        call, text = arguments(unet)
        states = [torch.randn(2, 32, 8, 8).double(), torch.randn(2, 64, 4, 4).double()]
        given = {**call, "down_intrablock_additional_residuals": list(states)}
        found = [early.prediction(given, text), early.prediction_and_maps(given, text)[0]]
        maps = [early.maps(given, text)[0] for _ in range(2)]
        call["down_intrablock_additional_residuals"] = list(states)
        expected = unet(encoder_hidden_states=text, **call).sample
    assert max(largest(each, expected) for each in found) <= OUTPUT_FLOAT64
    assert torch.equal(*maps)
    assert len(given["down_intrablock_additional_residuals"]) == 2


def test_pooled_text_is_zero_and_time_ids_stay():
    with passes("sdxl") as (unet, _):
        call, _ = arguments(unet)
        added = drop_pooled_text(call)["added_cond_kwargs"]
        assert not added["text_embeds"].any()
        assert added["time_ids"] is call["added_cond_kwargs"]["time_ids"]
        assert call["added_cond_kwargs"]["text_embeds"].any()
        first = take_rows(call, [1, 1, 0])
        for ours, theirs in ((first, call), (first["added_cond_kwargs"], call["added_cond_kwargs"])):
            for name, value in ours.items():
                if isinstance(value, torch.Tensor) and value.ndim:
                    assert torch.equal(value, theirs[name][[1, 1, 0]])
        assert first["timestep"] is call["timestep"]


def test_only_latents_are_shifted():
    sample = torch.randn(2, 9, 4, 4)
    moved = shift_latents(sample, torch.ones(2, 4, 4, 4))
    assert torch.equal(moved[:, :4], sample[:, :4] + 1)
    assert torch.equal(moved[:, 4:], sample[:, 4:])


def test_layers_for_maps():
    layers = choose_map_layers(make("sd-three-levels"), None)
    assert {name.split(".attentions")[0] for name in layers} == {"down_blocks.1", "up_blocks.1"}
    with pytest.raises(ValueError, match="no cross-attention layer matches"):
        choose_map_layers(make("sd"), "up_blocks.9.*")
    with pytest.raises(ValueError, match="no cross-attention in its encoder"):
        choose_map_layers(make("sd", down_block_types=("DownBlock2D", "DownBlock2D")), None)
    for layers in (None, "mid_block.*"):
        with pytest.raises(ValueError, match="attention with added keys in place of attn2 layers"):
            choose_map_layers(make("if"), layers)


def test_frozen_parameters_change_no_gradient():
    with passes("sd-three-levels") as (unet, early):
        next(unet.parameters()).requires_grad_(False)
        flags = [parameter.requires_grad for parameter in unet.parameters()]
        call, text = arguments(unet)

        def gradients():
            leaf = text.clone().requires_grad_()
            return torch.autograd.grad(early.prediction(call, leaf).square().sum(), leaf)[0]

        expected = gradients()

        def wanting():
            return [parameter.requires_grad for parameter in unet.parameters()]

        with freeze(unet):
            with freeze(unet):
                assert torch.equal(gradients(), expected)
            assert not any(wanting())  # the outer block is open
        assert wanting() == flags
