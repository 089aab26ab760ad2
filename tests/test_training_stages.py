"""The training from end to end, on a recipe so small that it learns nothing."""

import json
from argparse import Namespace

import numpy as np
import pytest
import torch
import train_shapes
from training.clip import draw_batch
from training.data import VOCABULARY, draw_pair, load_pairs
from training.loop import Budget
from training.recipe import RECIPES
from training.unet import choose

from difffast import models

RECIPE = RECIPES["test"]


def train(out, steps=None, start=None):
    out.mkdir(exist_ok=True)
    arguments = Namespace(out=out, start=start, export=out / "model")
    train_shapes.run(RECIPE, arguments, Budget(None, steps, out / "minutes.json"))


def losses(out, name):
    return json.loads((out / f"{name}-losses.json").read_text())


@pytest.mark.slow
def test_an_interrupted_training_goes_on_where_it_stopped(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(whole)
    for steps in (2, 4, 3, 99):  # within CLIP's 4, the autoencoder's, and the UNet's
        train(parts, steps)
        assert (parts / "model").is_dir() == (steps in (3, 99))
    for name in ("clip", "vae", "unet"):
        assert len(losses(whole, name)) == 4
        np.testing.assert_allclose(losses(parts, name), losses(whole, name), rtol=1e-4)
        assert (parts / f"{name}-loss.png").is_file()
    assert (parts / "vae.png").is_file()
    assert (parts / "samples" / "000004.png").is_file()
    for log in ("clip-checks.json", "unet-checks.json"):
        assert [check["step"] for check in json.loads((parts / log).read_text())][-2:] == [2, 4]

    pipe = models.embedded_pipeline(parts / "model")
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a red circle", num_inference_steps=2).images[0].size == (64, 64)
    assert pipe.tokenizer.tokenize("a checkered lime heart") == ["a</w>", "checkered</w>", "lime</w>", "heart</w>"]
    record = json.loads((parts / "model" / "training.json").read_text())
    assert [record[key] for key in ("clip_steps", "vae_steps", "steps", "pictures_seen")] == [4, 4, 4, 16]
    assert "checkered" in (parts / "model" / "README.md").read_text()


@pytest.mark.slow
def test_a_training_may_start_from_an_export(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    train(first)
    train(second, start=first / "model")
    assert len(losses(second, "vae")) == RECIPE.vae_tune_steps
    before, after = (models.embedded_pipeline(out / "model") for out in (first, second))
    assert before.vae.config.scaling_factor == after.vae.config.scaling_factor
    unchanged = before.unet.conv_in.weight - after.unet.conv_in.weight
    assert 0 < unchanged.abs().max() < 0.01, "it went on from the start's weights"


def test_pairs_differ_in_what_their_captions_say():
    for seed in range(30):
        (one, said), (other, also) = draw_pair(np.random.default_rng(seed), 4)
        assert said[0] == one.caption != other.caption == also[0]
        assert len(said) == len(also) == 4
        assert all(thing.shape in VOCABULARY.shapes for thing in (*one.things, *other.things))


def test_batches_of_pairs_are_of_pairs(tmp_path):
    store = load_pairs(RECIPE, tmp_path)
    pictures, texts = draw_batch(store, 8, [1])
    again, same = draw_batch(store, 8, [1])
    assert pictures.shape == (8, 3, 64, 64)
    assert texts == same
    assert torch.equal(pictures, again)
    places = [next(i for i, said in enumerate(store.captions) if text in said) for text in texts[::2]]
    assert len(set(places)) >= 3, "different scenes"


def test_damaged_pictures_are_named(tmp_path):
    load_pairs(RECIPE, tmp_path)
    (tmp_path / "pairs.npy").write_bytes(b"no array")
    with pytest.raises(ValueError, match=r"pairs\.npy .* is damaged .* remove both"):
        load_pairs(RECIPE, tmp_path)


def test_single_things_are_chosen_as_often_as_asked():
    class Store:
        things = np.array([1, 2, 3, 2, 1, 4] * 20)

    chosen = choose(Store, 32, 0.5, np.random.default_rng(0))
    assert (Store.things[chosen] == 1).sum() == 16
    assert len(choose(Store, 32, 0.0, np.random.default_rng(0))) == 32
