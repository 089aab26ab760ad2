"""Compiled programs give what the uncompiled calls give, and are compiled once.

Most tests trace with torch.compile's "eager" backend: what is traced and when is the same, and no kernel is generated.
"""

from itertools import pairwise

import peft
import pytest
import torch
import video_zoo
import zoo
from hypothesis import given
from hypothesis import strategies as st
from sampling import largest, picture
from sampling import latents as sampled
from tolerances import EXACT_FLOAT32, LATENTS_FLOAT64
from torch._dynamo.utils import counters

import difffast
from difffast import EncoderPropagation, collect_maps, ops, patch, patched, unpatch
from difffast.engines import programs
from difffast.layers import self_attention
from difffast.unet import split

TABLE = EncoderPropagation(key_steps=(0, 1, 2, 7), max_parallel=4)


def latents(pipe, *args, **options):
    return sampled(pipe, *args, **{"steps": 12, **options})


@pytest.fixture(autouse=True)
def _traced_only(monkeypatch):
    monkeypatch.setattr(programs, "BACKEND", "eager")


@pytest.fixture
def compilations():
    """Counts graphs since the last question."""
    seen = [counters["stats"]["unique_graphs"]]

    def since():
        seen.append(counters["stats"]["unique_graphs"])
        return seen[-1] - seen[-2]

    return since


@pytest.mark.parametrize(
    "options",
    [
        {"preset": "exact"},
        pytest.param({"propagation": TABLE}, marks=pytest.mark.slow),
        pytest.param({"propagation": TABLE, "fused": False}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_it_is_what_runs_uncompiled(pipe64, options):
    with patched(pipe64, **options):
        expected = latents(pipe64)
    with patched(pipe64, compile=True, **options) as report:
        assert largest(latents(pipe64), expected) <= LATENTS_FLOAT64
        assert not report.last_run.reasons
    assert "programs" in dict(report.replaced)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["AnimateDiffPipeline", "StableVideoDiffusionPipeline"])
def test_video_unets_are_compiled(name, compilations):
    row = video_zoo.ROWS[name]
    pipe = row.build().to(dtype=torch.float64)
    pipe.set_progress_bar_config(disable=True)
    propagation = EncoderPropagation(key_steps=(0, 1, 4, 6), max_parallel=2)
    with patched(pipe, propagation=propagation):
        expected = row.run(pipe, zoo.Inputs())
    with patched(pipe, propagation=propagation, compile=True) as report:
        row.run(pipe, zoo.Inputs())
        compilations()
        assert largest(row.run(pipe, zoo.Inputs()), expected) <= LATENTS_FLOAT64
        assert not compilations()
        assert not report.last_run.reasons


@pytest.mark.skipif(ops.missing("cpp") is not None, reason=str(ops.missing("cpp")))
@pytest.mark.slow
@pytest.mark.parametrize("fused", [True, False])
def test_self_attention_is_in_the_programs(pipe, fused):
    report = patch(pipe, "exact", fused=fused, compile=True)
    latents(pipe)
    with torch.profiler.profile() as profile:
        latents(pipe)
    calls = sum(event.count for event in profile.key_averages() if event.key == "difffast::self_attention")
    assert calls == fused * len(self_attention.SelfAttention().find(pipe.unet)) * report.last_run.total
    assert not report.last_run.reasons


@pytest.mark.slow
def test_programs_serve_every_prompt_seed_guidance_and_length(pipe, compilations):
    report = patch(pipe, propagation=TABLE, compile=True)
    latents(pipe)
    assert compilations() == 4  # whole, encoder, decoders of 4 and 1 steps
    assert {1, 4} <= set(report.last_run.decode_batches) <= set(programs.BATCHES)
    latents(pipe, "something else", seed=5, guidance_scale=2.0)
    latents(pipe, "and again", negative_prompt="this", steps=16)
    latents(pipe, eta=0.3)
    assert compilations() == 0
    latents(pipe, steps=13)
    assert compilations() == 1  # the last segment has six steps: a decoder of 2 steps


@pytest.mark.slow
def test_lora_scale_is_an_input(pipe, compilations):
    config = peft.LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "conv1"], init_lora_weights=False)
    pipe.unet.add_adapter(config, adapter_name="a")
    layers = [m for m in pipe.unet.modules() if type(m).__module__ == "peft.tuners.lora.layer"]

    def run(scale, **options):
        for layer in layers:
            layer.set_scale("a", scale)
        return latents(pipe, **options)

    settings = [(1.0, {}), (0.25, {}), (0.5, {"cross_attention_kwargs": {"scale": 0.3}})]
    expected = [run(scale, **options) for scale, options in settings]
    assert min(largest(a, b) for a, b in pairwise(expected)) > 100 * EXACT_FLOAT32
    with patched(pipe, "exact", compile=True):
        for (scale, options), stock in zip(settings, expected, strict=True):
            assert largest(run(scale, **options), stock) <= 2 * EXACT_FLOAT32
            assert layers[0].scaling["a"] == scale * layers[0].lora_alpha["a"] / layers[0].r["a"]
        assert compilations() == 1


