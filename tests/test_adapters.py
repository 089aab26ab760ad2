"""What users change in a pipeline that stays patched: the next picture is the one of a pipeline patched afresh."""

import copy
import functools

import adapter_zoo
import bitsandbytes
import peft
import pytest
import torch
import zoo
from peft.utils import get_peft_model_state_dict
from sampling import largest
from tolerances import LATENTS_FLOAT32, LATENTS_FLOAT64
from torch import nn

from difffast import EncoderPropagation, FeatureReuse, SemanticBinding, Suppression, patch, patched, unpatch

AHEAD = EncoderPropagation(key_steps=3)
STEP_BY_STEP = EncoderPropagation(key_steps=3, parallel=False)
ROWS = {**zoo.ROWS, **adapter_zoo.ROWS}


@functools.cache
def built(name):
    pipe = ROWS[name].build()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make(name):
    """A pipeline of the test's own in float64."""
    return copy.deepcopy(built(name)).to(dtype=torch.float64)


def run(pipe, name="StableDiffusionPipeline", **inputs):
    return ROWS[name].run(pipe, zoo.Inputs(**inputs))


def add_lora(pipe, name, seed):
    torch.manual_seed(seed)
    targets = ["to_q", "to_k", "to_v", "to_out.0", "conv1"]
    pipe.unet.add_adapter(peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False), adapter_name=name)


def hot_swap(pipe):
    """Put other weights into the adapter that is loaded, as ``load_lora_weights(hotswap=True)`` does."""
    weights = get_peft_model_state_dict(pipe.unet, adapter_name="style")
    other = {f"unet.{name}": torch.flip(weight, (0,)) for name, weight in weights.items()}
    pipe.load_lora_weights(other, adapter_name="style", hotswap=True)


def train(pipe):
    """One step of an optimiser on the attention layers' weights."""
    with torch.no_grad():
        for name, weight in pipe.unet.named_parameters():
            if "attn" in name:
                weight.mul_(1.1)


#: Of those below, what leaves the picture as it was.
NOTHING_NEW = ("switch adapters off", "delete them", "fuse it", "unfuse it", "fuse projections", "unfuse them")

#: In this order, on one pipeline.
CHANGES = {
    "load a LoRA": lambda pipe: add_lora(pipe, "style", 1),
    "scale it": lambda pipe: pipe.unet.set_adapters(["style"], [0.4]),
    "load another": lambda pipe: add_lora(pipe, "face", 2),
    "use both": lambda pipe: pipe.unet.set_adapters(["style", "face"], [0.7, 0.9]),
    "use the first alone": lambda pipe: pipe.unet.set_adapters(["style"]),
    "swap its weights": hot_swap,
    "fuse it": lambda pipe: pipe.unet.fuse_lora(adapter_names=["style"]),
    "unfuse it": lambda pipe: pipe.unet.unfuse_lora(),
    "switch adapters off": lambda pipe: pipe.unet.disable_adapters(),
    "delete them": lambda pipe: pipe.unet.delete_adapters(["face", "style"]),
    "train": train,
    "FreeU": lambda pipe: pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4),
    "no FreeU": lambda pipe: pipe.disable_freeu(),
    "fuse projections": lambda pipe: pipe.unet.fuse_qkv_projections(),
    "unfuse them": lambda pipe: pipe.unet.unfuse_qkv_projections(),
}


@pytest.mark.filterwarnings("ignore:Already found a `peft_config` attribute")  # PEFT's, of every second adapter
@pytest.mark.slow
@pytest.mark.parametrize("name", ["StableDiffusionPipeline", "StableDiffusionXLPipeline"])
def test_changes_while_patched(name):
    pipe, stock = make(name), make(name)
    report = patch(pipe, "exact")
    last = run(pipe, name)
    for what, change in CHANGES.items():
        change(pipe)
        change(stock)
        exact, expected = run(pipe, name), run(stock, name)
        assert largest(exact, expected) <= LATENTS_FLOAT64, what
        if what not in NOTHING_NEW:
            assert largest(exact, last) > 1e-3, what
        with patched(pipe, propagation=AHEAD) as propagated:
            ahead = run(pipe, name)
        with patched(stock, propagation=STEP_BY_STEP, fused=False):
            assert largest(ahead, run(stock, name)) <= LATENTS_FLOAT64, what
        assert propagated.last_run.propagated > 0
        assert propagated.last_run.stock == 0
        last = exact
    assert report.last_run.text_kv["reused"] > 0
    unpatch(pipe)
    assert torch.equal(run(pipe, name), run(stock, name))


