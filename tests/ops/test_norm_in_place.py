"""group_norm_silu in the place of its operand: the same bits, and only where nobody can notice."""

import pytest
import torch
from norm_operands import FUSED, needs_cpp, operands
from torch.autograd import forward_ad

from difffast import ops

SHAPES = [
    (2, 12, (5, 7), 3, "NCHW"),
    (2, 12, (5, 7), 3, "NHWC"),
    (3, 40, (19,), 4, "NCHW"),
    (1, 70, (40, 33), 7, "NHWC"),
]


def by_cpp(x, *rest, **options):
    with ops.use_backend("cpp", "group_norm_silu"), torch.no_grad():
        return ops.group_norm_silu(x, *rest, **options)


@needs_cpp
@pytest.mark.parametrize("fused", FUSED)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_it_has_the_same_bits(shape, dtype, fused):
    batch, channels, pixels, groups, layout = shape
    (x, *rest), options = operands(batch, channels, pixels, groups, fused, dtype=dtype, layout=layout)
    x = x.detach()
    expected = by_cpp(x.clone(memory_format=torch.preserve_format), *rest, **options)
    found = by_cpp(x, *rest, **options, overwrite=True)
    assert torch.equal(found, expected)
    assert found.data_ptr() == x.data_ptr()
    assert found.stride() == expected.stride()


@needs_cpp
def test_opcheck():
    (x, groups, *rest), _ = operands(2, 12, (6, 4), 3, "plain", dtype=torch.float32, layout="NHWC")
    operator = torch.ops.difffast.group_norm_silu_.cpp
    torch.library.opcheck(operator, (x, groups, *rest, 1e-5, None, None, None, True))


@needs_cpp
def test_other_operands_stay():
    (x, *rest), _ = operands(2, 12, (6, 4), 3, "plain", dtype=torch.float32, layout="NCHW")
    whole = torch.randn(2, 12, 6, 8)
    strided = whole[..., ::2]  # dense in neither format
    before = strided.clone()
    assert torch.equal(by_cpp(strided, *rest, overwrite=True), by_cpp(before, *rest))
    assert torch.equal(strided, before)
    with ops.use_backend("cpp", "group_norm_silu"):
        leaf = x.detach().clone().requires_grad_()
        before = leaf.detach().clone()
        (gradient,) = torch.autograd.grad(ops.group_norm_silu(leaf, *rest, overwrite=True).sin().sum(), leaf)
        (expected,) = torch.autograd.grad(ops.group_norm_silu(leaf, *rest).sin().sum(), leaf)
    assert torch.equal(leaf, before)
    assert torch.equal(gradient, expected)


@needs_cpp
def test_transforms_see_what_they_see_without_it():
    (x, *rest), _ = operands(2, 64, (48, 48), 4, "plain", dtype=torch.float32, layout="NCHW")
    with torch.no_grad():
        several = torch.stack([x, 2 * x + 1])
        found = torch.vmap(lambda x: ops.group_norm_silu(x, *rest, overwrite=True))(several.clone())
        torch.testing.assert_close(found, torch.stack([ops.group_norm_silu(each, *rest) for each in several]))
        with forward_ad.dual_level():
            dual = forward_ad.make_dual(x.clone(), torch.ones_like(x))
            out = ops.group_norm_silu(dual, *rest, overwrite=True)
            assert forward_ad.unpack_dual(out).tangent is not None
