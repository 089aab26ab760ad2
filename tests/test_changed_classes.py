"""Others derive classes from those of patched objects: all runs, and unpatch leaves nothing but theirs."""

import copy

import pytest
import torch
import torch.distributed as dist
from diffusers import UNet2DConditionModel
from sampling import largest, latents
from tolerances import EXACT_FLOAT32, LATENTS_FLOAT32
from torch.ao.quantization import quantize_dynamic
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.utils.parametrize import register_parametrization, remove_parametrizations

from difffast import EncoderPropagation, patch, unpatch
from difffast.sites import find_site
from difffast.surgery.subclass import MARK, is_swapped, swap_in, swap_out

EXACT = {"preset": "exact", "fused": False}


def derive(module):
    """Give a module a class that is derived from its own, and return that class."""
    module.__class__ = type("Mine", (type(module),), {})
    return type(module)


def has_trace(obj):
    return any(MARK in vars(each) for each in type(obj).__mro__)


@pytest.mark.parametrize("first", ["theirs", "ours"])
def test_a_unet_of_a_derived_class_runs_and_keeps_it(pipe, first):
    stock = latents(pipe, steps=4)
    if first == "theirs":
        theirs = derive(pipe.unet)
    report = patch(pipe, **EXACT)
    if first == "ours":
        theirs = derive(pipe.unet)
    assert torch.equal(latents(pipe, steps=4), stock)
    assert report.last_run.total == 4
    unpatch(pipe)
    assert type(pipe.unet) is theirs
    assert theirs.__bases__ == (UNet2DConditionModel,)
    assert not has_trace(pipe.unet)
    assert torch.equal(latents(pipe, steps=4), stock)
    report = patch(pipe, **EXACT)
    assert torch.equal(latents(pipe, steps=4), stock)
    assert report.last_run.total == 4
    unpatch(pipe)
    assert type(pipe.unet) is theirs


def test_a_unet_whose_class_is_taken_from_it_is_patched_again_at_the_next_call(pipe):
    report = patch(pipe, propagation=EncoderPropagation(key_steps=3), fused=False)
    ours = latents(pipe, steps=9)
    pipe.unet.__class__ = theirs = type("UNet2DConditionModel", (UNet2DConditionModel,), {"__module__": "diffusers"})
    assert largest(latents(pipe, steps=9), ours) <= LATENTS_FLOAT32
    assert report.last_run.propagated > 0
    unpatch(pipe)
    assert type(pipe.unet) is theirs
    assert not has_trace(pipe.unet)


def test_a_class_that_is_put_back_after_unpatch_runs_stock_and_is_healed(pipe):
    stock = latents(pipe, steps=4)
    patch(pipe, **EXACT)
    found = type(pipe.unet)
    unpatch(pipe)
    pipe.unet.__class__ = found
    assert torch.equal(latents(pipe, steps=4), stock)
    report = patch(pipe, **EXACT)
    assert torch.equal(latents(pipe, steps=4), stock)
    assert report.last_run.total == 4
    unpatch(pipe)
    assert type(pipe.unet) is UNet2DConditionModel


def test_copies_of_an_object_of_a_derived_class_are_of_that_class():
    layer = torch.nn.Linear(2, 2)
    swap_in(layer, {"forward": lambda self, x: x}, equal=True)
    theirs = derive(layer)
    assert type(copy.deepcopy(layer)) is theirs
    assert {theirs: "theirs"}.get(torch.nn.Linear) is None
    assert theirs not in (torch.nn.Linear, theirs.__bases__[0])
    made = theirs(3, 4)
    assert (type(made), made.in_features) == (theirs, 3)
    swap_out(layer)
    assert theirs.__bases__ == (torch.nn.Linear,)
    assert not is_swapped(made)


def test_two_objects_of_one_derived_class_are_taken_out_one_by_one():
    methods = {"forward": lambda self, x: x}
    first, second = torch.nn.ReLU(), torch.nn.ReLU()
    for each in (first, second):
        swap_in(each, methods)
    first.__class__ = second.__class__ = theirs = type("Mine", (type(first),), {})
    x = -torch.ones(1)
    swap_out(first)
    assert second(x) == x, "it is still to be overridden"
    swap_out(second)
    assert theirs.__bases__ == (torch.nn.ReLU,)
    assert second(x) == first(x) == 0


