"""patch, unpatch, patched: everything put back, nothing half done, and the stock features keep working."""

import copy
import pickle
import weakref

import accelerate
import pytest
import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiTPipeline,
    DiTTransformer2DModel,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.hooks import HookRegistry, ModelHook
from peft import LoraConfig
from sampling import largest, latents, scheduler
from tolerances import LATENTS_FLOAT32, LATENTS_FLOAT64

import difffast
from difffast import EncoderPropagation, patch, patched, unpatch
from difffast.surgery.subclass import is_swapped

EVERYTHING = EncoderPropagation(prior_noise=0.003)


def snapshot(pipe):
    """Types, instance dicts and attention processors of everything in a pipeline."""
    state = {"pipe": (type(pipe), dict(vars(pipe))), "scheduler": (type(pipe.scheduler), dict(vars(pipe.scheduler)))}
    for part in ("unet", "vae", "text_encoder"):
        for name, module in getattr(pipe, part).named_modules():
            state[f"{part}.{name}"] = (type(module), dict(vars(module)))
    for name, processor in pipe.unet.attn_processors.items():
        state[f"processor {name}"] = (type(processor), dict(vars(processor), itself=processor))
    return state


def assert_same(before, after):
    assert before.keys() == after.keys()
    for name, (kind, attributes) in before.items():
        assert after[name][0] is kind, name
        assert after[name][1].keys() == attributes.keys(), name
        for key, value in attributes.items():
            assert after[name][1][key] is value, (name, key)


@pytest.mark.parametrize("times", [1, 2])
def test_unpatch_restores_everything(pipe, times):
    stock = latents(pipe)
    classes = {cls: dict(vars(cls)) for cls in (UNet2DConditionModel, torch.nn.Module, DDIMScheduler)}
    before = snapshot(pipe)
    for _ in range(times):
        patch(pipe, propagation=EVERYTHING)
    assert is_swapped(pipe.unet)
    assert is_swapped(pipe.scheduler)
    assert vars(pipe.unet).keys() == before["unet."][1].keys(), "not even a patched UNet gains attributes"
    latents(pipe)
    assert unpatch(pipe) is True
    assert unpatch(pipe) is False

    after = snapshot(pipe)
    for state in (before, after):
        for changing in ("timesteps", "num_inference_steps"):  # the run set these, not the patch
            state["scheduler"][1].pop(changing, None)
        for changing in ("_num_timesteps", "_guidance_scale", "_interrupt"):
            state["pipe"][1].pop(changing, None)
    assert_same(before, after)
    assert all(vars(cls) == members for cls, members in classes.items()), "classes are never changed"
    assert torch.equal(latents(pipe), stock)


@pytest.mark.parametrize("while_patched", [True, False])
def test_pickles_and_copies(pipe, while_patched):
    expected = latents(pipe)
    patch(pipe, propagation=EVERYTHING)
    if not while_patched:
        unpatch(pipe)
    for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1):
        unet = pickle.loads(pickle.dumps(pipe.unet, protocol))
        assert type(unet) is UNet2DConditionModel
    assert type(pickle.loads(pickle.dumps(pipe.scheduler))) is DDIMScheduler
    twin = StableDiffusionPipeline(
        **{**pipe.components, "unet": unet, "scheduler": copy.deepcopy(pipe.scheduler)}, requires_safety_checker=False
    )
    twin.set_progress_bar_config(disable=True)
    assert torch.equal(latents(twin), expected)


def test_saves_as_the_stock_pipeline_while_patched(pipe, tmp_path):
    stock = latents(pipe)
    with patched(pipe, propagation=EVERYTHING):
        pipe.save_pretrained(tmp_path)
    loaded = difffast.models.load_pipeline(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded.unet) is UNet2DConditionModel
    assert torch.equal(latents(loaded), stock)


def test_a_patched_unet_still_looks_like_its_class(pipe):
    with patched(pipe, propagation=EncoderPropagation()):
        assert isinstance(pipe.unet, UNet2DConditionModel)
        assert type(pipe.unet).__name__ == "UNet2DConditionModel"
        assert type(pipe.unet).__module__ == UNet2DConditionModel.__module__
        assert pipe.unet.dtype == torch.float32
        assert pipe.to(torch.float64).unet.conv_in.weight.dtype == torch.float64


def test_new_objects_of_a_patched_class_are_plain(pipe):
    with patched(pipe, propagation=EVERYTHING):
        assert type(type(pipe.scheduler).from_config(pipe.scheduler.config)) is DDIMScheduler
        twin = type(pipe.unet).from_config(pipe.unet.config)
        assert type(twin) is UNet2DConditionModel
        assert twin.conv_in.weight.shape == pipe.unet.conv_in.weight.shape


