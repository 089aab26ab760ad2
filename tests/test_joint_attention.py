"""DeepFloyd IF's attention layers, text and pixels in one softmax: fused, text keys made once, maps that are stock's.

The pipeline of most tests is the tiny Stable Diffusion one with a UNet of IF's layout; IF's own are at the end.
"""

import copy
from collections import Counter

import adapter_zoo
import if_zoo
import pytest
import torch
import torch.nn.functional as F
import unets
import zoo
from attention_by_hand import Recorder
from diffusers.models.attention_processor import AttnAddedKVProcessor, AttnProcessor2_0
from peft import LoraConfig
from sampling import largest
from sampling import latents as sampled
from tolerances import EXACT_FLOAT32, EXACT_FLOAT64, LATENTS_FLOAT64, OUTPUT_FLOAT64

import difffast
from difffast import AttentionMaps, EncoderPropagation, ops, patch, patched, unpatch
from difffast.engines import programs
from difffast.layers import cross_attention
from difffast.layers.context import CallContext, Text, use_context
from difffast.layers.maps import choose_layers
from difffast.layers.text_kv import TextKV
from difffast.ops._installed import INTERPRETED

STEPS = 8


def latents(pipe, *args, **options):
    return sampled(pipe, *args, **{"steps": STEPS, **options})


@pytest.fixture
def pipe(pipe):
    """Instead of the shared one: its UNet is IF's."""
    return _with_unet(pipe)


@pytest.fixture
def pipe64(pipe64):
    return _with_unet(pipe64)


def _with_unet(pipe, **changes):
    width = pipe.text_encoder.config.hidden_size
    unet = unets.make("if", pipe.unet.dtype, out_channels=4, encoder_hid_dim=width, **changes)
    with torch.no_grad():
        for layer in layers_of(unet):
            # Fresh norms scale by 1 and add 0, which would hide a norm that is left out.
            for parameter in (layer.norm_cross.weight, layer.norm_cross.bias):
                parameter.add_(torch.randn_like(parameter) * 0.3)
    pipe.register_modules(unet=unet)
    return pipe


def layers_of(unet):
    return list(cross_attention.find_layers(unet).values())


def test_layers_are_found_by_what_they_are(pipe):
    names = list(cross_attention.find_layers(pipe.unet))
    assert len(names) == 6
    assert "mid_block.attentions.0" in names
    assert all(cross_attention.name_operator(layer) == "joint_attention" for layer in layers_of(pipe.unet))


def test_exact_is_stock_up_to_rounding(pipe, pipe64):
    for each, tolerance in ((pipe, EXACT_FLOAT32), (pipe64, EXACT_FLOAT64)):
        stock = latents(each)
        with patched(each, "exact") as report:
            assert largest(latents(each), stock) <= tolerance
        assert not report.last_run.reasons
        assert "added-key attention (6 layers)" in dict(report.replaced)
        assert "attn2" not in str(report)


def test_the_operator_runs_in_every_layer(pipe, monkeypatch):
    calls = []
    original = ops.joint_attention
    monkeypatch.setattr(ops, "joint_attention", lambda *a, **k: calls.append(a) or original(*a, **k))
    with patched(pipe, "exact"):
        latents(pipe)
    assert len(calls) == 6 * STEPS
    latents(pipe)
    with patched(pipe, "exact", fused=False):
        latents(pipe)
    assert len(calls) == 6 * STEPS


@pytest.mark.skipif(not INTERPRETED or ops.missing("triton") is not None, reason="needs Triton's interpreter")
def test_the_kernel_in_a_unet(pipe64):
    stock = latents(pipe64, steps=1)
    with patched(pipe64, "exact"), ops.use_backend("triton", "joint_attention"):
        assert largest(latents(pipe64, steps=1), stock) <= EXACT_FLOAT64


