"""GEGLU layers of a patched UNet on a CPU: the gate by the operator, and stock where that cannot be."""

import peft
import pytest
import torch
from sampling import largest
from sampling import latents as sampled
from tolerances import EXACT_FLOAT32

from difffast import ops, patch, patched, unpatch
from difffast.layers import geglu
from difffast.layers.geglu import Geglu
from difffast.surgery.subclass import is_swapped

pytestmark = pytest.mark.skipif(ops.missing("cpp") is not None, reason=str(ops.missing("cpp")))


def latents(pipe):
    return sampled(pipe, steps=4)


@pytest.fixture
def counted(monkeypatch):
    """How many gates the kernel has computed, without their linear layer or with it."""
    calls = []
    kernel, operator = geglu._kernel, ops.geglu
    monkeypatch.setattr(geglu, "_kernel", lambda x: calls.append("layer") or kernel(x))
    monkeypatch.setattr(ops, "geglu", lambda x: calls.append("gate") or operator(x))
    return calls


def test_a_patched_pipeline_uses_it_and_unpatch_takes_it_out(pipe, counted):
    stock = latents(pipe)
    layers = Geglu().find(pipe.unet)
    report = patch(pipe, "exact")
    assert f"GEGLU layers ({len(layers)}) geglu (cpp)" in " ".join(str(report).split())
    assert largest(latents(pipe), stock) <= EXACT_FLOAT32
    assert counted == ["layer"] * (len(layers) * report.last_run.total)
    assert not report.last_run.reasons
    unpatch(pipe)
    assert not any(map(is_swapped, layers.values()))
    counted.clear()
    assert torch.equal(latents(pipe), stock)
    assert not counted


def test_a_linear_layer_inside_that_is_not_plain_runs_as_it_is(pipe, counted):
    names = list(Geglu().find(pipe.unet))
    config = peft.LoraConfig(r=2, target_modules=[f"{names[0]}.proj"], init_lora_weights=False)
    pipe.unet.add_adapter(config)
    pipe.unet.get_submodule(f"{names[1]}.proj").register_forward_hook(lambda *_: None)
    stock = latents(pipe)
    with patched(pipe, "exact") as report:
        assert largest(latents(pipe), stock) <= EXACT_FLOAT32
    steps = report.last_run.total
    assert counted.count("gate") == 2 * steps
    assert counted.count("layer") == (len(names) - 2) * steps


def test_hooks_of_the_layer_itself_run(pipe, counted):
    layer = next(iter(Geglu().find(pipe.unet).values()))
    layer.register_forward_hook(lambda _module, _args, out: out + 0.1)
    stock = latents(pipe)
    with patched(pipe, "exact") as report:
        assert largest(latents(pipe), stock) <= EXACT_FLOAT32
    assert "GEGLU layers run stock: one has hooks, or a forward of its own" in report.last_run.reasons


def test_a_forced_reference_is_kept_to(pipe, counted):
    with ops.use_backend("reference", "geglu"), patched(pipe, "exact"):
        latents(pipe)
    assert not counted


def test_bfloat16_is_no_further_from_float32_than_stock(pipe, counted):
    exact = latents(pipe)
    pipe.to(torch.bfloat16)
    stock = (latents(pipe) - exact).norm()
    with patched(pipe, "exact"):
        ours = (latents(pipe) - exact).norm()
    assert counted
    assert 0 < ours <= 1.2 * stock


def test_float64(pipe, counted):
    pipe.to(torch.float64)
    stock = latents(pipe)
    with patched(pipe, "exact"):
        assert largest(latents(pipe), stock) <= 1e-9
    assert counted
