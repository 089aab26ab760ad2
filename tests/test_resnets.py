"""Fused resnets against stock ones."""

import contextlib
import copy

import pytest
import torch
from diffusers.models.resnet import ResnetBlock2D
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from difffast import ops, patch, unpatch
from difffast.layers.context import CallContext, use_context
from difffast.layers.resnet import Resnet
from difffast.surgery.subclass import is_swapped

pytestmark = pytest.mark.skipif(ops.missing("cpp") is not None, reason=str(ops.missing("cpp")))

SIZE = (3, 48, 34, 33)


def make(dtype=torch.float32, **options):
    torch.manual_seed(0)
    options = {"in_channels": 48, "out_channels": 32, "temb_channels": 24, "groups": 8, **options}
    resnet = ResnetBlock2D(**options).to(dtype).eval()
    for parameter in resnet.parameters():
        nn.init.normal_(parameter, std=0.2)
    return nn.ModuleDict({"resnet": resnet})


def run(holder, dtype=torch.float32, *, fused=True, layout=torch.contiguous_format):
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(SIZE, generator=generator).to(dtype).contiguous(memory_format=layout)
    temb = torch.randn(3, 24, generator=generator).to(dtype)
    reasons = []
    # By itself the kernel is chosen for larger operands only.
    kernel = ops.use_backend("cpp", "group_norm_silu") if fused else contextlib.nullcontext()
    with torch.no_grad(), kernel, use_context(CallContext(True, reasons.append, reasons.append) if fused else None):
        return holder["resnet"](hidden, temb), reasons


KINDS = {
    "plain": {},
    "no shortcut": {"out_channels": 48},
    "scale_shift": {"time_embedding_norm": "scale_shift"},
    "time activation elsewhere": {"skip_time_act": True},
    "output scale": {"output_scale_factor": 2**0.5},
    "group counts differ": {"groups_out": 4},
}


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_equals_stock(kind, layout, monkeypatch):
    holder = make(**KINDS[kind])
    exact, _ = run(copy.deepcopy(holder).double(), torch.float64, fused=False)
    stock, _ = run(holder, fused=False, layout=layout)
    Resnet().put_in(holder)
    calls = []
    plain = ops.group_norm_silu
    monkeypatch.setattr(ops, "group_norm_silu", lambda *a, **k: calls.append(1) or plain(*a, **k))
    fused, reasons = run(holder, layout=layout)
    assert (len(calls), reasons) == (2, [])
    assert fused.is_contiguous(memory_format=layout)
    assert float((fused - exact).norm()) <= 1.2 * float((stock - exact).norm())
    calls.clear()
    assert torch.equal(run(holder, fused=False, layout=layout)[0], stock)
    assert not calls


def test_half_precision_is_no_worse():
    holder = make(torch.bfloat16)
    exact, _ = run(copy.deepcopy(holder).double(), torch.float64, fused=False)
    stock, _ = run(holder, torch.bfloat16, fused=False)
    Resnet().put_in(holder)
    fused, reasons = run(holder, torch.bfloat16)
    assert not reasons
    assert float((fused - exact).norm()) <= 1.1 * float((stock - exact).norm())


