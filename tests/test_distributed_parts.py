"""What each process takes of the work, who encodes, checksums; and that none of it costs anything without a mesh."""

import subprocess
import sys
import timeit

import pytest
import torch

import difffast
from difffast.distributed.decoders import Decoders
from difffast.distributed.encoders import EncoderTimes
from difffast.distributed.weights import sum_bits
from difffast.plan import Plan
from difffast.sampling.state import RunState
from difffast.sampling.stats import RunStats


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
