"""Every row of the support table, on a real Diffusers pipeline with random weights."""

import copy
import functools
import warnings

import adapter_zoo
import diffusers
import if_zoo
import more_zoo
import pytest
import torch
import video_zoo
import zoo
from diffusers_sources import NOT_ALWAYS, exists
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling import largest, scheduler
from tolerances import LATENTS_FLOAT64

from difffast import CfgReuse, EncoderPropagation, FeatureReuse, patch, patched, support, unpatch
from difffast.surgery.subclass import is_swapped

pytestmark = pytest.mark.usefixtures("_one_thread")

ROWS = {**zoo.ROWS, **adapter_zoo.ROWS, **if_zoo.ROWS, **video_zoo.ROWS, **more_zoo.ROWS}

#: Rows that combine what other rows have one by one: with -m slow.
COMBINED = {
    *(f"StableDiffusion{XL}ControlNetPAGPipeline" for XL in ("", "XL")),
    *("StableDiffusionControlNetPAGInpaintPipeline", "StableDiffusionXLControlNetPAGImg2ImgPipeline"),
    *(f"StableDiffusionXLControlNet{kind}Pipeline" for kind in ("Inpaint", "Img2Img", "UnionInpaint", "UnionImg2Img")),
    *(f"StableDiffusion{XL}PAG{kind}Pipeline" for XL in ("", "XL") for kind in ("Inpaint", "Img2Img")),
    *(f"AnimateDiff{kind}ControlNetPipeline" for kind in ("VideoToVideo", "Sparse")),
    *("KolorsImg2ImgPipeline", "KolorsPAGPipeline", "IFInpaintingPipeline", "IFImg2ImgSuperResolutionPipeline"),
    *(f"AnimateDiff{kind}Pipeline" for kind in ("ControlNet", "PAG", "VideoToVideo", "SDXL")),
    *(f"StableDiffusionControlNet{kind}Pipeline" for kind in ("Img2Img", "Inpaint")),
    *(f"StableDiffusionXL{kind}Pipeline" for kind in ("ControlNetUnion", "InstructPix2Pix", "PAG", "Inpaint")),
    *("PIAPipeline", "VideoToVideoSDPipeline", "KandinskyV22ControlnetPipeline", "TextToVideoZeroSDXLPipeline"),
    *("IFInpaintingSuperResolutionPipeline", "KandinskyV22Img2ImgPipeline"),
    *("StableDiffusionXLAdapterPipeline", "StableDiffusionInstructPix2PixPipeline", "DreamLiteMobilePipeline"),
    *("StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLPipeline: denoising_end"),
    *(f"AnimateDiffPipeline:{kind}" for kind in ("FreeInit", "FreeNoise")),
    *(f"StableDiffusionControlNetPipeline: {kind}" for kind in ("two", "guess mode")),
    *(f"StableDiffusionXL{kind}" for kind in ("Img2ImgPipeline: refiner", "Pipeline: two IP-Adapters")),
}

#: Half of the steps share features, in segments of different lengths.
KEYS = (0, 1, 4, 6)
AHEAD = EncoderPropagation(key_steps=KEYS, max_parallel=3)
STEP_BY_STEP = EncoderPropagation(key_steps=KEYS, parallel=False)
ALL_KEY = EncoderPropagation(key_steps=1)


@functools.cache
def built(name):
    pipe = ROWS[name].build()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _marks(name):
    if not exists(pipeline := name.partition(":")[0]):
        return pytest.mark.skip(reason=f"Diffusers {diffusers.__version__} has no {pipeline}: {NOT_ALWAYS[pipeline]}")
    return pytest.mark.slow if ROWS[name].slow or name in COMBINED else ()


@pytest.fixture(params=[pytest.param(name, marks=_marks(name)) for name in ROWS])
def row(request):
    return ROWS[request.param]


@pytest.fixture
def pipe(request, row):
    """The row's pipeline in float64."""
    name = next(name for name, each in ROWS.items() if each is row)
    assert type(built(name)).__name__ == name.partition(":")[0]
    return copy.deepcopy(built(name)).to(dtype=torch.float64)


def run(row, pipe, inputs=None):
    """The last latents of a run, in which nothing but what the row says may be warned of."""
    with warnings.catch_warnings():
        for reason in row.reasons:
            warnings.filterwarnings("ignore", f"difffast: {reason}")
        latents = row.run(pipe, inputs or zoo.Inputs())
    assert latents.isfinite().all()
    return latents


def assert_as_planned(row, stats):
    """Nothing ran stock; a run that enters late forces one key step, and no other."""
    assert stats.stock == 0
    assert stats.forced <= 1
    assert all(reason.startswith(row.reasons) for reason in stats.reasons)


def test_every_supported_pipeline_has_a_row():
    assert {name.partition(":")[0] for name in ROWS} == set(support.PIPELINES)
    assert set(ROWS) >= COMBINED


