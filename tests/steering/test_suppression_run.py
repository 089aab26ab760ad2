"""Content suppression with optimisation, against the method written out on the stock UNet."""

import math
import threading

import pytest
import torch
import zoo
from attention_by_hand import attend
from sampling import largest, latents, scheduler
from torch.nn import functional

import difffast
from difffast import EncoderPropagation, Suppression, patched
from difffast.steering.suppression.losses import ImageMaps, paper_loss, reference_loss

PROMPT = "a ox by elk"  # a=1 ox=2 3 by=4 5 elk=6..8, end=9
REMOVED, KEPT, END = (6, 7, 8), (1, 2, 3, 4, 5), 9
STEPS = 8
LAYERS = tuple(
    f"{place}.transformer_blocks.0"
    for place in ("down_blocks.0.attentions.0", "up_blocks.1.attentions.0", "up_blocks.1.attentions.1")
)
OPTIONS = {"iterations": 3, "step_size": 2.0, "weight": 0.4, "alpha": 0.2}
#: mode -> (what is asked for, the steps of 8 that optimise)
WINDOWS = {"paper": ((10, 22), (2, 4)), "reference": ((2, 4), (2, 4))}


class Seeing:
    """Stock attention that keeps its probabilities, averaged over heads."""

    def __init__(self):
        self.maps = None

    def __call__(self, layer, hidden, encoder_hidden_states=None, **_):
        def see(maps):
            self.maps = maps.mean(1)
            return maps

        return attend(layer, hidden, encoder_hidden_states, see)


def by_svd(rows, alpha):
    u, sigma, v = torch.linalg.svd(rows, full_matrices=False)
    return u @ torch.diag(sigma * torch.exp(-alpha * sigma)) @ v


def distance(x, y):
    return 1 - (x @ y) / (x.norm() * y.norm())


def own_pixels(word, share):
    large = functional.interpolate(word.reshape(1, 1, 8, 8), size=(128, 128), mode="bilinear", align_corners=False)
    mask = (large > share * large.max()).to(word.dtype)
    return (functional.interpolate(mask, size=(8, 8), mode="bilinear", align_corners=False).flatten() > 0).nonzero()


def loss_by_hand(mode, source, own):
    """Of the pairs (cross maps [N, T], self maps [N, N])."""
    weight = OPTIONS["weight"]
    if mode == "paper":
        return sum(
            factor * sum(((source[0][:, i] - own[0][:, i]) ** 2).sum() for i in words)
            for words, factor in ((KEPT, 1), (REMOVED, -weight))
        )
    total = 0
    for words, factor, share in ((KEPT, 1, 0.95), (REMOVED, -weight, 0.85)):
        for i in words:
            total = total + factor * distance(source[0][:, i], own[0][:, i])
            for j in own_pixels(source[0][:, i], share):
                total = total + factor * distance(source[1][:, j.item()], own[1][:, j.item()])
    return total


class ByHand:
    """The whole method with the stock UNet and DDIM's formula; guidance 7.5."""

    def __init__(self, pipe, mode):
        self.pipe, self.mode = pipe, mode
        self.cross, self.itself = ([Seeing() for _ in LAYERS] for _ in range(2))
        own = {f"{name}.attn2.processor": each for name, each in zip(LAYERS, self.cross, strict=True)}
        own |= {f"{name}.attn1.processor": each for name, each in zip(LAYERS, self.itself, strict=True)}
        self.before = pipe.unet.attn_processors
        pipe.unet.set_attn_processor({**self.before, **own})

    def maps(self, row):
        return tuple(torch.stack([each.maps[row] for each in kind]).mean(0) for kind in (self.cross, self.itself))

    def step(self, z, noise, t):
        scheduler = self.pipe.scheduler
        before = t - scheduler.config.num_train_timesteps // STEPS
        a = scheduler.alphas_cumprod[t]  # in float32, as are its roots
        b = scheduler.alphas_cumprod[before] if before >= 0 else scheduler.final_alpha_cumprod
        return b**0.5 * ((z - (1 - a) ** 0.5 * noise) / a**0.5) + (1 - b) ** 0.5 * noise

    def predict(self, z, t, text):
        noise = self.pipe.unet(z.repeat(2, 1, 1, 1), t, text).sample
        return noise[:1] + 7.5 * (noise[1:] - noise[:1])

    def run(self):
        """-> (latents, losses per step)"""
        pipe, (_, window) = self.pipe, WINDOWS[self.mode]
        with torch.no_grad():
            text, nothing = pipe.encode_prompt(PROMPT, "cpu", 1, True)
        rows = [*REMOVED, *range(END, text.shape[1])]
        suppressed = text.clone()
        suppressed[0, rows] = by_svd(text[0, rows], OPTIONS["alpha"])
        z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        source, losses = z, []
        pipe.scheduler.set_timesteps(STEPS)
        for i, t in enumerate(pipe.scheduler.timesteps.tolist()):
            now = text if i < window[0] else suppressed
            if window[0] <= i < window[1]:
                with torch.no_grad():
                    noise = self.predict(source, t, torch.cat([nothing, text]))
                    seen = self.maps(1)
                    source = self.step(source, noise, t)
                losses.append([])
                for _ in range(OPTIONS["iterations"]):
                    leaf = now.detach().requires_grad_()
                    pipe.unet(z, t, leaf)
                    loss = loss_by_hand(self.mode, seen, self.maps(0))
                    losses[-1].append(loss.item())
                    size = OPTIONS["step_size"] * math.sqrt(torch.linspace(1, 0.1, STEPS, dtype=torch.float64)[i])
                    now = now - size * torch.autograd.grad(loss, leaf)[0]
            with torch.no_grad():
                z = self.step(z, self.predict(z, t, torch.cat([nothing, now])), t)
            if i < window[0]:
                source = z
        pipe.unet.set_attn_processor(self.before)
        return z, losses


