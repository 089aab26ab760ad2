"""Fused attn2 layers in a real UNet: right, exactly removable, text keys made once."""

import copy

import pytest
import torch
from diffusers.models.attention_processor import (
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
    IPAdapterAttnProcessor2_0,
    SlicedAttnProcessor,
)
from sampling import EVERY_SCHEDULER, STEPS, largest, latents, scheduler
from threads import in_threads
from tolerances import EXACT_FLOAT32, EXACT_FLOAT64

import difffast
from difffast import EncoderPropagation, ops, patch, patched, unpatch
from difffast.layers import cross_attention
from difffast.sampling.controller import find_controller

ALL_KEY = EncoderPropagation(key_steps=1)


def layers(pipe):
    return cross_attention.find_layers(pipe.unet)


@pytest.mark.parametrize("name", EVERY_SCHEDULER)
def test_exact_is_stock_up_to_rounding(pipe, pipe64, name):
    for each, tolerance in ((pipe, EXACT_FLOAT32), (pipe64, EXACT_FLOAT64)):
        each.scheduler = scheduler(name)
        stock = latents(each, steps=STEPS)
        with patched(each, "exact") as report:
            # In units of the latents' standard deviation: 1 in a trained model, up to 25 in this random one.
            assert largest(latents(each, steps=STEPS), stock) <= tolerance * max(1.0, float(stock.std()))
        assert report.last_run.key == report.last_run.total
        assert not report.last_run.reasons


def test_exact_takes_any_number_of_steps(pipe):
    stock = latents(pipe, steps=2)
    with patched(pipe, "exact"):
        assert largest(latents(pipe, steps=2), stock) <= EXACT_FLOAT32


def test_without_fused_layers_an_all_key_plan_is_stock_to_the_bit(pipe):
    stock = latents(pipe)
    for options in ({"preset": "exact", "fused": False}, {"propagation": ALL_KEY, "fused": False}):
        with patched(pipe, **options) as report:
            assert torch.equal(latents(pipe), stock)
        assert report.last_run.text_kv.total() == 0


def test_the_operator_runs_unless_switched_off(pipe, monkeypatch):
    calls = []
    original = ops.cross_attention
    monkeypatch.setattr(ops, "cross_attention", lambda *a, **k: calls.append(a) or original(*a, **k))
    with patched(pipe, "exact"):
        latents(pipe, steps=4)
    assert len(calls) == 4 * len(layers(pipe))
    with patched(pipe, "exact", fused=False):
        latents(pipe, steps=4)
    latents(pipe, steps=4)
    assert len(calls) == 4 * len(layers(pipe))


def test_unpatch_leaves_no_trace(pipe):
    before = {name: (type(layer), dict(vars(layer)), layer.processor) for name, layer in layers(pipe).items()}
    patch(pipe, propagation=EncoderPropagation())
    assert all(isinstance(layer, before[name][0]) for name, layer in layers(pipe).items())
    latents(pipe)
    unpatch(pipe)
    for name, layer in layers(pipe).items():
        cls, attributes, processor = before[name]
        assert type(layer) is cls
        assert vars(layer).keys() == attributes.keys()
        assert layer.processor is processor


def test_copies_of_a_patched_pipeline_are_stock(pipe):
    patch(pipe, propagation=EncoderPropagation())
    clone = copy.deepcopy(pipe.unet)
    plain = {type(layer) for layer in cross_attention.find_layers(clone).values()}
    assert plain == {type(layer).__mro__[1] for layer in layers(pipe).values()}
    unpatch(pipe)


# Text keys and values


def test_text_keys_and_values_are_made_once_a_prompt(pipe):
    count = len(layers(pipe))
    with patched(pipe, "exact") as report:
        for prompt in ("a red circle", "a blue square"):
            latents(pipe, prompt)
            assert report.last_run.text_kv == {"computed": count, "reused": 19 * count}


def test_text_keys_and_values_are_shared_by_parallel_decoders(pipe):
    with patched(pipe, propagation=EncoderPropagation(max_parallel=4)) as report:
        latents(pipe)
    assert max(report.last_run.decode_batches) > 1
    assert report.last_run.text_kv["computed"] == len(layers(pipe))


def test_texts_that_are_longer_than_a_tile(pipe64):
    """Kolors has 256 tokens, and prompts may be chained: keys are made once all the same, maps are refused."""
    width = pipe64.unet.config.cross_attention_dim
    texts = {f"{name}prompt_embeds": torch.randn(1, 200, width).double() for name in ("", "negative_")}
    stock = latents(pipe64, None, **texts)
    with patched(pipe64, "exact") as report:
        torch.testing.assert_close(latents(pipe64, None, **texts), stock, rtol=1e-9, atol=1e-9)
        assert report.last_run.text_kv == {"computed": len(layers(pipe64)), "reused": 19 * len(layers(pipe64))}
        assert not report.last_run.reasons
    ahead, slow = (EncoderPropagation(key_steps=3, max_parallel=2, parallel=parallel) for parallel in (True, False))
    with patched(pipe64, propagation=ahead):
        fast = latents(pipe64, None, **texts)
    with patched(pipe64, propagation=slow):
        torch.testing.assert_close(fast, latents(pipe64, None, **texts), rtol=1e-9, atol=1e-9)
    with difffast.collect_maps(pipe64), pytest.raises(RuntimeError, match=r"more than 128 text tokens \(200\)"):
        latents(pipe64, None, **texts)


def test_unknown_projections_are_not_remembered(pipe):
    layer = next(iter(layers(pipe).values()))
    layer.to_k.register_forward_hook(lambda *_: None)
    with patched(pipe, "exact") as report:
        latents(pipe)
    assert report.last_run.text_kv["computed"] == len(layers(pipe)) + 19


