"""The parts of the training: rows of text, losses, checkpoints."""

import json

import numpy as np
import pytest
import torch
from torch import nn
from training.clip import contrast
from training.kept import keep, take_up
from training.loop import Average, Budget, Training, rate_at
from training.text_rows import (
    Whitening,
    cross_attentions,
    feed,
    fit_affine,
    fit_whitening,
    fold,
    ids_of,
    rows_of,
    weights_of,
)
from training.unet import draw_timesteps, timestep_shares

from difffast.models import tiny_pipeline


def _small():
    pipe = tiny_pipeline("sd", channels=(32, 64), sample_size=4)
    pipe.unet.double()
    pipe.text_encoder.double()
    return pipe


def _operands(width):
    generator = torch.Generator().manual_seed(5)
    noisy = torch.randn(2, 4, 4, 4, generator=generator, dtype=torch.float64)
    rows = torch.randn(2, 77, width, generator=generator, dtype=torch.float64) + 3
    return noisy, torch.tensor([7, 700]), rows


@torch.no_grad()
def _drawn(unet, noisy, timesteps, rows):
    return unet(noisy, timesteps, rows).sample


def _whitening_of(rows):
    return fit_whitening(rows, torch.ones(rows.shape[:2], dtype=torch.float64))


def test_a_folded_unet_does_with_a_towers_rows_what_it_did_with_whitened_ones():
    pipe = _small()
    ids = ids_of(pipe.tokenizer, ["a red circle", "a blue ring above a star"])
    rows = rows_of(pipe.text_encoder, ids)
    whitening = fit_whitening(rows, weights_of(ids, pipe.tokenizer.eos_token_id))
    noisy, timesteps, _ = _operands(rows.shape[-1])
    expected = _drawn(pipe.unet, noisy, timesteps, whitening(rows))
    assert not torch.allclose(_drawn(pipe.unet, noisy, timesteps, rows), expected, rtol=1e-3)
    fold(pipe.unet, whitening)
    torch.testing.assert_close(_drawn(pipe.unet, noisy, timesteps, rows), expected, rtol=1e-9, atol=1e-9)