def test_patching_again_replaces_the_first_patch(pipe):
    first = patch(pipe, propagation=EncoderPropagation())
    second = patch(pipe, propagation=EncoderPropagation(key_steps=2))
    latents(pipe)
    assert first.last_run is None
    assert second.last_run.key == 10
    assert unpatch(pipe)
    assert not is_swapped(pipe.unet)


def test_patched_puts_an_earlier_patch_back(pipe):
    patch(pipe, propagation=EncoderPropagation(key_steps=4))
    expected = latents(pipe)
    with pytest.raises(KeyError), patched(pipe, propagation=EncoderPropagation(key_steps=1), fused=False):
        raise KeyError
    assert torch.equal(latents(pipe), expected)
    unpatch(pipe)
    with patched(pipe, propagation=EncoderPropagation()):
        pass
    assert not is_swapped(pipe.unet)


def test_the_patch_does_not_keep_a_pipeline_alive(pipe):
    own = StableDiffusionPipeline(**pipe.components, requires_safety_checker=False)
    patch(own)
    alive = weakref.ref(own)
    del own
    assert alive() is None
    assert latents(pipe).isfinite().all()
    patch(pipe, propagation=EncoderPropagation())
    unpatch(pipe)
    assert not is_swapped(pipe.unet)


def test_report(pipe):
    report = patch(pipe, propagation=EVERYTHING)
    assert report.last_run is None
    text = str(report)
    assert "StableDiffusionPipeline" in text
    assert "encoder propagation, decoders in parallel" in text
    assert "prior noise injection, alpha = 0.003" in text
    html = report._repr_html_()
    assert html.count("<tr>") == len(text.splitlines())
    assert "<td>StableDiffusionPipeline</td>" in html
    latents(pipe)
    assert str(report.last_run).startswith("7 key steps (0 forced), 13 propagated, 0 reused, 0 stock of 20")
    assert report.plan(20).key_steps == (0, 1, 2, 3, 5, 10, 15)
    unpatch(pipe)


def _dit():
    transformer = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=8, in_channels=4, num_layers=1, sample_size=8, norm_num_groups=4
    )
    return DiTPipeline(transformer=transformer, vae=AutoencoderKL(), scheduler=DDIMScheduler())


@pytest.mark.parametrize(
    ("target", "options", "error", "message"),
    [
        (lambda pipe: "a string", {}, TypeError, "must be a diffusers.DiffusionPipeline, got str"),
        (lambda pipe: pipe.unet, {}, TypeError, "got UNet2DConditionModel"),
        (lambda pipe: _dit(), {}, ValueError, "DiTPipeline has no UNet .other denoisers: transformer."),
        (
            lambda pipe: pipe,
            {"preset": "fastest"},
            ValueError,
            "unknown preset 'fastest'; available: exact, balanced, faster-diffusion, turbo",
        ),
        (
            lambda pipe: pipe,
            {"propagation": [0, 5]},
            TypeError,
            "FeatureReuse, .* or Plan, got list",
        ),
    ],
)
def test_bad_input_changes_nothing(pipe, target, options, error, message):
    before = snapshot(pipe)
    with pytest.raises(error, match=message):
        patch(target(pipe), **options)
    assert_same(before, snapshot(pipe))
    patch(pipe, propagation=EncoderPropagation())
    with pytest.raises(error, match=message):
        patch(target(pipe), **options)
    assert is_swapped(pipe.unet), "a refused patch leaves the earlier one in force"


def test_unknown_unets_are_refused(pipe):
    pipe.unet = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match=r"unet is a Linear, which difffast does not know; .*UNet2DConditionModel"):
        patch(pipe, propagation=EncoderPropagation())