def gradient_by_hand(mode, source, own):
    """Of the loss, in what it is of: the cross maps [N, T], and for the reference the self maps [N, N]."""
    weight = OPTIONS["weight"]
    of_cross, of_self = torch.zeros_like(own[0]), torch.zeros_like(own[1])

    def of_distance(x, y):
        return (x @ y) * y / (x.norm() * y.norm() ** 3) - x / (x.norm() * y.norm())

    for words, factor, share in ((KEPT, 1, 0.95), (REMOVED, -weight, 0.85)):
        for i in words:
            x, y = source[0][:, i], own[0][:, i]
            of_cross[:, i] += factor * (2 * (y - x) if mode == "paper" else of_distance(x, y))
            for j in own_pixels(x, share).flatten().tolist() if mode == "reference" else ():
                of_self[:, j] += factor * of_distance(source[1][:, j], own[1][:, j])
    return of_cross, of_self


@pytest.mark.parametrize("offset", [0.0, 4.0], ids=["centred", "uncentred"])
@pytest.mark.parametrize("mode", ["paper", "reference"])
def test_loss_and_gradient_are_the_formulas(mode, offset):
    source, own = ([torch.rand(64, n, dtype=torch.float64) - 0.5 + offset for n in (12, 64)] for _ in "so")
    leaves = [x.clone().requires_grad_() for x in own]
    pair, given = (ImageMaps(*source), ImageMaps(*leaves)), (KEPT, REMOVED, OPTIONS["weight"])
    loss = paper_loss(*pair, *given) if mode == "paper" else reference_loss(*pair, *given, (8, 8))
    assert abs(loss.item() - float(loss_by_hand(mode, source, own))) <= 1e-12 * max(1, abs(loss.item()))
    found = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
    for ours, expected in zip(found, gradient_by_hand(mode, source, own), strict=True):
        assert largest(ours, expected) <= 1e-12
    assert found[0].any()
    assert bool(found[1].any()) is (mode == "reference")


@pytest.mark.parametrize("mode", ["paper", "reference"])
def test_a_run_is_the_method_written_out(pipe64, mode):
    pipe64.scheduler = scheduler("DDIM")
    expected, losses = ByHand(pipe64, mode).run()
    method = Suppression("elk", mode=mode, optimise=WINDOWS[mode][0], **OPTIONS)
    with patched(pipe64, "exact", steering=method) as report:
        found = latents(pipe64, PROMPT, steps=STEPS)
    first, end = WINDOWS[mode][1]
    ours = [report.trace.losses[step, 0] for step in range(first, end)]
    assert set(report.trace.outcomes.values()) == {"iterations"}
    assert largest(torch.tensor(ours), torch.tensor(losses)) <= 1e-12 * max(1, max(map(max, losses)))
    assert all(each[0] > each[-1] for each in losses)
    moved = largest(expected, latents(pipe64, PROMPT, steps=STEPS))
    assert moved > 1e-3
    assert largest(found, expected) <= 1e-9 * moved


