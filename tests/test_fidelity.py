"""The fidelity benchmark's own machinery, and what its committed table promises; it is made by ``make fidelity``."""

import contextlib
import dataclasses
import json
import math
import sys
from types import SimpleNamespace

import bench_fidelity
import numpy as np
import pytest
import torch
from drawn.rendering import render
from fidelity import curve
from fidelity.cells import CELLS, PLAN, PRESET, STOCK, Cell, Way, choose_ways, describe, list_ways
from fidelity.plot import plot_cell
from fidelity.store import BATCH, Store, generate
from fidelity.tables import PROMISED, cells_table, load_cells, plot_name, ways_of_cells_table
from PIL import Image
from sampling import latents

from difffast import OutputForecast, patched
from difffast.sampling.schedule import name_solver

#: What the committed table shows and is not yet mended: cell -> the presets that are beaten there.
KNOWN: dict[str, set[str]] = {}


def find_broken_promises(record):
    """Presets of a cell that stock with fewer steps beats."""
    return {name: lacks for name, lacks in curve.find_dominated(record["rows"]).items() if name in PROMISED}


@pytest.mark.parametrize("cell", load_cells())
def test_no_preset_of_the_committed_table_is_beaten_by_fewer_steps(cell):
    record = load_cells()[cell]
    broken = find_broken_promises(record)
    assert broken.keys() == KNOWN.get(cell, set()), f"{cell}: stock is better in the same time by so many dB: {broken}"
    assert all(record["rows"][preset]["ratios"] for preset in PROMISED), "presets without seconds prove nothing"
    assert {_p10(row) for row in record["rows"].values()} == {"p10"}


def _p10(row):
    return "p10" if "psnr_p10_db" in row else "no p10"


def test_every_way_works_and_leaves_the_pipeline_as_it_was(pipe):
    cell, config = Cell("Euler", 8), pipe.scheduler.config
    pipe.scheduler = cell.make_scheduler(config)
    before, made = latents(pipe, steps=2), {}
    for way in list_ways(cell, config):
        with way.context(pipe):
            (made[way.name],) = generate(pipe, way, ["a red circle"], first_seed=3)
        assert torch.equal(latents(pipe, steps=2), before), way.name
    pixels = {name: np.asarray(image).astype(int) for name, image in made.items()}
    assert abs(pixels["exact"] - pixels[STOCK]).max() <= 1  # of 256 levels: rounding errors
    same = {name for name, image in pixels.items() if (image == pixels[STOCK]).all()}
    assert same.isdisjoint({"stock, 4 steps, leading", "faster-diffusion", "DeepCache 3, branch 1", "tomesd 50%"})
    assert same.isdisjoint({"stock, 4 steps, trailing", "forecast every 2", "T-GATE 40%", "Spectrum", "bfloat16"})


def test_fewer_steps_have_both_spacings_where_these_differ(pipe):
    config = pipe.scheduler.config

    def fewer(scheduler):
        return [way.name for way in list_ways(Cell(scheduler, 20), config) if way.kind == "fewer steps"]

    assert fewer("DDIM")[:4] == [
        "stock, 6 steps, leading",
        "stock, 6 steps, trailing",
        "stock, 8 steps, leading",
        "stock, 8 steps, trailing",
    ]
    # Karras' sigmas lie between the first and the last of training, however timesteps are spaced.
    assert fewer("DPM++ 2M Karras") == [f"stock, {steps} steps" for steps in (6, 8, 10, 12, 14, 16, 18)]


def test_the_cells_are_those_that_people_use(pipe):
    names = [str(cell) for cell in CELLS]
    for steps in (20, 25, 30):
        assert f"DPM++ 2M Karras, {steps} steps" in names
    assert {"Euler, 20 steps", "Euler, 30 steps", "Euler a, 25 steps", "UniPC, 20 steps", "PNDM, 25 steps"} <= set(
        names
    )
    for cell in CELLS:
        scheduler = cell.make_scheduler(pipe.scheduler.config)
        scheduler.set_timesteps(cell.steps)
        assert len(scheduler.timesteps) >= cell.steps
        assert name_solver(scheduler) == cell.scheduler, "presets find their plans by this name"


