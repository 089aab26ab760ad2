"""Losses of erasure and their gradients against the formulas, written anew here in float64."""

import copy

import pytest
import torch
import zoo
from diffusers.models.attention_processor import AttnProcessor
from sampling import picture

import difffast
from difffast.erase import meta
from difffast.erase.denoise import Denoiser
from difffast.erase.examples import Examples, draw_batches, encode_examples
from difffast.erase.losses import lead_away
from difffast.erase.points import Point, Points
from difffast.erase.text import Conditions, encode
from difffast.models.tiny import ddim_scheduler


def alphas(pipe):
    """Stable Diffusion's schedule, by hand: betas linear in their roots."""
    config = pipe.scheduler.config
    betas = torch.linspace(config.beta_start**0.5, config.beta_end**0.5, 1000, dtype=torch.float32) ** 2
    return torch.cumprod(1 - betas, 0).double()


def text(pipe, prompt):
    return pipe.encode_prompt(prompt, "cpu", 1, False)[0].detach()


def perturb(weights, seed=0):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in weights:
            weight += 0.02 * torch.randn(weight.shape, generator=generator, dtype=weight.dtype)


def gradients(unet, names):
    return {name: parameter.grad for name, parameter in unet.named_parameters() if name in names}


def assert_equal(found, expected, tolerance=1e-12):
    assert found.keys() == expected.keys()
    scale = max(float(value.abs().max()) for value in expected.values())
    assert scale > 0
    for name, value in expected.items():
        assert (found[name] - value).abs().max() <= tolerance * scale, name


def make_trainer(pipe, **options):
    trainer = difffast.EraseTrainer(pipe, ["a red cat"], params="xattn", sampling_steps=10, **options)
    point = Point(0, 3, torch.randn(1, 4, 8, 8, dtype=torch.float64) + 0.5)
    trainer._state.points.waiting = [point]
    draws = torch.Generator()
    draws.set_state(trainer._state.generator.get_state())
    timestep = int(torch.randint(600, 700, (), generator=draws))  # 1000 - 100 (3 + 1) up to 1000 - 100 * 3
    return trainer, point.latents, timestep


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("esd", {}),
        ("esd-2025", {}),
        ("esd-2025", {"erase_from": "a cat", "eta": 1.5}),
        ("sdd", {}),
    ],
)
def test_losses_and_gradients_are_the_formulas(pipe64, method, options):
    teacher = copy.deepcopy(pipe64.unet)
    trainer, z, t = make_trainer(pipe64, method=method, **options)
    perturb(trainer.weights.parameters)
    student = copy.deepcopy(pipe64.unet)
    null, concept = text(pipe64, ""), text(pipe64, "a red cat")
    source = text(pipe64, options.get("erase_from", "a red cat"))
    with torch.no_grad():
        e0, ep, ef = (teacher(z, t, each).sample for each in (null, concept, source))
        target = {
            "esd": e0 - options.get("eta", 3.0) * (ep - e0),
            "esd-2025": ef - options.get("eta", 2.0) * (ep - e0),
            "sdd": student(z, t, null).sample,
        }[method]
    expected = ((student(z, t, source).sample - target) ** 2).mean()
    expected.backward()
    with trainer.weights.training(pipe64.unet):
        loss = trainer.erasing_loss()
        loss.backward()
        found = dict(zip(trainer.weights.names, trainer.weights.gradients(), strict=True))
    assert abs(loss - expected) <= 1e-12 * expected
    assert_equal(found, gradients(student, trainer.weights.names))


