"""On a GPU nothing inside a patched UNet's call may ask for a value: here whatever would is an error, on the CPU."""

import pytest
from recorder import CpuRecorder
from sampling import latents
from torch.utils._python_dispatch import TorchDispatchMode

from difffast import CfgReuse, EncoderPropagation, FeatureReuse, OutputForecast, patched
from difffast.engines import graphs
from difffast.sampling.controller import find_controller

#: What ``item``, ``bool``, ``tolist``, ``nonzero``, ``equal`` and indexing by masks end in.
_ASKS = {"aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::is_nonzero", "aten::masked_select"}


class _AsksForbidden(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function._schema.name not in _ASKS, f"{function._schema.name} waits for the device"
        return function(*args, **(kwargs or {}))


class _Guarded:
    """In place of ``pipe.unet``: a call that waits raises."""

    def __init__(self, unet):
        self._unet = unet

    def __call__(self, *args, **kwargs):
        with _AsksForbidden():
            return self._unet(*args, **kwargs)

    def __getattr__(self, name):
        return getattr(self._unet, name)


OPTIONS = {
    "exact": {"preset": "exact"},
    "exact, recorded": {"preset": "exact", "engine": "cudagraphs"},
    "ahead": {"propagation": EncoderPropagation(key_steps=(0, 1, 4, 7))},
    "ahead, recorded": {"propagation": EncoderPropagation(key_steps=(0, 1, 4, 7)), "engine": "cudagraphs"},
    "one at a time, extrapolated": {
        "propagation": EncoderPropagation(key_steps=(0, 1, 4, 7), parallel=False, extrapolate=1)
    },
    "prior noise": {"preset": "faster-diffusion"},
    "outer layers": {"propagation": FeatureReuse(3, extrapolate=2)},
    "half": {"propagation": FeatureReuse(2), "cfg": CfgReuse(3)},
    "forecasts, guarded": {"propagation": OutputForecast(2, guard=1.0)},
}


@pytest.mark.parametrize("options", OPTIONS)
def test_no_call_of_the_unet_waits(pipe, options):
    options = OPTIONS[options]
    with patched(pipe, **options):
        if "engine" in options:
            find_controller(pipe.unet)._engines["cudagraphs"] = graphs.Graphs(CpuRecorder())
        latents(pipe, steps=11)  # what is compared once a text, for instance
        vars(pipe)["unet"] = _Guarded(pipe.unet)
        try:
            assert latents(pipe, steps=11).isfinite().all()
        finally:
            del vars(pipe)["unet"]


def test_the_guard_sees_what_waits(pipe):
    def ask(module, args, output):
        if output.sum() > 0:
            return None
        return None

    pipe.unet.conv_in.register_forward_hook(ask)
    vars(pipe)["unet"] = _Guarded(pipe.unet)
    try:
        with pytest.raises(AssertionError, match="_local_scalar_dense waits for the device"):
            latents(pipe, steps=2)
    finally:
        del vars(pipe)["unet"]