def test_a_fold_for_float16_takes_off_the_mean_of_the_rounded_values():
    unet = _small().unet
    width = unet.config.cross_attention_dim
    for layer in cross_attentions(unet):
        layer.to_out[0].weight.data = layer.to_out[0].weight.half().double()
    mean = 50 * torch.randn(width, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    whitening = Whitening(mean, torch.eye(width, dtype=torch.float64) / 3)
    noisy, timesteps, rows = _operands(width)
    expected = _drawn(unet, noisy, timesteps, torch.zeros_like(rows))
    fold(unet, whitening, torch.float16)
    assert all(
        torch.equal(part.weight, part.weight.half().double())
        for layer in cross_attentions(unet)
        for part in (layer.to_k, layer.to_v)
    )
    torch.testing.assert_close(_drawn(unet, noisy, timesteps, mean.expand_as(rows)), expected, rtol=1e-9, atol=1e-9)


def test_a_unet_that_is_fed_other_rows_does_the_same():
    unet = _small().unet
    noisy, timesteps, x = _operands(24)
    generator = torch.Generator().manual_seed(2)
    matrix = torch.randn(24, unet.config.cross_attention_dim, generator=generator, dtype=torch.float64)
    offset = torch.randn(unet.config.cross_attention_dim, generator=generator, dtype=torch.float64)
    expected = _drawn(unet, noisy, timesteps, x @ matrix + offset)
    feed(unet, matrix, offset)
    assert unet.config.cross_attention_dim == 24
    torch.testing.assert_close(_drawn(unet, noisy, timesteps, x), expected, rtol=1e-9, atol=1e-9)


def test_whitened_rows_have_mean_0_and_covariance_1():
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(40, 9, 6, generator=generator).double() @ torch.randn(6, 6, generator=generator).double() + 4
    weights = torch.rand(40, 9, generator=generator).double()
    white = fit_whitening(rows, weights)(rows).flatten(0, 1).numpy()
    covariance = np.cov(white.T, aweights=weights.flatten().numpy(), ddof=0)
    np.testing.assert_allclose(np.average(white, 0, weights.flatten().numpy()), 0, atol=1e-9)
    np.testing.assert_allclose(covariance, np.eye(6), atol=1e-9)


def test_tiny_directions_are_not_stretched_to_1():
    rows = torch.randn(50, 4, 3, generator=torch.Generator().manual_seed(3)).double() * torch.tensor([1, 1, 1e-9])
    white = _whitening_of(rows)(rows)
    assert white[..., 2].std() < 1e-6


def test_padding_counts_as_much_as_all_words():
    end = 9
    ids = torch.tensor([[1, 5, 6, end, end, end, end, end, end, end], [1, end, end, end, end, end, end, end, end, end]])
    weights = weights_of(ids, end)
    padding = torch.tensor([[0] * 4 + [1] * 6, [0] * 2 + [1] * 8]).bool()
    assert (weights[~padding] == 1).all()
    assert weights[padding].sum() == pytest.approx(6)


def test_an_affine_map_is_found_and_noise_is_not_explained():
    generator = torch.Generator().manual_seed(4)
    x, weights = torch.randn(200, 5, 4, generator=generator).double(), torch.ones(200, 5).double()
    matrix, offset = torch.randn(4, 3, generator=generator).double(), torch.tensor([1.0, -2.0, 3.0]).double()
    found = fit_affine(x, x @ matrix + offset, weights)
    torch.testing.assert_close(found.matrix, matrix, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found.offset, offset, rtol=1e-3, atol=1e-3)
    assert found.explained > 0.9999
    noise = torch.randn(200, 5, 3, generator=generator).double()
    assert 0 <= fit_affine(x, noise, weights).explained < 0.05


def test_the_contrastive_loss_is_clips():
    seen, read = (np.array([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]]), np.array([[0.8, 0.6], [0.0, 1.0], [1.0, 0.0]]))
    logits = np.exp(5 * seen @ read.T)
    expected = -(np.log(np.diag(logits) / logits.sum(1)).mean() + np.log(np.diag(logits) / logits.sum(0)).mean()) / 2
    same = torch.eye(3, dtype=torch.bool)
    found = contrast(torch.tensor(seen), torch.tensor(read), torch.tensor(5.0), same)
    assert float(found) == pytest.approx(expected)
    # Two texts that are the same are no negatives of each other.
    same[0, 1] = same[1, 0] = True
    logits[0, 1] = logits[1, 0] = 0
    expected = -(np.log(np.diag(logits) / logits.sum(1)).mean() + np.log(np.diag(logits) / logits.sum(0)).mean()) / 2
    assert float(contrast(torch.tensor(seen), torch.tensor(read), torch.tensor(5.0), same)) == pytest.approx(expected)


