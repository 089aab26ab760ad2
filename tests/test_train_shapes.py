"""The training script, on a recipe so small that it learns nothing."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from difffast import models

ROOT = Path(__file__).resolve().parents[1]


def train(out, *options):
    command = [sys.executable, ROOT / "bench" / "train_shapes.py", "--preset", "test", "--out", out, *options]
    subprocess.run(list(map(str, command)), check=True, cwd=out.parent)


def losses(out, name):
    return json.loads((out / f"{name}-losses.json").read_text())


@pytest.mark.slow
def test_an_interrupted_training_goes_on_where_it_stopped(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(whole, "--export", whole / "model")
    for steps in (1, 2, 3, 99):  # 1 and 2 end within the autoencoder's 4, the third run within the UNet's
        train(parts, "--stop-after", steps, "--export", parts / "model")
        assert (parts / "model").is_dir() == (steps > 2)
    for name in ("vae", "unet"):
        assert len(losses(whole, name)) == 4
        np.testing.assert_allclose(losses(parts, name), losses(whole, name), rtol=1e-4)

    pipe = models.embedded_pipeline(parts / "model")
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a red circle", num_inference_steps=2).images[0].size == (64, 64)
    assert pipe.tokenizer.tokenize("a red circle") == ["a</w>", "red</w>", "circle</w>"]
    record = json.loads((parts / "model" / "training.json").read_text())
    assert (record["vae_steps"], record["steps"], record["pictures_seen"]) == (4, 4, 16)
    assert all((parts / name).is_file() for name in ("vae.png", "vae-loss.png", "unet-loss.png"))
