"""CUDA graphs, recorded and replayed on the CPU: a replay is what runs eagerly, whatever has changed meanwhile."""

import copy

import pytest
import torch
from peft import LoraConfig
from recorder import CpuRecorder
from sampling import largest, latents
from torch import nn

import difffast
from difffast import CfgReuse, EncoderPropagation, FeatureReuse, patched
from difffast.engines import graphs
from difffast.sampling.controller import find_controller

PLANS = {
    "exact": {"preset": "exact"},
    "balanced": {"preset": "balanced"},
    "one at a time": {"propagation": EncoderPropagation(key_steps=(0, 1, 4, 7), parallel=False)},
    "ahead": {"propagation": EncoderPropagation(key_steps=(0, 1, 4, 7))},
    "outer layers": {"propagation": FeatureReuse(3, extrapolate=1)},
    "half": {"propagation": FeatureReuse(2), "cfg": CfgReuse(3)},
}


@pytest.fixture
def recorded(pipe):
    """-> (pipeline, a function that patches it with recorded graphs and returns (report, counts))"""

    def patch(**options):
        report = difffast.patch(pipe, engine="cudagraphs", **options)
        recorder = CpuRecorder()
        find_controller(pipe.unet)._engines["cudagraphs"] = graphs.Graphs(recorder)
        return report, recorder.counts

    yield pipe, patch
    difffast.unpatch(pipe)


@pytest.mark.parametrize("plan", PLANS)
def test_a_replay_is_what_runs_eagerly(recorded, plan):
    """Several images with other seeds, prompts and sizes, back and forth."""
    pipe, patch = recorded
    runs = [
        {"prompt": "a red circle", "seed": 0},
        {"prompt": "a blue square", "seed": 1},
        {"prompt": "a red circle", "seed": 0},
        {"prompt": "a red circle", "seed": 2, "height": 48, "width": 32},
        {"prompt": "a blue square", "seed": 1},
    ]
    with patched(pipe, **PLANS[plan], engine="eager"):
        expected = [latents(pipe, steps=11, **run) for run in runs]
    report, counts = patch(**PLANS[plan])
    for run, right in zip(runs, expected, strict=True):
        assert largest(latents(pipe, steps=11, **run), right) == 0
        few = "every step runs in full: with 11 steps"  # which presets say
        assert all(reason.startswith(few) for reason in report.last_run.reasons)
    assert counts["replays"] > counts["warm-ups"]
    assert report.programs.kept == counts["recordings"]


def _another_weight(pipe):
    pipe.unet.conv_in.weight = nn.Parameter(pipe.unet.conv_in.weight.detach() * 2)


def _moved_weight(pipe):
    pipe.unet.conv_out.weight.data = pipe.unet.conv_out.weight.data * 2


def _weight_in_place(pipe):
    with torch.no_grad():
        pipe.unet.conv_out.weight.mul_(2)


def _text_weight_in_place(pipe):
    layer = next(m for name, m in pipe.unet.named_modules() if name.endswith("attn2.to_k"))
    with torch.no_grad():
        layer.weight.mul_(2)


def _another_layer(pipe):
    pipe.unet.conv_out = copy.deepcopy(pipe.unet.conv_out)
    nn.init.ones_(pipe.unet.conv_out.bias)


def _another_attention_layer(pipe):
    block = pipe.unet.mid_block.attentions[0].transformer_blocks[0]
    block.attn2 = copy.deepcopy(block.attn2)
    nn.init.ones_(block.attn2.to_v.weight)


def _free_u(pipe):
    pipe.enable_freeu(s1=0.6, s2=0.4, b1=1.1, b2=1.2)


def _chunked_attention(pipe):
    pipe.enable_attention_slicing(1)


def _hook(pipe):
    pipe.unet.mid_block.register_forward_hook(lambda module, args, output: output * 2)


def _own_forward(pipe):
    block = pipe.unet.mid_block
    plain = block.forward
    block.forward = lambda *args, **kwargs: 2 * plain(*args, **kwargs)


def _scale_factor(pipe):
    pipe.unet.mid_block.resnets[0].output_scale_factor = 2.0


CHANGES = (
    _another_weight, _moved_weight, _weight_in_place, _text_weight_in_place, _another_layer, _another_attention_layer,
    _free_u, _chunked_attention, _hook, _own_forward, _scale_factor,
)  # fmt: skip


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__.strip("_"))
@pytest.mark.parametrize("middle", [False, True], ids=["between images", "in the middle of one"])
@pytest.mark.filterwarnings("ignore:difffast. no CUDA graphs", "ignore:difffast. attn2 layers run stock")
def test_no_stale_graph_answers(recorded, change, middle):
    pipe, patch = recorded
    other = copy.deepcopy(pipe)

    def at_six(pipe, step, timestep, arguments):
        if step == 6:
            change(pipe)
        return arguments

    def run(pipe):
        if middle:
            return latents(pipe, steps=12, callback_on_step_end=at_six)
        change(pipe)
        return latents(pipe, steps=12)

    patch(preset="exact")
    before = latents(pipe, steps=12)
    difffast.patch(other, "exact", engine="eager")
    right = run(other)
    assert largest(run(pipe), right) == 0
    assert change is _chunked_attention or largest(before, right) > 1e-3, "the change must show"


