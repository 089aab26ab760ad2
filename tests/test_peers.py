"""Other people's ways do what their papers say, and leave the pipeline as it was."""

import numpy as np
import peers
import pytest
import torch
from peers.spectrum import forecast_weights
from sampling import latents, scheduler

EVERYBODY = {
    "T-GATE": lambda pipe: peers.t_gate(pipe, 0.4),
    "Spectrum": lambda pipe: peers.spectrum(pipe),
    "bfloat16": lambda pipe: peers.in_bfloat16(pipe),
    "trailing": lambda pipe: peers.with_spacing(pipe, "trailing"),
    "DeepCache": lambda pipe: peers.deepcache(pipe, 3, 1),
    "tomesd": lambda pipe: peers.token_merging(pipe, 0.5),
    "PAB": lambda pipe: peers.pyramid_attention_broadcast(pipe, 2, 4),
}


class Calls:
    """Counts the calls of modules whose names end so, and keeps what goes in and comes out."""

    def __init__(self, pipe, ending):
        self.inputs, self.outputs = [], []
        for name, module in pipe.unet.named_modules():
            if name.endswith(ending):
                module.register_forward_hook(self._see)

    def _see(self, _module, inputs, output):
        self.inputs.append(inputs[0].detach().clone())
        self.outputs.append(output.detach().clone())


@pytest.mark.parametrize("name", EVERYBODY)
def test_the_pipeline_is_exactly_stock_again(pipe, name):
    before = latents(pipe, steps=10)
    unet, schedule = pipe.unet, pipe.scheduler
    with EVERYBODY[name](pipe):
        first, second = latents(pipe, steps=10), latents(pipe, steps=10)
    assert not torch.equal(first, before)
    if name != "tomesd":  # It draws the tokens that are kept, and goes on drawing.
        assert torch.equal(first, second), "a run must not see another one's features"
    with pytest.raises(RuntimeError, match="within"), EVERYBODY[name](pipe):
        raise RuntimeError("within")
    assert pipe.unet is unet
    assert pipe.scheduler is schedule
    assert "forward" not in {attribute for module in unet.modules() for attribute in vars(module)}
    assert torch.equal(latents(pipe, steps=10), before)


