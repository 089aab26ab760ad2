"""What changes in the middle of a run, or is the same but made anew: never a stale picture, and no work for nothing."""

import copy
import time

import peft
import pytest
import torch
import zoo
from diffusers.models.attention_processor import AttnProcessor
from sampling import largest, latents
from slowly import mostly_slow
from tolerances import EXACT_FLOAT32, LATENTS_FLOAT64

from difffast import EncoderPropagation, FeatureReuse, patched
from difffast.models.configs import unet as configured
from difffast.sampling import conditioning
from difffast.unet.contents import contents_of

STEPS = 12
AHEAD = EncoderPropagation(key_steps=4, max_parallel=4)
STEP_BY_STEP = EncoderPropagation(key_steps=4, parallel=False)
ALL_KEYS = EncoderPropagation(key_steps=1)


def run(pipe, **options):
    return latents(pipe, **{"steps": STEPS, **options})


def add_lora(pipe):
    torch.manual_seed(1)
    config = peft.LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "conv1"], init_lora_weights=False)
    pipe.unet.add_adapter(config, adapter_name="style")


def at(step, change):
    """A callback that changes something after one step."""

    def edit(pipe, index, timestep, tensors):
        if index == step:
            change(pipe)
        return tensors

    return edit


def fade(pipe, index, timestep, tensors):
    """A callback that makes a LoRA weaker at every step of the second half."""
    if index >= 5:
        pipe.unet.set_adapters(["style"], [1 - 0.1 * (index - 4)])
    return tensors


def other_processors(pipe):
    pipe.unet.set_attn_processor(AttnProcessor())  # the same numbers, another way: only rounding tells


def half_the_mid_block(pipe):
    pipe.unet.mid_block.resnets[0].output_scale_factor = 2.0


CHANGES = {
    "fused": (lambda pipe: pipe.unet.fuse_lora(), "which adapters are used"),
    "switched off": (lambda pipe: pipe.unet.disable_adapters(), "which adapters are used"),
    "deleted": (lambda pipe: pipe.unet.delete_adapters(["style"]), "which adapters are used"),
    "scaled": (lambda pipe: pipe.unet.set_adapters(["style"], [0.3]), "the LoRA's scale"),
    "processors": (other_processors, "an attention processor"),
    "an attribute": (half_the_mid_block, "output_scale_factor of a layer"),
    "FreeU": (lambda pipe: pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4), "FreeU"),
    "a weight": (lambda pipe: pipe.unet.conv_in.weight.requires_grad_(False).mul_(1.1), "a weight"),
}


@pytest.mark.parametrize("what", mostly_slow(CHANGES, "fused", "processors"))
@pytest.mark.filterwarnings("ignore:difffast. attn2 layers run stock")
def test_a_change_inside_the_unet_makes_a_key_step(pipe64, what):
    change, reason = CHANGES[what]
    add_lora(pipe64)
    results = []
    for config in (AHEAD, STEP_BY_STEP):
        pipe = copy.deepcopy(pipe64)
        with patched(pipe, propagation=config) as report:
            results.append(run(pipe, callback_on_step_end=at(5, change)))
        assert report.last_run.reasons[0] == f"key step at 6: {reason} changed"
        assert report.last_run.forced == 1
    assert largest(*results) <= LATENTS_FLOAT64
    pipe = copy.deepcopy(pipe64)
    with patched(pipe, propagation=ALL_KEYS, fused=False):
        all_keys = run(pipe, callback_on_step_end=at(5, change))
    assert torch.equal(all_keys, run(copy.deepcopy(pipe64), callback_on_step_end=at(5, change)))


def test_a_schedule_of_lora_scales(pipe64):
    add_lora(pipe64)
    results = []
    for config in (AHEAD, STEP_BY_STEP):
        pipe = copy.deepcopy(pipe64)
        with (
            patched(pipe, propagation=config) as report,
            pytest.warns(UserWarning, match="the LoRA's scale changes at every step, so that steps share nothing"),
        ):
            results.append(run(pipe, callback_on_step_end=fade))
        assert report.last_run.key == 2 + 6
        if config is AHEAD:
            assert report.last_run.decode_batches == [4, 4, 1, 1, 1, 1], "nothing is decoded ahead for nothing"
    assert largest(*results) <= LATENTS_FLOAT64
    pipe = copy.deepcopy(pipe64)
    with patched(pipe, propagation=AHEAD):
        assert largest(run(pipe), results[0]) > 1e-3


def test_a_scale_in_the_call_is_no_change(pipe64):
    """Diffusers multiplies by it and divides again, which may round."""
    add_lora(pipe64)
    pipe64.unet.set_adapters(["style"], [0.7])
    with patched(pipe64, propagation=AHEAD) as report:
        run(pipe64, cross_attention_kwargs={"scale": 0.3})
    assert report.last_run.reasons == []


def edit_prompt(pipe, step, timestep, tensors):
    if step == 5:
        tensors["prompt_embeds"].mul_(2.0)
    return tensors


def editing(pipe):
    return run(pipe, callback_on_step_end=edit_prompt, callback_on_step_end_tensor_inputs=["latents", "prompt_embeds"])


