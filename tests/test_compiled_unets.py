"""A UNet that the user has compiled stays compiled under a patch, with the user's settings, and is given back."""

import pickle

import pytest
import torch
import zoo
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPAGPipeline, UNet2DConditionModel
from sampling import largest, picture
from sampling import latents as sampled
from tolerances import EXACT_FLOAT32

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


@pytest.mark.slow
@pytest.mark.parametrize("how", ["torch.compile", "unet.compile"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_a_compiled_unet_stays_compiled(pipe, backend, how, when):
    with patched(pipe, propagation=TABLE):
        expected = latents(pipe)
    plain = pipe.unet
    if when == "before":
        compile_unet(pipe, how, backend=backend, fullgraph=True)
    report = patch(pipe, propagation=TABLE)
    assert any("stays compiled" in note for note in report.notes) == (when == "before")
    if when == "after":
        compile_unet(pipe, how, backend=backend, fullgraph=True)
    held = pipe.unet
    assert largest(latents(pipe), expected) <= EXACT_FLOAT32
    # Key steps 0 and 1 have no others to decode: the whole UNet, twice.  2 and 7 have four: an encoder, and decoders of
    # four steps and of one, each.
    assert backend.since() == (4, 8)
    assert largest(latents(pipe, "something else"), expected) > 100 * EXACT_FLOAT32
    assert backend.since() == (0, 8)
    assert not report.last_run.reasons
    unpatch(pipe)
    assert pipe.unet is held
    assert not is_swapped(held)
    assert type(plain) is UNet2DConditionModel


def test_whole_calls_run_the_users_own_program(pipe, backend):
    stock = latents(pipe)
    compiled = pipe.unet = torch.compile(pipe.unet, backend=backend, fullgraph=True)
    for _ in range(2):
        with patched(pipe, "exact") as report:
            assert largest(latents(pipe), stock) <= EXACT_FLOAT32
            assert report.last_run.stock == 0
        assert pipe.unet is compiled
    assert backend.since() == (1, 24)
    assert largest(latents(pipe), stock) <= EXACT_FLOAT32
    assert backend.since() == (1, 12)  # the type of the UNet, which torch.compile guards, is another one unpatched
    copy = pickle.loads(pickle.dumps(pipe.unet._orig_mod))
    assert type(copy) is UNet2DConditionModel


@pytest.mark.slow
def test_two_pipelines_share_a_compiled_unet(pipe, backend):
    twin = type(pipe)(**pipe.components, requires_safety_checker=False)
    twin.set_progress_bar_config(disable=True)
    pipe.unet = twin.unet = torch.compile(pipe.unet, backend=backend)
    patch([pipe, twin], propagation=TABLE)
    unpatch(twin)
    latents(pipe)
    assert backend.since() == (4, 8)
    unpatch(pipe)
    assert not is_swapped(pipe.unet)


@pytest.mark.slow
def test_shared_features_of_outer_layers_and_halves_follow_as_well(pipe, backend):
    with patched(pipe, propagation=FeatureReuse(3)):
        expected = latents(pipe)
    pipe.unet.compile(backend=backend)
    with patched(pipe, propagation=FeatureReuse(3)) as report:
        assert largest(latents(pipe), expected) <= EXACT_FLOAT32
    assert backend.since() == (2, 12)
    assert report.last_run.reused == 8


@pytest.mark.parametrize("fullgraph", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_repeated_blocks_keep_one_graph(pipe, backend, fullgraph):
    blocks = sum(type(module).__name__ == "BasicTransformerBlock" for module in pipe.unet.modules())
    shapes = 2  # widths of the blocks
    with patched(pipe, "exact"):
        expected = latents(pipe)
        pipe.unet.compile_repeated_blocks(backend=backend, fullgraph=fullgraph)
        assert largest(latents(pipe), expected) <= EXACT_FLOAT32
        graphs, entries = backend.since()
        assert graphs <= 2 * shapes, "an automatically dynamic size may need a second one"
        assert entries == 12 * blocks
        latents(pipe, "something else")
        assert backend.since() == (0, 12 * blocks)


def test_maps_are_collected_without_the_users_programs(pipe, backend):
    with collect_maps(pipe) as expected:
        latents(pipe)
    compiled = pipe.unet = torch.compile(pipe.unet, backend=backend)
    compiled._orig_mod.compile_repeated_blocks(backend=backend)
    with (
        collect_maps(pipe) as maps,
        pytest.warns(UserWarning, match="programs and graphs are not used while attention maps"),
    ):
        latents(pipe)
    assert backend.since() == (0, 0)
    layer = expected.layers[0]
    assert largest(maps.mean(layer), expected.mean(layer)) <= EXACT_FLOAT32


@pytest.mark.slow
def test_a_patched_unet_compiles_and_so_does_it_unpatched(pipe, backend):
    sample, text = torch.randn(2, 4, 8, 8), torch.randn(2, 5, pipe.unet.config.cross_attention_dim)
    with torch.no_grad():
        stock = pipe.unet(sample, 3, text).sample
        patch(pipe, "exact")
        compiled = torch.compile(pipe.unet, backend=backend, fullgraph=True)
        assert largest(compiled(sample, 3, text).sample, stock) <= EXACT_FLOAT32
        unpatch(pipe)
        assert largest(compiled(sample, 3, text).sample, stock) <= EXACT_FLOAT32
        assert largest(torch.compile(pipe.unet, backend=backend, fullgraph=True)(sample, 3, text).sample, stock) <= (
            EXACT_FLOAT32
        )
    assert backend.since()[1] == 3


@pytest.mark.slow
def test_a_compiled_controlnet_runs_at_key_steps(backend):
    pipe = zoo.ROWS["StableDiffusionControlNetPipeline"].build()
    pipe.set_progress_bar_config(disable=True)
    under = {"image": picture(), "height": 32, "width": 32}
    with patched(pipe, propagation=TABLE):
        expected = latents(pipe, **under)
    plain = pipe.controlnet
    compiled = pipe.controlnet = torch.compile(plain, backend=backend, fullgraph=True)
    with patched(pipe, propagation=TABLE) as report:
        assert largest(latents(pipe, **under), expected) <= EXACT_FLOAT32
        assert backend.since() == (1, 4)
        assert report.last_run.controlnet == {"computed": 4, "reused": 8}
        assert not report.last_run.reasons
    assert pipe.controlnet is compiled
    assert not is_swapped(compiled)
    assert not is_swapped(plain)


@pytest.mark.parametrize("other", [StableDiffusionImg2ImgPipeline, StableDiffusionPAGPipeline])
def test_pipelines_are_made_from_a_patched_one(pipe, other):
    patch(pipe, "exact")
    made = other.from_pipe(pipe)
    assert type(made) is other
    assert made.unet is pipe.unet
    assert type(pipe.unet) in {UNet2DConditionModel}
    assert type(pipe.unet) not in {type(pipe.vae), object}
    assert type(type(pipe).from_pipe(pipe)) is plain_class(pipe)
    patch(made, "exact")
    unpatch(pipe)
    assert is_swapped(made.unet), "the other one needs it"
    unpatch(made)
    assert type(made.unet) is UNet2DConditionModel