# Stock features under the patch.


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("kind", ["model", "sequential"])
def test_cpu_offload_hooks(pipe64, kind, when):
    pipe = pipe64
    expected_stock = latents(pipe)
    with patched(pipe, propagation=EncoderPropagation()):
        expected = latents(pipe)

    loads = []

    class Loading(accelerate.hooks.CpuOffload):
        def pre_forward(self, module, *args, **kwargs):
            loads.append(type(module).__name__)
            return super().pre_forward(module, *args, **kwargs)

    def offload():
        if kind == "model":
            accelerate.hooks.add_hook_to_module(pipe.unet, Loading(torch.device("cpu")), append=True)
        else:
            accelerate.cpu_offload(pipe.unet, execution_device=torch.device("cpu"))
            assert pipe.unet.conv_in.weight.is_meta, "weights are away until a layer's hook fetches them"

    if when == "before":
        offload()
    report = patch(pipe, propagation=EncoderPropagation())
    if when == "after":
        offload()
    assert largest(latents(pipe), expected) <= LATENTS_FLOAT64
    assert report.last_run.propagated == 13
    assert report.last_run.stock == 0
    # A layer whose weights are away cannot share its skip.
    resnets = sum(len(block.resnets) for block in pipe.unet.up_blocks)
    assert len(report.last_run.unshared) == (0 if kind == "model" else resnets)
    if kind == "model":
        # the whole UNet at the three lone key steps, an encoder at the other four, and every batch of decoders
        assert len(loads) == 3 + 4 + len(report.last_run.decode_batches)
    unpatch(pipe)
    assert torch.equal(latents(pipe), expected_stock)
    accelerate.hooks.remove_hook_from_module(pipe.unet, recurse=True)
    assert torch.equal(latents(pipe), expected_stock)
    assert type(pipe.unet) is UNet2DConditionModel
    assert "forward" in vars(pipe.unet), "accelerate leaves the plain method behind on the instance"
    report = patch(pipe, propagation=EncoderPropagation())
    assert torch.equal(latents(pipe), expected)
    assert report.last_run.stock == 0


@pytest.mark.parametrize("when", ["before", "after"])
def test_lora(pipe64, when):
    pipe = pipe64
    plain = latents(pipe)
    config = LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "conv1"], init_lora_weights=False)
    if when == "after":
        patch(pipe, propagation=EncoderPropagation())
        latents(pipe)
    torch.manual_seed(0)
    pipe.unet.add_adapter(config, adapter_name="style")
    if when == "before":
        patch(pipe, propagation=EncoderPropagation())

    ahead, all_key, scales = {}, {}, (1.0, 0.3)
    for scale in scales:
        options = {"cross_attention_kwargs": {"scale": scale}}
        ahead[scale] = latents(pipe, **options)
        with patched(pipe, propagation=EncoderPropagation(parallel=False)):
            assert largest(ahead[scale], latents(pipe, **options)) <= LATENTS_FLOAT64
        with patched(pipe, propagation=EncoderPropagation(key_steps=1), fused=False):
            all_key[scale] = latents(pipe, **options)
    unpatch(pipe)
    for scale in scales:
        assert torch.equal(all_key[scale], latents(pipe, cross_attention_kwargs={"scale": scale}))
    assert largest(ahead[1.0], ahead[0.3]) > 1e-3
    assert largest(ahead[1.0], plain) > 1e-3

    pipe.unet.disable_adapters()
    with patched(pipe, propagation=EncoderPropagation(key_steps=1), fused=False):
        assert largest(latents(pipe), plain) <= LATENTS_FLOAT64
    pipe.unet.delete_adapters("style")
    assert torch.equal(latents(pipe), plain)


def test_layerwise_casting(pipe):
    """Diffusers' own hooks on the layers below the UNet work."""
    stock = latents(pipe)
    pipe.unet.enable_layerwise_casting(storage_dtype=torch.bfloat16, compute_dtype=torch.float32)
    cast = latents(pipe)
    assert not torch.equal(cast, stock)
    with patched(pipe, propagation=EncoderPropagation(key_steps=1), fused=False):
        assert torch.equal(latents(pipe), cast)
    with patched(pipe, propagation=EncoderPropagation()) as report:
        ahead = latents(pipe)
    assert (report.last_run.stock, report.last_run.propagated) == (0, 13)
    with patched(pipe, propagation=EncoderPropagation(parallel=False)):
        assert largest(ahead, latents(pipe)) <= LATENTS_FLOAT32


def test_hooks_of_diffusers_on_the_unet_itself_run_stock(pipe):
    class Doubling(ModelHook):
        def post_forward(self, module, output):
            return (output[0] * 2,)

    HookRegistry.check_if_exists_or_initialize(pipe.unet).register_hook(Doubling(), "doubling")
    stock = latents(pipe)
    with (
        patched(pipe, propagation=EncoderPropagation()) as report,
        pytest.warns(UserWarning, match="forward has been replaced on the instance"),
    ):
        assert torch.equal(latents(pipe), stock)
    assert report.last_run.stock == 20


def test_scheduler_signature_survives_prior_noise(pipe):
    """Pipelines look for eta and generator in the signature of step."""
    plain = pipe.prepare_extra_step_kwargs(None, 0.5)
    with patched(pipe, propagation=EVERYTHING):
        assert pipe.prepare_extra_step_kwargs(None, 0.5).keys() == plain.keys() == {"eta", "generator"}
        pipe.scheduler = scheduler("Euler")
    assert not is_swapped(pipe.scheduler)
