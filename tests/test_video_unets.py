"""The split of the video UNets, on the calls that their pipelines make."""

import functools

import pytest
import torch
import video_zoo
import zoo
from sampling import largest
from tolerances import LATENTS_FLOAT64, OUTPUT_FLOAT64

from difffast import EncoderPropagation, collect_maps, patch, patched
from difffast.layers import cross_attention, text_projections
from difffast.steering.binding.method import SemanticBinding
from difffast.surgery.calls import bind_arguments
from difffast.surgery.subclass import is_swapped
from difffast.unet import split
from difffast.unet.outer_layers import run_recording, run_reuse
from difffast.unet.parts import count_skips, run_whole

pytestmark = pytest.mark.usefixtures("_one_thread")

#: A row for every class of UNets and every way in which pipelines call it.
NAMES = (
    "AnimateDiffPipeline",
    "AnimateDiffPipeline:FreeNoise",
    "AnimateDiffSDXLPipeline",
    "StableVideoDiffusionPipeline",
    "TextToVideoSDPipeline",
    "I2VGenXLPipeline",
)

#: What has done its work once the features are there.
ENCODER = (
    "image_latents_proj_in",
    "image_latents_temporal_encoder",
    "conv_in",
    "transformer_in",
    "down_blocks",
    "mid_block",
)


@functools.cache
def built(name):
    pipe = video_zoo.ROWS[name].build()
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(dtype=torch.float64)


class _Called(Exception):  # noqa: N818 - no error: it ends a run
    pass


@pytest.fixture(params=NAMES, scope="module")
def called(request):
    """A pipeline and the arguments of its UNet's first call in a run."""
    row, pipe, calls = video_zoo.ROWS[request.param], built(request.param), []

    def stop(unet, args, kwargs):
        calls.append(bind_arguments(unet, args, kwargs))
        raise _Called

    handle = pipe.unet.register_forward_pre_hook(stop, with_kwargs=True)
    with pytest.raises(_Called):
        row.run(pipe, row.other)
    handle.remove()
    return pipe, calls[0]


@torch.no_grad()
def test_two_halves_are_the_whole_bit_for_bit(called):
    unet, call = called[0].unet, called[1]
    whole = run_whole(unet, call)
    assert whole.shape[:1] + whole.shape[-2:] == call["sample"].shape[:1] + call["sample"].shape[-2:]
    (halves,) = split.decode(unet, split.encode(unet, call), call, call["timestep"].reshape(1))
    assert torch.equal(whole, halves)


@torch.no_grad()
def test_a_batch_of_decoders_is_one_at_a_time(called):
    """And none of them reads the latents, or runs a layer of the encoder."""
    unet, call = called[0].unet, called[1]
    features = split.encode(unet, call)
    ran = []
    encoder = [child for name in ENCODER if hasattr(unet, name) for child in unet.get_submodule(name).modules()]
    handles = [child.register_forward_hook(lambda child, *_: ran.append(child)) for child in encoder]
    times = torch.stack([call["timestep"], call["timestep"] * 0.9, call["timestep"] * 0.5])
    together = split.decode(unet, features, {**call, "sample": call["sample"] * float("nan")}, times)
    for handle in handles:
        handle.remove()
    assert not ran
    alone = [split.decode(unet, features, call, t.reshape(1))[0] for t in times]
    for a, b in zip(together, alone, strict=True):
        assert largest(a, b) <= OUTPUT_FLOAT64
    assert largest(alone[0], alone[2]) > 100 * OUTPUT_FLOAT64, "the time step must matter"


@torch.no_grad()
def test_reuse_of_the_same_latents_is_the_whole(called):
    """At every branch all layers run that depend on the latents, those over the frames included."""
    unet, call = called[0].unet, called[1]
    whole = run_whole(unet, call)
    for branch in range(count_skips(unet)):
        recorded, deep = run_recording(unet, call, branch)
        assert torch.equal(recorded, whole)
        assert torch.equal(run_reuse(unet, call, [deep], torch.ones(1), branch), whole), branch


@torch.no_grad()
def test_patched_calls_return_the_class_of_stock_ones(called):
    pipe, call = called
    stock = pipe.unet(**{**call, "return_dict": True})
    pipe.scheduler.set_timesteps(8)
    with patched(pipe, "exact"):
        ours = pipe.unet(**{**call, "timestep": pipe.scheduler.timesteps[0], "return_dict": True})
        (alone,) = pipe.unet(**{**call, "timestep": pipe.scheduler.timesteps[0], "return_dict": False})
    assert type(ours) is type(stock)
    assert torch.equal(ours.sample, alone)


@pytest.mark.parametrize("name", ["AnimateDiffPipeline", "AnimateDiffPipeline:FreeNoise"])
def test_maps_of_steps_decoded_together_belong_to_their_frames(name):
    row, pipe = video_zoo.ROWS[name], built(name)
    found = []
    for parallel in (True, False):
        propagation = EncoderPropagation(key_steps=4, max_parallel=4, parallel=parallel)
        with patched(pipe, propagation=propagation), collect_maps(pipe, layers="up_blocks.*") as maps:
            row.run(pipe, row.other)
        found.append(maps.grid(rows="all"))
    frames = row.other.frames * row.other.images * 2  # with guidance
    height, width = (pixels // 4 for pixels in row.other.size)
    assert found[0].shape == (frames, 77, height, width)
    assert largest(*found) <= LATENTS_FLOAT64
    assert largest(found[0][0], found[0][-1]) > 1000 * LATENTS_FLOAT64, "frames must differ"


@pytest.mark.parametrize("name", ["StableVideoDiffusionPipeline", "TextToVideoSDPipeline", "I2VGenXLPipeline"])
def test_no_maps_where_the_text_is_changed_on_its_way(name):
    pipe = built(name)
    with pytest.raises(ValueError, match="no attention maps can be collected from a"), collect_maps(pipe):
        pass
    assert not is_swapped(pipe.unet)


def test_no_binding_of_videos():
    pipe = built("AnimateDiffPipeline")
    with pytest.raises(ValueError, match="binding is for pictures, got a UNetMotionModel"):
        patch(pipe, binding=SemanticBinding())
    assert not is_swapped(pipe.unet)


@pytest.mark.parametrize(
    ("name", "rows"),
    [
        ("AnimateDiffPipeline", 2),  # with guidance
        ("AnimateDiffPipeline:FreeNoise", 2 * 2),  # every frame has a text of its own
        ("StableVideoDiffusionPipeline", 2),
        ("TextToVideoSDPipeline", 2),
    ],
)
def test_keys_and_values_are_made_once_a_prompt_of_rows_that_differ(name, rows, monkeypatch):
    row, pipe = video_zoo.ROWS[name], built(name)
    layers = len(cross_attention.find_layers(pipe.unet))
    (project, names), seen = text_projections.PROJECTIONS["AttnProcessor2_0"], []

    def counted(layer, text):
        seen.append(len(text))
        return project(layer, text)

    monkeypatch.setitem(text_projections.PROJECTIONS, "AttnProcessor2_0", (counted, names))
    with patched(pipe, propagation=EncoderPropagation(key_steps=4)) as report:
        row.run(pipe, zoo.Inputs())
    assert report.last_run.text_kv["computed"] == layers > 0
    assert seen == [rows] * layers