def test_a_pipeline(row, pipe):
    """All-key is stock bit for bit, look-ahead is step by step, other inputs after it are right, unpatch is exact."""
    supported = support.support_of(type(pipe))
    state, classes = vars(pipe.unet).copy(), {name: type(module) for name, module in pipe.unet.named_modules()}
    stock, stock_other = run(row, pipe), run(row, pipe, row.other)
    with patched(pipe, propagation=ALL_KEY, fused=False):
        assert torch.equal(run(row, pipe), stock)
        assert torch.equal(run(row, pipe, row.other), stock_other)
    with patched(pipe, "exact"):
        assert largest(run(row, pipe), stock) <= LATENTS_FLOAT64

    with patched(pipe, propagation=STEP_BY_STEP):
        slow, slow_other = run(row, pipe), run(row, pipe, row.other)
    with patched(pipe, propagation=AHEAD) as report:
        fast = run(row, pipe)
        stats = report.last_run
        other = run(row, pipe, row.other)
        again = run(row, pipe)
    assert largest(fast, slow) <= LATENTS_FLOAT64
    assert largest(other, slow_other) <= LATENTS_FLOAT64
    assert torch.equal(again, fast)
    assert largest(fast, stock) > 1000 * LATENTS_FLOAT64, "propagation must have taken place"
    assert stats.propagated > 0
    assert_as_planned(row, stats)
    assert (max(stats.decode_batches) > 1) == supported.parallel
    assert any("one at a time" in note for note in report.notes) != supported.parallel

    reuse = FeatureReuse(interval=2)
    if supported.reuse:
        with patched(pipe, propagation=FeatureReuse(interval=1), fused=False):
            assert torch.equal(run(row, pipe), stock)
        with patched(pipe, propagation=reuse) as report:
            reused = run(row, pipe)
        assert report.last_run.reused > 0
        assert_as_planned(row, report.last_run)
        assert largest(reused, stock) > 1000 * LATENTS_FLOAT64
    else:
        with pytest.raises(ValueError, match="reuse"):
            patch(pipe, propagation=reuse)

    if not supported.prior_noise:
        with pytest.raises(ValueError, match="prior noise"):
            patch(pipe, propagation=EncoderPropagation(prior_noise=0.003))

    halves = {"propagation": AHEAD, "cfg": CfgReuse(2)}
    if supported.guidance or not hasattr(pipe, "do_classifier_free_guidance"):
        with pytest.raises(ValueError, match=f"guidance cannot be reused with {type(pipe).__name__}"):
            patch(pipe, **halves)
    else:
        with patched(pipe, **halves) as report:
            fast = run(row, pipe)
        assert report.last_run.halves > 0 or any("guidance is off" in reason for reason in report.last_run.reasons)
        with patched(pipe, **{**halves, "propagation": STEP_BY_STEP}):
            assert largest(fast, run(row, pipe)) <= LATENTS_FLOAT64

    unpatch(pipe)
    assert vars(pipe.unet) == state
    assert {name: type(module) for name, module in pipe.unet.named_modules()} == classes
    assert not is_swapped(pipe.scheduler)
    assert torch.equal(run(row, pipe), stock)


class StopRunError(Exception):
    pass


def interrupted(row, pipe, inputs, calls):
    """A run that an exception ends in the scheduler's step after so many of them."""
    plain, seen = pipe.scheduler.step, []

    def step(*args, **kwargs):
        seen.append(1)
        if len(seen) > calls:
            raise StopRunError
        return plain(*args, **kwargs)

    pipe.scheduler.step = functools.wraps(plain)(step)
    try:
        with pytest.raises(StopRunError):
            run(row, pipe, inputs)
    finally:
        del pipe.scheduler.step


@pytest.mark.slow
@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_run_of_any_pipeline(data):
    """After a run that was cut off, look-ahead is step by step, whatever is asked for."""
    name = data.draw(st.sampled_from(sorted(name for name in ROWS if exists(name.partition(":")[0]))))
    row = ROWS[name]
    pipe = copy.deepcopy(built(name)).to(dtype=torch.float64)
    # Some step with arguments that not every scheduler takes.
    free = not name.startswith(("DDIMPipeline", "Marigold"))
    if type(pipe.scheduler).__name__ == "DDIMScheduler" and free and data.draw(st.booleans()):
        other = data.draw(st.sampled_from(["PNDM", "Euler", "Heun", "DPM++ 2M", "UniPC"]))
        pipe.scheduler = type(scheduler(other)).from_config(pipe.scheduler.config)
    steps = data.draw(st.integers(8, 14))
    inputs = zoo.Inputs(
        prompt=data.draw(st.sampled_from(["a red circle", "two cats"])),
        seed=data.draw(st.integers(0, 9)),
        images=data.draw(st.integers(1, row.other.images)),
        size=data.draw(st.sampled_from([zoo.Inputs.size, row.other.size])),
        steps=steps,
    )
    keys = data.draw(
        st.one_of(st.integers(1, 5), st.floats(0.1, 0.5), st.sets(st.integers(0, 7)).map(lambda s: s | {0}))
    )
    ahead = EncoderPropagation(key_steps=keys, max_parallel=data.draw(st.integers(1, 5)))
    options = {}
    if hasattr(pipe, "do_classifier_free_guidance") and not support.support_of(type(pipe)).guidance:
        interval = data.draw(st.sampled_from([None, 1, 2, 3]))
        options["cfg"] = interval and CfgReuse(interval, start=data.draw(st.floats(0, 0.5)))
    with patched(pipe, propagation=ahead, **options):
        interrupted(row, pipe, zoo.Inputs("something else", seed=11, steps=steps), data.draw(st.integers(0, 5)))
        fast = run(row, pipe, inputs)
    with patched(pipe, propagation=EncoderPropagation(key_steps=keys, parallel=False), **options):
        assert largest(fast, run(row, pipe, inputs)) <= LATENTS_FLOAT64