def test_what_a_way_does_tells_its_pictures_apart(pipe):
    def forecast(interval):
        plan = OutputForecast(interval)
        return Way("forecast", PLAN, 10, lambda pipe: patched(pipe, "exact", propagation=plan))

    assert describe(forecast(2), pipe) != describe(forecast(3), pipe)
    assert describe(forecast(2), pipe) == describe(forecast(2), pipe)
    assert describe(Way("stock", STOCK, 10), pipe) == "stock"
    peers = {way.name: describe(way, pipe) for way in list_ways(Cell("DDIM", 20), pipe.scheduler.config)}
    assert "'interval': 3, 'branch': 1" in peers["DeepCache 3, branch 1"]
    spectrum, slower = (peers[name].split(": ", 1)[1] for name in ("Spectrum", "Spectrum, every 2"))
    assert spectrum.split()[-1] == slower.split()[-1], "they are written in the same file"
    assert spectrum != slower
    balanced = Way("balanced", PRESET, 10, lambda pipe: patched(pipe, "balanced"))
    assert describe(balanced, pipe) != describe(dataclasses.replace(balanced, steps=50), pipe)


def test_ways_are_chosen_by_name_or_kind(pipe):
    every = list_ways(Cell("DDIM", 20), pipe.scheduler.config)
    chosen = choose_ways(every, ["preset", "DeepCache 3, branch 1"])
    assert [way.name for way in chosen] == [
        *("stock", "exact", "balanced", "faster-diffusion", "turbo"),
        "DeepCache 3, branch 1",
    ]
    with pytest.raises(ValueError, match="DeepCache 7"):
        choose_ways(every, ["DeepCache 7"])


class Painter:
    """Stands in for a pipeline: paints seeds, and counts the calls."""

    def __init__(self):
        self.batches, self.components = [], {}

    def set_progress_bar_config(self, **_options):
        pass

    def __call__(self, prompts, *, num_inference_steps, generator):
        self.batches.append(len(prompts))
        seeds = [each.initial_seed() for each in generator]
        return SimpleNamespace(images=[Image.new("RGB", (4, 4), (seed, num_inference_steps, 0)) for seed in seeds])


def test_pictures_are_made_once_and_go_on(tmp_path):
    wanted, painter, way = bench_fidelity.scenes(30), Painter(), Way("w", STOCK, 7)
    Store(tmp_path, {"w": "w"}, "here").make_pictures(painter, way, wanted[:14])
    assert painter.batches == [BATCH, 2]
    store = Store(tmp_path, {"w": "w"}, "here")
    store.make_pictures(painter, way, wanted)
    # A batch that was not full is made again: who is beside whom must not depend on how often it was asked.
    assert painter.batches == [BATCH, 2, BATCH, 6]
    assert store.pictures(way, 30)[:, 0, 0].tolist() == [[seed, 7, 0] for seed in range(30)]
    assert len(store.pictures(way, 5)) == 5
    store.make_pictures(painter, way, wanted)
    assert len(painter.batches) == 4
    assert len(Store(tmp_path, {"w": "w, but another plan"}, "here").pictures(way, 5)) == 0


def test_presets_and_plans_make_one_picture_at_a_time(tmp_path):
    """A guard looks at all pictures of a batch, and users make one."""
    for kind in (PRESET, PLAN):
        painter, way = Painter(), Way(kind, kind, 7, lambda pipe: contextlib.nullcontext())
        Store(tmp_path, {kind: kind}, "here").make_pictures(painter, way, bench_fidelity.scenes(3))
        assert painter.batches == [1, 1, 1]