def test_nothing_is_kept_after_the_run(pipe):
    with patched(pipe, "exact"):
        latents(pipe)
        controller = find_controller(pipe.unet)
        assert not any(run._texts for run in controller._runs)


# Dispatch on the live processor


def _with_ip_adapter(pipe):
    """What load_ip_adapter leaves behind: a projection of image embeddings and its own processors on attn2."""
    from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection

    torch.manual_seed(1)
    width = pipe.unet.config.cross_attention_dim
    pipe.unet.encoder_hid_proj = MultiIPAdapterImageProjection([ImageProjection(16, width, num_image_text_embeds=4)])
    pipe.unet.config.encoder_hid_dim_type = "ip_image_proj"
    for layer in layers(pipe).values():
        layer.set_processor(IPAdapterAttnProcessor2_0(layer.inner_dim, width, num_tokens=(4,), scale=0.7))
    return {"ip_adapter_image_embeds": [torch.randn(2, 1, 16)]}


@pytest.mark.parametrize("when", ["before", "after"])
def test_ip_adapter(pipe, when):
    if when == "after":
        patch(pipe, "exact")
    options = _with_ip_adapter(pipe)
    report = patch(pipe, "exact") if when == "before" else None
    ours = latents(pipe, **options)
    if report is not None:
        assert report.last_run.text_kv["reused"] > 0
        assert not report.last_run.reasons
    unpatch(pipe)
    stock = latents(pipe, **options)
    assert largest(ours, stock) <= EXACT_FLOAT32
    pipe.set_ip_adapter_scale(0.0)
    assert largest(latents(pipe, **options), stock) > 1e-3, "the image counts"


def test_fused_projections(pipe):
    stock = latents(pipe)
    patch(pipe, "exact")
    pipe.unet.fuse_qkv_projections()
    assert all(isinstance(layer.processor, FusedAttnProcessor2_0) for layer in layers(pipe).values())
    report = patch(pipe, "exact")
    assert largest(latents(pipe), stock) <= EXACT_FLOAT32
    assert report.last_run.text_kv["computed"] == len(layers(pipe))
    pipe.unet.unfuse_qkv_projections()
    assert all(isinstance(layer.processor, AttnProcessor2_0) for layer in layers(pipe).values())


def test_other_processors_run_stock_and_say_so(pipe):
    pipe.enable_attention_slicing(1)
    assert any(isinstance(layer.processor, SlicedAttnProcessor) for layer in layers(pipe).values())
    stock = latents(pipe)
    with (
        ops.use_backend("reference", "convolution", "geglu"),
        patched(pipe, "exact") as report,
        pytest.warns(UserWarning, match="attn2 layers run stock.*SlicedAttnProc"),
    ):
        assert torch.equal(latents(pipe), stock)
    assert any("SlicedAttnProcessor" in reason for reason in report.last_run.reasons)


def test_a_subclassed_processor_is_not_taken_for_the_original(pipe):
    class Mine(AttnProcessor2_0):
        def __call__(self, *args, **kwargs):
            return super().__call__(*args, **kwargs) * 0

    for layer in layers(pipe).values():
        layer.set_processor(Mine())
    stock = latents(pipe)
    with (
        ops.use_backend("reference", "convolution", "geglu"),
        ops.use_backend("sdpa", "self_attention"),
        patched(pipe, "exact"),
        pytest.warns(UserWarning, match="Mine"),
    ):
        assert torch.equal(latents(pipe), stock)


def test_hooks_on_a_layer_see_every_call(pipe):
    layer, seen = next(iter(layers(pipe).values())), []
    layer.register_forward_hook(lambda _m, _a, out: seen.append(out.shape))
    with patched(pipe, "exact"), pytest.warns(UserWarning, match="the layer has hooks"):
        latents(pipe)
    assert len(seen) == 20


def test_layers_outside_a_run_are_stock(pipe):
    """Direct calls, training: nothing is remembered and gradients flow."""
    with patched(pipe, "exact"):
        sample, text = torch.randn(1, 4, 8, 8), torch.randn(1, 77, pipe.unet.config.cross_attention_dim)
        with pytest.warns(UserWarning, match="runs unpatched"):
            ours = pipe.unet(sample, 3, text).sample
        ours.sum().backward()
    assert torch.equal(pipe.unet(sample, 3, text).sample, ours)
    assert next(iter(layers(pipe).values())).to_k.weight.grad.abs().sum() > 0


def test_a_compiled_unet_runs_without_graph_breaks(pipe):
    stock = latents(pipe, steps=4)
    torch._dynamo.reset()
    pipe.unet.compile(backend="aot_eager", fullgraph=True)
    with patched(pipe, "exact"):
        assert largest(latents(pipe, steps=4), stock) <= EXACT_FLOAT32


# Maps


def test_threads_share_a_unet(pipe):
    """Each thread's own prompt and collector; text keys belong to runs."""
    prompts = ["a red circle", "a blue square"]
    pipes = [_sharing(pipe) for _ in prompts]
    alone = []
    for each, prompt in zip(pipes, prompts, strict=True):
        with patched(each, "exact"):
            alone.append(latents(each, prompt))
    for each in pipes:
        patch(each, "exact")
    results = {}

    def work(index):
        results[index] = latents(pipes[index], prompts[index])

    in_threads(work, 2)
    for each in pipes:
        unpatch(each)
    for index, expected in enumerate(alone):
        assert torch.equal(results[index], expected)


def _sharing(pipe):
    """A pipeline with the same modules and a scheduler of its own."""
    components = {**pipe.components, "scheduler": type(pipe.scheduler).from_config(pipe.scheduler.config)}
    other = type(pipe)(**components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    return other
