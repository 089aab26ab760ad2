"""Pictures by several processes on gloo are those of one process."""

import re
import subprocess
import sys
import timeit
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ranks
import ranks_mesh
import torch
from bench_distributed import Link, predict_speedup, summarise
from ranks_mesh import PROMPTS, Case

import difffast
from difffast import CfgReuse, EncoderPropagation, FeatureReuse, OutputForecast
from difffast.distributed.decoders import Decoders
from difffast.distributed.encoders import EncoderTimes
from difffast.distributed.meshes import check_mesh, parse_mesh
from difffast.distributed.weights import sum_bits
from difffast.plan import Plan
from difffast.sampling.state import RunState
from difffast.sampling.stats import RunStats

#: Windows of 4, 3 and 2 steps, which two processes cannot divide evenly.
UNEVEN = EncoderPropagation(key_steps=(0, 1, 5, 8), prior_noise=None)

CFG, DEC, DP = {"cfg": 2}, {"dec": 2}, {"dp": 2}
TWO = {
    "cfg exact": Case(CFG, {"preset": "exact"}, 4),
    "cfg, two images": Case(CFG, {"preset": "exact"}, 3, {"num_images_per_prompt": 2}),
    "cfg, guidance off": Case(CFG, {"preset": "exact"}, 3, {"guidance_scale": 1.0}),
    "cfg, forecasts": Case(CFG, {"preset": "turbo"}, 14),
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
    "dp": Case(DP, {"preset": "exact", "engine": "openvino"}, 3),
}
INDUCTOR = {
    name: replace(OPENVINO[name], options={**OPENVINO[name].options, "engine": "inductor"})
    for name in ("cfg", "dec", "dp")
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


@pytest.mark.parametrize(
    ("change", "reasons"),
    [
        ("weights", ("process 1 has other weights, first in unet.conv_out.bias", "process 0 has other weights")),
        ("order", ("process 1 has other weights, first in vae.decoder.conv_in.bias", "first in vae.decoder")),
        ("channels", ("process 1 has modules of other names, shapes or dtypes", "process 0 has modules of other")),
        ("options", ("process 1 has other options", "here: preset=turbo")),
        ("seed", ("must have the same latents at step 0",) * 2),
        ("nothing", ("nothing",) * 2),
    ],
)
def test_processes_that_are_not_alike_are_refused_by_all_of_them(change, reasons):
    results = ranks.run(2, ranks_mesh.patch_unlike, change)
    for reason, result in zip(reasons, results, strict=True):
        assert reason in result


def test_a_difference_is_told_to_processes_that_do_not_see_it():
    results = ranks.run(4, ranks_mesh.patch_unlike_in_a_grid)
    assert all("must load the same pipeline and patch it alike" in result for result in results), results
    assert sum("others of them differ" in result for result in results) >= 1


@pytest.mark.parametrize(
    ("sizes", "preset", "options", "reason"),
    [
        ({"tp": 2}, "exact", {}, "the dimensions of a mesh must be named"),
        ({"dec": 2}, "balanced", {}, "divides steps that are decoded together, of which"),
        ({"dec": 2}, "exact", {}, "use propagation=EncoderPropagation"),
        ({"dec": 2}, "exact", {"propagation": FeatureReuse()}, "divides steps that are decoded together"),
        ({"dec": 2}, "exact", {"propagation": OutputForecast()}, "divides steps that are decoded together"),
        ({"cfg": 2}, "exact", {"cfg": CfgReuse()}, "needs both of guidance's halves at every step"),
        ({"cfg": 2}, "exact", {"encoder": "one process"}, 'needs a mesh with several processes along "dec", got cfg 2'),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(sizes, preset, options, reason):
    for result in ranks.run(2, ranks_mesh.refuse, sizes, preset, options):
        assert result.startswith("ValueError: ")
        assert reason in result


def test_guidance_has_two_halves():
    for result in ranks.run(3, ranks_mesh.refuse, {"cfg": 3}, "exact", {}):
        assert 'dimension "cfg" must have 2 processes, one for each half, got 3' in result


def test_what_is_no_mesh_is_refused(pipe):
    with pytest.raises(TypeError, match=r"mesh must be a .*DeviceMesh, got int"):
        difffast.patch(pipe, mesh=2)
    with pytest.raises(TypeError, match="got list"):
        check_mesh([2])
    with pytest.raises(ValueError, match=r"encoder='one process' needs a mesh"):
        difffast.patch(pipe, encoder="one process")
    with pytest.raises(ValueError, match=r"encoder must be one of 'every process', 'one process', None, got 'mine'"):
        difffast.patch(pipe, encoder="mine")
    assert not difffast.unpatch(pipe)


@pytest.mark.parametrize("ranks_off", [(0, 1), (1,)])
def test_latents_that_change_their_shape_are_refused(ranks_off):
    """Guidance ends on the way: the batch is two rows up to step 2, and then one."""
    results = ranks.run(2, ranks_mesh.draw_with_guidance_to_step, 2, ranks_off)
    for rank, result in enumerate(results):
        if rank in ranks_off:
            assert "got (2, 4, 8, 8) at step 2 and (1, 4, 8, 8) at step 3: leave guidance on to the end" in result
        else:
            assert "process 0 could not exchange guidance's halves with processes [1]" in result


@pytest.mark.parametrize(("how", "timeout_s"), [("killed", 20.0), pytest.param("hangs", 5.0, marks=pytest.mark.slow)])
def test_a_process_that_is_lost_ends_the_other_with_an_error_within_the_timeout(how, timeout_s):
    (text, seconds), lost = ranks.run(2, ranks_mesh.draw_lost, how, timeout_s)
    assert isinstance(lost, ranks.Killed) == (how == "killed")
    assert "process 0 could not exchange guidance's halves with processes [1]: one of them has ended" in text
    assert seconds < timeout_s + 1


def test_without_a_mesh_nothing_distributed_is_imported_or_called():
    """What torch and the stock pipeline import of torch.distributed by themselves is theirs."""
    script = """
import sys
from pathlib import Path
from diffusers import AutoencoderKL, StableDiffusionPipeline

def find_distributed():
    return {name for name in sys.modules if name.startswith(("torch.distributed", "difffast.distributed"))}

theirs = find_distributed()
import difffast
from difffast.sampling import division
pipe = difffast.models.tiny_pipeline("sd", channels=(32, 64), sample_size=8)
report = difffast.patch(pipe, "faster-diffusion")
pipe.set_progress_bar_config(disable=True)
called = set()
sys.setprofile(lambda frame, event, _: called.add(frame.f_code.co_filename))
pipe("a", num_inference_steps=10, output_type="latent")
sys.setprofile(None)
assert report.last_run.propagated > 0
assert str(Path(difffast.__file__).parent / "sampling" / "run.py") in called
print(sorted(find_distributed() - theirs), division.__file__ in called)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout.strip() == "[] False", done.stdout + done.stderr


def test_without_a_mesh_a_step_is_not_a_microsecond_slower(pipe, monkeypatch):
    """All that a step does for meshes is to ask whether there is one, a few times, and one call that asks as well."""
    plan, output = Plan(total=10, key_steps=(0,), max_batch=1), torch.zeros(1)
    state = RunState(plan, RunStats(total=10), torch.arange(10))
    assert state.join(output) is output

    def ask():
        state.join(output)
        return [state.division is None for _ in range(8)]

    seconds = min(timeit.repeat(ask, number=1000, repeat=50)) / 1000
    assert seconds < 1e-6
    asked = []
    monkeypatch.setattr(RunState, "division", property(asked.append, lambda *_: None), raising=False)
    for preset in ("faster-diffusion", "turbo", "exact"):
        asked.clear()
        report = difffast.patch(pipe, preset)
        pipe("a", num_inference_steps=12, output_type="latent")
        assert 0 < len(asked) <= 8 * report.last_run.total, preset
    difffast.unpatch(pipe)


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


@pytest.mark.parametrize(
    ("count", "steps", "parts"),
    [
        (2, 1, [[0], [0]]),
        (2, 7, [[0, 1, 2, 3], [4, 5, 6]]),
        (4, 5, [[0, 1], [2, 3], [4], [4]]),
        (3, 3, [[0], [1], [2]]),
        (4, 2, [[0], [1], [1], [1]]),
    ],
)
def test_steps_of_a_window(count, steps, parts):
    decoders = [Decoders(None, place, count, None) for place in range(count)]
    assert [[*each.take(range(10, 10 + steps))] for each in decoders] == [[10 + i for i in part] for part in parts]


def test_the_encoder_runs_where_the_slowest_process_has_features_earlier():
    """Process 1 is half as fast: it has features after 4 s if it encodes, and after 3 s if process 0 sends them."""
    times = EncoderTimes(None)
    ways = []
    for _ in range(6):
        way, timed = times.choose("small")
        assert timed
        ways.append(way)
        medians = times.add("small", way, {"every process": 2.0, "one process": 3.0}[way])
        assert (medians is None) == (len(ways) < 6)
    assert ways == ["every process", "one process"] * 3
    assert medians.tolist() == [2.0, 3.0]
    assert "after 4e+03 ms where every process encodes, after 3e+03 ms" in times.settle(
        "small", torch.tensor([[2.0, 3.0], [4.0, 3.0]])
    )
    assert times.choose("small") == ("one process", False)
    assert times.choose("large") == ("every process", True), "other shapes are timed anew"
    times.settle("small", torch.tensor([[2.0, 3.0], [2.0, 3.0]]))
    assert times.choose("small") == ("every process", False)
    assert EncoderTimes("one process").choose("small") == ("one process", False)


def test_decoders_together_take_larger_windows():
    plan = Plan(total=40, key_steps=(0, 1), max_batch=4, batches=(1, 2, 4))
    wide = Decoders(None, 0, 3, None).widen(plan)
    assert (wide.max_batch, wide.batches) == (12, (1, 3, 6, 12))
    assert wide.batch(1) == range(1, 13)
    assert Decoders(None, 0, 1, None).widen(plan) is plan


def test_checksums_see_every_bit():
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.bool):
        tensor = values.to(dtype)
        expected = sum_bits(tensor)
        assert torch.equal(expected, sum_bits(tensor.clone()))
        other = tensor.clone()
        other[17] = ~other[17] if dtype == torch.bool else other[17] + 1
        assert not torch.equal(expected, sum_bits(other)), dtype
    assert not torch.equal(sum_bits(values), sum_bits(values.flip(0)))
    assert torch.equal(sum_bits(values[:0]), torch.zeros(2, dtype=torch.int64))
    # By hand: bits 1, 2, 3 weigh 1 + 4 + 9.
    assert sum_bits(torch.tensor([1, 2, 3], dtype=torch.int32)).tolist() == [6, 14]


def test_the_model_of_speed_up():
    """By hand: 10 s of which 8 are divided in two are 2 + 4; 100 calls of 1 ms and 1 GB at 2 GB/s are 0.6 s more."""
    assert predict_speedup(10.0, 8.0, 0.5) == pytest.approx(10 / 6)
    assert Link(1e-3, 2e9).cost(100, 10**9) == pytest.approx(0.6)
    assert predict_speedup(10.0, 8.0, 0.5, 0.6) == pytest.approx(10 / 6.6)


def test_what_was_measured_is_summarised():
    """By hand: a picture takes 10 s, of which 8 are in the UNet, and 5 where half of each call is run; 100 exchanges of
    1 ms and 1 GB at 2 GB/s take 0.6 s.  The decoders take 6 s alone, and 3.5 s in the process with the larger part."""

    def way(seconds, cpu, decoding=0.0, calls=0, received=0):
        return {
            "seconds": [seconds] * 3,
            "cpu": [cpu] * 3,
            "decoding": [decoding] * 3,
            "calls": calls,
            "bytes": received,
        }

    def process(factor, alone):
        return {
            "a call": way(8.0, 8.0 * alone),
            "half a call": way(5.0, 5.0 * factor),
            "one": way(10.0, 10.0 * alone),
            "cfg": way(8.0, 7.0 * factor, calls=100, received=10**9),
            "dp": way(11.0, 10.5 * factor),
            "one, decoding ahead": way(10.0, 10.0 * alone, 6.0 * alone),
            "dec": way(8.0, 7.5 * factor, 3.5 * factor, calls=100),
            "dec, one encodes": way(9.0, 7.5 * factor, 3.5 * factor, calls=100, received=10**9),
        }

    link = {"latency_s": 1e-3, "bandwidth": 2e9}
    rows = {row["way"]: row for row in summarise({"link": link, "processes": [process(1.0, 1), process(0.8, 0)]})}
    assert {name: row["speedup"] for name, row in rows.items()} == pytest.approx(
        {"cfg": 1.25, "dp": 20 / 11, "dec": 1.25, "dec, one encodes": 10 / 9}
    )
    assert {name: row["cpu_speedup"] for name, row in rows.items()} == pytest.approx(
        {"cfg": 10 / 7, "dp": 20 / 10.5, "dec": 10 / 7.5, "dec, one encodes": 10 / 7.5}
    )
    assert {name: row["predicted"] for name, row in rows.items()} == pytest.approx(
        {"cfg": 10 / (2 + 5 + 0.6), "dp": 2.0, "dec": 10 / (4 + 3.5 + 0.1), "dec, one encodes": 10 / (4 + 3.5 + 0.6)}
    )
    assert (rows["cfg"]["bar"], rows["dp"]["bar"], rows["dec"]["bar"]) == (1.7, 1.9, None)
    assert (rows["cfg"]["two_s"], rows["dp"]["two_s"], rows["cfg"]["divided"], rows["cfg"]["share"]) == pytest.approx(
        (8.0, 5.5, 0.8, 5 / 8)
    )


def test_a_mesh_as_it_is_written():
    assert parse_mesh(None, 3) == {"dp": 3}
    assert parse_mesh("dp=2, cfg=2", 4) == {"dp": 2, "cfg": 2}
    for text in ("tp=2", "dp=2,dp=2", "dp", "dp=x", "dp=0", ""):
        with pytest.raises(ValueError, match="a mesh is written as"):
            parse_mesh(text, 4)
    with pytest.raises(ValueError, match="must have as many processes as there are, 3, and has 4"):
        parse_mesh("dp=2,cfg=2", 3)