def test_seconds_are_measured_in_rounds_with_stock(tmp_path):
    ways = [Way("stock", STOCK, 7), Way("a", PLAN, 7), Way("b", PLAN, 7)]
    keys = {way.name: way.name for way in ways}
    Store(tmp_path, keys, "here").make_times(Painter(), ways[:2], ["a red circle", "a dog"], 2)
    store = Store(tmp_path, keys, "here")
    assert [len(store.times(way)[0]) for way in ways] == [2, 2, 0]
    store.make_times(Painter(), ways, ["a red circle", "a dog"], 3)
    # Way b lacked three rounds, and a went along.
    assert [len(store.times(way)[0]) for way in ways] == [5, 5, 3]
    assert store.times(ways[0])[1] == [1.0] * 5
    for way in ways[1:]:
        assert all(ratio > 0 for ratio in store.times(way)[1])
    store.rounds[:] = [{key: 2.0 for key in store.rounds[0]}]
    assert store.times(ways[1]) == ([2.0], [1.0])
    assert Store(tmp_path, keys, "elsewhere").rounds == []


def row(kind, share, median, low, rounds=3):
    return {"kind": kind, "ratios": [share] * rounds, "seconds": [2 * share] * rounds, "psnr_db": median} | {
        "psnr_p10_db": low
    }


@pytest.fixture
def rows():
    fewer = {
        "leading": [(6, 0.3, 20.0, 12.0), (10, 0.5, 30.0, 20.0), (18, 0.9, 40.0, 25.0)],
        "trailing": [(6, 0.3, 25.0, 10.0), (10, 0.5, 28.0, 21.0), (14, 0.7, 27.0, 20.0), (18, 0.9, 41.0, 24.0)],
    }
    return {"stock": row("stock", 1.0, None, None)} | {
        f"stock, {steps} steps, {spacing}": row("fewer steps", share, median, low)
        for spacing, points in fewer.items()
        for steps, share, median, low in points
    }


def test_the_fewer_steps_curve_by_hand(rows):
    shares = (0.29, 0.3, 0.4, 0.5, 0.7, 0.95, 1.0, 1.2)
    # 0.4: leading 25, trailing 26.5; 0.7: leading 35, trailing no worse than its 28 at 0.5; 0.95: the last ones.
    medians = [-math.inf, 25, 26.5, 30, 35, 41, math.inf, math.inf]
    assert curve.trace_curve(rows, "psnr_db", shares) == pytest.approx(medians)
    lows = [-math.inf, 12, 16, 21, 22.5, 25, math.inf, math.inf]
    assert curve.trace_curve(rows, "psnr_p10_db", shares) == pytest.approx(lows)


def test_a_planted_preset_that_fewer_steps_beat_is_found(rows):
    def broken(**preset):
        return find_broken_promises({"rows": rows | preset})

    assert broken(balanced=row("preset", 0.4, 26.6, 16.1)) == {}
    assert broken(balanced=row("preset", 0.4, 26.0, 17.0)) == {"balanced": {"psnr_db": pytest.approx(0.5)}}
    assert broken(balanced=row("preset", 0.4, 30.0, 15.0)) == {"balanced": {"psnr_p10_db": pytest.approx(1.0)}}
    assert broken(balanced=row("preset", 1.1, 50.0, 40.0)) == {
        "balanced": {"psnr_db": math.inf, "psnr_p10_db": math.inf}
    }
    assert broken(balanced=row("preset", 0.2, 1.0, 1.0)) == {}, "nobody took so few steps"
    assert broken(balanced={**row("preset", 0.4, 26.0, 17.0), "ratios": []}) == {}
    assert curve.find_dominated(rows | {"PAB": row("peer", 0.4, 20.0, 5.0)}).keys() == {"PAB"}


def test_what_is_stock_is_not_beaten_by_noise(rows):
    same = row("preset", 1.0, None, 71.0)
    assert curve.find_dominated(rows | {"exact": {**same, "ratios": [1.02, 0.99, 1.01, 1.0]}}) == {}
    assert curve.find_dominated(rows | {"exact": {**same, "ratios": [1.02, 1.04, 1.01, 1.03]}}).keys() == {"exact"}
    assert curve.find_dominated(rows | {"exact": row("preset", 1.0, None, 60.0)}).keys() == {"exact"}


