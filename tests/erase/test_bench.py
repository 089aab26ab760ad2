"""The benchmark of erasure asks what it says, and its tables say what was measured."""

import json

import bench_erasure
import erasure_tables
import pytest
from drawn.shapes import Scene, Thing, render


def test_questions_are_about_red_and_not_about_red():
    questions = bench_erasure.Questions(neighbours=2, binding=5)
    assert {prompt.split()[1] for prompt in questions.prompts["target"]} == {"red"}
    assert len(questions.prompts["target"]) == 6
    assert len(set(questions.prompts["neighbours"])) == 2 * 7
    assert len(questions.prompts["binding"]) == 5
    assert not any(" red " in prompt for group in ("neighbours", "binding") for prompt in questions.prompts[group])


def test_the_judge_looks_for_the_colour_of_the_prompt():
    questions = bench_erasure.Questions(neighbours=1, binding=3)
    red, blue = (render(Scene((Thing("circle", colour),), "white", "")) for colour in ("red", "blue"))
    assert [questions.judge(picture, "a red circle") for picture in (red, blue)] == [1.0, 0.0]
    for scene in bench_erasure.scenes(3, 20, 2, red=False):
        assert questions.judge(render(scene), scene.caption) == 1.0
        assert questions.judge(red, scene.caption) == 0.0


def test_scenes_hold_red_things_or_none():
    for red in (True, False):
        for scene in bench_erasure.scenes(5, 1, 2, red=red):
            assert any(thing.colour == "red" for thing in scene.things) == red


@pytest.fixture
def results(tmp_path):
    machine = {"device": "a machine", "threads": 1, "dtype": "float32", "torch": "2.13"}
    costs = {
        name: {"tflop": {"sd15": 45.0}, "times_flop": {"sd15": 1.5}, "seconds": 2.0} for name in erasure_tables.BARS
    }
    rows = {name: {**each, "times": times} for (name, each), times in zip(costs.items(), (2.9, 1.3), strict=True)}
    (tmp_path / "erasure_cost.json").write_text(json.dumps({**machine, "rounds": 2, "rows": rows}))
    shown = [{"group": g, "prompt": "x", "before": 1.0, "after": 0.25} for g in ("target", "neighbours", "binding")]
    report = {"rows": shown, "pictures": 4, "relearned": [{"attack": "full", "steps": 10, "shown": 0.5}]}
    record = {**machine, "denoise": 10, "attack_rate": 3e-5, "reports": {"UCE": report}}
    (tmp_path / "erasure.json").write_text(json.dumps(record))
    return tmp_path


def test_tables(results):
    costs = erasure_tables.erasure_cost_table(results)
    assert "| meta step | 45.0 | 1.50x | 2.00 | 1.30x |" in costs
    assert "esd, pool of 10: 2.90x against the 3.0x asked for, missed" in costs
    assert "meta step: 1.30x against the 1.3x asked for, met" in costs
    table = erasure_tables.erasure_table(results)
    assert "| stock | 100.0% | 100.0% | 100.0% |  |" in table
    assert "| UCE | 25.0% (21.7) | 25.0% (21.7) | 25.0% (21.7) | 50% |" in table
