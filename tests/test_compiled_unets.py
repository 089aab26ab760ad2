"""A UNet that the user has compiled stays compiled under a patch, with the user's settings, and is given back."""

import pickle

import pytest
import torch
import zoo
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPAGPipeline, UNet2DConditionModel
from sampling import largest, picture
from sampling import latents as sampled
from tolerances import EXACT_FLOAT32
from torch._dynamo.utils import counters

from difffast import EncoderPropagation, FeatureReuse, collect_maps, patch, patched, unpatch
from difffast.surgery.subclass import is_swapped, plain_class

TABLE = EncoderPropagation(key_steps=(0, 1, 2, 7), max_parallel=4)


def latents(pipe, *args, **options):
    return sampled(pipe, *args, **{"steps": 12, **options})


class Backend:
    """Counts the graphs that are made, and the entries into them."""

    def __init__(self):
        self.graphs = self.entries = 0

    def __call__(self, graph, _inputs):
        self.graphs += 1

        def enter(*args):
            self.entries += 1
            return graph.forward(*args)

        return enter

    def since(self):
        """(graphs, entries) since the last question."""
        found = (self.graphs, self.entries)
        self.graphs = self.entries = 0
        return found


@pytest.fixture
def backend():
    torch._dynamo.reset()
    return Backend()


def compile_unet(pipe, how, **options):
    if how == "torch.compile":
        pipe.unet = torch.compile(pipe.unet, **options)
    else:
        pipe.unet.compile(**options)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("how", ["torch.compile", "unet.compile"])
def test_a_compiled_unet_stays_compiled(pipe, backend, how, when):
    with patched(pipe, propagation=TABLE):
        expected = latents(pipe)
    plain = pipe.unet
    if when == "after":
        patch(pipe, propagation=TABLE)
    compile_unet(pipe, how, backend=backend, fullgraph=True)
    held = pipe.unet
    report = patch(pipe, propagation=TABLE) if when == "before" else patch(pipe, propagation=TABLE)
    assert any("stays compiled" in note for note in report.notes)
    assert largest(latents(pipe), expected) <= EXACT_FLOAT32
    assert backend.since() == (4, 9)
    assert largest(latents(pipe), expected) <= EXACT_FLOAT32
    # 3 whole steps or encoders at key steps 0 and 1 (segments of one step), 2 and 7; decoders of 4, 1, 4 and 1 steps
    assert backend.since() == (0, 8)
    assert not report.last_run.reasons
    assert pipe.unet is held
    unpatch(pipe)
    assert pipe.unet is held
    assert not is_swapped(held)
    assert type(plain) is UNet2DConditionModel