def test_the_judged_scenes_are_mixed_and_not_those_trained_on():
    wanted = bench_fidelity.scenes(200)
    counts = [len(scene.things) for scene in wanted]
    assert [counts.count(n) for n in (1, 2, 3)] == [80, 80, 40]
    assert wanted == bench_fidelity.scenes(200)
    assert wanted[:50] == bench_fidelity.scenes(50)
    import text_space
    from training import recipe

    seeds = {recipe.DATA_SEED, recipe.CHECK_SEED, text_space.SEED, bench_fidelity.SEED}
    assert len(seeds) == 4


def test_pictures_of_the_truth_are_judged_right_and_wrong_ones_are_not():
    wanted = bench_fidelity.scenes(40)
    right = np.stack([np.asarray(render(scene)) for scene in wanted])
    truth = np.stack([bench_fidelity.features(image) for image in right])
    rows = {STOCK: bench_fidelity.judged(right, right, wanted, truth)}
    rows["others' pictures"] = bench_fidelity.judged(np.roll(right, 1, 0), right, wanted, truth)
    control, wrong = rows.values()
    assert control["all"]["binding"] > 0.97
    assert control["psnr_db"] == control["psnr_p10_db"] == np.inf
    assert control["distance"] == 0
    assert wrong["all"]["binding"] < 0.3
    assert wrong["distance"] > 0.05
    assert wrong["psnr_p10_db"] < wrong["psnr_db"]
    value, low, high = bench_fidelity.lost(rows, "others' pictures")
    assert low < value < high
    assert value == pytest.approx(100 * (control["all"]["binding"] - wrong["all"]["binding"]))
    assert bench_fidelity.lost(rows, STOCK) == (0, 0, 0)
    few = bench_fidelity.judged(np.roll(right, 1, 0)[:15], right[:15], wanted[:15], truth)
    first = bench_fidelity.judged(right[:15], right[:15], wanted[:15], truth)
    value, *_ = bench_fidelity.lost({**rows, "fewer prompts": few}, "fewer prompts")
    assert value == pytest.approx(100 * (first["all"]["binding"] - few["all"]["binding"])), "against stock on the same"


def test_the_10th_percentile_is_that_of_the_pictures():
    """Of ten pictures, nine are stock's and one is not: half of them, and the second worst, are the same."""
    wanted = bench_fidelity.scenes(10)
    control = np.stack([np.asarray(render(scene)) for scene in wanted])
    truth = np.stack([bench_fidelity.features(image) for image in control])
    made = control.copy()
    made[3] = 0
    assert bench_fidelity.judged(made, control, wanted, truth)["psnr_p10_db"] < 15
    made[3] = control[3]
    made[4, 0, 0, 0] ^= 1
    judged = bench_fidelity.judged(made, control, wanted, truth)
    assert judged["psnr_db"] == np.inf
    assert judged["psnr_p10_db"] == pytest.approx(10 * math.log10(255**2 * made[0].size))


def test_a_cell_is_drawn_with_what_is_beaten(tmp_path, rows):
    ways = {"exact": row("preset", 0.95, None, None), "PAB": row("peer", 0.6, 20.0, 5.0)}
    record = {"prompts": 1, "device": "d", "threads": 2, "rows": rows | ways}
    plot_cell("DPM++ 2M Karras, 25 steps", record, tmp_path)
    assert plot_name("DPM++ 2M Karras, 25 steps") == "fidelity-dpmpp-2m-karras-25-steps"
    with Image.open(tmp_path / "fidelity-dpmpp-2m-karras-25-steps.png") as picture:
        assert picture.size[0] > 1000
    drawn = (tmp_path / "fidelity-dpmpp-2m-karras-25-steps.svg").read_text()
    for text in ("beaten by fewer steps, in either", "stock with fewer steps, 10th percentile", "1  exact", "2  PAB"):
        assert text in drawn
    no_peer = {**record, "rows": rows | {"exact": ways["exact"]}}
    plot_cell("Euler, 20 steps", no_peer, tmp_path)
    assert "beaten by" not in (tmp_path / "fidelity-euler-20-steps.svg").read_text()


