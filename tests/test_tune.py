"""tune measures candidates against stock and chooses the fastest inside the budget."""

import functools
import math
import re
import sys

import adapter_zoo
import pytest
import torch
import zoo
from diffusers import AutoencoderKL, DDIMScheduler, DiTPipeline, DiTTransformer2DModel
from PIL import Image
from sampling import latents

import difffast
from difffast import CfgReuse, EncoderPropagation, FeatureReuse, Plan, patch, patched
from difffast.plan import MeasuredPlan
from difffast.plots import new_figure
from difffast.surgery.subclass import is_swapped
from difffast.tune import EXACT, Candidate, Measured, Tuning, tune
from difffast.tuning import results
from difffast.tuning.costs import Profiles
from difffast.tuning.search import PlanSearch

tune_module = sys.modules["difffast.tune"]
SOME = (Candidate(FeatureReuse(2)), FeatureReuse(3), EncoderPropagation(key_steps=2))
WITH_GUIDANCE = Candidate(FeatureReuse(2), CfgReuse(2))


@pytest.fixture
def calls(pipe, monkeypatch):
    """Counts the pipeline's calls."""
    made = []
    plain = type(pipe).__call__

    @functools.wraps(plain)
    def counted(self, *args, **kwargs):
        made.append(args)
        return plain(self, *args, **kwargs)

    monkeypatch.setattr(type(pipe), "__call__", counted)
    return made


def test_it_measures_and_chooses(pipe, calls):
    stock = latents(pipe, steps=12)
    before = dict(vars(pipe))
    choice = tune(
        pipe, 12, budget=1.0, metric="latent_error", candidates=[*SOME, WITH_GUIDANCE], prompts=["one", "two"]
    )
    by_candidate = {str(row.candidate): row for row in choice.rows}
    assert set(by_candidate) == {str(EXACT), *map(str, SOME), str(WITH_GUIDANCE)}
    assert max(by_candidate[str(EXACT)].latent_error) < 1e-5
    assert min(by_candidate[str(FeatureReuse(2))].latent_error) > 1e-4
    assert by_candidate[str(FeatureReuse(3))].median("psnr_db") < by_candidate[str(EXACT)].median("psnr_db")
    assert choice.candidate == choice.rows[0].candidate  # everything is inside: the fastest
    assert all(len(row.seconds) == 2 for row in choice.rows)
    assert vars(pipe) == before
    assert torch.equal(latents(pipe, steps=12), stock)
    text = str(choice)
    assert text.count("chosen") == 1
    assert "FeatureReuse(interval=3, branch=0)" in text
    assert "FeatureReuse(interval=2, branch=0), CfgReuse(interval=2)" in text


def test_no_budget_leaves_the_exact_one(pipe):
    choice = tune(pipe, 8, budget=1000.0, candidates=SOME[:1], prompts=["one"])
    assert choice.candidate == EXACT


def test_measurements_are_kept_for_this_model_and_schedule(pipe, calls, tmp_path):
    cache = tmp_path / "deep" / "plans.json"
    options = {"candidates": SOME[:1], "prompts": ["one"], "cache": cache, "repeats": 1}
    first = tune(pipe, 8, **options)
    made = len(calls)
    assert made == 1 + 3  # warm-up, stock, exact, one candidate
    again = tune(pipe, 8, **options)
    assert len(calls) == made
    assert again == first
    more = tune(pipe, 8, **{**options, "repeats": 2})
    assert len(calls) == made + 3  # all of them once more
    before = {row.candidate: row.seconds for row in first.rows}
    assert all(row.seconds <= before[row.candidate] for row in more.rows)
    made = len(calls)
    tune(pipe, 8, **{**options, "candidates": SOME[:2]})
    assert len(calls) == made + 3  # stock again for its latents, after a warm-up, and the new candidate
    made = len(calls)
    tune(pipe, 9, **options)
    assert len(calls) == made + 4
    with torch.no_grad():
        pipe.unet.conv_in.weight.mul_(2)
    tune(pipe, 8, **options)
    assert len(calls) == made + 8


