"""On a CUDA device: look-ahead is step by step there too, and no call of the patched UNet waits for the device."""

import pytest
import torch
from sampling import SCHEDULERS, STEPS, largest, latents, scheduler
from tolerances import EXACT_FLOAT32, LATENTS_FLOAT32, LATENTS_FLOAT64

from difffast import EncoderPropagation, FeatureReuse, patched

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture(autouse=True)
def _exact_arithmetic():
    earlier = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = earlier


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, LATENTS_FLOAT32), (torch.float64, LATENTS_FLOAT64)], ids=str
)
def test_look_ahead_is_step_by_step(pipe, name, dtype, tolerance):
    pipe = pipe.to("cuda", dtype)
    pipe.scheduler = scheduler(name)
    with patched(pipe, propagation=EncoderPropagation(parallel=False)):
        one_at_a_time = latents(pipe, steps=STEPS)
    with patched(pipe, "faster-diffusion") as report:
        assert largest(latents(pipe, steps=STEPS), one_at_a_time) <= tolerance
    assert report.last_run.propagated > 0


@pytest.mark.parametrize(
    "propagation", [EncoderPropagation(key_steps=1), EncoderPropagation(), FeatureReuse(3, extrapolate=1)], ids=str
)
def test_captured_programs_are_what_runs_uncompiled(pipe, propagation):
    """Two images, so that graphs are replayed, and a weight that changes in place between them."""
    pipe = pipe.to("cuda")
    for change in (1.0, 1.5):
        with torch.no_grad():
            pipe.unet.conv_in.weight.mul_(change)
        with patched(pipe, propagation=propagation):
            expected = latents(pipe)
        with patched(pipe, propagation=propagation, compile=True) as report:
            for _ in range(2):
                assert largest(latents(pipe), expected) <= EXACT_FLOAT32
            with torch.no_grad():
                pipe.unet.conv_in.weight.mul_(2)
            assert largest(latents(pipe), expected) > 100 * EXACT_FLOAT32
            with torch.no_grad():
                pipe.unet.conv_in.weight.div_(2)
        assert not report.last_run.reasons
        assert report.programs.count_graph_bytes > 0


@pytest.mark.parametrize(
    "options",
    [
        {"preset": "exact"},
        {"propagation": EncoderPropagation(key_steps=(0, 1, 5, 9))},
        {"propagation": EncoderPropagation(key_steps=(0, 1, 5, 9), parallel=False)},
        {"propagation": FeatureReuse(3, extrapolate=1)},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_recorded_graphs_are_what_runs_eagerly(pipe, dtype, options):
    """Two images with other prompts, so that graphs are replayed, and a weight that changes and one that moves."""
    pipe = pipe.to("cuda", dtype)
    with patched(pipe, **options, engine="cudagraphs") as report:
        for change in (1.0, 1.5):
            with torch.no_grad():
                pipe.unet.conv_in.weight.mul_(change)
                pipe.unet.conv_out.weight.data = pipe.unet.conv_out.weight.data * change
            for prompt in ("a red circle", "a blue square"):
                ours = latents(pipe, prompt)
                assert not report.last_run.reasons
                with patched(pipe, **options, engine="eager"):
                    expected = latents(pipe, prompt)
                assert largest(ours.float(), expected.float()) <= (EXACT_FLOAT32 if dtype == torch.float32 else 0.05)
        latents(pipe)
        assert report.programs.kept > 0
        assert report.programs.graph_bytes > 0


class _SyncsForbidden:
    """In place of ``pipe.unet``: a call that synchronises raises."""

    def __init__(self, unet):
        self._unet = unet

    def __call__(self, *args, **kwargs):
        try:
            torch.cuda.set_sync_debug_mode("error")
            return self._unet(*args, **kwargs)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    def __getattr__(self, name):
        return getattr(self._unet, name)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
@pytest.mark.parametrize(
    "options", [{"preset": "faster-diffusion"}, {"propagation": FeatureReuse(3, extrapolate=2)}], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_no_synchronisation_inside_the_unet(pipe, dtype, options):
    pipe = pipe.to("cuda", dtype)
    with patched(pipe, **options):
        latents(pipe)
        vars(pipe)["unet"] = _SyncsForbidden(pipe.unet)
        try:
            assert latents(pipe).isfinite().all()
        finally:
            vars(pipe)["unet"] = pipe.unet._unet
