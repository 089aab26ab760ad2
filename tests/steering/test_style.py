"""StyleDiffusion against its formulas on the stock UNet by processors: loss, gradient, Adam, replay, and edits."""

import dataclasses
import math
from concurrent.futures import ThreadPoolExecutor

import adapter_zoo
import pytest
import torch
import zoo
from attention_by_hand import attend
from sampling import largest, latents, picture, scheduler
from tolerances import EXACT_FLOAT64
from transformers import CLIPImageProcessor

import difffast
from difffast import Inversion, invert, patched
from difffast.steering.inversion import style as module
from difffast.steering.inversion.moves import Moves
from difffast.steering.inversion.networks import make_network, read_features
from difffast.steering.inversion.prefix import compute_once, find_prefix
from difffast.steering.inversion.style import StyleFit, use_text_layers
from difffast.surgery.freezing import freeze

#: One token a letter: a=1 ox=2 3 in=4 5 fog=6..8; a=1 elk=2..4 in=5 6 fog=7..9.
PROMPT, TARGET = "a ox in fog", "a elk in fog"
STEPS, SIZE, GUIDANCE = 3, (32, 32), 3.0
#: Deepest level of the encoder that has any, and its counterpart.
LAYERS = ("down_blocks.0.attentions.0", "up_blocks.1.attentions.0", "up_blocks.1.attentions.1")


@pytest.fixture
def ready(pipe64):
    pipe64.scheduler = scheduler("DDIM")
    return pipe64


class Valued:
    """Stock attention whose last rows have the values of other texts, and whose maps may be looked at or changed."""

    def __init__(self, values=None, edit=None):
        self.values, self.edit, self.maps = values, edit or (lambda p, itself: p), None

    def __call__(self, layer, hidden, encoder_hidden_states=None, **_):
        if encoder_hidden_states is None:
            return attend(layer, hidden, None, lambda p: self.edit(p, True))
        other = encoder_hidden_states.clone() if self.values is not None else encoder_hidden_states
        if self.values is not None:
            other = torch.cat([other[: -len(self.values)], self.values])
        plain = layer.to_v.forward
        layer.to_v.forward = lambda _: plain(other)
        try:
            return attend(layer, hidden, encoder_hidden_states, self._look)
        finally:
            del layer.to_v.forward

    def _look(self, maps):
        self.maps = self.edit(maps, False)
        return self.maps


def put(pipe, make):
    """Put a processor of its own into every layer; -> those of LAYERS."""
    names = pipe.unet.attn_processors
    made = {name: make() for name in names}
    pipe.unet.set_attn_processor(dict(made))  # which is emptied
    return [made[f"{place}.transformer_blocks.0.attn2.processor"] for place in LAYERS]