def test_the_two_conventions_of_esd_differ_by_one():
    null, concept = torch.randn(2, 3, 4, dtype=torch.float64)
    later = lead_away(concept, null, concept, 2.5)
    assert (later - lead_away(null, null, concept, 1.5)).abs().max() < 1e-14


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_trajectories_are_guided_ddim(pipe64, kind):
    pipe64.scheduler = ddim_scheduler(prediction_type=kind)
    alpha, null, concept = alphas(pipe64), text(pipe64, ""), text(pipe64, "a red cat")
    denoiser = Denoiser(pipe64, 50)
    z = first = torch.randn(1, 4, 8, 8, dtype=torch.float64)
    for i in range(3):
        t = 981 - 20 * i
        with torch.no_grad():
            e0, ep = pipe64.unet(z, t, null).sample, pipe64.unet(z, t, concept).sample
        out, a, earlier = e0 + 3 * (ep - e0), alpha[t], alpha[t - 20]
        if kind == "v_prediction":
            noise, clean = a.sqrt() * out + (1 - a).sqrt() * z, a.sqrt() * z - (1 - a).sqrt() * out
        else:
            noise, clean = out, (z - (1 - a).sqrt() * out) / a.sqrt()
        z = earlier.sqrt() * clean + (1 - earlier).sqrt() * noise
    *_, found = denoiser.move(first, 3, Conditions(concept), 3.0)
    assert (found - z).abs().max() < 1e-12 * z.abs().max()


def test_timesteps_are_uniform_in_the_interval_of_their_moves(pipe):
    denoiser, generator = Denoiser(pipe, 50), torch.Generator().manual_seed(0)
    for moves, low in ((0, 980), (49, 0)):
        drawn = {int(denoiser.draw_timestep(moves, generator)) for _ in range(200)}
        assert drawn == set(range(low, low + 20))


def test_sdxl_gets_its_pooled_text_and_sizes():
    pipe = zoo.ROWS["StableDiffusionXLPipeline"].build().to(dtype=torch.float64)
    conditions = encode(pipe, ["a red cat"])
    z = torch.randn(1, 4, 8, 8, dtype=torch.float64)
    size = 8.0 * pipe.vae_scale_factor
    added = {"text_embeds": conditions.pooled, "time_ids": torch.tensor([[size, size, 0, 0, size, size]])}
    with torch.no_grad():
        expected = pipe.unet(z, 500, conditions.embeds, added_cond_kwargs=added).sample
        assert (Denoiser(pipe).predict(z, 500, conditions) - expected).abs().max() < 1e-12
        assert Denoiser(pipe).null.pooled.abs().max() == 0  # as the stock call does without a negative prompt


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_the_loss_of_diffusion(pipe64, kind):
    pipe64.scheduler = ddim_scheduler(prediction_type=kind)
    denoiser, alpha = Denoiser(pipe64), alphas(pipe64)
    clean, noise = torch.randn(2, 3, 4, 8, 8, dtype=torch.float64)
    timesteps = torch.tensor([0, 500, 999])
    noisy = denoiser.add_noise(clean, noise, timesteps)
    for row, t in enumerate(timesteps):
        a = alpha[t]
        z = a.sqrt() * clean[row] + (1 - a).sqrt() * noise[row]
        target = noise[row] if kind == "epsilon" else a.sqrt() * noise[row] - (1 - a).sqrt() * clean[row]
        assert (noisy.latents[row] - z).abs().max() < 1e-12
        assert (noisy.target[row] - target).abs().max() < 1e-12


def test_moments_are_those_of_the_vae(pipe):
    pictures = [picture((32, 32), seed) for seed in (0, 1)]
    found = encode_examples(pipe, [(each, f"prompt {i}") for i, each in enumerate(pictures)])
    for i, each in enumerate(pictures):
        pixels = pipe.image_processor.preprocess(each)
        with torch.no_grad():
            latent = pipe.vae.encode(pixels).latent_dist
        assert torch.equal(found.mean[i], latent.mean[0] * pipe.vae.config.scaling_factor)
        assert torch.equal(found.std[i], latent.std[0] * pipe.vae.config.scaling_factor)
        assert (found.conditions.embeds[i] - text(pipe, f"prompt {i}")[0]).abs().max() < 1e-5


def test_pictures_with_alpha_palettes_or_grey_are_examples_and_other_channels_are_named(pipe):
    plain = picture((32, 32), 0)
    for mode in ("RGBA", "L", "P"):
        other = plain.convert(mode)
        found, wanted = (encode_examples(pipe, [(each, "a")]) for each in (other, other.convert("RGB")))
        assert torch.equal(found.mean, wanted.mean)
    with pytest.raises(ValueError, match="pictures must have 3 channels, got 4"):
        encode_examples(pipe, [(torch.zeros(1, 4, 32, 32), "a")])