def test_text_alone_in_the_softmax(pipe64, monkeypatch):
    """only_cross_attention, as in IF's second stage."""
    changes = {"only_cross_attention": True, "mid_block_only_cross_attention": True}
    pipe = _with_unet(pipe64, **changes)
    stock = latents(pipe)
    assert all(cross_attention.name_operator(layer) == "cross_attention" for layer in layers_of(pipe.unet))
    with patched(pipe, "exact") as report:
        assert largest(latents(pipe), stock) <= EXACT_FLOAT64
    assert report.last_run.text_kv["reused"] == 6 * (STEPS - 1)


def test_unpatch_leaves_no_trace(pipe):
    before = {name: (type(layer), dict(vars(layer))) for name, layer in cross_attention.find_layers(pipe.unet).items()}
    plain, stock = type(pipe.unet), latents(pipe)
    patch(pipe, "exact")
    assert type(pipe.unet).process_encoder_hidden_states is not plain.process_encoder_hidden_states
    unpatch(pipe)
    assert type(pipe.unet) is plain
    for name, layer in cross_attention.find_layers(pipe.unet).items():
        assert (type(layer), dict(vars(layer))) == before[name]
    assert torch.equal(latents(pipe), stock)


# Text keys and values


class _Count:
    """Counts products with one weight."""

    def __init__(self, monkeypatch, weight):
        self.calls = 0
        original = F.linear

        def linear(x, w, b=None):
            self.calls += w is weight
            return original(x, w, b)

        monkeypatch.setattr(F, "linear", linear)


@pytest.mark.parametrize("which", ["encoder_hid_proj", "mid_block.attentions.0.add_k_proj"])
@pytest.mark.parametrize(
    "options",
    [{"preset": "exact"}, {"propagation": EncoderPropagation(key_steps=(0, 1, 2), max_parallel=4)}],
    ids=["exact", "propagated"],
)
def test_text_is_projected_once_a_prompt(pipe, monkeypatch, options, which):
    count = _Count(monkeypatch, pipe.unet.get_submodule(which).weight)
    with patched(pipe, **options) as report:
        for prompts, prompt in enumerate(("a red circle", "a blue square"), 1):
            latents(pipe, prompt)
            assert count.calls == prompts
            assert report.last_run.text_kv["computed"] == 6


def test_parallel_decoding_is_step_by_step(pipe64):
    results = []
    for parallel in (False, True):
        propagation = EncoderPropagation(key_steps=(0, 1, 2), parallel=parallel, max_parallel=4)
        with patched(pipe64, propagation=propagation) as report, difffast.collect_maps(pipe64) as maps:
            results.append((latents(pipe64), *(maps.mean(name) for name in maps.layers)))
    assert max(report.last_run.decode_batches) > 1
    for a, b in zip(*results, strict=True):
        assert largest(a, b) <= LATENTS_FLOAT64


CHANGES = {
    "projection": ("encoder_hid_proj", "weight", 6),
    "norm": ("mid_block.attentions.0.norm_cross", "weight", 1),
    "norm's bias": ("mid_block.attentions.0.norm_cross", "bias", 1),
    "keys": ("mid_block.attentions.0.add_k_proj", "weight", 1),
    "values": ("mid_block.attentions.0.add_v_proj", "bias", 1),
}


def _changed(pipe, change):
    """Latents of a patched run in which ``change(pipe)`` is called in mid-run, which must be stock's; -> its counts."""

    def run(each):
        def on_end(_pipe, step, _t, values):
            if step == 3:
                change(each)
            return values

        return latents(each, callback_on_step_end=on_end)

    twin = copy.deepcopy(pipe)
    untouched = latents(pipe)
    with patched(pipe, "exact") as report:
        ours = run(pipe)
    assert largest(ours, run(twin)) <= EXACT_FLOAT64
    assert largest(ours, untouched) > 100 * EXACT_FLOAT64
    return report.last_run.text_kv


@pytest.mark.parametrize("what", CHANGES)
def test_weight_updates_are_seen(pipe64, what):
    name, parameter, remade = CHANGES[what]

    def change(pipe):
        with torch.no_grad():
            values = getattr(pipe.unet.get_submodule(name), parameter)
            values.add_(torch.randn(values.shape, generator=torch.Generator().manual_seed(0)))

    assert _changed(pipe64, change)["computed"] == 6 + remade