@pytest.mark.parametrize("name", ["T-GATE", "Spectrum"])
def test_two_prompts_in_a_batch_equal_each_alone(pipe64, name):
    prompts = ["a red circle", "a blue square"]
    start = torch.randn(2, 4, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    with EVERYBODY[name](pipe64):
        both = latents(pipe64, prompts, steps=10, latents=start)
        alone = [latents(pipe64, prompts[i], steps=10, latents=start[i : i + 1]) for i in range(2)]
    torch.testing.assert_close(both, torch.cat(alone), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("steps", "gate"), [(10, 4), (25, 10)])
def test_t_gate_runs_no_cross_attention_and_one_half_after_its_gate(pipe, steps, gate):
    queries, whole = Calls(pipe, "attn2.to_q"), Calls(pipe, "conv_in")
    layers = sum(name.endswith("attn2") for name, _ in pipe.unet.named_modules())
    with peers.t_gate(pipe, 0.4):
        latents(pipe, steps=steps)
    assert len(queries.inputs) == layers * gate
    assert [len(each) for each in whole.inputs] == [2] * gate + [1] * (steps - gate)


def test_t_gate_freezes_cross_attention_to_the_mean_of_both_halves(pipe):
    layer = next(name for name, _ in pipe.unet.named_modules() if name.endswith("attn2"))
    attention, output = Calls(pipe, layer), Calls(pipe, "conv_out")
    with peers.t_gate(pipe, 0.5):
        latents(pipe, steps=6)
    last = attention.outputs[2]
    for frozen in attention.outputs[3:]:
        torch.testing.assert_close(frozen, (last[:1] + last[1:]) / 2)
    assert len(output.outputs[2]) == 2
    assert len(output.outputs[3]) == 1


def test_t_gate_at_the_end_is_stock(pipe):
    before = latents(pipe, steps=6)
    with peers.t_gate(pipe, 1.0):
        assert torch.equal(latents(pipe, steps=6), before)


def test_t_gate_without_guidance_freezes_the_text_alone(pipe):
    attention = Calls(pipe, "down_blocks.0.attentions.0.transformer_blocks.0.attn2")
    with peers.t_gate(pipe, 0.5):
        latents(pipe, steps=6, guidance_scale=1.0)
    assert all(torch.equal(each, attention.outputs[2]) for each in attention.outputs[3:])


@pytest.mark.parametrize(("steps", "runs"), [(20, 11), (30, 14), (40, 16)])
def test_spectrum_runs_as_many_steps_as_published(pipe, steps, runs):
    """In stable-diffusion.cpp it is 1.82, 2.14 and 2.50 times as fast as stock (pull request 1322)."""
    whole, last = Calls(pipe, "conv_in"), Calls(pipe, "conv_out")
    with peers.spectrum(pipe):
        latents(pipe, steps=steps)
    assert len(whole.inputs) == runs
    assert len(last.inputs) == steps
    assert round(steps / runs, 2) == {20: 1.82, 30: 2.14, 40: 2.5}[steps]


def test_spectrum_counts_the_calls_of_schedulers_that_need_two_a_step(pipe):
    pipe.scheduler = scheduler("Heun")
    whole, last = Calls(pipe, "conv_in"), Calls(pipe, "conv_out")
    with peers.spectrum(pipe):
        latents(pipe, steps=10)
    assert len(last.inputs) == 19
    assert len(whole.inputs) == 4 + 4 + 2  # the first, 5, 7, 10 and 13, and those from the 17th on


def test_spectrums_polynomials_reproduce_polynomials():
    def cubic(step):
        return 3 - 0.2 * step + 0.07 * step**2 - 0.004 * step**3

    known = [0, 1, 2, 3, 5, 7, 10]
    weights = forecast_weights(known, 12, 25, degree=4, ridge=1e-12, blend=1.0)
    assert np.dot(weights, [cubic(step) for step in known]) == pytest.approx(cubic(12), rel=1e-6)


def test_spectrums_forecast_by_hand():
    # Degree 0: the mean, which the ridge draws to 0.
    assert forecast_weights([0, 1, 2, 3], 4, 20, degree=0, ridge=1.0, blend=1.0) == pytest.approx([0.2] * 4)
    # No polynomials: the line through the last two.
    assert forecast_weights([0, 2], 3, 20, degree=4, ridge=0.1, blend=0.0) == pytest.approx([-0.5, 1.5])


def test_spectrum_forecasts_the_last_feature(pipe64):
    """Against the normal equations' other form: least squares on rows that stand for the penalty."""
    features = Calls(pipe64, "conv_norm_out")
    with peers.spectrum(pipe64, degree=3, ridge=0.5, blend=0.3):
        latents(pipe64, steps=20)
    # conv_norm_out is given forecasts too, but not through its hooks: what is seen are the steps that run.
    known = np.stack([each.numpy().ravel() for each in features.inputs[:4]])
    times = 2 * np.arange(5) / 19 - 1
    rows = np.concatenate([np.polynomial.chebyshev.chebvander(times[:4], 3), np.sqrt(0.5) * np.eye(4)])
    fit = np.linalg.lstsq(rows, np.concatenate([known, np.zeros((4, known.shape[1]))]), rcond=None)[0]
    polynomial = np.polynomial.chebyshev.chebvander(times[4:], 3)[0] @ fit
    expected = 0.3 * polynomial + 0.7 * (2 * known[3] - known[2])
    weights = forecast_weights(range(4), 4, 20, degree=3, ridge=0.5, blend=0.3)
    np.testing.assert_allclose(np.dot(weights, known), expected, rtol=1e-9)
    output = Calls(pipe64, "conv_out")
    with peers.spectrum(pipe64, degree=3, ridge=0.5, blend=0.3):
        latents(pipe64, steps=20)
    feature = torch.from_numpy(expected).reshape(features.inputs[0].shape)
    made = pipe64.unet.conv_out(pipe64.unet.conv_act(pipe64.unet.conv_norm_out(feature)))
    torch.testing.assert_close(output.outputs[4], made, rtol=1e-9, atol=1e-9)


def test_in_bfloat16_only_the_unet_is_rounded(pipe):
    before = latents(pipe, steps=10)
    seen = []
    with peers.in_bfloat16(pipe):
        inside = pipe.unet
        inside.conv_in.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
        inside.time_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].dtype))
        made = latents(pipe, steps=10)
    assert set(seen) == {torch.bfloat16, torch.int64}, "times are not rounded"
    assert made.dtype == torch.float32
    assert 0 < (made - before).norm() / before.norm() < 0.05
    assert {weight.dtype for weight in pipe.unet.parameters()} == {torch.float32}


@pytest.mark.parametrize(("spacing", "first", "last"), [("leading", 901, 1), ("trailing", 999, 99)])
def test_the_timesteps_of_both_spacings(pipe, spacing, first, last):
    with peers.with_spacing(pipe, spacing):
        latents(pipe, steps=10)
        times = pipe.scheduler.timesteps
    assert times.tolist() == list(range(first, last - 1, -100))
