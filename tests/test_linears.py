"""Linear layers of a patched UNet through the operator, and stock where that cannot be."""

import importlib

import peft
import pytest
import torch
from sampling import largest
from sampling import latents as sampled
from tolerances import EXACT_FLOAT32
from torch import nn

from difffast import SemanticBinding, collect_maps, ops, patch, patched, unpatch
from difffast.engines import programs
from difffast.layers.linear import Linear
from difffast.surgery.subclass import is_swapped

pytestmark = pytest.mark.skipif(ops.missing("onednn") is not None, reason=str(ops.missing("onednn")))
operator = importlib.import_module("difffast.ops.linear")


def latents(pipe, *args, **options):
    return sampled(pipe, *args, **{"steps": 10, **options})


@pytest.fixture(autouse=True)
def _pays(monkeypatch):
    """As on a processor on which oneDNN is faster, and for layers as small as these pipelines'."""
    monkeypatch.setattr(operator, "advantage", lambda: 2.0)
    monkeypatch.setattr(operator, "advantage_if_large", lambda: 2.0)
    monkeypatch.setattr(operator, "_SMALL", 0)
    monkeypatch.setattr(operator, "_FEW", 8)
    monkeypatch.setattr(operator, "_ACCEPTED", 0)


@pytest.fixture
def counted(monkeypatch):
    """How many products oneDNN has computed."""
    calls = []
    product = operator._convolution
    monkeypatch.setattr(operator, "_convolution", lambda *args: calls.append(1) or product(*args))
    return calls


def of_text(names):
    """Those of them that make text keys and values, once a prompt."""
    return [name for name in names if "attn2.to_k" in name or "attn2.to_v" in name]


def test_a_patched_pipeline_uses_it_and_unpatch_takes_it_out(pipe, counted):
    stock = latents(pipe)
    layers = Linear().find(pipe.unet)
    report = patch(pipe, "exact")
    assert f"linear layers ({len(layers)}) linear (onednn)" in " ".join(str(report).split())
    assert largest(latents(pipe), stock) <= EXACT_FLOAT32
    names, steps = list(Linear().find(pipe.unet)), report.last_run.total
    text = len(of_text(names))
    assert text
    assert len(counted) == (len(names) - text) * steps + text
    assert not report.last_run.reasons
    assert all(map(is_swapped, layers.values()))
    unpatch(pipe)
    assert not any(map(is_swapped, layers.values()))
    counted.clear()
    assert torch.equal(latents(pipe), stock)
    assert not counted


def test_layers_are_stock_outside_the_pipeline(pipe, counted):
    with patched(pipe, "exact", fused=False):
        latents(pipe)
    with patched(pipe, "exact"):
        layer = next(iter(Linear().find(pipe.unet).values()))
        layer(torch.randn(1, 64, layer.in_features))
    assert not counted


def test_where_pytorchs_product_is_as_fast(pipe, counted, monkeypatch):
    monkeypatch.setattr(operator, "advantage", lambda: 1.0)
    monkeypatch.setattr(operator, "advantage_if_large", lambda: 1.0)
    with patched(pipe, "exact") as report:
        assert "linear layers" not in str(report)
        latents(pipe)
    assert not counted


def test_gradients_run_stock_whatever_is_forced(pipe, counted):
    short = {"bind_steps": 1, "focus_steps": 1, "iterations": 1, "bind_iterations": 1}
    binding = SemanticBinding("attribute", step_size=0.05, bind_step_size=0.05, **short)
    with ops.use_backend("onednn"), patched(pipe, "exact", binding=binding) as report:
        latents(pipe, "a [red circle] and a [blue square]", steps=8)
    assert {step.kind for step in report.trace.steps} == {"bind", "focus"}
    assert counted, "the steps themselves are not differentiated"


def test_lora_around_the_layers(pipe, counted):
    names = ["to_q", "to_k", "to_v", "to_out.0"]
    pipe.unet.add_adapter(peft.LoraConfig(r=2, target_modules=names, init_lora_weights=False))
    stock = latents(pipe)
    with patched(pipe, "exact") as report:
        # Adapters of weights around 1 make latents of 25 where 4 is usual: rounding grows with them.
        assert largest(latents(pipe), stock) <= EXACT_FLOAT32 * float(stock.abs().max()) / 4
    assert counted
    assert not report.last_run.reasons
    assert torch.equal(latents(pipe), stock)


def test_an_adapter_that_is_added_while_patched(pipe, counted):
    with patched(pipe, "exact"):
        pipe.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"], init_lora_weights=False))
        ours = latents(pipe)
    assert counted
    assert not any(map(is_swapped, pipe.unet.modules()))
    assert largest(latents(pipe), ours) <= EXACT_FLOAT32


class _Quantised(nn.Parameter):
    """As quantised weights are: a parameter of another type."""


def test_hooks_and_other_weights_run_stock(pipe, counted):
    hooked, quantised, *_ = Linear().find(pipe.unet).values()
    seen = []
    handle = hooked.register_forward_hook(lambda *_: seen.append(1))
    quantised.weight = _Quantised(quantised.weight.detach())
    with patched(pipe, "exact") as report:
        latents(pipe)
    handle.remove()
    assert len(seen) == report.last_run.total
    assert any("linear layers run stock: one has hooks" in reason for reason in report.last_run.reasons)
    names, steps = list(Linear().find(pipe.unet)), report.last_run.total
    text = len(of_text(names))
    assert len(counted) == (len(names) - text - 2) * steps + text


@pytest.mark.slow
@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("fused", [True, False])
def test_they_are_in_the_programs(pipe, fused, adapted, monkeypatch):
    if adapted:  # whose own layers are held in nn.ModuleDict
        pipe.unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_v", "proj_in"], init_lora_weights=False))
    with patched(pipe, "exact", fused=fused):
        expected = latents(pipe)
    found = []

    def backend(graph, _):
        found.extend(node for node in graph.graph.nodes if node.target is torch.ops.difffast.linear.onednn)
        return graph

    monkeypatch.setattr(programs, "BACKEND", backend)
    with patched(pipe, "exact", fused=fused, compile=True) as report:
        assert largest(latents(pipe), expected) <= EXACT_FLOAT32
    assert not report.last_run.reasons
    layers = list(Linear().find(pipe.unet))
    assert len(found) == fused * (len(layers) - len(of_text(layers)))


def test_layers_that_shall_not_be_fused_are_asked_nothing(pipe, counted, monkeypatch):
    """A forced backend that cannot serve them must not make them fail."""
    pipe.to(torch.bfloat16)
    with ops.use_backend("onednn"), patched(pipe, "exact", fused=False), collect_maps(pipe, layers="mid_block.*"):
        assert latents(pipe).isfinite().all()
    assert not counted