@pytest.mark.parametrize("target", ["add_k_proj", "encoder_hid_proj"])
def test_lora_scales_are_seen(pipe64, target):
    config = LoraConfig(r=2, target_modules=[target], init_lora_weights=False)
    pipe64.unet.add_adapter(config, "one")

    def change(pipe):
        for module in pipe.unet.modules():
            if type(module).__module__ == "peft.tuners.lora.layer":
                module.scaling["one"] *= 5

    assert _changed(pipe64, change)["computed"] == 12


def test_two_prompts_do_not_meet(pipe64):
    """Runs that take turns on one UNet, as threads do."""
    unet = pipe64.unet
    calls = [unets.call_for(unet, dtype=torch.float64) for _ in range(2)]
    calls[1]["encoder_hidden_states"] = calls[1]["encoder_hidden_states"].flip(1)
    with torch.no_grad():
        stock = [unet(**call).sample for call in calls]
        with patched(pipe64, "exact"):
            contexts = [_context(call) for call in calls]
            for turn in (0, 1, 1, 0):
                with use_context(contexts[turn]):
                    ours = type(unet).__mro__[1].__call__(unet, **calls[turn])
                assert largest(ours.sample, stock[turn]) <= OUTPUT_FLOAT64


def _context(call, *, note=pytest.fail, sink=0, sinks=()):
    """What allows a call its fused cross-attention."""
    text = call["encoder_hidden_states"]
    kv = None if torch.is_grad_enabled() else TextKV(text, Counter())
    size = tuple(call["sample"].shape[-2:])
    return CallContext(True, note, note, Text(text, text, kv, sink=sink), sinks, size, only_text=True)


# Dispatch


def test_other_processors_run_stock_and_say_so(pipe):
    for layer in layers_of(pipe.unet):
        layer.set_processor(AttnAddedKVProcessor())
    stock = latents(pipe)
    with (
        ops.use_backend("reference", "convolution"),
        patched(pipe, "exact") as report,
        pytest.warns(UserWarning, match="added-key attention layers run stock: attention processor AttnAddedKVProc"),
    ):
        assert torch.equal(latents(pipe), stock)
    assert report.last_run.text_kv.total() == 0


def test_a_processor_of_the_other_kind_is_left_to_fail(pipe):
    layer = layers_of(pipe.unet)[0]
    layer.set_processor(AttnProcessor2_0())
    reason = cross_attention.refuse_call(layer, torch.zeros(1, 7, 32), (), {})
    assert reason == "attention processor AttnProcessor2_0 with added keys"


def test_masks_and_hooks_run_stock(pipe):
    unet, notes = pipe.unet, []
    layer = layers_of(unet)[0]
    hidden, text = torch.randn(2, 64, 4, 4), torch.randn(2, 7, 32)
    mask = torch.zeros(2, 1, 7).index_fill_(2, torch.tensor([2, 3]), -1e4)
    with torch.no_grad():
        stock = layer(hidden, encoder_hidden_states=text, attention_mask=mask)
        patch(pipe, "exact")
        with use_context(CallContext(True, notes.append, pytest.fail, Text(text, text, None), size=(8, 8))):
            assert torch.equal(layer(hidden, encoder_hidden_states=text, attention_mask=mask), stock)
            layer.register_forward_hook(lambda *_: None)
            layer(hidden, encoder_hidden_states=text)
    assert [note.partition(": ")[2] for note in notes] == [
        "arguments attention_mask (masks are not fused)",
        "the layer has hooks, or a forward of its own",
    ]


def test_rows_of_zeros_are_refused(pipe):
    """Semantic binding leaves out rows that are zero; after a norm and biases they are not."""
    patch(pipe, "exact")
    call = unets.call_for(pipe.unet)
    message = r"cannot do without rows of zeros: .* norm and biases"
    with torch.no_grad(), use_context(_context(call, sink=2, note=print)), pytest.raises(RuntimeError, match=message):
        type(pipe.unet).__mro__[1].__call__(pipe.unet, **call)