def mix_by_hand(weights, features):
    """gamma and beta of a network's parameters, in matrices."""
    h = weights["first.weight"][..., 0] @ features + weights["first.bias"][:, None]
    h = weights["second.weight"][..., 0] @ h + weights["second.bias"][:, None]
    mean = h.mean(1, keepdim=True)
    h = (h - mean) / (((h - mean) ** 2).mean(1, keepdim=True) + 1e-5).sqrt()
    h = h * weights["norm.weight"][:, None] + weights["norm.bias"][:, None]
    h = torch.where(h > 0, h, 0.01 * h)
    out = weights["last.weight"][..., 0] @ h + weights["last.bias"][:, None]
    return out[: len(out) // 2], out[len(out) // 2 :]


def loss_by_hand(pipe, weights, features, step, z, way, guidance=GUIDANCE):
    """-> (loss, the latents after the step)"""
    text, null = (pipe.encode_prompt(each, "cpu", 1, False)[0].detach() for each in (PROMPT, ""))
    pipe.scheduler.set_timesteps(STEPS)
    t = int(pipe.scheduler.timesteps[step])
    before = t - 1000 // STEPS
    a = pipe.scheduler.alphas_cumprod[t]
    b = pipe.scheduler.alphas_cumprod[before] if before >= 0 else pipe.scheduler.final_alpha_cumprod
    kept = pipe.unet.attn_processors
    try:
        seen = put(pipe, Valued)
        with torch.no_grad():
            e0 = pipe.unet(z, t, null).sample
            pipe.unet(way[step : step + 1], t, text)
        wanted = [each.maps for each in seen]
        gamma, beta = mix_by_hand(weights, features)
        seen = put(pipe, lambda: Valued(text * gamma + beta))
        e = pipe.unet(z, t, text).sample
    finally:
        pipe.unet.set_attn_processor(kept)
    e = e0 + guidance * (e - e0)
    moved = b**0.5 * (z - (1 - a) ** 0.5 * e) / a**0.5 + (1 - b) ** 0.5 * e
    loss = ((moved - way[step + 1]) ** 2).mean()
    return loss + sum(((each.maps - one) ** 2).mean() for each, one in zip(seen, wanted, strict=True)), moved.detach()


def randomise(network):
    """Weights with which every part of the network has an effect."""
    with torch.no_grad():
        for weight in network.parameters():
            weight.add_(torch.randn_like(weight) * 0.1)


def test_loss_and_gradient_are_those_of_the_formula(ready):
    found = invert(ready, picture(32), PROMPT, "ddim", steps=STEPS, guidance=GUIDANCE)
    moves = Moves(ready, ready.unet, PROMPT, STEPS, SIZE)
    features = torch.randn(5, 64, dtype=torch.float64) + 1
    found = dataclasses.replace(found, features=features)
    z, step = found.trajectory[1:2] + 0.1, 1
    with freeze(ready.unet), use_text_layers(ready.unet):
        fit = StyleFit(moves, ready.unet, found)
        randomise(fit._network)
        with torch.no_grad():
            maps, nothing = fit._look(found.trajectory[1:2], step), moves.predict_null(z, step)
        loss = fit.compute_loss(z, found.trajectory[2], step, nothing, maps)
        weights = dict(fit._network.named_parameters())
        gradients = torch.autograd.grad(loss, list(weights.values()))
    leaves = {name: each.detach().clone().requires_grad_() for name, each in weights.items()}
    expected, _ = loss_by_hand(ready, leaves, features, step, z, found.trajectory)
    assert abs(loss - expected) <= 1e-12
    by_hand = torch.autograd.grad(expected, list(leaves.values()))
    assert max(largest(*pair) for pair in zip(gradients, by_hand, strict=True)) <= 1e-12
    assert max(each.abs().max() for each in by_hand) > 1e-3
    assert len(maps) == len(LAYERS)
    assert sum(each.numel() for each in make_network(torch.empty(197, 768), 77).parameters()) == 78540


def test_networks_descend_as_adam_does_and_begin_where_the_last_one_ended(ready, monkeypatch):
    monkeypatch.setattr(module, "_UPDATES", 4)
    found = invert(ready, picture(32), PROMPT, "style", steps=STEPS, guidance=GUIDANCE)
    way, z = found.trajectory, found.trajectory[:1]
    network = make_network(found.features, 77)
    weights = {name: each.detach() for name, each in network.named_parameters()}
    for step in range(2):
        first = second = dict.fromkeys(weights, 0)
        tried = []
        for k in range(1, math.ceil(4 * math.exp(-0.1 * step)) + 1):
            leaves = {name: each.clone().requires_grad_() for name, each in weights.items()}
            loss, _ = loss_by_hand(ready, leaves, found.features, step, z, way)
            tried.append((loss.item(), weights))
            gradients = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
            first = {name: 0.9 * first[name] + 0.1 * each for name, each in gradients.items()}
            second = {name: 0.999 * second[name] + 0.001 * each**2 for name, each in gradients.items()}
            weights = {
                name: each
                - 0.01
                * (1 - step / 100)
                * (first[name] / (1 - 0.9**k))
                / ((second[name] / (1 - 0.999**k)).sqrt() + 1e-8)
                for name, each in weights.items()
            }
        least, weights = min(tried, key=lambda pair: pair[0])
        assert abs(found.losses[step] - least) <= 1e-10
        # Adam divides by the root of gradients that are almost zero.
        assert max(largest(found.networks[name][step], each) for name, each in weights.items()) <= 1e-6
        with torch.no_grad():
            _, z = loss_by_hand(ready, weights, found.features, step, z, way)
    assert largest(found.networks["last.bias"][0], found.networks["last.bias"][1]) > 1e-3


def make_inversion(pipe, **options):
    """A picture whose networks have weights as good as any."""
    found = invert(pipe, picture(32), PROMPT, "ddim", steps=STEPS, guidance=GUIDANCE)
    features = torch.randn(5, 64, dtype=torch.float64) + 1
    network, states = make_network(features, 77), []
    for _ in range(STEPS):
        randomise(network)
        states.append({name: each.detach().clone() for name, each in network.state_dict().items()})
    networks = {name: torch.stack([each[name] for each in states]) for name in states[0]}
    style = {"method": "style", "features": features, "networks": networks, "losses": (0.0,) * STEPS}
    return dataclasses.replace(found, **style, **options)


def values_by_hand(inversion, text, step):
    gamma, beta = mix_by_hand({name: each[step] for name, each in inversion.networks.items()}, inversion.features)
    return text * gamma + beta


def run_by_hand(pipe, prompts, inversion, shown, edit=None, **options):
    """Final latents; ``shown``: step -> of the text [n, T, D], what gives the values."""
    text = pipe.encode_prompt(prompts, "cpu", 1, False)[0].detach()
    kept = pipe.unet.attn_processors

    def prepare(step):
        own = None if edit is None else (lambda maps, itself: edit(maps, itself, step))
        put(pipe, lambda: Valued(shown(text, step), own))

    def after(_pipe, step, _timestep, tensors):
        prepare(step + 1) if step + 1 < STEPS else None
        return tensors

    prepare(0)
    given = {**inversion.arguments, **options, "latents": inversion.trajectory[:1].repeat(len(prompts), 1, 1, 1)}
    try:
        return pipe(prompts, output_type="latent", callback_on_step_end=after, **given).images
    finally:
        pipe.unet.set_attn_processor(kept)


@pytest.mark.parametrize("guidance", [GUIDANCE, 1.0])
def test_a_replay_has_the_networks_values_in_the_conditional_half(ready, guidance):
    found = make_inversion(ready, guidance=guidance)
    expected = run_by_hand(ready, [PROMPT], found, lambda text, step: values_by_hand(found, text, step))
    for options in ({}, {"fused": False}):
        with patched(ready, "exact", steering=found, **options):
            replayed = ready(PROMPT, output_type="latent", **found.arguments).images
        assert largest(replayed, expected) <= EXACT_FLOAT64 * expected.abs().max()
    plain = dataclasses.replace(found, method="ddim")
    with patched(ready, "exact", steering=plain):
        assert largest(ready(PROMPT, output_type="latent", **found.arguments).images, expected) > 1e-3
    other = f"guidance_scale {guidance} and no guidance_rescale, this call has 2.0 and 0.0"
    with patched(ready, "exact", steering=found), pytest.warns(UserWarning, match=other):
        ready(PROMPT, output_type="latent", **{**found.arguments, "guidance_scale": 2.0})


def test_an_edit_has_the_pictures_values_for_its_share_of_the_steps(ready):
    found = make_inversion(ready)
    mix = torch.zeros(77, 77, dtype=torch.float64)
    mix[0, 0] = mix[1, 1] = mix[76, 76] = 1
    mix[2:4, 2:5] = 1 / 3
    for i in range(4, 76):
        mix[i, i + 1] = 1

    def edit(maps, itself, step):
        if itself or step >= 2:  # cross = 0.6 of 3 steps
            return maps
        return torch.cat([maps[:-1], maps[-2:-1] @ mix])

    def shown(text, step):
        changed = values_by_hand(found, text, step)
        return changed if step < 1 else torch.cat([changed[:1], text[1:]])  # values = 0.4 of 3 steps

    expected = run_by_hand(ready, [PROMPT, TARGET], found, shown, edit)
    with difffast.edit(ready, PROMPT, TARGET, inversion=found, cross=0.6, self_=0.0, values=0.4) as edited:
        got = ready(edited.prompts, output_type="latent", **found.arguments).images
    assert largest(got, expected) <= EXACT_FLOAT64 * expected.abs().max()
    with difffast.edit(ready, PROMPT, TARGET, inversion=found, cross=0.6, self_=0.0, values=0.0) as edited:
        without = ready(edited.prompts, output_type="latent", **found.arguments).images
    assert largest(got[:1], without[:1]) <= EXACT_FLOAT64 * expected.abs().max()
    assert largest(got[1:], without[1:]) > 1e-3


def test_an_interrupted_inversion_goes_on_and_files_hold_all_of_it(ready, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_UPDATES", 2)
    whole = invert(ready, picture(32), PROMPT, "style", steps=STEPS)
    plain, calls = StyleFit.optimise, []

    def interrupted(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return plain(*arguments)

    monkeypatch.setattr(StyleFit, "optimise", interrupted)
    with pytest.raises(KeyboardInterrupt):
        invert(ready, picture(32), PROMPT, "style", steps=STEPS, checkpoint=tmp_path / "file")
    half = Inversion.load(tmp_path / "file")
    assert len(half.losses) == 2
    with pytest.raises(ValueError, match="2 of 3 steps are done"):
        difffast.patch(ready, "exact", steering=half)
    resumed = invert(ready, picture(32), PROMPT, "style", steps=STEPS, checkpoint=tmp_path / "file")
    assert len(calls) == 4
    again = Inversion.load(tmp_path / "file")
    for each in (resumed, again):
        assert each.losses == resumed.losses
        assert largest(each.features, whole.features) <= 1e-12
        assert max(largest(each.networks[name], whole.networks[name]) for name in whole.networks) <= 1e-9
    assert not any(type(module).__name__.startswith("Difffast") for module in ready.unet.modules())


@pytest.mark.parametrize("kind", [pytest.param("noise", marks=pytest.mark.slow), "velocity", "two encoders"])
def test_reconstructions_are_nearer_than_those_of_ddim(kind, pipe64, monkeypatch):
    monkeypatch.setattr(module, "_UPDATES", 12)
    pipe = zoo.xl("StableDiffusionXLPipeline")() if kind == "two encoders" else pipe64
    pipe.scheduler = scheduler("DDIM")
    if kind == "velocity":
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, prediction_type="v_prediction")
    pipe.set_progress_bar_config(disable=True)
    found = invert(pipe, picture((40, 24)), PROMPT, "style", steps=2)
    errors = []
    for each in (found, dataclasses.replace(found, method="ddim")):
        with patched(pipe, "exact", steering=each):
            again = pipe(PROMPT, output_type="latent", **each.arguments).images
        errors.append((again - each.trajectory[-1:]).square().mean().item())
    assert errors[0] < errors[1]
    assert found.networks["last.bias"].shape[0] == 2


def test_features_are_the_image_encoders_tokens_or_cells_of_the_latents(ready):
    z, text = torch.randn(1, 4, 8, 10, dtype=torch.float64), torch.empty(1, 77, 64, dtype=torch.float64)
    cells = read_features(ready, picture(32), z, text)
    assert cells.shape == (6, 64)
    assert torch.equal(cells[0], z[0, :, :4, :4].flatten())
    assert torch.equal(cells[2].unflatten(0, (4, 4, 4))[..., :2], z[0, :, :4, 8:])
    assert not cells[2].unflatten(0, (4, 4, 4))[..., 2:].any()
    encoder = adapter_zoo.image_encoder(16)
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    ready.register_modules(image_encoder=encoder, feature_extractor=CLIPImageProcessor(**size))
    tokens = read_features(ready, picture(32), z, text)
    pixels = ready.feature_extractor(images=picture(32), return_tensors="pt").pixel_values
    expected = encoder.vision_model(pixels).last_hidden_state[0].detach().double()
    assert tokens.shape == (5, 64)  # 32 channels of its own
    assert largest(tokens, torch.nn.functional.interpolate(expected[None], 64, mode="linear")[0]) <= 1e-6


def test_what_does_not_depend_on_the_text_is_computed_once_and_in_this_thread_alone(ready):
    prefix = find_prefix(ready.unet)
    down = ready.unet.down_blocks[0]
    assert prefix == (ready.unet.conv_in, down.resnets[0], down.attentions[0].transformer_blocks[0].attn1)
    z, text = torch.randn(2, 1, 4, 8, 8, dtype=torch.float64), torch.randn(2, 1, 77, 64, dtype=torch.float64)
    with torch.no_grad():
        expected, other = (ready.unet(z[i], 500, text[1]).sample for i in (0, 1))
        with compute_once(prefix):
            ready.unet(z[0], 500, text[0])
            assert torch.equal(ready.unet(z[0], 500, text[1]).sample, expected)
            assert not torch.equal(ready.unet(z[1], 500, text[1]).sample, other)  # it is not computed again
            with ThreadPoolExecutor(1) as pool:
                assert torch.equal(pool.submit(torch.no_grad()(ready.unet), z[1], 500, text[1]).result().sample, other)
        assert torch.equal(ready.unet(z[1], 500, text[1]).sample, other)
    names = [name for name, _ in zoo.xl("StableDiffusionXLPipeline")().unet.named_modules()]
    xl = zoo.xl("StableDiffusionXLPipeline")().unet
    assert "down_blocks.0.attentions.0" not in names
    assert find_prefix(xl)[:3] == (xl.conv_in, xl.down_blocks[0], xl.down_blocks[1].resnets[0])


def test_a_loss_that_is_not_finite_keeps_the_last_good_networks(ready, monkeypatch):
    monkeypatch.setattr(module, "_UPDATES", 5)
    plain, calls = StyleFit.compute_loss, []

    def broken(*arguments):
        calls.append(arguments)
        return plain(*arguments) * (float("nan") if len(calls) > 2 else 1)

    monkeypatch.setattr(StyleFit, "compute_loss", broken)
    with pytest.warns(UserWarning, match="the values of step 0 diverged; the best ones are kept"):
        found = invert(ready, picture(32), PROMPT, "style", steps=1)
    assert all(bool(each.isfinite().all()) for each in found.networks.values())
    assert len(calls) == 3


def test_what_cannot_be_done_is_said_and_the_pipeline_is_as_before(ready, tmp_path):
    plain, found = latents(ready, PROMPT, steps=2), make_inversion(ready)
    for value, error in ((0.5, r"values=0\.5 needs a picture inverted by 'style'"), (1.5, "values must be a share")):
        with pytest.raises(ValueError, match=error), difffast.edit(ready, PROMPT, TARGET, values=value):
            pass
    with patched(ready, "exact", steering=found), pytest.raises(ValueError, match="needs as many, got 4"):
        ready(PROMPT, num_inference_steps=4, output_type="latent")
    with difffast.edit(ready, PROMPT, TARGET, inversion=found), pytest.raises(ValueError, match="needs as many, got 4"):
        ready([PROMPT, TARGET], num_inference_steps=4, output_type="latent")
    other = dataclasses.replace(found, features=found.features[:, :32])
    with patched(ready, "exact", steering=other), pytest.raises(ValueError, match=r"for texts of \(77, 32\), got"):
        ready(PROMPT, output_type="latent", **other.arguments)
    dataclasses.replace(found, losses=found.losses[:2]).save(tmp_path / "torn")
    with pytest.raises(ValueError, match="torn is damaged: it has not what each of its 2 steps has found"):
        Inversion.load(tmp_path / "torn")
    found.save(tmp_path / "file")
    with pytest.raises(ValueError, match="is of another picture"):
        invert(
            ready, picture(32, seed=3), PROMPT, "style", steps=STEPS, guidance=GUIDANCE, checkpoint=tmp_path / "file"
        )
    assert torch.equal(latents(ready, PROMPT, steps=2), plain)