@pytest.mark.parametrize("reencode", [False, True])
def test_without_iterations_it_is_the_regularised_text_from_a_fifth_on(pipe64, reencode):
    method = Suppression("ox", iterations=0, reencode=reencode)
    with patched(pipe64, "exact", steering=method):
        found = latents(pipe64, PROMPT, steps=10)
    plain = pipe64.encode_prompt(PROMPT, "cpu", 1, False)[0].detach()
    changed = difffast.suppress(pipe64, PROMPT, "ox", reencode=reencode)["prompt_embeds"]

    def swap(pipe, step, timestep, tensors):
        tensors["prompt_embeds"] = torch.cat([tensors["prompt_embeds"][:1], changed if step >= 1 else plain])
        return tensors

    named = {"callback_on_step_end": swap, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    assert largest(found, latents(pipe64, PROMPT, steps=10, **named)) <= 1e-9


def test_images_and_prompts_are_suppressed_one_by_one(pipe64):
    method = Suppression("elk", iterations=1, optimise=(10, 15), step_size=1.0)
    prompts = [PROMPT, "a red ox"]
    start = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    with patched(pipe64, "exact", steering=method) as report:
        both = latents(pipe64, prompts, steps=6, latents=start)
        assert report.trace.removed == (REMOVED, ())
        alone = latents(pipe64, PROMPT, steps=6, latents=start[:1])
    assert largest(both[:1], alone) <= 1e-9
    assert largest(both[1:], latents(pipe64, "a red ox", steps=6, latents=start[1:])) <= 1e-9


def test_steps_that_share_are_those_outside_the_window(pipe64):
    method = Suppression("elk", iterations=1, step_size=1.0)
    with patched(pipe64, propagation=EncoderPropagation(key_steps=5), steering=method) as report:
        found = latents(pipe64, PROMPT, steps=20)
        assert report.plan(20).full_steps == tuple(range(4, 9))
    with patched(pipe64, propagation=EncoderPropagation(key_steps=5, parallel=False), steering=method):
        assert largest(found, latents(pipe64, PROMPT, steps=20)) <= 1e-9


def test_two_text_encoders_euler_and_a_loss_that_is_not_finite():
    pipe = zoo.xl("StableDiffusionXLPipeline")()
    pipe.scheduler = scheduler("Euler")
    pipe.set_progress_bar_config(disable=True)
    given = {"num_inference_steps": 8, "height": 32, "width": 32, "output_type": "latent"}
    plain = pipe(PROMPT, generator=torch.Generator().manual_seed(0), **given).images
    with (
        patched(pipe, "exact", steering=Suppression("elk", step_size=1e30, iterations=2)) as report,
        pytest.warns(UserWarning, match="went back to its best text"),
    ):
        found = pipe(PROMPT, generator=torch.Generator().manual_seed(0), **given).images
    assert set(report.trace.outcomes.values()) == {"diverged"}
    assert found.isfinite().all()
    assert not torch.equal(found, plain)
    assert torch.equal(pipe(PROMPT, generator=torch.Generator().manual_seed(0), **given).images, plain)


def test_two_text_encoders_with_different_prompts_are_refused():
    pipe = zoo.xl("StableDiffusionXLPipeline")()
    with (
        patched(pipe, "exact", steering=Suppression("elk")),
        pytest.raises(ValueError, match="one prompt for both text encoders, got 'a ox by elk' and 'a red ox'"),
    ):
        pipe(PROMPT, prompt_2="a red ox", num_inference_steps=2, height=32, width=32)


def test_a_run_sees_the_self_attention_of_its_own_thread_alone(pipe64):
    given = {"mode": "reference", "optimise": (1, 2), "iterations": 1}
    with patched(pipe64, "exact", steering=Suppression("elk", **given)):
        expected = latents(pipe64, PROMPT, steps=2)
    strangers, text = [], torch.zeros(1, 7, pipe64.unet.config.cross_attention_dim, dtype=torch.float64)
    call = torch.zeros(1, 4, 8, 8, dtype=torch.float64), 1, text
    watched = pipe64.unet.get_submodule(f"{LAYERS[0]}.attn1")

    def call_from_another_thread(*_):
        """In the middle of a pass whose self-attention is watched, as another pipeline with this UNet would."""
        if not strangers and watched._forward_pre_hooks:
            strangers.append(threading.Thread(target=pipe64.unet.forward, args=call))
            strangers[0].start()
            strangers[0].join()

    handle = watched.to_q.register_forward_pre_hook(call_from_another_thread)
    with patched(pipe64, "exact", steering=Suppression("elk", **given)):
        found = latents(pipe64, PROMPT, steps=2)
    handle.remove()
    assert strangers
    assert largest(found, expected) <= 1e-9


def test_what_cannot_be_is_said(pipe):
    with pytest.raises(ValueError, match="two steps of 50 in order, got"):
        Suppression("ox", optimise=(20, 10))
    with pytest.raises(ValueError, match="mode must be one of paper, reference, got 'code'"):
        Suppression("ox", mode="code")
    with pytest.raises(ValueError, match="step_size must be a finite number"):
        Suppression("ox", step_size=math.nan)
    with patched(pipe, "exact", steering=Suppression("cat")), pytest.raises(ValueError, match="no word 'cat'"):
        latents(pipe, PROMPT, steps=2)
