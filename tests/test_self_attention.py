"""Self-attention layers of a patched UNet through the operator, and stock where that cannot be."""

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor2_0
from sampling import latents

from difffast import SemanticBinding, ops, patch, patched, unpatch
from difffast.layers.self_attention import SelfAttention
from difffast.surgery.subclass import is_swapped

pytestmark = pytest.mark.skipif(ops.missing("cpp") is not None, reason=str(ops.missing("cpp")))


@pytest.fixture
def counted(monkeypatch):
    """How many layers the operator has computed."""
    calls = []
    forward = SelfAttention.forward
    monkeypatch.setattr(SelfAttention, "forward", lambda *args, **kwargs: calls.append(1) or forward(*args, **kwargs))
    return calls


def test_a_patched_pipeline_uses_it_and_unpatch_takes_it_out(pipe64, counted):
    stock = latents(pipe64)
    layers = SelfAttention().find(pipe64.unet)
    assert len(layers) == 4
    report = patch(pipe64, "exact")
    assert f"self-attention ({len(layers)} layers) self_attention (cpp)" in " ".join(str(report).split())
    torch.testing.assert_close(latents(pipe64), stock, rtol=1e-9, atol=1e-9)
    steps = report.last_run.total
    assert len(counted) == len(layers) * steps
    assert all(map(is_swapped, layers.values()))
    unpatch(pipe64)
    assert not any(map(is_swapped, layers.values()))
    assert torch.equal(latents(pipe64), stock)
    assert len(counted) == len(layers) * steps


def test_layers_are_stock_outside_the_pipeline(pipe, counted):
    """A UNet that is called by hand, or whose run asks for stock layers."""
    with patched(pipe, "exact", fused=False):
        latents(pipe)
    with patched(pipe, "exact"):
        layer = next(iter(SelfAttention().find(pipe.unet).values()))
        layer(torch.randn(1, 16, layer.inner_dim))
    assert not counted


def test_gradients_run_stock_whatever_is_forced(pipe, counted):
    """Semantic binding differentiates the UNet: a kernel that was forced must not refuse there."""
    short = {"bind_steps": 1, "focus_steps": 1, "iterations": 1, "bind_iterations": 1}
    binding = SemanticBinding("attribute", step_size=0.05, bind_step_size=0.05, **short)
    with ops.use_backend("cpp"), patched(pipe, "exact", binding=binding) as report:
        latents(pipe, "a [red circle] and a [blue square]", steps=8)
    assert {step.kind for step in report.trace.steps} == {"bind", "focus"}
    assert counted, "the steps themselves are not differentiated"


def test_projections_that_are_fused(pipe64, counted):
    pipe64.unet.fuse_qkv_projections()
    stock = latents(pipe64)
    with patched(pipe64, "exact"):
        torch.testing.assert_close(latents(pipe64), stock, rtol=1e-9, atol=1e-9)
    assert counted


def test_an_unknown_processor_runs(pipe64, counted):
    class Mine(AttnProcessor2_0):
        def __call__(self, *args, **kwargs):
            return super().__call__(*args, **kwargs) * 0

    for layer in SelfAttention().find(pipe64.unet).values():
        layer.set_processor(Mine())
    stock = latents(pipe64)
    with patched(pipe64, "exact") as report:
        torch.testing.assert_close(latents(pipe64), stock, rtol=1e-9, atol=1e-9)
    assert not counted
    (reason,) = report.last_run.reasons
    assert reason.startswith("self-attention layers run stock: attention processor")
    assert reason.endswith("Mine")


def test_hooks_and_arguments_run_stock(pipe, counted):
    layers = list(SelfAttention().find(pipe.unet).values())
    seen = []
    handle = layers[0].register_forward_hook(lambda *_: seen.append(1))
    with patched(pipe, "exact") as report:
        latents(pipe)
    handle.remove()
    assert any("self-attention layers run stock: the layer has hooks" in reason for reason in report.last_run.reasons)
    steps = report.last_run.total
    assert len(seen) == steps
    assert len(counted) == (len(layers) - 1) * steps
    kind, hidden = SelfAttention(), torch.ones(1, 1, 1)
    assert kind.refuse(layers[0], hidden, (), {"attention_mask": torch.ones(1)}) == "arguments attention_mask"
    assert kind.refuse(layers[0], hidden, (None,), {"encoder_hidden_states": None}) is None


def test_where_pytorchs_attention_is_the_faster_one(pipe, counted):
    with ops.use_backend("sdpa", "self_attention"), patched(pipe, "exact") as report:
        assert "self_attention" not in str(report)
        latents(pipe)
    assert not counted