@pytest.mark.parametrize("change", [_hook, _own_forward], ids=lambda change: change.__name__.strip("_"))
def test_what_cannot_be_recorded_runs_eagerly_and_the_report_says_why(recorded, change):
    pipe, patch = recorded
    report, counts = patch(preset="exact")
    change(pipe)
    with pytest.warns(UserWarning, match="no CUDA graphs: mid_block has a "):
        latents(pipe)
    assert counts["recordings"] == 0
    assert any("no CUDA graphs: mid_block" in reason for reason in report.last_run.reasons)


def test_a_recording_that_fails_is_told_for_every_picture(recorded, monkeypatch):
    pipe, patch = recorded
    with patched(pipe, "exact", engine="eager"):
        expected = latents(pipe)
    report, _ = patch(preset="exact")

    def fail(*_, **__):
        raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(CpuRecorder, "record", fail)
    why = "run_whole runs without CUDA graphs: RuntimeError: operation not permitted when stream is capturing"
    for _ in range(2):
        with pytest.warns(UserWarning, match=why):
            assert largest(latents(pipe), expected) == 0
        assert report.last_run.reasons == [why]


@pytest.mark.filterwarnings("ignore:difffast. attn2 layers run stock", "ignore:difffast. decoding one step")
def test_foreign_attention_processors_are_not_recorded(recorded):
    from diffusers.models.attention_processor import AttnProcessor2_0

    class Counting(AttnProcessor2_0):
        calls = 0

        def __call__(self, *args, **kwargs):
            Counting.calls += 1
            return super().__call__(*args, **kwargs)

    pipe, patch = recorded
    pipe.unet.set_attn_processor(Counting())
    _, counts = patch(preset="exact")
    with pytest.warns(UserWarning, match="no CUDA graphs: .* which is not one of Diffusers' own"):
        latents(pipe, steps=10)
    layers = len(pipe.unet.attn_processors)
    assert Counting.calls == 10 * layers
    assert counts["recordings"] == 0


def test_lora_scales_need_no_new_graph(recorded):
    pipe, patch = recorded
    pipe.unet.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_k", "to_v"], init_lora_weights=False), "one")
    _, counts = patch(preset="exact")
    results = {}
    for scale in (0.3, 0.9, 0.3):
        results.setdefault(scale, []).append(latents(pipe, cross_attention_kwargs={"scale": scale}))
    assert counts["recordings"] == 1
    first, again = results[0.3]
    assert torch.equal(first, again)
    for scale in results:
        with patched(pipe, "exact", engine="eager"):
            assert largest(latents(pipe, cross_attention_kwargs={"scale": scale}), results[scale][0]) < 1e-5


def test_a_replay_copies_the_latents_and_the_time(recorded, monkeypatch):
    """Text keys and values are copied once a prompt."""
    pipe, patch = recorded
    patch(preset="exact")
    latents(pipe)
    copied = []
    fill = graphs._Buffer.fill
    # What is copied is told by the version of the buffer's memory.

    def counting(self, value):
        before = self.memory._version
        fill(self, value)
        if self.memory._version != before:
            copied.append(value.nbytes)

    monkeypatch.setattr(graphs._Buffer, "fill", counting)
    latents(pipe, steps=20)
    latent, time = 2 * 4 * 8 * 8 * 4, 8
    keys_and_values = sum(copied) - 20 * (latent + time)
    assert 0 < keys_and_values < 1 << 20
    copied.clear()
    latents(pipe, steps=20)
    assert sum(copied) == 20 * (latent + time) + keys_and_values, "a new text tensor, though of equal values"


def test_the_number_of_graphs_is_bounded(recorded, monkeypatch):
    pipe, patch = recorded
    monkeypatch.setattr(graphs, "MAX_PROGRAMS", 2)
    report, counts = patch(preset="exact")
    for size in (16, 32, 48, 64):
        latents(pipe, steps=9, height=size, width=size)
    assert counts["recordings"] == 4
    assert report.programs.kept <= 2


def test_bad_engines_are_refused(pipe):
    with pytest.raises(ValueError, match=r"unknown engine 'cuda-graphs' \(did you mean 'cudagraphs'\?\)"):
        difffast.patch(pipe, engine="cuda-graphs")
    with pytest.raises(ValueError, match="compile=True is short for engine='inductor', got engine='eager' as well"):
        difffast.patch(pipe, compile=True, engine="eager")


def test_without_cuda_the_report_says_so(pipe):
    with patched(pipe, "exact", engine="cudagraphs") as report, pytest.warns(UserWarning, match="no CUDA graphs"):
        latents(pipe)
    assert report.last_run.reasons == ["no CUDA graphs: the UNet is on 'cpu'"]