@pytest.mark.parametrize("of", ["conv1", "conv2", "every module"])
def test_outputs_that_somebody_keeps_stay(of, monkeypatch):
    """A norm and the sum take the place of what nobody else will read."""
    holder, kept, overwrites = make(out_channels=48), [], []
    plain = ops.group_norm_silu
    monkeypatch.setattr(
        ops, "group_norm_silu", lambda *a, **k: overwrites.append(k.get("overwrite", False)) or plain(*a, **k)
    )

    def keep(module, _inputs, output):
        if isinstance(module, nn.Conv2d):
            kept.append((output, output.clone()))

    layer = getattr(holder["resnet"], of, None)
    Resnet().put_in(holder)
    with register_module_forward_hook(keep) if layer is None else layer.register_forward_hook(keep):
        watched, reasons = run(holder)
    assert not reasons
    assert len(kept) == (2 if layer is None else 1)
    assert all(torch.equal(output, before) for output, before in kept)
    assert overwrites == [False, of == "conv2"]
    overwrites.clear()
    assert torch.equal(run(holder)[0], watched)
    assert overwrites == [False, True]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda r: r.register_forward_hook(lambda *_: None), "one has hooks"),
        (lambda r: setattr(r, "forward", lambda *a: ResnetBlock2D.forward(r, *a)), "one has hooks"),
        (lambda r: r.norm2.register_forward_hook(lambda *_: None), "a norm is wrapped"),
        (lambda r: setattr(r, "norm1", nn.GroupNorm(8, 48, affine=False)), "a norm is wrapped"),
        (lambda r: setattr(r, "norm1", nn.Identity()), "a norm is wrapped"),
        (lambda r: setattr(r, "norm1", r.norm1.double()), "a norm's weights are torch.float64"),
    ],
)
def test_what_cannot_be_fused_runs_stock_and_says_why(change, reason):
    holder = make()
    change(holder["resnet"])
    if "float64" in reason:  # stock refuses that as well
        Resnet().put_in(holder)
        with pytest.raises(RuntimeError):
            run(holder)
        return
    stock, _ = run(holder, fused=False)
    Resnet().put_in(holder)
    fused, reasons = run(holder)
    assert torch.equal(fused, stock)
    assert len(reasons) == 1
    assert reasons[0].startswith(f"resnets run stock: {reason}")


def test_autocast_runs_stock():
    holder = make()
    Resnet().put_in(holder)
    with torch.autocast("cpu", torch.bfloat16):
        _, reasons = run(holder)
    assert reasons == ["resnets run stock: autocast chooses the norms' dtype"]


@pytest.mark.parametrize("options", [{"non_linearity": "mish"}, {"up": True}, {"down": True}], ids=str)
def test_other_kinds_are_left_alone(options):
    holder = make(**options)
    Resnet().put_in(holder)
    assert not is_swapped(holder["resnet"])


def test_a_patched_pipeline_uses_them_and_unpatch_takes_them_out(pipe):
    found = Resnet().find(pipe.unet)
    assert found
    report = patch(pipe, "exact")
    assert all(map(is_swapped, found.values()))
    assert f"resnets ({len(found)} layers) group_norm_silu (cpp)" in " ".join(str(report).split())
    unpatch(pipe)
    assert not any(map(is_swapped, found.values()))
    assert "resnets (" not in str(patch(pipe, "exact", fused=False))
    unpatch(pipe)


def test_small_operands_run_stock_altogether(monkeypatch):
    holder = make()
    Resnet().put_in(holder)
    calls = []
    plain = ops.group_norm_silu
    monkeypatch.setattr(ops, "group_norm_silu", lambda *a, **k: calls.append(1) or plain(*a, **k))
    for size, fused in (((3, 48, 34, 33), True), ((2, 48, 8, 8), False)):
        calls.clear()
        with torch.no_grad(), use_context(CallContext(True, pytest.fail, pytest.fail)):
            holder["resnet"](torch.randn(size), torch.randn(size[0], 24))
        assert bool(calls) == fused


def test_inputs_may_come_by_name(monkeypatch):
    """As UNetMotionModel calls its resnets."""
    holder = make()
    Resnet().put_in(holder)
    calls, plain = [], ops.group_norm_silu
    monkeypatch.setattr(ops, "group_norm_silu", lambda *a, **k: calls.append(1) or plain(*a, **k))
    hidden, temb = torch.randn(SIZE), torch.randn(3, 24)
    with torch.no_grad(), ops.use_backend("cpp", "group_norm_silu"):
        stock = holder["resnet"](hidden, temb)
        with use_context(CallContext(True, pytest.fail, pytest.fail)):
            fused = holder["resnet"](input_tensor=hidden, temb=temb)
    assert len(calls) == 2
    torch.testing.assert_close(fused, stock, rtol=1e-4, atol=1e-4)


def test_all_resnets_of_a_vae_are_found(pipe):
    for half in (pipe.vae.encoder, pipe.vae.decoder):
        resnets = {name for name, module in half.named_modules() if type(module) is ResnetBlock2D}
        assert set(Resnet().find(half)) == resnets
        assert len(resnets) >= 4
