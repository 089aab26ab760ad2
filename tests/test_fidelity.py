"""The fidelity benchmark's own machinery; its figures come from ``make fidelity``."""

import dataclasses
import json

import bench_fidelity
import numpy as np
import pytest
import torch
from drawn.shapes import render
from PIL import Image
from sampling import latents


def test_every_way_works_and_leaves_the_pipeline_as_it_was(pipe64):
    before = latents(pipe64, steps=10)
    made = {}
    for way in bench_fidelity.ways():
        way = dataclasses.replace(way, steps=min(way.steps, 12))
        (made[way.name],) = bench_fidelity.generate(pipe64, way, ["a red circle"], first_seed=3)
        assert torch.equal(latents(pipe64, steps=10), before), way.name
    pixels = {name: np.asarray(image).tobytes() for name, image in made.items()}
    stock = pixels[bench_fidelity.CONTROL]
    changed = {name for name, image in pixels.items() if image != stock}
    # 12 steps each: only 10 steps, and what approximates, can differ; "balanced" approximates from 34 steps on.
    assert changed >= {"stock, 10 steps", "difffast faster-diffusion", "DeepCache 3, branch 0", "tomesd 50%"}
    assert changed.isdisjoint({"stock, 15 steps", "stock, 20 steps", "difffast exact", "difffast balanced"})


def test_the_judged_scenes_are_mixed_and_not_those_trained_on():
    wanted = bench_fidelity.scenes(200)
    counts = [len(scene.things) for scene in wanted]
    assert [counts.count(n) for n in (1, 2, 3)] == [80, 80, 40]
    assert wanted == bench_fidelity.scenes(200)
    import train_shapes

    assert train_shapes.DATA_SEED != bench_fidelity.SEED


def test_pictures_of_the_truth_are_judged_right_and_wrong_ones_are_not():
    wanted = bench_fidelity.scenes(40)
    right = np.stack([np.asarray(render(scene)) for scene in wanted])
    truth = np.stack([bench_fidelity.features(image) for image in right])
    rows = {bench_fidelity.CONTROL: bench_fidelity.judged(right, right, wanted, truth)}
    rows["others' pictures"] = bench_fidelity.judged(np.roll(right, 1, 0), right, wanted, truth)
    control, wrong = rows.values()
    assert control["all"]["binding"] > 0.97
    assert control["psnr_db"] == np.inf
    assert control["distance"] == 0
    assert wrong["all"]["binding"] < 0.3
    assert wrong["distance"] > 0.05
    value, low, high = bench_fidelity.lost(rows, "others' pictures")
    assert low < value < high
    assert value == pytest.approx(100 * (control["all"]["binding"] - wrong["all"]["binding"]))
    assert bench_fidelity.lost(rows, bench_fidelity.CONTROL) == (0, 0, 0)


def test_the_chart_is_drawn(tmp_path):
    row = {"kind": "stock", "seconds": [1.0], "all": {"binding": 0.9}, "psnr_db": None}
    record = {
        "model": "m",
        "prompts": 1,
        "device": "d",
        "rows": {"stock": row, "fast": {**row, "kind": "difffast", "seconds": [0.5], "psnr_db": 30.0}},
    }
    bench_fidelity.draw(json.loads(json.dumps(record)), tmp_path)
    with Image.open(tmp_path / "fidelity.png") as picture:
        assert picture.size[0] > 1000
    assert "fast" in (tmp_path / "fidelity.svg").read_text()
