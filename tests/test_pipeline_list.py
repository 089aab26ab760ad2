"""Every UNet pipeline of the installed Diffusers is supported, or can have what is exact only, for a written reason."""

import copy
import inspect

import diffusers
import more_zoo
import pytest
import torch
import zoo
from diffusers.models import embeddings
from diffusers_sources import exists, find_unet_pipelines
from sampling import largest
from test_support import StopRunError, run
from tolerances import LATENTS_FLOAT64

from difffast import (
    CfgReuse,
    EncoderPropagation,
    FeatureReuse,
    SemanticBinding,
    patch,
    patched,
    support,
    tune,
    tuning,
    unpatch,
)
from difffast.surgery.subclass import is_swapped

pytestmark = pytest.mark.usefixtures("_one_thread")

EXACT = [pytest.param(name, marks=() if name == "OwnPipeline" else pytest.mark.slow) for name in more_zoo.EXACT_ROWS]


def test_every_unet_pipeline_of_diffusers_has_been_looked_at():
    """A new one is named here: put it into ``support.PIPELINES``, or with its reason into ``support.EXACT_ONLY``."""
    found, known = set(find_unet_pipelines()), support.PIPELINES.keys() | support.EXACT_ONLY.keys()
    assert sorted(found - known) == [], f"new in Diffusers {diffusers.__version__}, and nobody has looked at them"
    assert sorted(known - found) == sorted(name for name in known if not exists(name)), "gone, or found nowhere"


def test_what_is_found_is_what_can_be_imported():
    """By another way: classes that can be imported, and whose arguments are annotated with a UNet."""
    for name in ("StableDiffusionPipeline", "TextToVideoZeroSDXLPipeline", "UnCLIPPipeline", "AudioDiffusionPipeline"):
        assert name in find_unet_pipelines()
    for name in ("FluxPipeline", "StableDiffusion3Pipeline", "KandinskyPriorPipeline", "DiffusionPipeline"):
        assert name not in find_unet_pipelines()


def test_every_pipeline_has_one_entry_and_every_refusal_a_reason():
    assert not support.PIPELINES.keys() & support.EXACT_ONLY.keys()
    assert all(len(reason.split()) >= 3 for reason in support.EXACT_ONLY.values())
    deprecated = {name for name, reason in support.EXACT_ONLY.items() if reason == "deprecated in Diffusers"}
    onnx = {name for name, reason in support.EXACT_ONLY.items() if "ONNX" in reason}
    assert set(support.EXACT_ONLY) - deprecated - onnx == set(more_zoo.EXACT_ROWS) - {"OwnPipeline"}
    assert not any(entry.exact_only for entry in support.PIPELINES.values())


@pytest.mark.parametrize("name", EXACT)
def test_what_shares_nothing_takes_what_is_exact(name):
    """Stock's latents within rounding, bit for bit with stock layers; all else is refused with the reason."""
    row = more_zoo.EXACT_ROWS[name]
    pipe = row.build()
    pipe.set_progress_bar_config(disable=True)
    pipe.to(dtype=torch.float64)
    reason = support.EXACT_ONLY.get(name, "how it samples is not known")
    stock, stock_other = run(row, pipe), run(row, pipe, row.other)
    for options in ({}, {"preset": "turbo"}, {"preset": "exact", "propagation": FeatureReuse(1)}):
        with pytest.raises(ValueError, match=rf"{name} can only have what is exact.*{reason}"):
            patch(pipe, **options)
    prior_noise = EncoderPropagation(key_steps=1, prior_noise=0.003)
    for options in ({"propagation": prior_noise}, {"binding": SemanticBinding()}, {"cfg": CfgReuse(2)}):
        with pytest.raises(ValueError, match=reason):
            patch(pipe, "exact", **options)
    assert not is_swapped(pipe.unet)

    with patched(pipe, "exact", fused=False):
        assert torch.equal(run(row, pipe), stock)
        assert torch.equal(run(row, pipe, row.other), stock_other)
    with patched(pipe, "exact") as report:
        assert largest(run(row, pipe), stock) <= LATENTS_FLOAT64
        stats = report.last_run
        assert largest(run(row, pipe, row.other), stock_other) <= LATENTS_FLOAT64
    assert any(reason in note for note in report.notes)
    assert stats.key > 0
    assert stats.stock == stats.propagated == stats.reused == stats.halves == 0
    assert all(each.startswith(row.reasons) for each in stats.reasons)
    assert not is_swapped(pipe.unet)
    assert torch.equal(run(row, pipe), stock)


def test_an_unknown_pipeline_is_really_served_by_the_operators():
    """Its UNet gets copies of the times, so that no position is known: its texts are remembered all the same."""
    row = more_zoo.EXACT_ROWS["OwnPipeline"]
    pipe = row.build()
    pipe.set_progress_bar_config(disable=True)
    with patched(pipe, "exact") as report:
        run(row, pipe)
    layers = sum(name.endswith("attn2") for name, _ in pipe.unet.named_modules())
    assert report.last_run.key == 2 * zoo.Inputs.steps  # guidance in two calls
    assert report.last_run.text_kv == {"computed": 2 * layers, "reused": 2 * layers * (zoo.Inputs.steps - 1)}


