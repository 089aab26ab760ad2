"""engine="openvino": what stock gives, never a stale model, and nothing left behind."""

import copy
import sys
import warnings

import pytest
import torch
import zoo
from engine_histories import EngineHistory
from lora_changes import load
from sampling import latents, picture, relative
from tolerances import ENGINE_RELATIVE

from difffast import CfgReuse, EncoderPropagation, FeatureReuse, patch, patched, unpatch
from difffast.engines import conversion, openvino
from difffast.engines.constants import Constants
from difffast.engines.inputs import LORA_SCALES, ProgramInputs
from difffast.engines.openvino import OpenVino
from difffast.surgery.subclass import is_swapped

pytest.importorskip("openvino", reason="the extra difffast[openvino] is not installed")

pytestmark = [
    pytest.mark.usefixtures("_one_thread", "_files"),
    pytest.mark.filterwarnings("ignore:Already"),  # PEFT, of what is fused or not already
]


@pytest.fixture(scope="module")
def _files(tmp_path_factory):
    """A folder for this module's files: models of the same function are converted once."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setenv("DIFFFAST_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


PLANS = {
    "exact": {"preset": "exact"},
    "outer layers in halves": {"propagation": FeatureReuse(2), "cfg": CfgReuse(4)},
    "ahead": {"propagation": EncoderPropagation(key_steps=3)},
    "extrapolated": {"propagation": EncoderPropagation(key_steps=3, extrapolate=1)},
}


@pytest.mark.parametrize("plan", ["exact", *(pytest.param(name, marks=pytest.mark.slow) for name in list(PLANS)[1:])])
def test_it_is_what_runs_eagerly(pipe, plan):
    with patched(pipe, **PLANS[plan], fused=False):
        expected = latents(pipe)
    with patched(pipe, **PLANS[plan], engine="openvino") as report:
        assert relative(latents(pipe), expected) <= ENGINE_RELATIVE
        assert not report.last_run.reasons
        assert report.programs.kept
        assert report.programs.precisions == ("f32",)
        assert "OpenVINO in f32" in str(report.programs)
    assert not any(map(is_swapped, [pipe, *pipe.unet.modules()]))


@pytest.mark.parametrize("seed", range(2))
def test_some_histories(seed):
    EngineHistory(seed, lambda pipe: patch(pipe, "exact", engine="openvino")).play(draws=4)


@pytest.mark.parametrize(
    "change",
    ["edit .data", *(pytest.param(each, marks=pytest.mark.slow) for each in ("edit", "negate .data", "replace"))],
)
def test_histories_find_a_model_that_is_stale(change, monkeypatch):
    history = EngineHistory(0, lambda pipe: patch(pipe, "exact", engine="openvino"))
    call = {"prompt": "a cat", "height": 16, "width": 16}
    history.compare(call)
    with monkeypatch.context() as planted:
        planted.setattr(Constants, "still_hold", lambda self, module: True)
        history.change(change)
        with pytest.raises(AssertionError):
            history.compare(call)
    history.compare(call)


def test_a_layer_that_was_replaced_between_two_patches_is_not_remembered(one_level):
    """What is known of a UNet's layers ends with the patch."""
    with patched(one_level, "exact", engine="openvino"):
        latents(one_level, steps=2)
    name = next(name for name, _ in one_level.unet.named_modules() if name.endswith("attn2"))
    other = copy.deepcopy(one_level.unet.get_submodule(name))
    torch.nn.init.normal_(other.to_v.weight)
    one_level.unet.set_submodule(name, other)
    expected = latents(one_level, steps=2)
    with patched(one_level, "exact", engine="openvino") as report:
        assert relative(latents(one_level, steps=2), expected) <= ENGINE_RELATIVE
        assert not report.last_run.reasons


def test_a_prompt_needs_no_new_model_and_a_size_does(one_level):
    report = patch(one_level, "exact", engine="openvino")
    latents(one_level, steps=2)
    latents(one_level, "two dogs", seed=3, guidance_scale=2.0, steps=3)
    assert report.programs.kept == 2  # text encoder and UNet
    latents(one_level, steps=2, height=24, width=16)
    assert report.programs.kept == 3


def test_what_cannot_be_converted_runs_eagerly_and_the_report_says_why(one_level, models_folder, monkeypatch):
    expected = latents(one_level, steps=2)

    def fail(*_):
        raise RuntimeError("no rule for aten::frobnicate")

    monkeypatch.setattr(conversion, "convert", fail)
    report = patch(one_level, "exact", engine="openvino")
    why = "runs without OpenVINO: RuntimeError: no rule for aten::frobnicate"
    for _ in range(2):  # whoever reads the second picture's report is told as well
        with pytest.warns(UserWarning, match=why):
            assert relative(latents(one_level, steps=2), expected) <= ENGINE_RELATIVE
        assert report.last_run.reasons == [f"text encoder: _run_forward {why}", f"run_whole {why}"]
    assert report.programs.kept == 0


