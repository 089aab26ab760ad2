"""Whatever interrupts patch or unpatch: nothing is half done, and what was patched before is patched again."""

import copy
import sys
import threading
import warnings

import pytest
import torch
from diffusers import StableDiffusionImageVariationPipeline, StableDiffusionPipeline, UNet2DConditionModel
from sampling import latents

from difffast import (
    CfgReuse,
    EncoderPropagation,
    FeatureReuse,
    SemanticBinding,
    collect_maps,
    patch,
    patched,
    unpatch,
)
from difffast.sampling import parts
from difffast.sampling.controller import find_controller
from difffast.sampling.prior_noise import PriorNoise
from difffast.sampling.settings import Settings
from difffast.sites import find_site, lock
from difffast.surgery.subclass import is_swapped
from difffast.surgery.undo import UndoStack

EVERYTHING = {"propagation": EncoderPropagation(key_steps=3, prior_noise=0.003), "cfg": CfgReuse(1)}


def swapped(pipe):
    """The names of all that has a class of its own."""
    names = [name for name, module in pipe.unet.named_modules() if is_swapped(module)]
    return [*names, *(name for name in ("scheduler",) if is_swapped(pipe.scheduler)), *(["pipe"] * is_swapped(pipe))]


class Interrupt:
    """Raises KeyboardInterrupt at the n-th call into difffast inside the block."""

    def __init__(self, at):
        self.left = at

    def __call__(self, frame, event, _argument):
        # A generator expression may be called to be closed: Python reports and ignores what is raised there.
        here = frame.f_globals.get("__name__", "").startswith("difffast.") and frame.f_code.co_name != "<genexpr>"
        if event == "call" and here:
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt

    def __enter__(self):
        sys.setprofile(self)
        return self

    def __exit__(self, *_):
        sys.setprofile(None)


def calls(function, *args, **kwargs):
    with Interrupt(-1) as counter:
        function(*args, **kwargs)
    return -1 - counter.left


POSITIONS = [each / 24 for each in range(24)]


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("earlier", [False, True])
def test_an_interrupted_patch_leaves_no_trace(pipe, position, earlier):
    if earlier:
        patch(pipe, propagation=FeatureReuse(3))
    count = calls(patch, pipe, **EVERYTHING)
    unpatch(pipe)
    if earlier:
        patch(pipe, propagation=FeatureReuse(3))
    with pytest.raises(KeyboardInterrupt), Interrupt(1 + int(position * count)):
        patch(pipe, **EVERYTHING)
    if earlier:
        assert patch_of(pipe) == FeatureReuse(3)
        assert unpatch(pipe)
    assert swapped(pipe) == []
    assert not unpatch(pipe)


def patch_of(pipe):
    return find_site(pipe).settings.propagation


@pytest.mark.parametrize("position", POSITIONS)
def test_an_interrupted_unpatch_is_finished_by_the_next(pipe, position):
    patch(pipe, **EVERYTHING)
    count = calls(unpatch, pipe)
    patch(pipe, **EVERYTHING)
    with pytest.raises(KeyboardInterrupt), Interrupt(1 + int(position * count)):
        unpatch(pipe)
    unpatch(pipe)
    assert swapped(pipe) == []


@pytest.mark.parametrize("part", [part.__name__ for part in parts.PARTS])
def test_an_error_in_a_part_rolls_all_of_them_back(pipe, part, monkeypatch):
    stock = latents(pipe)

    def broken(*_):
        raise RuntimeError(part)

    monkeypatch.setattr(parts, "PARTS", [broken if each.__name__ == part else each for each in parts.PARTS])
    monkeypatch.setattr("difffast.sites.PARTS", parts.PARTS)
    with pytest.raises(RuntimeError, match=part):
        patch(pipe, **EVERYTHING)
    assert swapped(pipe) == []
    assert type(pipe.unet) is UNet2DConditionModel
    assert torch.equal(latents(pipe), stock)


def test_an_error_in_the_second_of_two_pipelines(pipe, monkeypatch):
    twin = StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    twin.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    adopt = Settings.adopt_scheduler

    def broken(self):
        adopt(self)
        if self.pipe() is twin:
            raise OSError("no more")

    monkeypatch.setattr(Settings, "adopt_scheduler", broken)
    with pytest.raises(OSError, match="no more"):
        patch([pipe, twin], **EVERYTHING)
    assert swapped(pipe) == swapped(twin) == []


def test_binding_without_a_prompt_is_refused_and_changes_nothing(pipe):
    other = StableDiffusionImageVariationPipeline(
        vae=pipe.vae,
        image_encoder=None,
        unet=pipe.unet,
        scheduler=pipe.scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    with pytest.raises(ValueError, match="StableDiffusionImageVariationPipeline has no encode_prompt"):
        patch(other, binding=SemanticBinding("object"))
    assert swapped(pipe) == []


def test_a_pipeline_that_is_dropped_leaves_nothing_behind(pipe):
    stock = latents(pipe)
    own = StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    own.set_progress_bar_config(disable=True)
    patch(own, **EVERYTHING)
    latents(own)
    twin = StableDiffusionPipeline(
        **{**pipe.components, "scheduler": type(pipe.scheduler).from_config(pipe.scheduler.config)},
        requires_safety_checker=False,
    )
    patch(twin, "exact")
    del own
    assert not is_swapped(pipe.scheduler)
    assert is_swapped(pipe.unet), "another pipeline needs it"
    del twin
    assert swapped(pipe) == []
    assert find_controller(pipe.unet) is None
    assert torch.equal(latents(pipe), stock)


def test_a_pipeline_that_is_dropped_in_the_middle_of_a_patch(pipe, monkeypatch):
    """As the garbage collector does it: what it has left is taken out as soon as the patch is done."""
    owns = [StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)]
    patch(owns[0], "exact")

    def drop(*_):
        owns.clear()
        assert is_swapped(pipe.unet)

    monkeypatch.setattr("difffast.sites.PARTS", [drop, *parts.PARTS])
    patch(pipe, "exact")
    assert is_swapped(pipe.unet)
    assert len(find_controller(pipe.unet).settings) == 1
    unpatch(pipe)
    assert swapped(pipe) == []


