"""Settings of semantic binding: presets, schedules, and what is refused."""

import pytest
from bound import STEPS, binding, run
from sampling import scheduler

from difffast import SemanticBinding, patch, patched
from difffast.steering.binding.config import Schedule
from difffast.surgery.subclass import is_swapped


def test_embeddings_instead_of_a_prompt_are_refused(pipe):
    embeds = pipe.encode_prompt("a cat", "cpu", 1, True)
    with (
        patched(pipe, binding=SemanticBinding()),
        pytest.raises(ValueError, match="as text"),
    ):
        pipe(prompt_embeds=embeds[0], negative_prompt_embeds=embeds[1], num_inference_steps=STEPS)


# Pipelines, schedulers, plans


def test_correctors_are_not_optimised(pipe64):
    """Second calls that step from the scheduler's own latents: there is nothing to move."""
    for name, expected in (("PNDM", {0, 2}), ("Heun", {0, 2}), ("DPM++ single", {0, 2})):
        pipe64.scheduler = scheduler(name)
        _, report = run(pipe64, binding(bind_steps=0, focus_steps=3))
        assert {step.step for step in report.trace.steps} == expected


def test_schedulers_that_correct_from_their_own_latents_are_refused(pipe64):
    pipe64.scheduler = scheduler("UniPC")
    with pytest.raises(ValueError, match=r"UniPC.*own copy"):
        run(pipe64, binding())
    ours, _ = run(pipe64, binding(optimise="text"))
    assert ours.isfinite().all()


# Configuration


def test_presets_are_for_fifty_steps():
    assert SemanticBinding("object").schedule(50) == Schedule(7, 7, 6, 3, 0, True)
    assert SemanticBinding("attribute").schedule(50) == Schedule(5, 5, 4, 3, None, False)
    assert SemanticBinding("object").schedule(20) == Schedule(3, 3, 6, 3, 0, True)
    assert SemanticBinding("object", mode="reference").schedule(20) == Schedule(7, 7, 6, 3, 0, True)
    assert SemanticBinding("object", bind_steps=4, replace_step=None).schedule(20) == Schedule(4, 3, 6, 3, None, True)
    assert SemanticBinding("attribute", replace_step=9).full_steps(50) == (0, 1, 2, 3, 4, 9)


def test_step_sizes_fall_and_thresholds_follow_the_schedule():
    config = SemanticBinding()
    assert config.step_size_at(0, 50) == 3.0
    assert config.step_size_at(49, 50) == 0.0
    assert [config.threshold_at(order, 50) for order in (0, 4, 7, 30)] == [26.0, 22.5, 21.0, 21.0]
    assert config.threshold_at(2, 25) == 22.5
    assert SemanticBinding(mode="reference").threshold_at(2, 25) == 24.0
    assert SemanticBinding(losses={"segregation": 1}).threshold_at(0, 50) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"preset": "best"}, "object, attribute, got 'best'"),
        ({"mode": "code"}, "paper, reference, got 'code'"),
        ({"optimise": "vae"}, "got 'vae'"),
        ({"losses": {"beauty": 1}}, "unknown loss 'beauty'"),
        ({"losses": {}}, "at least one"),
        ({"losses": {"entropy": float("nan")}}, "finite"),
        ({"losses": {"syngen": 1}}, "merge=False"),
        ({"merge": False}, "bind_steps=0"),
        ({"bind_steps": -1}, "bind_steps must not be negative"),
        ({"step_size": -1.0}, "step_size must be finite"),
        ({"subjects": [((1,),)]}, "pairs"),
        ({"weights": (1.0,)}, r"two finite numbers, got \(1.0,\)"),
        ({"weights": (1.0, float("nan"))}, "two finite numbers"),
    ],
)
def test_bad_values_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SemanticBinding(**options)


@pytest.mark.parametrize("options", [{"step_size": "3"}, {"merge": 1}, {"iterations": 2.5}])
def test_wrong_types_are_refused(options):
    with pytest.raises(TypeError, match=next(iter(options))):
        SemanticBinding(**options)


def test_patch_refuses_before_it_changes_anything(pipe):
    with pytest.raises(TypeError, match="binding must be"):
        patch(pipe, binding="object")
    with pytest.raises(ValueError, match="no cross-attention layer matches"):
        patch(pipe, binding=SemanticBinding(layers="nowhere.*"))
    assert not is_swapped(pipe)
    assert not is_swapped(pipe.unet)


def test_layers_of_two_sizes_are_refused(pipe64):
    with pytest.raises(ValueError, match="one size"):
        run(pipe64, binding(layers="*"))