# Programs


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"preset": "exact"}, id="exact"),
        pytest.param(
            {"propagation": EncoderPropagation(key_steps=(0, 1, 2), max_parallel=4)},
            id="propagated",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_programs_take_the_keys_as_inputs(pipe64, monkeypatch, options):
    monkeypatch.setattr(programs, "BACKEND", "eager")  # traced only: no kernels are generated
    with patched(pipe64, **options):
        expected = latents(pipe64)
    projection = pipe64.unet.mid_block.attentions[0].add_k_proj
    with patched(pipe64, compile=True, **options) as report:
        assert largest(latents(pipe64), expected) <= LATENTS_FLOAT64
        assert not report.last_run.reasons
        assert report.last_run.text_kv["computed"] == 6
        assert report.last_run.text_kv["reused"] > 0
        count = _Count(monkeypatch, projection.weight)
        latents(pipe64, "a blue square")
        assert count.calls == 1, "programs do not project the text"


# Maps


@pytest.mark.parametrize("fused", [True, False])
def test_maps_are_the_stock_maps(pipe64, fused):
    twin, expected = copy.deepcopy(pipe64), {}
    for name, layer in cross_attention.find_layers(twin.unet).items():
        layer.set_processor(Recorder(expected, name))
    stock = latents(twin)
    with patched(pipe64, "exact", fused=fused), difffast.collect_maps(pipe64, tokens=[3, 1]) as maps:
        assert largest(latents(pipe64), stock) <= EXACT_FLOAT64
    assert set(maps.layers) == set(expected)
    for name, recorded in expected.items():
        assert maps.steps[name] == len(recorded) == STEPS
        mean = torch.stack(recorded).mean(0)[..., [3, 1]]
        torch.testing.assert_close(maps.mean(name, rows="all"), mean, rtol=1e-6, atol=1e-9)
    assert maps.grid("mid_block.attentions.0", rows="all").shape == (2, 2, 4, 4)


def test_maps_carry_gradients_to_the_text(pipe64):
    """Through the projection, which is not remembered then."""
    call = unets.call_for(pipe64.unet, dtype=torch.float64)
    text = call["encoder_hidden_states"].requires_grad_()
    collected = AttentionMaps(choose_layers(pipe64.unet, "mid_block.*"), (2,))
    patch(pipe64, "exact")
    with use_context(_context(call, sinks=(collected,))):
        type(pipe64.unet).__mro__[1].__call__(pipe64.unet, **call)
    (grad,) = torch.autograd.grad(collected.latest["mid_block.attentions.0"].square().sum(), text)
    assert float(grad.abs().sum()) > 0


# Whole pipelines


@pytest.mark.parametrize(
    ("name", "operator"),
    [
        ("IFPipeline", "joint_attention"),
        ("IFSuperResolutionPipeline", "cross_attention"),
        ("KolorsPipeline", "cross_attention"),  # attn2 layers behind a projection of the text
    ],
)
def test_pipelines_whose_text_is_projected(name, operator, monkeypatch):
    row = {**if_zoo.ROWS, **adapter_zoo.ROWS}[name]
    pipe = row.build().to(dtype=torch.float64)
    pipe.set_progress_bar_config(disable=True)
    layers = layers_of(pipe.unet)
    assert {cross_attention.name_operator(layer) for layer in layers} == {operator}
    stock = row.run(pipe, zoo.Inputs())
    count = _Count(monkeypatch, pipe.unet.encoder_hid_proj.weight)
    with patched(pipe, "exact") as report:
        assert largest(row.run(pipe, zoo.Inputs()), stock) <= EXACT_FLOAT64
    assert count.calls == 1
    total = report.last_run.total
    assert report.last_run.text_kv == {"computed": len(layers), "reused": len(layers) * (total - 1)}
    with difffast.collect_maps(pipe, layers="up_blocks.*", tokens=[1, 2]) as maps:
        assert largest(row.run(pipe, zoo.Inputs()), stock) <= EXACT_FLOAT64
    assert set(maps.steps.values()) == {total}