def test_tables_say_who_is_beaten(tmp_path, rows):
    judged = {"all": {"binding": 0.9}, **{f"{n} things": {"binding": 0.9} for n in (1, 2, 3)}}
    judged["binding_points_lost"] = [1.0, 0.5, 1.5]
    deepcache = {
        "DeepCache 2, branch 0": row("peer", 0.39, 22.0, 11.0),
        "DeepCache 3, branch 1": row("peer", 0.35, 23.0, 10.0),
        "DeepCache 5, branch 0": row("peer", 0.41, 29.0, 20.0),  # better, but slower
    }
    every = rows | deepcache | {"balanced": row("preset", 0.4, 26.0, 17.0), "turbo": row("preset", 0.2, 22.0, 12.0)}
    setting = {"prompts": 1, "device": "d", "threads": 2, "dtype": "float32", "torch": "2"}
    record = {**setting, "rows": {name: {**each, **judged} for name, each in every.items()}}
    record["prompts"] = 100
    record["rows"]["DeepCache 5, branch 0"]["prompts"] = 24
    (tmp_path / "fidelity.json").write_text(json.dumps({"cells": {"Euler, 20 steps": record}}))
    assert "| DeepCache 5, branch 0, 24 prompts |" in ways_of_cells_table(tmp_path)
    assert "branch 1, " not in ways_of_cells_table(tmp_path)
    balanced, turbo = cells_table(tmp_path).splitlines()[2:4]
    assert balanced == (
        "| Euler, 20 steps | `balanced` | 0.40 | 26.0 (17.0) | 26.5 (16.0) **balanced is beaten** "
        "| 23.0 (10.0): 3, branch 1 | +1.0 (+0.5 to +1.5) |"
    )
    assert "| 0.20 | 22.0 (12.0) | none as fast | none as fast |" in turbo
    every_way = ways_of_cells_table(tmp_path)
    assert "| balanced (beaten by fewer steps) | 0.80 | 0.40 | 26.0 (17.0) | 90.0% | 90, 90, 90 |" in every_way
    assert "| stock | 2.00 | 1.00 | same (same) |" in every_way


@pytest.mark.slow
def test_the_command_fills_one_cache_in_two_ways_and_writes_the_table(tmp_path, monkeypatch, capsys):
    common = ["--cells", "Euler, 20 steps", "--prompts", "5", "--rounds", "1"]
    common += ["--only", "exact", "stock, 18 steps, trailing"]
    common += ["--out", str(tmp_path / "out"), "--cache", str(tmp_path)]

    def run(*more):
        monkeypatch.setattr(sys, "argv", ["bench_fidelity.py", *common, *more])
        bench_fidelity.main()

    run("--pictures-only")
    run("--times-only")
    assert not (tmp_path / "out").exists()
    run()
    record = load_cells(tmp_path / "out")["Euler, 20 steps"]
    assert list(record["rows"]) == ["stock", "stock, 18 steps, trailing", "exact"]
    assert record["rows"]["exact"]["psnr_db"] is None or record["rows"]["exact"]["psnr_db"] > 50
    assert all(len(each["ratios"]) == 1 for each in record["rows"].values())
    assert (tmp_path / "out" / "fidelity-euler-20-steps.png").is_file()
    assert "Euler, 20 steps" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cells", "Euler, 21 steps"], "--cells must name cells of the table, got Euler, 21 steps"),
        (["--pictures-only", "--times-only"], "exclude each other"),
        (["--prompts", "4"], "--prompts must be at least 5"),
    ],
)
def test_bad_arguments(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench_fidelity.py", *arguments])
    with pytest.raises(SystemExit):
        bench_fidelity.parse_arguments()
    assert message in capsys.readouterr().err
