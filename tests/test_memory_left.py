"""How much memory is left, and what is not kept where it is short."""

import pytest
import torch
from sampling import latents
from torch import nn

from difffast import patched
from difffast.layers import convolution, transformed
from difffast.layers.context import CallContext, use_context
from difffast.layers.convolution import Convolution, convolve_channels
from difffast.ops import _memory
from difffast.ops.convolution import convolution_weights, count_transformed_bytes

GIB = 1 << 30


@pytest.fixture
def system(tmp_path, monkeypatch):
    """A folder with the files that the system would have; at first, none is there."""
    for name, place in (("_SYSTEM", "meminfo"), ("_OWN", "own"), ("_GROUPS", "groups")):
        monkeypatch.setattr(_memory, name, tmp_path / place)
    return tmp_path


def write(folder, **files):
    """Write files into a new folder; "__" in a name stands for a full stop."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_text(f"{content}\n")


MACHINE = "MemTotal:       1024 kB\nMemAvailable:    512 kB\nHugePages_Total:       0"


def test_a_machine(system):
    write(system, meminfo=MACHINE)
    assert (_memory.count_left(), _memory.count_all()) == (512 << 10, 1024 << 10)


@pytest.mark.parametrize("at", ["", "inner", "inner/most"])
def test_a_container(system, at):
    """Its limit may be its own, or one of those around it."""
    write(system, meminfo=MACHINE, own="1:name=systemd:/x\n0::/inner/most")
    stat = "anon 5\ninactive_file 6000\nactive_file 1000"
    write(system / "groups" / at, memory__max=90_000, memory__current=50_000, memory__stat=stat)
    assert (_memory.count_left(), _memory.count_all()) == (47_000, 90_000)


@pytest.mark.parametrize("at", ["", "docker/1234"])
def test_a_container_of_control_groups_of_version_1(system, at):
    write(system, meminfo=MACHINE, own="5:cpu,cpuacct:/x\n4:hugetlb,memory:/docker/1234")
    stat = "inactive_file 1\ntotal_inactive_file 6000\ntotal_active_file 1000"
    at = system / "groups" / "memory" / at
    write(at, memory__limit_in_bytes=90_000, memory__usage_in_bytes=50_000, memory__stat=stat)
    assert (_memory.count_left(), _memory.count_all()) == (47_000, 90_000)


@pytest.mark.parametrize("limit", ["max", "", "9223372036854771712"])
def test_a_container_without_a_limit(system, limit):
    write(system, meminfo=MACHINE, own="0::/\nunknown\n\n")
    write(system / "groups", memory__max=limit, memory__current=50_000)
    assert (_memory.count_left(), _memory.count_all()) == (512 << 10, 1024 << 10)


@pytest.mark.usefixtures("system")
def test_a_system_that_does_not_tell():
    assert _memory.count_left() is None
    assert _memory.count_all() is None or _memory.count_all() > GIB


def test_this_machine():
    left, whole = _memory.count_left(), _memory.count_all()
    assert left is None or 0 < left < whole


@pytest.mark.parametrize(
    ("left", "whole", "fits"),
    [
        (4.5, 64, True),
        (4.05, 64, False),
        (2.5, 8, True),  # of small machines a quarter
        (2.05, 8, False),
        (None, None, True),
        (None, 8, True),
    ],
)
def test_what_is_left_for_others(left, whole, fits, monkeypatch):
    monkeypatch.setattr(_memory, "count_left", lambda: left and int(left * GIB))
    monkeypatch.setattr(_memory, "count_all", lambda: whole and whole * GIB)
    assert _memory.leaves_enough(GIB // 10) == fits


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tile", [2, 4])
def test_bytes_of_transformed_weights(dtype, tile):
    weight = torch.randn(70, 33, 3, 3, dtype=dtype)
    assert count_transformed_bytes(weight, tile) == convolution_weights(weight, tile).transformed.nbytes


def test_short_memory_is_reported_and_looked_at_again_for_the_next_picture(pipe, monkeypatch):
    with patched(pipe, "exact") as report:
        expected = latents(pipe)
        assert transformed.count_bytes([pipe.unet])
    with patched(pipe, "exact") as report, monkeypatch.context() as context:
        context.setattr(transformed, "leaves_enough", lambda size: False)
        found = latents(pipe)
        assert report.last_run.reasons == [convolution._SHORT]
        assert transformed.count_bytes([pipe.unet]) == 0
        assert float((found - expected).norm() / expected.norm()) <= 1e-5
        context.undo()
        assert torch.equal(latents(pipe), expected)
        assert not report.last_run.reasons
        assert transformed.count_bytes([pipe.unet])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_layers_are_stocks_where_memory_is_short(dtype, monkeypatch):
    monkeypatch.setattr(transformed, "leaves_enough", lambda size: False)
    monkeypatch.setattr(convolution, "advantage", lambda: 1.0)
    convolution._find_way.cache_clear()
    layer, notes = nn.Conv2d(32, 64, 3, padding=1).to(dtype), []
    x = torch.randn(2, 32, 16, 16).to(dtype)
    with torch.no_grad(), use_context(CallContext(True, notes.append, notes.append, within=x)):
        stock, parts = layer(x), []
        Convolution().put_in(nn.Sequential(layer))
        assert torch.equal(layer(x), stock)
        for channels, bias in ((slice(0, 20), layer.bias), (slice(20, None), None)):
            parts.append(convolve_channels(layer, x[:, channels].contiguous(), channels, bias))
    error = 1e-5 if dtype == torch.float32 else 0.05
    torch.testing.assert_close(sum(parts), stock, rtol=error, atol=error)
    assert set(notes) == {convolution._SHORT}
    convolution._find_way.cache_clear()