def test_an_epoch_has_every_example_once(pipe):
    examples = Examples(
        torch.arange(5.0).view(5, 1, 1, 1).expand(5, 4, 8, 8),
        torch.zeros(5, 4, 8, 8),
        Conditions(torch.arange(5.0).view(5, 1, 1).expand(5, 77, 64)),
    )
    batches = list(draw_batches(Denoiser(pipe), examples, 2, torch.Generator().manual_seed(1)))
    rows = torch.cat([batch.conditions.embeds[:, 0, 0] for batch in batches])
    assert [len(batch.conditions) for batch in batches] == [2, 2, 1]
    assert sorted(rows.tolist()) == [0, 1, 2, 3, 4] != rows.tolist()


@pytest.fixture
def examples():
    def draw(seed, count):
        g = torch.Generator().manual_seed(seed)
        mean = torch.randn(count, 4, 8, 8, generator=g, dtype=torch.float64) + 0.3
        embeds = torch.randn(count, 77, 64, generator=g, dtype=torch.float64)
        return Examples(mean, torch.full_like(mean, 0.1), Conditions(embeds))

    return {"harmful": draw(1, 3), "related": draw(2, 2), "unrelated": draw(3, 1)}


@pytest.fixture
def record(monkeypatch):
    """Every epoch that is drawn, in the order of the draws."""
    drawn = []

    def draw(*arguments):
        batches = list(draw_batches(*arguments))
        drawn.append(batches)
        return batches

    monkeypatch.setattr(meta, "draw_batches", draw)
    return drawn


def sum_of_losses(unet, batches):
    """The loss of diffusion, summed over batches, written out."""
    parts = []
    for batch in batches:
        found = unet(batch.noisy.latents, batch.noisy.timesteps, batch.conditions.embeds).sample
        parts.append(((found - batch.noisy.target) ** 2).mean())
    return sum(parts)


def gradients_of(unet, batches, names):
    unet.zero_grad()
    unet.requires_grad_(True)
    sum_of_losses(unet, batches).backward()
    return gradients(unet, names)


@pytest.mark.parametrize("compat", [None, "published"])
def test_the_meta_gradient_is_the_formula(pipe64, examples, record, compat):
    gammas = (0.4, 0.3, 0.2, 0.9, 0.7)
    trainer, _, _ = make_trainer(pipe64)
    trap = difffast.MetaTrap(
        **examples, gammas=gammas, batch_size=2, learning_rate=1e-2, weight_decay=0.1, compat=compat
    )
    trainer.attach(trap)
    names = trainer.weights.names
    with trainer.weights.training(pipe64.unet):
        for _ in range(2):  # the second time, shadow and moments are left over from the first
            record.clear()
            losses = trainer._attack.add_gradients()
            found = dict(zip(names, trainer.weights.gradients(), strict=True))
    unrelated, related, attack, *after = record
    if compat is None:
        (harmful,), related_after, unrelated_after = after, related, unrelated
    else:
        related_after, unrelated_after, harmful = after
        assert not torch.equal(related_after[0].noisy.latents, related[0].noisy.latents)
    assert [len(epoch) for epoch in (unrelated, related, attack, harmful)] == [1, 1, 2, 2]

    theta, adapted = copy.deepcopy(pipe64.unet), copy.deepcopy(pipe64.unet)
    moved = [parameter for name, parameter in adapted.named_parameters() if name in names]
    fresh = torch.optim.AdamW(moved, lr=1e-2, weight_decay=0.1)
    for batch in attack:
        gradients_of(adapted, [batch], names)
        torch.nn.utils.clip_grad_norm_(moved, 1.0)
        fresh.step()
    parts = [
        (gammas[0], gradients_of(theta, unrelated, names)),
        (gammas[1], gradients_of(theta, related, names)),
        (-gammas[2], gradients_of(adapted, harmful, names)),
        (-gammas[3], gradients_of(adapted, related_after, names)),
        (-gammas[4], gradients_of(adapted, unrelated_after, names)),
    ]
    assert_equal(found, {name: sum(weight * part[name] for weight, part in parts) for name in names})
    with torch.no_grad():
        assert losses["harmful after"] == pytest.approx(float(sum_of_losses(adapted, harmful)), rel=1e-12)
        assert losses["related"] == pytest.approx(float(sum_of_losses(theta, related)), rel=1e-12)


