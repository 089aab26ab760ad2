"""Pictures by several processes on gloo are those of one process."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ranks
import ranks_mesh
from ranks_mesh import PROMPTS, Case

from difffast import CfgReuse, EncoderPropagation, FeatureReuse
from difffast.plan import MeasuredPlan

#: Windows of 4, 3 and 2 steps, which two processes cannot divide evenly.
UNEVEN = EncoderPropagation(key_steps=(0, 1, 5, 8), prior_noise=None)

CFG, DEC, DP = {"cfg": 2}, {"dec": 2}, {"dp": 2}
TWO = {
    "cfg exact": Case(CFG, {"preset": "exact"}, 4),
    "cfg, two images": Case(CFG, {"preset": "exact"}, 3, {"num_images_per_prompt": 2}),
    "cfg, guidance off": Case(CFG, {"preset": "exact"}, 3, {"guidance_scale": 1.0}),
    "cfg, forecasts": Case(CFG, {"propagation": MeasuredPlan("turbo", guard=10.0)}, 14),
    "cfg, reuse": Case(CFG, {"propagation": FeatureReuse(interval=3)}),
    "cfg, propagation": Case(CFG, {"propagation": UNEVEN}),
    "dec, uneven": Case(DEC, {"propagation": UNEVEN}),
    "dec, two images": Case(DEC, {"propagation": UNEVEN}, 10, {"num_images_per_prompt": 2}),
    "dec, extrapolated": Case(DEC, {"propagation": EncoderPropagation(key_steps=(0, 1, 4, 7), extrapolate=1)}),
    "dec, guidance reused": Case(DEC, {"propagation": UNEVEN, "cfg": CfgReuse()}),
    "dec, one encodes": Case(DEC, {"propagation": UNEVEN}, shared={"encoder": "one process"}),
    "dec, all encode": Case(DEC, {"propagation": UNEVEN}, shared={"encoder": "every process"}),
    "dec, measured": Case(DEC, {"propagation": EncoderPropagation(key_steps=2, prior_noise=None)}, 17),
    "dp, exact": Case(DP, {"preset": "exact"}, 3),
    "dp, balanced": Case(DP, {"preset": "balanced"}, 12),
    "dp, forecasts": Case(DP, {"preset": "turbo"}, 12),
    "dp, reuse": Case(DP, {"propagation": FeatureReuse(interval=3)}),
}
FOUR = {
    "cfg and dec": Case({"cfg": 2, "dec": 2}, {"propagation": UNEVEN}),
    "dec and cfg, prior noise": Case({"dec": 2, "cfg": 2}, {"preset": "faster-diffusion"}, 12),
    "dec of four": Case(
        {"dec": 4}, {"propagation": UNEVEN}, 10, {"num_images_per_prompt": 2}, {"encoder": "every process"}
    ),
    "dp and cfg": Case({"dp": 2, "cfg": 2}, {"preset": "turbo"}, 12),
    "dp and dec": Case({"dp": 2, "dec": 2}, {"propagation": UNEVEN}),
    "cfg and dec, one encodes": Case({"cfg": 2, "dec": 2}, {"propagation": UNEVEN}, shared={"encoder": "one process"}),
}
OPENVINO = {
    "cfg": Case(CFG, {"preset": "exact", "engine": "openvino"}, 3),
    "cfg, forecasts": Case(CFG, {"preset": "turbo", "engine": "openvino"}, 12),
    "dec": Case(DEC, {"propagation": UNEVEN, "engine": "openvino"}),
}
#: Decoders of several sizes are traced alone: what generated code computes does not depend on the mesh.
INDUCTOR = {
    name: replace(OPENVINO[name], options={**OPENVINO[name].options, "engine": "inductor"}, **more)
    for name, more in (("cfg", {}), ("dec", {"backend": "eager"}))
}


def check(cases, count, **how):
    """Compare every case in every process with one process; returns what they gave by name."""
    results = ranks.run(count, ranks_mesh.draw_all, list(cases.values()), **how)
    found = {}
    for number, (name, case) in enumerate(cases.items()):
        expected = {prompt: ranks_mesh.draw_alone(case, prompt) for prompt in PROMPTS[: case.mesh.get("dp", 1)]}
        for rank, result in enumerate(results):
            # "dp" comes first in a mesh: its place is the first one of the rank's coordinates.
            place = rank // (count // 2) if "dp" in case.mesh else 0
            assert np.abs(result[number][0] - expected[PROMPTS[place]]).max() < 1e-5, (name, rank)
        found[name] = [result[number] for result in results]
    return found


@pytest.fixture(scope="module")
def two():
    return check(TWO, 2)


def test_two_processes_make_the_pictures_of_one(two):
    assert len(two) == len(TWO)


def test_guidance_is_one_exchange_a_step(two):
    """Each process receives the other's half: one image of 4 channels of 8x8 numbers of 4 bytes; and two comparisons of
    11 numbers of 8 bytes at the first two steps that run."""
    for _, exchanged, _, text in two["cfg exact"]:
        assert exchanged == {"calls": 4 + 2, "bytes": 4 * 4 * 8 * 8 * 4 + 2 * 11 * 8}
        assert "exchanged with other processes: 6 calls, 4272 bytes received (1.50 calls and 1068 bytes a step)" in text
    for _, exchanged, _, _ in two["cfg, two images"]:
        assert exchanged == {"calls": 3 + 2, "bytes": 3 * 2 * 4 * 8 * 8 * 4 + 2 * 11 * 8}
    halves = [re.search(r"^mesh .*", text, re.M)[0].split(": ", 1)[1] for *_, text in two["cfg exact"]]
    assert halves == ["this process is guidance's unconditional half", "this process is guidance's conditional half"]


def test_steps_that_are_forecast_exchange_nothing(two):
    for _, exchanged, _, text in two["cfg, forecasts"]:
        forecast = int(re.search(r"(\d+) forecast without the UNet", text)[1])
        assert forecast >= 4
        assert exchanged["calls"] == 14 - forecast + 2


def test_without_guidance_every_process_runs_everything(two):
    for _, exchanged, _, text in two["cfg, guidance off"]:
        assert exchanged["calls"] == 2, "the comparisons alone"
        assert "every process runs both of guidance's halves: guidance is off" in text


def test_decoded_steps_are_divided(two):
    """Windows of 4, 3 and 2 steps: the second process decodes one step less of the second one."""
    (_, exchanged, first, _), (_, _, second, _) = two["dec, uneven"]
    assert (first, second) == ([2, 2, 1], [2, 1, 1])
    # A step is a batch of two halves; parts of 2, 2 and 1 steps are received.  The third key step's features are sent,
    # to see how long that takes; the first ones show what they are like, the second ones how long encoding takes.
    assert exchanged == {"calls": 3 + 2 + 1, "bytes": 5 * 2 * 4 * 8 * 8 * 4 + 2 * 11 * 8}, "by the one who sends"


def test_the_encoder_runs_where_the_user_says(two):
    """Channels 32 and 64, latents of 8x8, two halves: conv_in and a resnet leave 32 channels of 8x8 each, the
    downsampler 32 of 4x4, the second block's resnet 64 of 4x4, as often as the mid block.  The shared parts come
    besides."""
    sender, receiver = (exchanged for _, exchanged, _, _ in two["dec, one encodes"])
    steps = 5 * 2 * 4 * 8 * 8 * 4 + 2 * 11 * 8
    assert sender == {"calls": 3 + 2 + 2, "bytes": steps}
    assert receiver["calls"] == 3 + 2 + 2
    at_least = 4 * 2 * (2 * 32 * 8 * 8 + 32 * 4 * 4 + 2 * 64 * 4 * 4)
    assert receiver["bytes"] - steps >= 2 * at_least
    for _, exchanged, _, _ in two["dec, all encode"]:
        assert exchanged == {"calls": 3 + 2, "bytes": steps}


def test_where_the_encoder_runs_is_measured_and_all_processes_choose_alike(two):
    """Eight key steps: the first shows the features' shapes, three of each kind are timed, and the last is chosen."""
    pattern = r"the encoder runs in (\w+ process) from now on: features are there after [\d.e-]+ ms where every process"
    found = [re.findall(pattern, text) for *_, text in two["dec, measured"]]
    assert found[0] == found[1]
    assert found[0] in (["every process"], ["one process"])