@pytest.mark.parametrize(
    ("precision", "near"), [("f32", ENGINE_RELATIVE), ("bf16", conversion.LARGEST_ERROR["bf16"])], ids=["f32", "bf16"]
)
def test_without_memory_for_a_model_it_runs_eagerly_and_every_report_says_why(
    one_level, models_folder, monkeypatch, precision, near
):
    """A process that the system kills in the middle of a picture says nothing."""
    narrow = precision == "bf16" and "BF16" in conversion.describe_processor()
    size = sum(each.numel() for each in one_level.unet.parameters()) * (2 if narrow else 4)
    expected = latents(one_level, steps=2)
    report = patch(one_level, "exact", engine="openvino", precision=precision)
    monkeypatch.setattr(openvino, "leaves_enough", lambda taken: taken < size)
    for _ in range(2):
        why = f"run_whole runs without OpenVINO: too little memory is left for a model of {size >> 20} MiB"
        with pytest.warns(UserWarning, match=why):
            assert relative(latents(one_level, steps=2), expected) <= near
        assert why in report.last_run.reasons
    monkeypatch.setattr(openvino, "leaves_enough", lambda taken: True)
    latents(one_level, steps=2)
    assert not report.last_run.reasons
    assert report.programs.kept == 2


def test_float64_runs_eagerly_and_the_report_says_why(pipe64):
    expected = latents(pipe64, steps=2)
    report = patch(pipe64, "exact", engine="openvino")
    with pytest.warns(UserWarning, match=r"runs float32 and bfloat16 on CPUs, and the weights are torch.float64"):
        assert relative(latents(pipe64, steps=2), expected) <= 1e-9
    why = "OpenVINO runs float32 and bfloat16 on CPUs, and the weights are torch.float64"
    assert report.last_run.reasons == [f"text encoder runs without OpenVINO: {why}", f"no OpenVINO: {why}"]
    assert report.programs.kept == 0


def test_bf16_is_opted_into_and_stated(one_level):
    expected = latents(one_level, steps=2)
    with patched(one_level, "exact", engine="openvino", precision="bf16") as report:
        error = relative(latents(one_level, steps=2), expected)
        assert report.programs.precisions in (("bf16",), ("f32",))  # processors without bfloat16 keep float32
        assert (ENGINE_RELATIVE if report.programs.precisions == ("bf16",) else 0) <= error <= 0.1
    assert dict(report.replaced)["engine"].startswith("OpenVINO in bf16")


def test_weights_in_bfloat16_run_in_bfloat16_whatever_the_inputs_are(one_level):
    """Token ids are integers, and a LoRA's scale is in float32."""
    load(one_level)
    one_level.unet.to(torch.bfloat16)
    one_level.text_encoder.to(torch.bfloat16)
    report = patch(one_level, "exact", engine="openvino")
    latents(one_level, steps=2, cross_attention_kwargs={"scale": 0.3})
    assert not report.last_run.reasons
    assert report.programs.kept == 2
    assert report.programs.precisions in (("bf16",), ("f32",))  # processors without bfloat16 keep float32


def test_weights_in_bfloat16_and_channels_last_are_read_as_they_are(one_level):
    """OpenVINO copies them, and used to read the copy when its memory was others' already."""
    load(one_level)
    one_level.unet.to(torch.bfloat16, memory_format=torch.channels_last)
    one_level.text_encoder.to(torch.bfloat16)
    report = patch(one_level, "exact", engine="openvino")
    latents(one_level, steps=2)
    assert not report.last_run.reasons
    assert report.programs.kept


@pytest.mark.parametrize("copied", [False, True])
def test_inputs_are_handed_over_once_and_again_when_they_change(copied, monkeypatch):
    x = torch.randn(4, 3).T if copied else torch.randn(3, 4)
    layer, shared, share = torch.nn.Linear(4, 2), [], conversion._share
    model = conversion.convert(layer.forward, layer, [x], "f32")
    monkeypatch.setattr(conversion, "_share", lambda tensor: shared.append(tensor.shape) or share(tensor))
    with torch.no_grad():
        for changes in (False, False, True):
            if changes:
                x.mul_(2)
            assert relative(model.run([x]), layer(x)) <= ENGINE_RELATIVE
        other = x.clone() + 1
        assert relative(model.run([other]), layer(other)) <= ENGINE_RELATIVE
    # Converting has proved the model on x; a tensor is read where it lies, or copied anew once it has changed.
    assert shared.count(x.shape) == (2 if copied else 1)


def test_the_number_of_models_is_bounded(monkeypatch):
    monkeypatch.setattr("difffast.engines.openvino.MAX_PROGRAMS", 1)
    layer, engine, notes = torch.nn.Linear(4, 2), OpenVino(), []
    for rows in (3, 5, 3):
        assert engine.refuse(layer) is None
        x = torch.randn(rows, 4)
        out = engine.run(ProgramInputs({LORA_SCALES: {}}, ()), notes.append, torch.nn.Module.__call__, layer, x)
        assert relative(out, layer(x).detach()) <= ENGINE_RELATIVE
        assert engine.count(torch.device("cpu")).kept == 1
    assert engine.count(torch.device("cpu")).loaded == 1  # the third one, which the first has left in a file
    assert not notes