def test_second_order_is_the_gradient_through_the_attack(pipe64, examples, record):
    gammas, rate = (0.0, 0.0, 1.0, 0.5, 0.0), 0.5
    trainer, _, _ = make_trainer(pipe64)
    trap = difffast.MetaTrap(**examples, gammas=gammas, batch_size=2, learning_rate=rate, second_order=True)
    trainer.attach(trap)
    names = trainer.weights.names
    with trainer.weights.training(pipe64.unet):
        trainer._attack.add_gradients()
        found = dict(zip(names, trainer.weights.gradients(), strict=True))
    _, related, attack, harmful = record
    unet = copy.deepcopy(pipe64.unet)
    unet.set_attn_processor(AttnProcessor())  # can be differentiated twice
    start = {name: parameter for name, parameter in unet.named_parameters() if name in names}

    def losses(values, batches):
        parts = []
        for batch in batches:
            inputs = batch.noisy.latents, batch.noisy.timesteps, batch.conditions.embeds
            found = torch.func.functional_call(unet, values, inputs).sample
            parts.append(((found - batch.noisy.target) ** 2).mean())
        return sum(parts)

    values = dict(start)
    for batch in attack:
        slopes = torch.autograd.grad(losses(values, [batch]), list(values.values()), create_graph=True)
        values = {name: v - rate * g for (name, v), g in zip(values.items(), slopes, strict=True)}
    objective = -gammas[2] * losses(values, harmful) - gammas[3] * losses(values, related)
    expected = dict(zip(names, torch.autograd.grad(objective, list(start.values()), retain_graph=True), strict=True))
    assert_equal(found, expected, 1e-7)
    first = torch.autograd.grad(objective, list(values.values()))
    with pytest.raises(AssertionError):
        assert_equal(found, dict(zip(names, first, strict=True)), 1e-4)


def test_a_pool_serves_different_points_of_one_trajectory(pipe64, monkeypatch):
    denoiser, prompts = Denoiser(pipe64, 10), encode(pipe64, ["a red cat"])
    calls, predict = [], denoiser.predict
    monkeypatch.setattr(denoiser, "predict", lambda *a: calls.append(len(a[0])) or predict(*a))
    points, generator = Points(denoiser, prompts, 3.0, pool=4), torch.Generator().manual_seed(3)
    drawn = [points.draw(generator) for _ in range(4)]
    most = max(point.moves for point in drawn)
    assert len({point.moves for point in drawn}) == 4
    assert calls == [2] * most
    generator.manual_seed(3)
    torch.randint(1, (), generator=generator)  # the concept
    torch.randperm(10, generator=generator)
    noise = torch.randn(1, 4, 8, 8, generator=generator).double()
    again = list(denoiser.move(noise, most, prompts, 3.0))
    assert all(torch.equal(point.latents, again[point.moves]) for point in drawn)
    assert points.waiting == []
    points.draw(generator)
    assert len(points.waiting) == 3


@pytest.mark.parametrize("pool", [None, 3])
def test_every_place_is_as_likely(pipe, pool, monkeypatch):
    denoiser = Denoiser(pipe, 5)
    monkeypatch.setattr(denoiser, "move", lambda latents, moves, *a: [latents] * (moves + 1))
    points, generator = Points(denoiser, encode(pipe, ["a", "b"]), 3.0, pool=pool), torch.Generator().manual_seed(0)
    drawn = [points.draw(generator) for _ in range(500)]
    for i in range(5):
        assert abs(sum(point.moves == i for point in drawn) - 100) < 5 * (500 * 0.2 * 0.8) ** 0.5
    assert abs(sum(point.concept for point in drawn) - 250) < 5 * (pool or 1) ** 0.5 * (500 / 4) ** 0.5