def test_replicas_exchange_nothing(two):
    for rank, (_, exchanged, _, text) in enumerate(two["dp, balanced"]):
        assert exchanged == {}
        assert f"dp 2: this process is replica {rank + 1} of 2" in text


@pytest.mark.slow
@pytest.mark.parametrize("engine", [OPENVINO, INDUCTOR], ids=["openvino", "inductor"])
def test_engines_compose_with_a_mesh(engine):
    found = check(engine, 2, timeout_s=1500.0)  # compiling takes minutes where others compile as well
    for name, texts in found.items():
        for *_, text in texts:
            assert "no programs" not in text, name
            assert "no OpenVINO" not in text, name


def test_four_processes_make_the_pictures_of_one():
    found = check(FOUR, 4)
    for _, exchanged, sizes, _ in found["dec of four"]:
        assert sizes == [1, 1, 1]
        assert exchanged["calls"] == 3 + 2
    # An exchange a step, one a window of several, comparisons, and features that are sent to see how long that takes.
    for _, exchanged, _, _ in found["cfg and dec"]:
        assert exchanged["calls"] == 10 + 3 + 2 * 2 + 1


#: What it starts on GPUs; with --cpu, it starts one process.
ACCELERATE = ["accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
ACCELERATE += ["--mixed_precision", "no", "--dynamo_backend", "no"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [["torch.distributed.run", "--standalone", "--nproc-per-node", "2"], ACCELERATE],
    ids=["torchrun", "accelerate"],
)
def test_the_example_under_torchrun_and_accelerate(tmp_path, launcher):
    script = Path(__file__).resolve().parents[1] / "examples" / "several_processes.py"
    command = [sys.executable, "-m", *launcher, str(script), "--steps", "4", "--out", str(tmp_path / "a.png")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    assert "cfg 2: this process is guidance's unconditional half" in done.stdout
    assert "6 calls" in done.stdout
    assert (tmp_path / "a.png").stat().st_size > 1000
