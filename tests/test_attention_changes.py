"""What the keys and values of a text were made of may change: weights, LoRA and prompts, and they are made anew."""

import copy
import warnings

import pytest
import torch
from sampling import largest, latents
from test_attention import layers
from tolerances import EXACT_FLOAT32

from difffast import EncoderPropagation, patch, patched, unpatch

ALL_KEY = EncoderPropagation(key_steps=1)


def _run_with(pipe, change, *, at=10, preset="exact", **options):
    """Latents when ``change`` is called after step ``at``, with the report's counts."""

    def on_end(_pipe, step, _t, values):
        if step == at:
            change()
        return values

    with patched(pipe, preset, **options) as report:
        return latents(pipe, callback_on_step_end=on_end), report.last_run


def _changed(pipe, make_change):
    """A change of weights in mid-run has the effect that it has on a stock pipeline."""
    twin = copy.deepcopy(pipe)
    ours, stats = _run_with(pipe, make_change(pipe))
    theirs, _ = _run_with(twin, make_change(twin), fused=False)
    untouched = latents(copy.deepcopy(twin), callback_on_step_end=None)
    assert largest(ours, theirs) <= EXACT_FLOAT32
    return ours, untouched, stats


def test_weight_updates_are_seen(pipe):
    def change(pipe):
        weight = next(iter(layers(pipe).values())).to_k.weight

        def update():
            with torch.no_grad():
                weight.mul_(3)

        return update

    _, _, stats = _changed(pipe, change)
    assert stats.text_kv["computed"] == len(layers(pipe)) + 1


def test_replaced_weights_are_seen(pipe):
    def change(pipe):
        layer = next(iter(layers(pipe).values()))

        def update():
            layer.to_v.weight.data = layer.to_v.weight.data * 3

        return update

    _, _, stats = _changed(pipe, change)
    assert stats.text_kv["computed"] == len(layers(pipe)) + 1


def _add_lora(pipe, name="one", seed=0):
    from peft import LoraConfig

    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")  # the second adapter is meant
        pipe.unet.add_adapter(LoraConfig(r=4, target_modules=["to_k", "to_v"], init_lora_weights=False), name)
    generator = torch.Generator().manual_seed(seed)
    for key, weight in pipe.unet.named_parameters():
        if "lora" in key and f".{name}." in key:
            weight.data = torch.randn(weight.shape, generator=generator) * 0.2


@pytest.mark.parametrize("what", ["scale", "disable", "second", "update"])
def test_lora_changes_are_seen(pipe, what):
    _add_lora(pipe)
    if what == "second":
        _add_lora(pipe, "two", seed=1)
        pipe.unet.set_adapter("one")

    def change(pipe):
        def update():
            if what == "scale":
                for layer in layers(pipe).values():
                    layer.to_k.scaling["one"] *= 5
            elif what == "disable":
                pipe.unet.disable_adapters()
            elif what == "second":
                pipe.unet.set_adapter("two")
            else:
                with torch.no_grad():
                    for layer in layers(pipe).values():
                        layer.to_v.lora_B["one"].weight.mul_(5)

        return update

    _, _, stats = _changed(pipe, change)
    assert stats.text_kv["computed"] == 2 * len(layers(pipe))


def test_lora_added_after_patching(pipe):
    patch(pipe, "exact")
    plain = latents(pipe)
    _add_lora(pipe)
    ours = latents(pipe)
    unpatch(pipe)
    assert largest(ours, plain) > 1e-3
    assert largest(ours, latents(pipe)) <= EXACT_FLOAT32


def test_a_prompt_changed_in_place_is_seen(pipe):
    # Outside inference_mode, whose tensors have no version counter.
    embeddings = pipe.encode_prompt("a red circle", "cpu", 1, False)[0].detach().clone()

    def run():
        given = embeddings.clone()

        def change(_pipe, step, _t, values):
            if step == 10:
                values["prompt_embeds"].mul_(0.5)
            return values

        with torch.no_grad():
            return latents(
                pipe,
                None,
                prompt_embeds=given,
                guidance_scale=1.0,
                callback_on_step_end=change,
                callback_on_step_end_tensor_inputs=["prompt_embeds"],
            )

    stock = run()
    with patched(pipe, "exact"):
        assert largest(run(), stock) <= EXACT_FLOAT32


HIDDEN = {"data": lambda text: text.data.mul_(0.5), "NumPy": lambda text: text.numpy().__imul__(0.5)}


@pytest.mark.parametrize("how", HIDDEN)
def test_a_prompt_changed_past_its_version_is_seen(pipe, how):
    embeddings = pipe.encode_prompt("a red circle", "cpu", 1, False)[0].detach().clone()

    @torch.no_grad()
    def run():
        def change(_pipe, step, _t, values):
            if step in (3, 5):
                HIDDEN[how](values["prompt_embeds"])
            return values

        edits = {"callback_on_step_end": change, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
        return latents(pipe, None, steps=9, prompt_embeds=embeddings.clone(), guidance_scale=1.0, **edits)

    stock = run()
    with patched(pipe, "exact"):
        assert largest(run(), stock) <= EXACT_FLOAT32
    with patched(pipe, propagation=EncoderPropagation(key_steps=8)) as report:
        run()
    changed = [f"key step at {step}: encoder_hidden_states changed" for step in (4, 6)]
    assert report.last_run.reasons == changed


@torch.no_grad()
def test_two_texts_by_turns_that_change_past_their_versions_are_seen(pipe):
    """A loop of one's own that calls the UNet once for each of guidance's halves."""
    given = pipe.encode_prompt("a cat", "cpu", 1, True)[:2]

    def run():
        texts = [text.clone() for text in given]
        pipe.scheduler.set_timesteps(4)
        x, outputs = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0)), []
        for t in pipe.scheduler.timesteps:
            outputs += [pipe.unet(x, t, text).sample for text in texts]
            texts[0].data.mul_(0.5)
        return torch.stack(outputs)

    stock = run()
    with patched(pipe, "exact"):
        assert largest(run(), stock) <= EXACT_FLOAT32
