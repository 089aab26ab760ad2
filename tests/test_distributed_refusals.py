"""Meshes that do not fit, processes that are not alike, and processes that are lost end in clear errors."""

import pytest
import ranks
import ranks_mesh

import difffast
from difffast import CfgReuse, FeatureReuse, OutputForecast
from difffast.distributed.meshes import check_mesh, parse_mesh


@pytest.mark.parametrize(
    ("change", "reasons"),
    [
        ("weights", ("process 1 has other weights, first in unet.conv_out.bias", "process 0 has other weights")),
        ("order", ("process 1 has other weights, first in vae.decoder.conv_in.bias", "first in vae.decoder")),
        ("channels", ("process 1 has modules of other names, shapes or dtypes", "process 0 has modules of other")),
        ("options", ("process 1 has other options", "here: preset=turbo")),
        ("seed", ("must have the same latents at step 0",) * 2),
        ("nothing", ("nothing",) * 2),
    ],
)
def test_processes_that_are_not_alike_are_refused_by_all_of_them(change, reasons):
    results = ranks.run(2, ranks_mesh.patch_unlike, change)
    for reason, result in zip(reasons, results, strict=True):
        assert reason in result


def test_a_difference_is_told_to_processes_that_do_not_see_it():
    results = ranks.run(4, ranks_mesh.patch_unlike_in_a_grid)
    assert all("must load the same pipeline and patch it alike" in result for result in results), results
    assert sum("others of them differ" in result for result in results) >= 1


@pytest.mark.parametrize(
    ("sizes", "preset", "options", "reason"),
    [
        ({"tp": 2}, "exact", {}, "the dimensions of a mesh must be named"),
        ({"dec": 2}, "balanced", {}, "divides steps that are decoded together, of which"),
        ({"dec": 2}, "exact", {}, "use propagation=EncoderPropagation"),
        ({"dec": 2}, "exact", {"propagation": FeatureReuse()}, "divides steps that are decoded together"),
        ({"dec": 2}, "exact", {"propagation": OutputForecast()}, "divides steps that are decoded together"),
        ({"cfg": 2}, "exact", {"cfg": CfgReuse()}, "needs both of guidance's halves at every step"),
        ({"cfg": 2}, "exact", {"encoder": "one process"}, 'needs a mesh with several processes along "dec", got cfg 2'),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(sizes, preset, options, reason):
    for result in ranks.run(2, ranks_mesh.refuse, sizes, preset, options):
        assert result.startswith("ValueError: ")
        assert reason in result


def test_guidance_has_two_halves():
    for result in ranks.run(3, ranks_mesh.refuse, {"cfg": 3}, "exact", {}):
        assert 'dimension "cfg" must have 2 processes, one for each half, got 3' in result


def test_what_is_no_mesh_is_refused(pipe):
    with pytest.raises(TypeError, match=r"mesh must be a .*DeviceMesh, got int"):
        difffast.patch(pipe, mesh=2)
    with pytest.raises(TypeError, match="got list"):
        check_mesh([2])
    with pytest.raises(ValueError, match=r"encoder='one process' needs a mesh"):
        difffast.patch(pipe, encoder="one process")
    with pytest.raises(ValueError, match=r"encoder must be one of 'every process', 'one process', None, got 'mine'"):
        difffast.patch(pipe, encoder="mine")
    assert not difffast.unpatch(pipe)


@pytest.mark.parametrize("ranks_off", [(0, 1), (1,)])
def test_latents_that_change_their_shape_are_refused(ranks_off):
    """Guidance ends on the way: the batch is two rows up to step 2, and then one."""
    results = ranks.run(2, ranks_mesh.draw_with_guidance_to_step, 2, ranks_off)
    for rank, result in enumerate(results):
        if rank in ranks_off:
            assert "got (2, 4, 8, 8) at step 2 and (1, 4, 8, 8) at step 3: leave guidance on to the end" in result
        else:
            assert "process 0 could not exchange guidance's halves with processes [1]" in result


@pytest.mark.parametrize(("how", "timeout_s"), [("killed", 20.0), pytest.param("hangs", 5.0, marks=pytest.mark.slow)])
def test_a_process_that_is_lost_ends_the_other_with_an_error_within_the_timeout(how, timeout_s):
    (text, seconds), lost = ranks.run(2, ranks_mesh.draw_lost, how, timeout_s)
    assert isinstance(lost, ranks.Killed) == (how == "killed")
    assert "process 0 could not exchange guidance's halves with processes [1]: one of them has ended" in text
    assert seconds < timeout_s + 1


def test_a_mesh_as_it_is_written():
    assert parse_mesh(None, 3) == {"dp": 3}
    assert parse_mesh("dp=2, cfg=2", 4) == {"dp": 2, "cfg": 2}
    for text in ("tp=2", "dp=2,dp=2", "dp", "dp=x", "dp=0", ""):
        with pytest.raises(ValueError, match="a mesh is written as"):
            parse_mesh(text, 4)
    with pytest.raises(ValueError, match="must have as many processes as there are, 3, and has 4"):
        parse_mesh("dp=2,cfg=2", 3)