@pytest.mark.parametrize("sharded", ["after", "before and after"])
def test_fsdp_shards_a_patched_unet(pipe, tmp_path, sharded):
    stock = latents(pipe, steps=4)
    other = copy.deepcopy(pipe.unet)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        if sharded == "before and after":
            fully_shard(other, mesh=mesh)  # it keeps the class that it makes, and gives it to UNets of an equal class
        report = patch(pipe, **EXACT)
        fully_shard(pipe.unet, mesh=mesh)
        with pytest.warns(UserWarning, match="forward hooks are registered on the UNet itself"):
            assert torch.equal(latents(pipe, steps=4), stock)
        assert report.last_run.total == 4
        unpatch(pipe)
        assert isinstance(pipe.unet, FSDPModule)
        assert not has_trace(pipe.unet)
        assert torch.equal(latents(pipe, steps=4), stock)
    finally:
        dist.destroy_process_group()


def test_one_derived_class_for_the_parts_of_two_pipelines(pipe):
    """As FSDP2 gives it to modules whose classes are equal."""
    other = copy.deepcopy(pipe)
    decoders = [each.vae.decoder for each in (pipe, other)]
    patch(pipe, "exact")
    patch(other, "exact", profile=True)
    decoders[1].__class__ = derive(decoders[0])
    settings = find_site(other).settings
    other("a red circle", num_inference_steps=1, output_type="pt")
    assert "VAE decoder" in settings.last_run.seconds
    unpatch(other)
    assert not any(map(has_trace, other.vae.decoder.mid_block.modules()))
    unpatch(pipe)
    assert not any(map(has_trace, [*decoders[0].modules(), *decoders[1].modules()]))


class Doubled(torch.nn.Module):
    """A parametrization."""

    def forward(self, weight):
        return 2 * weight


def test_layers_that_are_parametrized_while_patched_are_taken_out(pipe):
    patch(pipe, "exact")
    layers = [each for each in pipe.unet.modules() if isinstance(each, torch.nn.Linear | torch.nn.Conv2d)]
    classes = [torch.nn.Linear if isinstance(each, torch.nn.Linear) else torch.nn.Conv2d for each in layers]
    assert sum(map(is_swapped, layers)) > 60
    for each in layers:
        register_parametrization(each, "weight", Doubled())
    ours = latents(pipe, steps=2)
    unpatch(pipe)
    assert not any(map(has_trace, layers))
    assert largest(ours, latents(pipe, steps=2)) <= EXACT_FLOAT32
    for each in layers:
        remove_parametrizations(each, "weight", leave_parametrized=False)
    assert [type(each) for each in layers] == classes


@pytest.mark.parametrize("part", ["unet", "vae"])
def test_layers_that_are_out_of_place_at_unpatch_are_taken_out(pipe, part):
    place = pipe.unet.mid_block.resnets if part == "unet" else pipe.vae.decoder.mid_block.resnets
    patch(pipe, "exact")
    ours = place[0]
    assert any(map(is_swapped, ours.modules()))
    place[0] = copy.deepcopy(ours)
    unpatch(pipe)
    assert not any(map(has_trace, ours.modules()))


def test_layers_that_two_unets_share_are_taken_out_of_the_last_one(pipe):
    other = copy.deepcopy(pipe)
    other.unet.mid_block = shared = pipe.unet.mid_block
    for each in (pipe, other):
        patch(each, "exact")
    patched_layers = [each for each in shared.modules() if is_swapped(each)]
    unpatch(pipe)
    assert [each for each in shared.modules() if is_swapped(each)] == patched_layers != []
    unpatch(other)
    assert not any(map(has_trace, shared.modules()))


@pytest.mark.filterwarnings("ignore:torch.ao.quantization is deprecated", "ignore:torch.quantize_per_tensor")
def test_layers_are_found_by_their_types_in_a_dict(pipe):
    """As PyTorch's dynamic quantisation finds those that it exchanges."""

    def quantize(unet):
        quantize_dynamic(unet, {torch.nn.Linear}, inplace=True)
        return [name for name, each in unet.named_modules() if "quantized" in type(each).__module__]

    expected = quantize(copy.deepcopy(pipe.unet))
    layers = [each for each in pipe.unet.modules() if isinstance(each, torch.nn.Linear)]
    patch(pipe, "exact")
    assert sum(map(is_swapped, layers)) == 40, "those that see pixels or tokens"
    assert quantize(pipe.unet) == expected != []
    unpatch(pipe)
    assert not any(map(has_trace, layers))
