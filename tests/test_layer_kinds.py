"""A kind of fused layers is one object: patching, reports, programs and unpatching ask nothing but the registry."""

import pytest
import torch
from sampling import largest, latents
from tolerances import EXACT_FLOAT64
from torch import nn

from difffast import patch, patched, unpatch
from difffast.engines import programs
from difffast.layers.kind import LayerKind
from difffast.layers.registry import LAYERS, register
from difffast.surgery.pristine import is_plain
from difffast.surgery.subclass import is_swapped, plain_class


class Norms(LayerKind):
    """LayerNorms written out: a toy, registered as a user would."""

    name = "layer norms"

    def __init__(self):
        self.calls = 0

    def find(self, unet):
        return {name: module for name, module in unet.named_modules() if plain_class(module) is nn.LayerNorm}

    def pays(self, layer, hidden):
        return hidden.shape[1] >= 16

    def refuse(self, layer, hidden, args, kwargs):
        return None if is_plain(layer, nn.LayerNorm) else "one is wrapped"

    def forward(self, layer, hidden):
        self.calls += 1
        centred = hidden - hidden.mean(-1, keepdim=True)
        return centred * (centred.square().mean(-1, keepdim=True) + layer.eps).rsqrt() * layer.weight + layer.bias

    def as_inputs(self, layers, call):
        return dict.fromkeys(layers, ()) if call.fused else {}

    def stand_in(self, layer, value):
        return lambda hidden: (
            nn.functional.rms_norm(hidden - hidden.mean(-1, keepdim=True), hidden.shape[-1:]) * 0
            + (nn.functional.layer_norm(hidden, hidden.shape[-1:], layer.weight, layer.bias, layer.eps))
        )

    def describe(self, layers, weight, *, compiled):
        yield f"layer norms ({len(layers)})", "by hand"


@pytest.fixture
def norms():
    kind = register(Norms())
    yield kind
    LAYERS.remove(kind)


def test_a_registered_kind_is_fused_reported_and_taken_out(pipe64, norms):
    stock = latents(pipe64)
    report = patch(pipe64, "exact")
    layers = norms.find(pipe64.unet)
    assert f"layer norms ({len(layers)})" in str(report)
    assert largest(latents(pipe64), stock) <= EXACT_FLOAT64
    assert norms.calls == len(layers) * report.last_run.total
    handle = next(iter(layers.values())).register_forward_hook(lambda *_: None)
    latents(pipe64)
    handle.remove()
    assert "layer norms run stock: one is wrapped" in report.last_run.reasons
    unpatch(pipe64)
    assert not any(map(is_swapped, pipe64.unet.modules()))
    assert torch.equal(latents(pipe64), stock)


@pytest.mark.slow
def test_programs_take_it_as_well(pipe, norms, monkeypatch):
    monkeypatch.setattr(programs, "BACKEND", "eager")
    with patched(pipe, "exact"):
        expected = latents(pipe)
    calls = norms.calls
    with patched(pipe, "exact", compile=True) as report:
        assert largest(latents(pipe), expected) <= 1e-4
    assert not report.last_run.reasons
    assert norms.calls == calls, "programs run stand-ins"


def test_a_kind_that_is_gone_is_taken_out_all_the_same(pipe, norms):
    patch(pipe, "exact")
    LAYERS.remove(norms)
    try:
        unpatch(pipe)
        assert not any(map(is_swapped, pipe.unet.modules()))
    finally:
        LAYERS.append(norms)


def test_what_is_no_kind_is_refused(norms):
    with pytest.raises(TypeError, match=r"kind must be a difffast.layers.kind.LayerKind, got str"):
        register("norms")
    with pytest.raises(ValueError, match=r"name must be new, got 'layer norms'"):
        register(Norms())