@pytest.mark.slow
def test_controlnet_strength_and_picture_are_inputs(compilations):
    pipe = zoo.ROWS["StableDiffusionControlNetPipeline"].build()
    pipe.set_progress_bar_config(disable=True)
    under = {"image": picture(), "height": 32, "width": 32}
    with patched(pipe, propagation=TABLE):
        expected = latents(pipe, controlnet_conditioning_scale=0.3, **under)
    with patched(pipe, propagation=TABLE, compile=True) as report:
        latents(pipe, **under)
        assert compilations() == 4  # whole, encoder, decoders of 4 and 1 steps
        latents(pipe, "two cats", **{**under, "image": picture(seed=1)})
        weaker = latents(pipe, controlnet_conditioning_scale=0.3, **under)
        assert compilations() == 0
        assert not report.last_run.reasons
    assert largest(weaker, expected) <= EXACT_FLOAT32


@pytest.mark.slow
def test_changed_layers_are_noticed(pipe, compilations):
    def check():
        with patched(pipe, "exact"):
            expected = latents(pipe)
        patch(pipe, "exact", compile=True)
        ours = latents(pipe)
        assert largest(ours, expected) <= EXACT_FLOAT32
        return ours

    patch(pipe, "exact", compile=True)
    before = latents(pipe)
    with torch.no_grad():
        pipe.unet.conv_in.weight.mul_(1.5)
        pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn2.to_k.weight.neg_()
    compilations()
    after = latents(pipe)
    assert compilations() == 0
    assert largest(check(), after) == 0
    assert largest(before, after) > 100 * EXACT_FLOAT32
    pipe.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_k"], init_lora_weights=False))
    with_adapter = latents(pipe)
    assert largest(check(), with_adapter) == 0
    assert largest(after, with_adapter) > 100 * EXACT_FLOAT32


@pytest.mark.slow
@torch._dynamo.config.patch(recompile_limit=1)
def test_more_changes_than_torch_compile_keeps_are_no_error(pipe):
    with patched(pipe, "exact"):
        expected = latents(pipe)
    with patched(pipe, "exact", compile=True) as report:
        for flag in (True, False, True):
            pipe.unet.conv_act.inplace = flag
            assert largest(latents(pipe), expected) <= EXACT_FLOAT32
    assert not report.last_run.reasons


@pytest.mark.slow
def test_a_new_size_gets_its_own_programs_and_their_number_is_bounded(pipe, monkeypatch, compilations):
    monkeypatch.setattr(programs, "MAX_PROGRAMS", 2)
    report = patch(pipe, "exact", compile=True)
    for height in (64, 80, 64, 96, 64):
        latents(pipe, height=height, width=64)
        assert report.programs.kept <= 2
    assert str(report.programs) == "2 compiled, at most 2"
    assert compilations() == 3  # the size used last stays


def test_memory_of_cuda_graphs_is_what_the_allocator_keeps_apart_for_them(monkeypatch):
    """As ``torch.cuda.memory_snapshot`` describes it; no GPU is needed to add it up."""

    def segment(device, pool, total_size):
        return {"device": device, "segment_pool_id": pool, "total_size": total_size}

    segments = [segment(0, (0, 0), 7), segment(0, (0, 1), 5 << 20), segment(0, (3, 0), 1 << 20), segment(1, (0, 2), 9)]
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda include_traces: segments)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    assert programs.count_graph_bytes(torch.device("cuda:0")) == 6 << 20
    assert programs.count_graph_bytes(torch.device("cuda")) == 9
    assert programs.count_graph_bytes(torch.device("cpu")) == 0
    assert str(programs.Programs().count(torch.device("cuda:0"))) == "0 compiled, at most 16; CUDA graphs hold 6 MiB"


