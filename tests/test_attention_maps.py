"""The maps that fused attn2 layers hand out in a real UNet: stock maps, of the steps and layers asked for."""

import copy

import pytest
import torch
from sampling import latents

import difffast
from difffast import EncoderPropagation, patched, unpatch
from difffast.layers import cross_attention

ALL_KEY = EncoderPropagation(key_steps=1)


class Recorder:
    """An attention processor that computes what AttnProcessor2_0 does, and keeps the per-head probabilities."""

    def __init__(self, store, name):
        self.store, self.name = store, name

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None):
        q, k, v = (
            x.unflatten(-1, (attn.heads, -1)).transpose(1, 2)
            for x in (
                attn.to_q(hidden_states),
                attn.to_k(encoder_hidden_states),
                attn.to_v(encoder_hidden_states),
            )
        )
        p = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
        self.store.setdefault(self.name, []).append(p.mean(1))
        return attn.to_out[0]((p @ v).transpose(1, 2).flatten(2))


def stock_maps(pipe, **options):
    """Per layer: the head-averaged maps of every step of a stock run, [B, N, T]."""
    twin, store = copy.deepcopy(pipe), {}
    for name, layer in cross_attention.find_layers(twin.unet).items():
        layer.set_processor(Recorder(store, name))
    latents(twin, **options)
    return store


