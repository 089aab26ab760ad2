"""tune with what the pipelines of the support table are called with."""

import functools
import inspect
import warnings

import adapter_zoo
import if_zoo
import pytest
import video_zoo
import zoo

from difffast import EncoderPropagation, patched
from difffast.surgery.subclass import is_swapped
from difffast.tune import EXACT, Candidate, tune
from difffast.tuning.costs import Profiles
from difffast.tuning.runs import run_once
from difffast.tuning.search import PlanSearch

ROWS = {**zoo.ROWS, **adapter_zoo.ROWS, **if_zoo.ROWS, **video_zoo.ROWS}


def _recorded(name, monkeypatch):
    """A pipeline of the support table, the arguments of the call that it is tested with, and its steps."""
    pipe, given = ROWS[name].build(), {}
    pipe.set_progress_bar_config(disable=True)
    plain = type(pipe).__call__

    @functools.wraps(plain)
    def recorded(self, *args, **kwargs):
        given.update(inspect.signature(plain).bind(self, *args, **kwargs).arguments)
        return plain(self, *args, **kwargs)

    with monkeypatch.context() as patching, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        patching.setattr(type(pipe), "__call__", recorded)
        ROWS[name].run(pipe, zoo.Inputs())
    own = ("self", "prompt", "num_inference_steps", "generator", "output_type", "return_dict", "num_images_per_prompt")
    call = {key: value for key, value in {**given, **given.get("kwargs", {})}.items() if key not in (*own, "kwargs")}
    steps = given.get("num_inference_steps", 8)
    return pipe, call, steps


#: One of each kind of denoiser and of loop.
OF_EACH_KIND = {
    *("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionXLPipeline", "IFPipeline"),
    *("StableDiffusionControlNetPipeline", "AnimateDiffPipeline", "KandinskyV22Pipeline", "TextToVideoSDPipeline"),
}


#: KolorsImg2ImgPipeline forgets to pass the embeddings on that it is given; its text encoder is not to be had offline.
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in OF_EACH_KIND else pytest.mark.slow)
        for name in sorted(ROWS.keys() - {"KolorsImg2ImgPipeline"})
    ],
)
@pytest.mark.usefixtures("_one_thread")
def test_every_supported_pipeline(name, monkeypatch):
    """What a pipeline of the support table is called with, tune can be called with as well."""
    pipe, call, steps = _recorded(name, monkeypatch)
    candidates = [EncoderPropagation(key_steps=2)]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Default grid_sample")  # Diffusers', in Text2Video-Zero
        for reason in ROWS[name].reasons:
            warnings.filterwarnings("ignore", f"difffast: {reason}")
        tuning = tune(pipe, steps, prompts=["a red circle"], candidates=candidates, repeats=1, **call)
    assert {row.candidate for row in tuning.rows} == {EXACT, Candidate(candidates[0])}
    exact, other = (next(row for row in tuning.rows if (row.candidate == EXACT) == first) for first in (True, False))
    assert exact.latent_error[0] < 1e-3
    assert 0 < other.latent_error[0] < 10
    assert exact.psnr_db[0] > other.psnr_db[0]
    assert not is_swapped(pipe.unet)


#: Schedules that begin late or end early, layers that change, latents of other kinds.
OF_OTHER_LOOPS = {
    *("StableDiffusionPipeline: v-prediction, zero terminal SNR", "StableDiffusionXLPipeline: denoising_end"),
    *("StableDiffusionGLIGENPipeline", "StableDiffusionXLControlNetPAGImg2ImgPipeline", "I2VGenXLPipeline"),
    "StableVideoDiffusionPipeline",
}
#: They go through parts of the schedule, or all of it, several times.
WITHOUT_PLANS = {"TextToVideoZeroPipeline", "TextToVideoZeroSDXLPipeline", "AnimateDiffPipeline:FreeInit"}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(OF_EACH_KIND | OF_OTHER_LOOPS | WITHOUT_PLANS))
@pytest.mark.usefixtures("_one_thread")
def test_plans_for_each_kind_of_pipeline(name, monkeypatch):
    pipe, call, steps = _recorded(name, monkeypatch)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = PlanSearch(pipe, steps, ["a red circle"], call, Profiles(None, "key")).find(lambda left: None)
        for each in found[:: max(1, len(found) // 2)]:
            with patched(pipe, propagation=each.plan) as report:
                run_once(pipe, "a red circle", 0, steps, call)
            counts = report.last_run
            # GLIGEN's layers change on the way: a key step is forced, at a forecast or at another step.
            assert len(each.plan.forecasts) - counts.forced <= counts.forecast <= len(each.plan.forecasts)
            assert counts.forced == ("GLIGEN" in name)
    assert bool(found) == (name not in WITHOUT_PLANS)
    assert not found or found[-1].error == 0
    assert not is_swapped(pipe.unet)