def test_what_cannot_be_compiled_runs_as_it_is_and_says_so(pipe, monkeypatch):
    def broken(graph, inputs):
        raise NotImplementedError("no compiler here")

    monkeypatch.setattr(programs, "BACKEND", broken)
    with patched(pipe, "exact"):
        expected = latents(pipe)
    report = patch(pipe, "exact", compile=True)
    for _ in range(2):  # whoever reads the second picture's report is told as well
        with pytest.warns(UserWarning, match="run_whole runs without torch.compile: BackendCompilerFailed"):
            ours = latents(pipe)
        assert largest(ours, expected) <= EXACT_FLOAT32
        assert len(report.last_run.reasons) == 1


def test_maps_are_collected_without_programs(pipe):
    patch(pipe, "exact", compile=True)
    with (
        collect_maps(pipe) as maps,
        pytest.warns(UserWarning, match="programs and graphs are not used while attention maps"),
    ):
        latents(pipe)
    assert maps.steps


@pytest.mark.slow
def test_binding_steps_from_the_same_latents(pipe):
    binding, prompt = difffast.SemanticBinding("object"), "a [red circle] and a [blue square]"
    with patched(pipe, "exact", binding=binding):
        expected = latents(pipe, prompt)
    with patched(pipe, "exact", binding=binding, compile=True) as report:
        assert largest(latents(pipe, prompt), expected) <= EXACT_FLOAT32
    assert report.trace is not None
    assert largest(latents(pipe, prompt), expected) > 100 * EXACT_FLOAT32


def test_memory_that_runs_out_makes_smaller_batches(pipe, monkeypatch):
    with patched(pipe, propagation=TABLE):
        expected = latents(pipe)
    decode, tried = split.decode, []

    def bounded(unet, features, call, timesteps, **options):
        tried.append(timesteps.numel())
        if timesteps.numel() > 2:
            raise torch.OutOfMemoryError("more than two steps do not fit")
        return decode(unet, features, call, timesteps, **options)

    monkeypatch.setattr(split, "decode", bounded)
    with patched(pipe, propagation=TABLE) as report:
        with pytest.warns(UserWarning, match="out of memory decoding 3 steps at once: 1 from now on"):
            ours = latents(pipe)
        assert largest(ours, expected) <= EXACT_FLOAT32
        assert tried.count(3) == 1
        assert max(report.last_run.decode_batches) == 1
    monkeypatch.setattr(split, "decode", lambda *args, **options: bounded(None, None, None, torch.zeros(3)))
    patch(pipe, propagation=EncoderPropagation(parallel=False))
    with pytest.raises(torch.OutOfMemoryError):
        latents(pipe)


def test_bad_values_and_shared_schedulers_are_refused(pipe):
    with pytest.raises(TypeError, match="compile must be True or False, got 'max-autotune'"):
        patch(pipe, compile="max-autotune")
    assert not unpatch(pipe)
    other = type(pipe)(**pipe.components)
    patch(pipe, compile=True)
    with pytest.raises(ValueError, match=r"'engine': 'inductor'.*'engine': None"):
        patch(other)


@given(st.data())
def test_batches_have_the_sizes_there_are(data):
    total = data.draw(st.integers(8, 120))
    cap = data.draw(st.integers(1, 20))
    keys = data.draw(st.sets(st.integers(0, total - 1))) | {0}
    plan = EncoderPropagation(key_steps=keys, max_parallel=cap).plan(total, batches=programs.BATCHES)
    rows = plan.steps()
    assert [row.step for row in rows] == list(range(total))
    for row in rows:
        assert len(row.decoded_with) in programs.BATCHES
        assert len(row.decoded_with) <= cap
        assert not any(plan.is_key(order) for order in row.decoded_with[1:])


def test_a_plan_without_single_steps_is_refused():
    with pytest.raises(ValueError, match="batches must ascend from 1"):
        difffast.Plan(total=8, key_steps=(0,), max_batch=4, batches=(2, 4))


@pytest.mark.slow
def test_generated_kernels(pipe, monkeypatch):
    monkeypatch.setattr(programs, "BACKEND", "inductor")
    with patched(pipe, propagation=TABLE):
        expected = latents(pipe)
    with patched(pipe, propagation=TABLE, compile=True) as report:
        assert largest(latents(pipe), expected) <= EXACT_FLOAT32
        assert not report.last_run.reasons
