"""What the launchers of the Triton kernels ask a GPU for.

The interpreter runs grids and compiler options that hardware refuses, so that its tests do not see them.
"""

import math

import pytest
import torch
from triton_launches import Recorder

pytest.importorskip("triton")

from difffast.triton_kernels import (
    attention_entropy,
    attention_tiles,
    cross_attention,
    edited_attention,
    group_norm_silu,
    joint_attention,
    skip_norm_silu,
)

MODULES = (attention_entropy, cross_attention, edited_attention, group_norm_silu, joint_attention, skip_norm_silu)

#: CUDA C++ programming guide, table of technical specifications: the first dimension of a grid, and the others.
FIRST, OTHERS = 2**31 - 1, 65535
#: More than a dimension after the first has: the frames and pixels of a video, as a batch.
ROWS = 70_000


@pytest.fixture
def grids(monkeypatch):
    recorded = []
    for module in MODULES:
        for name in vars(module):
            if name.endswith("_kernel"):
                monkeypatch.setattr(module, name, Recorder(recorded))
    return recorded


def assert_fit(grids, launches):
    assert len(grids) == launches
    for first, *others in grids:
        assert 1 <= first <= FIRST
        assert all(1 <= size <= OTHERS for size in others)


@pytest.mark.parametrize("pixels", [(3, 3), (9,)])
def test_norms_of_any_batch(grids, pixels):
    x, weight = torch.empty(ROWS, 8, *pixels, device="meta"), torch.empty(8, device="meta")
    for channels_last in {False, len(pixels) == 2}:
        out, coefficients = group_norm_silu.forward(
            x, 4, weight, weight, 1e-5, None, None, None, True, channels_last=channels_last
        )
        assert_fit(grids, 3)
        group_norm_silu.backward(out, x, coefficients, 4, None, True, channels_last=channels_last)
        assert_fit(grids, 5)
        assert min(math.prod(grid) for grid in grids) >= ROWS
        grids.clear()
        skip_norm_silu.forward(
            x[:, :5].contiguous(), x[: ROWS // 2, :3].contiguous(), 4, weight, weight, 1e-5, True,
            channels_last=channels_last,
        )  # fmt: skip
        assert_fit(grids, 6)
        grids.clear()


def test_entropies_of_any_batch(grids):
    maps = torch.empty(ROWS, 16, 9, device="meta")
    loss, *saved = attention_entropy.forward(maps, [1, 2], 4, 1.0, 1e-8, 1.0, False)
    attention_entropy.backward(loss, maps, *saved, [1, 2], 4, 1.0, 1e-8, 1.0)
    assert_fit(grids, 2)


@pytest.mark.parametrize(("batch", "heads"), [(OTHERS, 1), (1, OTHERS)])
def test_attention_of_the_largest_batch(grids, batch, heads):
    q = torch.empty(batch, heads, 4, 8, device="meta")
    assert "65535" in (attention_tiles.obstacle(torch.empty(ROWS, 1, 4, 8), q, q) or "")
    out, maps = cross_attention.forward(q, q, q, 1.0, 0, (0, 1))
    cross_attention.backward(out, maps, q, q, q, 1.0, 0, (0, 1))
    joint_attention.forward(q, q, q, q, q, 1.0, (0, 1))
    edited_attention.forward(q, q, q, q, q, q, 1.0)
    assert_fit(grids, 6)


@pytest.mark.parametrize(
    ("d", "refused"), [(40, False), (64, False), (80, False), (96, False), (128, True), (160, True)]
)
def test_what_has_failed_on_hopper_is_refused(d, refused):
    found = attention_tiles.refuse_on_hopper(d, 77, torch.float16)
    assert (found is not None) == refused
    assert attention_tiles.refuse_on_hopper(d, 77, torch.float32) is None, "on FMA units"