@pytest.mark.parametrize("batch", [1, 2])
def test_maps_are_the_stock_maps(pipe64, batch):
    expected = stock_maps(pipe64, prompt=["a red circle"] * batch)
    with difffast.collect_maps(pipe64) as maps:
        latents(pipe64, ["a red circle"] * batch)
    assert set(maps.layers) == set(expected)
    for name, recorded in expected.items():
        assert maps.steps[name] == len(recorded) == 20
        mean = torch.stack(recorded).mean(0)
        torch.testing.assert_close(maps.mean(name, rows="all"), mean, rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(maps.mean(name, rows="negative"), mean[:batch], rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(maps.mean(name), mean[batch:], rtol=1e-6, atol=1e-9)
        torch.testing.assert_close(maps.latest[name], recorded[-1], rtol=1e-6, atol=1e-9)
    assert not difffast.unpatch(pipe64), "the pipeline was not patched before"


def test_chosen_layers_and_tokens(pipe64):
    expected = stock_maps(pipe64)
    with difffast.collect_maps(pipe64, layers="up_blocks.*", tokens=[3, 1]) as maps:
        latents(pipe64)
    assert maps.layers
    assert all(name.startswith("up_blocks.") for name in maps.layers)
    mean = torch.stack([torch.stack(expected[name]).mean(0) for name in maps.layers]).mean(0)
    torch.testing.assert_close(maps.mean(rows="all"), mean[..., [3, 1]], rtol=1e-6, atol=1e-9)


def test_maps_of_propagated_and_parallel_steps(pipe64):
    one_at_a_time = EncoderPropagation(parallel=False)
    with patched(pipe64, propagation=one_at_a_time), difffast.collect_maps(pipe64) as expected:
        latents(pipe64)
    with patched(pipe64, propagation=EncoderPropagation()) as report, difffast.collect_maps(pipe64) as maps:
        latents(pipe64)
    assert max(report.last_run.decode_batches) > 1
    assert maps.steps == expected.steps
    for name in maps.layers:
        torch.testing.assert_close(maps.mean(name), expected.mean(name), rtol=1e-9, atol=1e-12)
        steps = report.last_run.key if name.startswith(("down", "mid")) else 20
        assert maps.steps[name] == steps


def test_maps_do_not_change_the_image(pipe):
    with patched(pipe, propagation=EncoderPropagation()):
        plain = latents(pipe)
        with difffast.collect_maps(pipe, tokens=[1]):
            assert torch.equal(latents(pipe), plain)
        assert torch.equal(latents(pipe), plain)


def test_maps_without_fused_layers(pipe):
    with patched(pipe, "exact", fused=False), difffast.collect_maps(pipe, layers="mid_block.*") as maps:
        latents(pipe)
    assert maps.mean(rows="all").shape == (2, 16, 77)


def test_two_collectors_at_once(pipe):
    with (
        difffast.collect_maps(pipe, tokens=[2, 1]) as a,
        difffast.collect_maps(pipe, layers="up_blocks.*", tokens=[5]) as b,
    ):
        latents(pipe)
    with difffast.collect_maps(pipe) as everything:
        latents(pipe)
    for maps in (a, b):
        for name in maps.layers:
            torch.testing.assert_close(maps.mean(name), everything.mean(name)[..., list(maps.tokens)])


def test_a_new_image_starts_afresh(pipe):
    with difffast.collect_maps(pipe, layers="mid_block.*") as maps:
        latents(pipe, "a blue square")
        latents(pipe)
        twice = maps.mean()
    with difffast.collect_maps(pipe, layers="mid_block.*") as maps:
        latents(pipe)
    assert torch.equal(maps.mean(), twice)


def test_grid_of_a_wide_image(pipe):
    with difffast.collect_maps(pipe, layers="mid_block.*", tokens=[1, 2]) as maps:
        latents(pipe, height=16, width=32, steps=2)
    factor = pipe.vae_scale_factor
    grid = maps.grid()
    assert grid.shape == (1, 2, 16 // factor // 2, 32 // factor // 2)
    assert torch.equal(grid[0, 1].flatten(), maps.mean()[0, :, 1])


def test_maps_carry_gradients(pipe64):
    """Guidance differentiates a map with respect to the latents; nothing remembered may cut the graph."""
    grads = []

    def guide(each, step, t, values):
        if step == 2:
            with torch.enable_grad():
                z = values["latents"].detach().clone().requires_grad_()
                text = values["prompt_embeds"].detach().clone().requires_grad_()
                schedule_time = each.scheduler.timesteps[step]
                with pytest.warns(UserWarning, match="gradients are enabled"):
                    each.unet(torch.cat([z] * 2), schedule_time, text)
                loss = sum(m[..., 0].square().sum() for m in maps.latest.values())
                grads.extend(torch.autograd.grad(loss, (z, text)))
        return values

    with torch.no_grad(), difffast.collect_maps(pipe64, tokens=[2]) as maps:
        latents(
            pipe64, callback_on_step_end=guide, callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"], steps=8
        )
    assert all(bool(grad.abs().sum() > 0) for grad in grads)
    assert len(grads) == 2


def test_errors_of_collect_maps(pipe):
    for options, message in (
        ({"layers": "nowhere.*"}, "no cross-attention layer matches 'nowhere.*'; there are: down_blocks"),
        ({"tokens": []}, "at least one word, or int of at least 0"),
        ({"tokens": [" "]}, "at least one word, or int"),
        ({"tokens": [True]}, "at least one word, or int"),
        ({"tokens": [-1]}, "int of at least 0"),
        ({"tokens": [0.5]}, "int of at least 0"),
    ):
        with pytest.raises(ValueError, match=message.replace("*", r"\*")), difffast.collect_maps(pipe, **options):
            pass
        assert not unpatch(pipe)
    with difffast.collect_maps(pipe, tokens=[77]), pytest.raises(ValueError, match=r"0 .. 76, got 77"):
        latents(pipe)
    with difffast.collect_maps(pipe) as maps:
        with pytest.raises(ValueError, match="run the pipeline inside"):
            maps.mean()
        latents(pipe, steps=2)
        with pytest.raises(ValueError, match="differ in size"):
            maps.mean()
        with pytest.raises(ValueError, match="layer must be one of"):
            maps.mean("mid")
    pipe.enable_attention_slicing(1)
    with (
        difffast.collect_maps(pipe),
        pytest.raises(RuntimeError, match=r"maps of .*attn2 cannot be collected: .*SlicedAttnProcessor"),
    ):
        latents(pipe)