@pytest.fixture(params=["compared", "not compared"])
def compared(request, monkeypatch):
    """Whether tensors can be compared without waiting, as on the CPU."""
    if request.param == "not compared":
        monkeypatch.setattr(conditioning, "can_compare", lambda tensor: False)
    return request.param == "compared"


def test_a_prompt_that_is_edited_in_place_without_a_version(pipe, compared):
    """Where tensors cannot be compared, steps up to the next key step have the old prompt."""
    plain = run(pipe)
    with torch.inference_mode():
        stock = editing(pipe)
        assert largest(stock, plain) > 1e-3
        with patched(pipe, "exact") as report:
            assert largest(editing(pipe), stock) <= EXACT_FLOAT32
        with patched(pipe, propagation=AHEAD) as report:
            ahead = editing(pipe)
            assert report.last_run.forced == compared
            run(pipe)
            assert report.last_run.reasons == []
            assert (report.last_run.text_kv["reused"] > 0) == compared
    with patched(pipe, propagation=AHEAD if compared else EncoderPropagation(key_steps=(0, 4, 8))):
        if compared:
            assert largest(editing(pipe), ahead) <= EXACT_FLOAT32


def remaking(pipe, factor=lambda step: 1.0):
    """A run that gives the same text at every step, as another tensor."""

    def remake(pipe, step, timestep, tensors):
        return {"prompt_embeds": tensors["prompt_embeds"] * factor(step)}

    return run(pipe, callback_on_step_end=remake, callback_on_step_end_tensor_inputs=["prompt_embeds"])


@pytest.mark.parametrize("config", mostly_slow([AHEAD, FeatureReuse(3)], AHEAD), ids=str)
def test_a_text_that_is_made_anew_with_equal_values_costs_nothing(pipe, config):
    with patched(pipe, propagation=config) as report:
        expected = run(pipe)
        before = str(report.last_run)
        assert torch.equal(remaking(pipe), expected)
    name = "encoder_hidden_states is made anew at every step with equal values, which are compared"
    assert report.last_run.reasons == [name]
    assert str(report.last_run).partition("\n")[0] == before


def test_a_text_that_is_made_anew_and_cannot_be_compared_costs_no_more_than_stock(pipe, monkeypatch):
    monkeypatch.setattr(conditioning, "can_compare", lambda tensor: False)
    stock = remaking(pipe)
    with (
        patched(pipe, propagation=AHEAD, fused=False) as report,
        pytest.warns(UserWarning, match="encoder_hidden_states changes at every step, so that steps share nothing"),
    ):
        assert largest(remaking(pipe), stock) <= EXACT_FLOAT32
    assert report.last_run.key == STEPS
    assert sum(report.last_run.decode_batches) <= STEPS + 3, "but for the first segment, which nobody could know"


def test_a_text_that_is_made_anew_with_other_values_is_seen(pipe):
    stock = remaking(pipe, lambda step: 1.5 if step == 5 else 1.0)
    with patched(pipe, "exact"):
        assert largest(remaking(pipe, lambda step: 1.5 if step == 5 else 1.0), stock) <= EXACT_FLOAT32
    with patched(pipe, propagation=AHEAD) as report:
        remaking(pipe, lambda step: 1.5 if step == 5 else 1.0)
    assert report.last_run.forced == 1
    assert "key step at 6: encoder_hidden_states changed" in report.last_run.reasons


def test_controlnet_runs_where_only_the_unet_knows_of_a_key_step():
    name = "StableDiffusionControlNetPipeline"
    pipes = [zoo.ROWS[name].build().to(torch.float64) for _ in range(2)]
    results, counts = [], []
    change = at(5, lambda pipe: pipe.unet.set_adapters(["style"], [0.3]))
    for pipe, config in zip(pipes, (AHEAD, STEP_BY_STEP), strict=True):
        pipe.set_progress_bar_config(disable=True)
        add_lora(pipe)
        with patched(pipe, propagation=config) as report:
            results.append(zoo.under_map(pipe, zoo.Inputs(steps=STEPS), callback_on_step_end=change))
        counts.append(report.last_run.controlnet["computed"])
    assert counts == [4, 4]
    assert largest(*results) <= LATENTS_FLOAT64


@pytest.mark.parametrize("propagation", mostly_slow([AHEAD, FeatureReuse(3), ALL_KEYS], AHEAD), ids=str)
def test_a_schedule_on_another_device_than_the_unet(pipe, propagation):
    with patched(pipe, propagation=propagation, fused=False) as report, torch.no_grad():
        pipe.unet.to("meta")
        pipe.scheduler.set_timesteps(STEPS)
        text = torch.empty(2, 77, 64, device="meta")
        for t in pipe.scheduler.timesteps:
            assert pipe.unet(torch.empty(2, 4, 8, 8, device="meta"), t, text).sample.is_meta
    assert report.last_run.stock == 0


def test_looking_at_a_unet_is_cheap():
    """Of the 709 modules of SD 1.5, in 0.25 ms where nothing else runs; a call of it takes ten or more on a GPU."""
    with torch.device("meta"):
        unet = configured("sd15")
    contents = contents_of(unet)

    def once():
        begin = time.thread_time()
        contents.look()
        return time.thread_time() - begin

    assert min(once() for _ in range(20)) < 1e-3
    assert contents.foreign is None