def test_an_unknown_pipeline_beside_a_known_one():
    """They share a UNet, not a scheduler: each runs as it was patched."""
    known = zoo.ROWS["StableDiffusionPipeline"].build()
    unknown = more_zoo.OwnPipeline(known.unet, copy.deepcopy(known.scheduler))
    for pipe in (known, unknown):
        pipe.set_progress_bar_config(disable=True)
        pipe.to(dtype=torch.float64)
    own = more_zoo.EXACT_ROWS["OwnPipeline"]
    stock = run(own, unknown)
    share = EncoderPropagation(key_steps=2)
    with patched(known, propagation=share):
        expected = zoo.sample(known, zoo.Inputs())
    reports = patch(known, propagation=share), patch(unknown, "exact")
    assert torch.equal(zoo.sample(known, zoo.Inputs()), expected)
    assert largest(run(own, unknown), stock) <= LATENTS_FLOAT64
    assert [(each.last_run.key, each.last_run.propagated) for each in reports] == [(4, 4), (16, 0)]
    unpatch([known, unknown])
    assert not is_swapped(known.unet)


def test_a_subclass_of_what_shares_nothing_shares_nothing_either():
    class Newer(diffusers.StableDiffusionLatentUpscalePipeline):
        pass

    assert support.support_of(Newer).exact_only == support.EXACT_ONLY["StableDiffusionLatentUpscalePipeline"]
    assert support.support_of(more_zoo.OwnPipeline) is None


def test_an_unknown_unet_is_refused_by_the_names_of_the_known_ones():
    pipe = more_zoo.OwnPipeline(zoo.unet(), zoo.parts_of_sd()["scheduler"])
    pipe.unet = torch.nn.Linear(1, 1)
    with pytest.raises(
        ValueError, match=r"OwnPipeline\.unet is a Linear, which difffast does not know; UNets that it kno"
    ):
        patch(pipe, "exact")
    with pytest.raises(ValueError, match=", ".join(support.UNETS)):
        patch(pipe)


def test_tuning_an_unknown_pipeline_measures_what_is_exact_alone():
    tuning = tune(more_zoo.own(), 4, prompts=["a red circle"], repeats=1)
    assert {row.candidate.steps for row in tuning.rows} == {None, 2, 3}
    assert all(row.candidate.options["propagation"] == EncoderPropagation(key_steps=1) for row in tuning.rows)
    exact = next(row for row in tuning.rows if row.candidate.steps is None)
    assert exact.psnr_db[0] > 80
    assert tuning.options["propagation"] == EncoderPropagation(key_steps=1)


@pytest.mark.skipif(not exists("DreamLiteMobilePipeline"), reason="DreamLite came with Diffusers 0.39.0")
def test_copies_of_times_are_rounded_ahead_as_they_are_at_their_step(monkeypatch):
    """DreamLite's UNet gets the times in the latents' dtype; of steps that are decoded ahead as well."""
    row, seen = more_zoo.ROWS["DreamLiteMobilePipeline"], []
    pipe = row.build().to(dtype=torch.bfloat16)
    pipe.set_progress_bar_config(disable=True)
    embed = embeddings.get_timestep_embedding

    def watch(timesteps, *args, **kwargs):
        seen.extend(timesteps.tolist())
        return embed(timesteps, *args, **kwargs)

    monkeypatch.setattr(embeddings, "get_timestep_embedding", watch)  # a hook in the UNet would run at every step
    run(row, pipe)
    stock = sorted(seen)
    seen.clear()
    with patched(pipe, propagation=EncoderPropagation(key_steps=4, max_parallel=3), fused=False) as report:
        run(row, pipe)
    assert max(report.last_run.decode_batches) > 1
    assert len(set(stock)) == zoo.Inputs.steps + 1, "the picture's size is embedded in the same way"
    assert set(seen) == set(stock)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in more_zoo.ROWS if exists(name.partition(":")[0])])
def test_tuning_asks_for_latents_where_a_pipeline_returns_them(name, monkeypatch):
    """The rows of the zoo say "pt", or nothing at all, where it does not."""
    pipe, asked = more_zoo.ROWS[name].build(), []

    def call(self, *args, output_type="pt", **kwargs):
        asked.append(output_type)
        raise StopRunError

    call.__signature__ = inspect.signature(type(pipe).__call__)
    monkeypatch.setattr(type(pipe), "__call__", call)
    with pytest.raises(StopRunError):
        more_zoo.ROWS[name].run(pipe, zoo.Inputs())
    assert asked == [tuning.runs._choose_output(pipe)]