def test_nothing_global_changes_and_unpatch_is_exact(one_level):
    before = (torch.get_num_threads(), torch.is_grad_enabled(), list(warnings.filters), torch.get_rng_state())
    expected, classes = latents(one_level, steps=2), [type(module) for module in one_level.unet.modules()]
    patch(one_level, "exact", engine="openvino")
    latents(one_level, steps=2)
    unpatch(one_level)
    assert [type(module) for module in one_level.unet.modules()] == classes
    assert torch.equal(latents(one_level, steps=2), expected)
    after = (torch.get_num_threads(), torch.is_grad_enabled(), list(warnings.filters), torch.get_rng_state())
    assert after[:3] == before[:3]
    assert torch.equal(after[3], before[3])


def test_without_the_package_it_is_refused_with_the_command(one_level, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(ModuleNotFoundError, match=r'pip install "difffast\[openvino\]"'):
        patch(one_level, "exact", engine="openvino")
    assert not is_swapped(one_level.unet)


def test_precision_needs_the_engine_that_has_it(one_level):
    with pytest.raises(ValueError, match="precision='bf16' needs engine='openvino', got engine=None"):
        patch(one_level, "exact", precision="bf16")
    with pytest.raises(ValueError, match="precision must be one of 'f32', 'bf16', None, got 'int8'"):
        patch(one_level, "exact", engine="openvino", precision="int8")


def test_inference_tensors_run_eagerly(one_level):
    with torch.inference_mode():
        weight = one_level.unet.conv_out.weight * 1
        del one_level.unet.conv_out.weight
        one_level.unet.conv_out.weight = torch.nn.Parameter(weight, requires_grad=False)
        patch(one_level, "exact", engine="openvino")
        with pytest.warns(UserWarning, match=r"no OpenVINO: conv_out.weight was made under torch.inference_mode"):
            latents(one_level, steps=2)


def test_text_encoder_unet_and_vae_are_models_and_every_part_is_timed(pipe):
    def picture(**options):
        generator = torch.Generator().manual_seed(0)
        return pipe("a red circle", num_inference_steps=2, generator=generator, output_type="pt", **options).images

    expected, classes = picture(), [type(module) for module in pipe.vae.modules()]
    for engine in ("eager", "openvino"):
        with patched(pipe, "exact", engine=engine, profile=True) as report:
            assert float((picture() - expected).abs().max()) <= 1e-4
            run = report.last_run
            assert list(run.seconds) == ["text encoder", "UNet", "VAE decoder", "the rest"]
            assert min(run.seconds.values()) > 0
            assert not run.reasons
            assert report.programs.kept == (3 if engine == "openvino" else 0)
    assert "seconds: text encoder" in str(run)
    assert [type(module) for module in pipe.vae.modules()] == classes
    assert torch.equal(picture(), expected)


def test_a_neighbour_that_shares_text_encoder_and_vae_runs_them_by_its_own_options(one_level):
    def picture():
        generator = torch.Generator().manual_seed(0)
        return other("a red circle", num_inference_steps=2, generator=generator, output_type="pt").images

    other = type(one_level)(
        **{**one_level.components, "unet": copy.deepcopy(one_level.unet)}, requires_safety_checker=False
    )
    other.scheduler = copy.deepcopy(one_level.scheduler)
    other.set_progress_bar_config(disable=True)
    stock = picture()
    with patched(one_level, "exact", engine="openvino", precision="bf16"):
        assert torch.equal(picture(), stock)
        with patched(other, "exact", fused=False) as report:
            assert torch.equal(picture(), stock)
        assert report.programs.kept == 0


def test_a_model_whose_numbers_are_others_is_not_used():
    class Branching(torch.nn.Linear):  # a trace takes the branch of its own arguments for the only one
        def forward(self, x):
            return super().forward(x) + (0 if torch.jit.is_tracing() else 1)

    layer, x = Branching(4, 2), torch.randn(3, 4)
    model = conversion.convert(layer.forward, layer, [x], "f32")
    with pytest.raises(RuntimeError, match=r"the converted model is off by .* of its largest number"):
        conversion._prove(model, [x], [layer(x).detach()])


@pytest.mark.slow
def test_controlnet_is_a_model_whose_strength_is_an_input():
    pipe = zoo.ROWS["StableDiffusionControlNetPipeline"].build()
    pipe.set_progress_bar_config(disable=True)
    under = {"image": picture(), "height": 32, "width": 32, "steps": 2}
    expected = [latents(pipe, controlnet_conditioning_scale=scale, **under) for scale in (1.0, 0.3)]
    with patched(pipe, "exact", engine="openvino", profile=True) as report:
        for scale, right in zip((1.0, 0.3), expected, strict=True):
            assert relative(latents(pipe, controlnet_conditioning_scale=scale, **under), right) <= ENGINE_RELATIVE
            assert not report.last_run.reasons
            assert report.programs.kept == 3  # text encoder, ControlNet and UNet
    assert "ControlNet" in report.last_run.seconds
    assert not is_swapped(pipe.controlnet)