def test_a_patched_pipeline_keeps_its_patch_and_its_progress_bar(pipe):
    report = patch(pipe, propagation=FeatureReuse(4))
    pipe.set_progress_bar_config(disable=True, desc="mine")
    tune(pipe, 8, candidates=SOME[:1], prompts=["one"])
    assert pipe._progress_bar_config == {"disable": True, "desc": "mine"}
    latents(pipe, steps=8)
    assert "outer layers (branch 0)" in str(report)
    assert difffast.unpatch(pipe)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "lpips"}, "metric must be one of psnr_db, latent_error, got 'lpips'"),
        ({"prompts": []}, "prompts"),
        ({"budget": (1.0, 2.0, 3.0)}, "budget must be a number, or two for the median and the tail, got (1.0, 2.0"),
        ({"repeats": 0}, "repeats must be at least 1, got 0"),
    ],
)
def test_bad_values(pipe, options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        tune(pipe, 8, **options)


def test_plans_are_searched_and_weighed_against_presets_and_fewer_steps(pipe, calls, tmp_path, monkeypatch):
    stock = latents(pipe, steps=14)
    monkeypatch.setattr(tune_module, "SEARCH_PROMPTS", ["three", "one"])
    options = {"prompts": ["one", "two"], "repeats": 1, "cache": tmp_path / "plans.json"}
    tuning = tune(pipe, 14, budget=(25.0, 20.0), **options)
    kinds = {type(row.candidate.propagation) for row in tuning.rows}
    assert kinds == {type(EXACT.propagation), MeasuredPlan, Plan}
    assert {row.candidate.steps for row in tuning.rows} == {None, 6, 7, 8, 10, 11, 13}
    plans = [row for row in tuning.rows if isinstance(row.candidate.propagation, Plan)]
    assert 4 <= len(plans) <= 8
    assert all(row.candidate.propagation.total == 14 for row in plans)
    assert len({row.candidate.propagation for row in plans}) == len(plans)
    chosen = next(row for row in tuning.rows if row.candidate == tuning.candidate)
    assert chosen.inside("psnr_db", 25.0, 20.0)
    assert not any(row.inside("psnr_db", 25.0, 20.0) for row in tuning.rows[: tuning.rows.index(chosen)])
    text = str(tuning)
    assert "exact, 7 steps" in text
    assert "budget: psnr_db at least 25, tail at least 20; 14 steps" in text
    assert torch.equal(latents(pipe, steps=14), stock)
    made = len(calls)
    assert tune(pipe, 14, budget=(25.0, 20.0), **options) == tuning
    assert len(calls) == made + 1  # one look at the schedule; profile and measurements are in the file
    assert not is_swapped(pipe.unet)


@pytest.mark.slow
def test_errors_of_plans_are_what_the_search_expects(pipe):
    """Where one row of a plan is not full, its error is the profile's, measured by running the plan to the end."""
    search = PlanSearch(pipe, 12, ["a red circle", "two"], {}, Profiles(None, "key"))
    found = search.find(lambda left: None)
    assert [each.seconds for each in found] == sorted(each.seconds for each in found)
    assert found[-1].error == 0
    assert not found[-1].plan.shares
    one = [each for each in found if 0 < 12 - len(each.plan.key_steps) <= 1 and not each.plan.halves]
    for each in one:
        errors = []
        for seed, prompt in enumerate(["a red circle", "two"]):
            stock = latents(pipe, prompt, steps=12, seed=seed)
            with patched(pipe, propagation=each.plan, fused=False):
                errors.append(float((latents(pipe, prompt, steps=12, seed=seed) - stock).square().mean()))
        assert sum(errors) / 2 == pytest.approx(each.error, rel=0.5)
    assert one


def test_an_interrupted_search_goes_on(pipe, calls, tmp_path):
    cache = tmp_path / "plans.json"

    def search(prompts, show):
        return PlanSearch(pipe, 9, prompts, {}, Profiles(cache, "key")).find(show)

    def interrupt(left):
        if left == 3 and len(Profiles(cache, "key")._known) == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(["one", "two"], interrupt)
    assert not is_swapped(pipe.unet)
    made, seen = len(calls), []
    search(["one", "two"], seen.append)
    assert seen == list(range(seen[0], -1, -1))
    assert len(calls) == made + 1 + seen[0]
    whole = PlanSearch(pipe, 9, ["one", "two"], {}, Profiles(None, "key")).find(lambda left: None)
    assert len(whole) > 3


def test_every_second_of_many_prompts_is_searched_with(pipe, monkeypatch):
    given = []
    monkeypatch.setattr(PlanSearch, "find", lambda self, show: given.extend(self._prompts) or [])
    tuning = tune(pipe, 8, prompts=list("abcdefg"), repeats=1)
    assert given == ["b", "d", "f"]
    assert len(tuning.stock_seconds) == 4


def test_what_a_pipeline_cannot_have_is_not_searched_for(monkeypatch):
    pipe = zoo.ROWS["StableDiffusionPAGPipeline"].build()
    pipe.set_progress_bar_config(disable=True)
    monkeypatch.setattr(tune_module, "SEARCH_PROMPTS", ["two"])
    choice = tune(pipe, 8, prompts=["one"], repeats=1, height=32, width=32)
    assert not any(row.candidate.cfg for row in choice.rows)
    assert not any(
        row.candidate.propagation.halves for row in choice.rows if isinstance(row.candidate.propagation, Plan)
    )
    assert WITH_GUIDANCE.options == {"propagation": FeatureReuse(2), "cfg": CfgReuse(2)}


def test_the_tail_has_a_budget_of_its_own():
    row = Measured(EXACT, (1.0,) * 5, (30.0, 20.0, 40.0, 50.0, 60.0), (0.1, 0.2, 0.3, 0.4, 0.5))
    assert row.worst("psnr_db") == pytest.approx(24.0)  # 0.4 of the way from 20 to 30
    assert row.worst("latent_error") == pytest.approx(0.46)
    assert row.inside("psnr_db", 40.0, 24.0)
    assert not row.inside("psnr_db", 40.0, 24.1)
    assert not row.inside("psnr_db", 40.1)
    assert row.inside("latent_error", 0.3, 0.47)
    same = Measured(EXACT, (1.0,) * 2, (math.inf, math.inf), (0.0, 0.0))
    assert same.worst("psnr_db") == math.inf


def test_advice():
    plan = Plan(total=12, key_steps=tuple(range(11)), max_batch=1, forecasts=(11,))
    mine, shipped = Candidate(plan), Candidate(MeasuredPlan("balanced"), name="balanced")
    fewer = Candidate(EXACT.propagation, steps=9, name="exact, 9 steps")
    rows = tuple(
        Measured(each, (seconds,), (psnr,), (0.1,))
        for each, seconds, psnr in ((fewer, 1.0, 20.0), (shipped, 1.5, 30.0), (mine, 2.0, 35.0))
    )

    def advise(chosen):
        return list(Tuning(chosen, rows, (4.0,), "psnr_db", 20.0, 12).advice())

    assert advise(fewer) == ["fewer steps are better here: call with num_inference_steps=9"]
    assert advise(mine) == [
        "the preset 'balanced' is as good a choice: no plan that was found beats it in both time and error"
    ]
    assert advise(shipped) == []
    assert mine.label == "a plan: 11 full, 1 forecast"
    halves = Plan(total=12, key_steps=(0, *range(2, 12)), max_batch=1, halves=(1, 3), forecasts=())
    assert Candidate(halves).label == "a plan: 10 full, 2 half"
    assert list(Tuning(mine, rows, (4.0,), "psnr_db", 32.0, 12).advice()) == []  # the preset is outside that budget
    assert advise(EXACT) == ["nothing that approximates is inside the budget"]


def made_up():
    rows = [
        Measured(Candidate(FeatureReuse(interval)), (seconds,), (psnr,), (1 / psnr,))
        for interval, seconds, psnr in ((7, 1.0, 20.0), (5, 2.0, 18.0), (3, 3.0, 35.0), (2, 4.0, 30.0))
    ]
    return (*rows, Measured(EXACT, (9.0,), (math.inf,), (0.0,)))


def test_the_front_has_no_candidate_that_another_beats(tmp_path):
    choice = Tuning(Candidate(FeatureReuse(3)), made_up(), (10.0,), "psnr_db", 30.0, 50)
    assert [row.candidate for row in choice.front] == [*(Candidate(FeatureReuse(n)) for n in (7, 3)), EXACT]
    by_error = Tuning(Candidate(FeatureReuse(3)), made_up(), (10.0,), "latent_error", 0.03, 50)
    assert by_error.front == choice.front
    assert [row.inside("latent_error", 0.03) for row in choice.rows] == [False, False, True, False, True]
    choice.plot(tmp_path / "front.png")
    with Image.open(tmp_path / "front.png") as picture:
        assert picture.size[0] > 500


@pytest.mark.parametrize("exact", [138.0, math.inf])
def test_the_plot_shows_the_front_although_the_exact_one_is_far_away(tmp_path, monkeypatch, exact):
    """Of the axis' height the approximations, 18 to 35 dB, take most, and the legend lists no defaults."""
    drawn = []
    monkeypatch.setattr(results, "new_figure", lambda **options: drawn.append(new_figure(**options)) or drawn[-1])
    *others, _ = made_up()
    rows = (*others, Measured(EXACT, (9.0,), (exact,), (1e-6,)))
    Tuning(Candidate(FeatureReuse(3)), rows, (10.0,), "psnr_db", 30.0, 50).plot(tmp_path / "front.svg")
    (axis,) = drawn[0].axes
    low, high = axis.get_ylim()
    assert (35 - 18) / (high - low) > 0.7
    assert low < 18
    assert high > 35
    assert axis.texts[-1].get_text() == ("5: 138 dB" if exact == 138 else "5: same")
    labels = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert labels[0] == "1  FeatureReuse(interval=7, branch=0)"
    assert labels[-3:] == ["5  exact", "budget: 30", "stock"]
    Tuning(EXACT, rows[-1:], (10.0,), "psnr_db", 200.0, 50).plot(tmp_path / "alone.svg")


def test_the_plot_has_fewer_steps_as_a_line(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(results, "new_figure", lambda **options: drawn.append(new_figure(**options)) or drawn[-1])
    fewer = [
        Measured(Candidate(EXACT.propagation, steps=n, name=f"exact, {n} steps"), (n / 10,), (float(n),), (0.1,))
        for n in (20, 25, 35)
    ]
    rows = tuple(sorted((*made_up(), *fewer), key=lambda row: row.seconds))
    Tuning(EXACT, rows, (10.0,), "psnr_db", 30.0, 50).plot(tmp_path / "front.svg")
    (line,) = [line for line in drawn[0].axes[0].lines if line.get_label() == "exact, fewer steps"]
    assert line.get_xydata().tolist() == [[2.0, 20.0], [2.5, 25.0], [3.5, 35.0]]


def test_arguments_that_a_call_does_not_have_are_refused_before_anything_runs(pipe, calls):
    with pytest.raises(TypeError, match=r"takes no 'budgett' beside what tune gives it.*it takes: height"):
        tune(pipe, 9, budgett=3.0)
    with pytest.raises(TypeError, match=r"takes no 'guidance_scal' .*did you mean 'guidance_scale'"):
        tune(pipe, 9, guidance_scal=3.0)
    with pytest.raises(TypeError, match=r"prompts must be a sequence of strings, got the string 'a cat'"):
        tune(pipe, 9, prompts="a cat")
    with pytest.raises(ValueError, match=r"DiTPipeline has no UNet"):
        tune(_without_unet(), 9)
    assert not calls


def test_a_picture_that_a_pipeline_needs_is_asked_for():
    with pytest.raises(TypeError, match=r"needs 'image': tune\(pipe, steps, image=...\)"):
        tune(adapter_zoo.ROWS["StableDiffusionImageVariationPipeline"].build(), 9)


def _without_unet():
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=1, sample_size=8, norm_num_groups=4
    )
    return DiTPipeline(transformer=transformer, vae=AutoencoderKL(), scheduler=DDIMScheduler())