def changing(pipe, at, change, name="StableDiffusionPipeline", **options):
    """A run with a change before the step ``at``."""

    def edit(pipe, step, timestep, tensors):
        if step == at - 1:
            change(pipe)
        return tensors

    return ROWS[name].run(pipe, zoo.Inputs(), callback_on_step_end=edit, **options)


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        (
            "StableDiffusionPipeline: IP-Adapter",
            lambda pipe: pipe.set_ip_adapter_scale(0.1),
            "the IP-Adapter's scale changed",
        ),
        ("StableDiffusionPipeline", CHANGES["FreeU"], "FreeU changed"),
    ],
    ids=["IP-Adapter", "FreeU"],
)
def test_changes_in_the_middle_of_a_run_make_a_key_step(name, change, reason):
    results = []
    for config in (AHEAD, STEP_BY_STEP):
        pipe = make(name)
        with patched(pipe, propagation=config) as report:
            results.append(changing(pipe, 4, change, name))
        assert report.last_run.reasons == [f"key step at 4: {reason}"]
        assert report.last_run.forced == 1
    assert largest(*results) <= LATENTS_FLOAT64
    pipe = make(name)
    with patched(pipe, propagation=EncoderPropagation(key_steps=1), fused=False):
        all_key = changing(pipe, 4, change, name)
    assert torch.equal(all_key, changing(make(name), 4, change, name))


def test_where_a_t2i_adapter_ends_there_is_a_key_step():
    name = "StableDiffusionXLAdapterPipeline"
    results = []
    for config in (AHEAD, STEP_BY_STEP, FeatureReuse(interval=3)):
        pipe = make(name)
        with patched(pipe, propagation=config) as report:
            results.append(ROWS[name].run(pipe, zoo.Inputs(), adapter_conditioning_factor=0.5))
        assert report.last_run.reasons == ["key step at 4: down_intrablock_additional_residuals changed"]
    assert largest(*results[:2]) <= LATENTS_FLOAT64


@pytest.mark.parametrize("name", ["StableDiffusionAdapterPipeline", "StableDiffusionXLAdapterPipeline"])
@pytest.mark.parametrize(
    ("prompt", "still", "off"),
    [
        (
            "red elk",
            {"steering": Suppression("elk", step_size=0.0, optimise=(10, 30), iterations=1)},
            {"steering": Suppression("elk", optimise=(10, 30), iterations=0)},
        ),
        (
            "a [red elk] and a [blue cat]",
            {"binding": SemanticBinding(step_size=0.0, bind_step_size=0.0)},
            {"binding": SemanticBinding(bind_steps=0, focus_steps=0)},
        ),
    ],
    ids=["suppression", "binding"],
)
def test_an_optimisation_that_moves_nothing_leaves_a_t2i_adapters_picture(name, prompt, still, off):
    results = []
    for method in (still, off):
        pipe = make(name)
        with patched(pipe, "exact", **method):
            results.append(ROWS[name].run(pipe, zoo.Inputs(prompt=prompt)))
    assert largest(*results) <= LATENTS_FLOAT64


def test_textual_inversion():
    pipe = make("StableDiffusionPipeline")
    report = patch(pipe, propagation=AHEAD)
    before = run(pipe, prompt="a <cat>")
    pipe.load_textual_inversion({"<cat>": torch.randn(64, generator=torch.Generator().manual_seed(3))}, token="<cat>")
    after = run(pipe, prompt="a <cat>")
    assert largest(after, before) > 1e-3
    assert report.last_run.stock == 0
    with patched(pipe, propagation=STEP_BY_STEP):
        assert largest(after, run(pipe, prompt="a <cat>")) <= LATENTS_FLOAT64


def test_tiled_and_sliced_decoding():
    pipe = make("StableDiffusionPipeline")
    pipe.vae.enable_tiling()
    pipe.vae.enable_slicing()
    call = functools.partial(pipe, "a red circle", num_inference_steps=8, output_type="pt", num_images_per_prompt=2)
    stock = call(generator=torch.Generator().manual_seed(0)).images
    with patched(pipe, propagation=EncoderPropagation(key_steps=1), fused=False):
        assert torch.equal(call(generator=torch.Generator().manual_seed(0)).images, stock)


def test_a_quantised_unet():
    """bitsandbytes' four-bit layers, put in by hand: Diffusers loads them on a GPU only."""
    pipe = copy.deepcopy(built("StableDiffusionPipeline"))

    def quantise(module):
        for name, child in module.named_children():
            if type(child) is nn.Linear:
                bias = child.bias is not None
                layer = bitsandbytes.nn.Linear4bit(
                    child.in_features, child.out_features, bias=bias, compute_dtype=torch.float32, quant_type="nf4"
                )
                layer.weight = bitsandbytes.nn.Params4bit(child.weight.data, requires_grad=False, quant_type="nf4")
                layer.bias = child.bias
                setattr(module, name, layer.to("cpu"))
            else:
                quantise(child)

    plain = run(pipe)
    quantise(pipe.unet)
    stock = run(pipe)
    assert largest(stock, plain) > 1e-2
    with patched(pipe, propagation=EncoderPropagation(key_steps=1), fused=False):
        assert torch.equal(run(pipe), stock)
    with patched(pipe, propagation=AHEAD) as report:
        ahead = run(pipe)
    assert (report.last_run.stock, report.last_run.propagated) == (0, 5)
    with patched(pipe, propagation=STEP_BY_STEP):
        assert largest(ahead, run(pipe)) <= LATENTS_FLOAT32