def test_timesteps_are_drawn_as_often_as_min_snr_weighs_them(pipe):
    shares = timestep_shares(pipe.scheduler, 5.0)
    snr = pipe.scheduler.alphas_cumprod.double() / (1 - pipe.scheduler.alphas_cumprod.double())
    expected = torch.minimum(snr, torch.tensor(5.0)) / snr  # arXiv 2303.09556, of errors in noise
    torch.testing.assert_close(shares / shares[-1], expected / expected[-1], rtol=1e-5, atol=1e-9)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.cat([draw_timesteps(shares, 32, generator) for _ in range(2000)])
    counts = torch.bincount(drawn // 100, minlength=10) / len(drawn)
    torch.testing.assert_close(counts.double(), shares.reshape(10, 100).sum(1), rtol=0, atol=0.002)


def test_averaged_weights_by_hand():
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(1.0)
    average = Average(model, decay=0.25)
    model.weight.data.fill_(3.0)
    average.step(model)  # keeps 2/11
    average.step(model)  # keeps 3/12
    average.swap(model)
    assert float(model.weight.detach()) == pytest.approx(3 - 2 * (2 / 11) * 0.25)
    average.swap(model)
    assert float(model.weight.detach()) == 3


def test_the_learning_rate_rises_and_falls():
    assert [rate_at(step, 100, 10) for step in (0, 9, 50, 80, 90, 100)] == pytest.approx([0.1, 1, 1, 1, 0.5, 0])


def _train(out, budget, steps=250):
    torch.manual_seed(0)
    model = nn.Linear(3, 2)
    training = Training("line", model, out, rate=0.01, count=steps, warmup=5, decay=0.9, precision="no")
    for step in training.steps(budget):
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        training.step((model(x) - x[:, :2]).square().mean())
    return training


def test_a_killed_training_loses_no_more_than_100_steps(tmp_path):
    whole = _train(tmp_path / "whole", Budget(None, None, tmp_path / "whole" / "minutes.json"))

    class KilledError(Exception):
        pass

    class KillingBudget(Budget):
        def spend(self):
            if not super().spend():
                raise KilledError  # nothing is saved
            return True

    parts = tmp_path / "parts"
    with pytest.raises(KilledError):
        _train(parts, KillingBudget(None, 230, parts / "minutes.json"))
    assert len(json.loads((parts / "line-losses.json").read_text())) == 200
    resumed = _train(parts, Budget(None, None, parts / "minutes.json"))
    assert resumed.losses == whole.losses
    assert all(map(torch.equal, resumed.averaged().parameters(), whole.averaged().parameters()))
    runs = json.loads((parts / "minutes.json").read_text())
    assert [run["line"]["steps"] for run in runs] == [200, 50]
    assert all(run["line"]["processor_minutes"] >= 0 for run in runs)


def test_terminating_ends_after_the_step_and_saves(tmp_path):
    budget = Budget(None, None, tmp_path / "minutes.json")
    training = _train(tmp_path, Budget(None, 3, tmp_path / "minutes.json"))
    for _ in training.steps(budget):
        training.step(training.model(torch.ones(1, 3)).square().mean())
        budget.stop()
    assert len(json.loads((tmp_path / "line-losses.json").read_text())) == 4
    assert not training.finished


@pytest.mark.parametrize("damage", ["cut", "empty", "text", "another"])
def test_a_damaged_checkpoint_is_named(tmp_path, damage):
    _train(tmp_path, Budget(None, 3, tmp_path / "minutes.json"))
    file = tmp_path / "line-checkpoint.pt"
    content = file.read_bytes()
    damaged = {"cut": content[: len(content) // 2], "empty": b"", "text": b"no checkpoint"}
    if damage == "another":
        torch.save({"model": {}}, file)
    else:
        file.write_bytes(damaged[damage])
    with pytest.raises(ValueError, match=r"line-checkpoint\.pt is damaged or of another recipe .* remove it"):
        _train(tmp_path, Budget(None, 3, tmp_path / "minutes.json"))


class _Linear(nn.Linear):
    """A model whose steps anybody can take."""


def _train_toy(out, steps, count=40):
    torch.manual_seed(0)
    training = Training("toy", _Linear(3, 2), out, rate=0.1, count=count, warmup=2, decay=0.9, precision="no")
    for step in training.steps(Budget(None, steps, out / "minutes.json")):
        x = torch.randn(8, 3, generator=torch.Generator().manual_seed(step))
        training.step((training.model(x) - x[:, :2]).square().mean())
    return training


def test_what_is_kept_goes_on_elsewhere_from_the_averaged_weights(tmp_path):
    here, kept, there = tmp_path / "here", tmp_path / "kept", tmp_path / "there"
    here.mkdir()
    first = _train_toy(here, 30)
    (here / "pairs.json").write_text("{}")
    names = sorted(path.name for path in keep(here, kept))
    assert names == ["minutes.json", "toy-checkpoint.pt", "toy-losses.json"]
    assert (kept / "toy-checkpoint.pt").stat().st_size < (here / "toy-checkpoint.pt").stat().st_size
    take_up(kept, there)
    second = _train_toy(there, 0)
    assert second.losses == first.losses
    averaged = first.averaged()
    for own, weight in zip(second.model.parameters(), averaged.parameters(), strict=True):
        torch.testing.assert_close(own, weight.half().float(), rtol=0, atol=0)
    # Half of the last fifth lies before it.
    assert second._optimiser.param_groups[0]["lr"] == pytest.approx(0.1 * rate_at(30, 40, 2))
    assert _train_toy(there, None).finished
    assert len(json.loads((there / "toy-losses.json").read_text())) == 40


def test_nothing_of_a_training_is_overwritten_by_what_was_kept(tmp_path):
    here, kept = tmp_path / "here", tmp_path / "kept"
    here.mkdir()
    _train_toy(here, 10)
    keep(here, kept)
    further = _train_toy(here, 10)
    assert take_up(kept, here) == []
    assert _train_toy(here, 0).losses == further.losses


@pytest.mark.parametrize("function", [keep, take_up])
def test_a_folder_without_checkpoints_is_named(function, tmp_path):
    with pytest.raises(ValueError, match=r"must hold .*-checkpoint\.pt.*, found none"):
        function(tmp_path, tmp_path / "other")