def test_a_pipeline_that_is_dropped_while_another_thread_patches(pipe):
    owns = [StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)]
    patch(owns[0], "exact")
    with lock:
        thread = threading.Thread(target=owns.clear)
        thread.start()
        thread.join(10)
        assert not thread.is_alive(), "it waits for nobody"
        assert is_swapped(pipe.unet)
    assert swapped(pipe) == []


def test_a_unet_whose_pipelines_are_gone_is_healed(pipe):
    own = StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    patch(own, "exact")
    find_site(own).dropped.detach()  # as if it had not come to it
    del own
    assert swapped(pipe)
    assert unpatch(pipe) is False
    assert swapped(pipe) == []


def test_a_replaced_unet_is_noticed_at_the_next_call(pipe):
    other = UNet2DConditionModel.from_config(pipe.unet.config).eval()
    patch(pipe, "exact")
    patched_unet = pipe.unet
    latents(pipe)
    pipe.unet = other
    with pytest.warns(UserWarning, match=r"pipe.unet was replaced .* UNet2DConditionModel runs stock: call diff"):
        latents(pipe)
    report = patch(pipe, "exact")
    assert is_swapped(other)
    assert not is_swapped(patched_unet)
    latents(pipe)
    assert report.last_run.total == 20
    unpatch(pipe)
    assert swapped(pipe) == []


def test_the_stack_goes_on_where_it_was_interrupted():
    done, stack = [], UndoStack()

    def second():
        if not done:
            done.append("tried")
            raise KeyboardInterrupt
        done.append("second")

    stack.add(done.append, "first")
    stack.add(second)
    with pytest.raises(KeyboardInterrupt):
        stack.run()
    stack.run()
    stack.run()
    assert done == ["tried", "second", "first"]


def test_a_refused_patch_leaves_the_report_of_the_earlier_one_in_force(pipe):
    twin = StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    twin.set_progress_bar_config(disable=True)
    report = patch(pipe, "exact")
    patch(twin, "exact")
    with collect_maps(pipe) as maps:
        with pytest.raises(ValueError, match="shares this pipeline's scheduler"):
            patch(pipe, "turbo")
        latents(pipe, steps=9)
    assert report.last_run.total == 9
    assert set(maps.steps.values()) == {9}


def test_a_block_gives_back_the_earlier_patch_with_its_report_and_its_collections(pipe):
    report = patch(pipe, propagation=EncoderPropagation(key_steps=3))
    with collect_maps(pipe) as maps:
        with patched(pipe, "exact") as inner:
            latents(pipe, steps=9)
        assert set(maps.steps.values()) == {9}
        assert inner.last_run.total == 9
        assert report.last_run is None
        latents(pipe, steps=12)
        assert max(maps.steps.values()) == 12
    assert report.last_run.total == 12
    with pytest.raises(ZeroDivisionError), patched(pipe, "turbo"):
        raise ZeroDivisionError
    latents(pipe, steps=15)
    assert report.last_run.total == 15


@pytest.mark.parametrize("instead", [None, torch.nn.Identity()])
def test_a_block_that_ends_without_a_unet_gives_back_the_earlier_patch(pipe, instead):
    def free_memory():  # before decoding, say
        pipe.unet = instead
        raise ZeroDivisionError

    report = patch(pipe, propagation=EncoderPropagation(key_steps=3))
    unet = pipe.unet
    with pytest.raises(ZeroDivisionError), patched(pipe, "exact"):
        free_memory()
    pipe.unet = unet
    latents(pipe, steps=9)
    assert report.last_run.propagated > 0
    assert unpatch(pipe)
    assert swapped(pipe) == []


def test_a_block_whose_earlier_patch_cannot_be_put_back_raises_what_was_raised_in_it(pipe, monkeypatch):
    def broken(*_):
        raise OSError("no more")

    def run():
        with patched([pipe, other], propagation=FeatureReuse(3)):
            monkeypatch.setattr("difffast.sites.PARTS", [parts.put_in_unet, broken])
            raise ZeroDivisionError

    other = StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    other.unet, other.scheduler = copy.deepcopy(pipe.unet), copy.deepcopy(pipe.scheduler)
    patch([pipe, other], "exact")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        with pytest.raises(ZeroDivisionError):
            run()
    assert ["the earlier patch could not be put back: no more" in str(each.message) for each in seen] == [True]
    assert swapped(pipe) == swapped(other) == []


def test_a_unet_that_is_compiled_after_patching_is_the_patched_one(pipe, monkeypatch):
    def stop(*_, **__):
        raise InterruptedError

    patch(pipe, "exact")
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    monkeypatch.setattr(StableDiffusionPipeline, "check_inputs", stop)  # the first thing that the plain call does
    with pytest.raises(InterruptedError):  # and no warning, which would be an error
        pipe("a red circle")
    assert type(pipe).__call__.__wrapped__ is StableDiffusionPipeline.__call__.__wrapped__, "under its no_grad"


def test_two_extensions_cannot_override_one_method(pipe, monkeypatch):
    monkeypatch.setattr(PriorNoise, "pipeline_methods", lambda self: {"__call__": len})
    with pytest.raises(ValueError, match="can be overridden once, and __call__ would be twice"):
        patch(pipe, **EVERYTHING)
    assert swapped(pipe) == []
