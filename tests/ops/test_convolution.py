"""convolution: both tiles against float64, on every size of image, and what it must not do."""

import importlib

import instruction_sets
import pytest
import torch
import torch.nn.functional as F
from attention_operands import absent

from difffast import ops

module = importlib.import_module("difffast.ops.convolution")
pytestmark = pytest.mark.skipif(absent("cpp") is not None, reason=str(absent("cpp")))

#: (batch, input channels, output channels, height, width): one of each, tiles that are cut off, several turns.
SHAPES = [
    (1, 1, 1, 2, 2),
    (2, 3, 5, 4, 4),
    (1, 16, 32, 8, 8),
    (2, 33, 65, 7, 9),
    (3, 20, 40, 13, 2),
    (1, 64, 48, 16, 33),
    (2, 5, 70, 3, 21),
]


def operands(shape, dtype=torch.float32, centre=0.0):
    batch, channels, out, height, width = shape
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(batch, channels, height, width, generator=generator) + centre
    weight = torch.randn(out, channels, 3, 3, generator=generator) / (3 * channels**0.5)
    return x.to(dtype), weight.to(dtype), torch.randn(out, generator=generator).to(dtype)


def run(x, weight, bias, tile):
    with ops.use_backend("cpp", "convolution"):
        return ops.convolution(x, ops.convolution_weights(weight, tile), bias)


@pytest.mark.parametrize("tile", module.TILES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("centre", [0.0, 10.0])
@pytest.mark.usefixtures("_nan_memory")
def test_error_is_no_worse_than_a_plain_sums(shape, dtype, tile, centre):
    x, weight, bias = operands(shape, dtype, centre)
    exact = F.conv2d(x.double(), weight.double(), bias.double(), padding=1)
    out = run(x, weight, bias, tile)
    assert out.dtype == dtype
    assert out.is_contiguous()
    if dtype == torch.float64:
        torch.testing.assert_close(out, exact, rtol=1e-12, atol=1e-12 * (1 + centre))
        return
    plain = F.conv2d(x.float(), weight.float(), bias.float(), padding=1)
    ours, theirs = (float((y.double() - exact).square().mean().sqrt()) for y in (out, plain.to(dtype)))
    # What adds in a few lanes at a time, as oneDNN does, errs less than what adds one by one.
    assert ours <= (4 if dtype == torch.float32 else 1.1) * theirs + 2e-7 * float(exact.abs().max()) * (
        dtype == torch.float32
    )


@pytest.mark.parametrize("tile", module.TILES)
def test_error_at_the_sizes_of_stable_diffusion(tile):
    """Root mean square, against what one float32 number after the other adds up to."""
    x, weight, bias = operands((1, 640, 32, 16, 16))
    exact = F.conv2d(x.double(), weight.double(), bias.double(), padding=1)
    columns, naive = F.unfold(x, 3, padding=1)[0], bias[:, None].expand(-1, 256).clone()
    for i in range(columns.shape[0]):
        naive += weight.flatten(1)[:, i, None] * columns[i]
    ours, theirs = (
        float((y.double() - exact).square().mean().sqrt()) for y in (run(x, weight, bias, tile), naive.view_as(exact))
    )
    assert ours <= 2 * theirs


@pytest.mark.parametrize("tile", module.TILES)
def test_rows_do_not_depend_on_their_batch(tile):
    x, weight, bias = operands((5, 40, 40, 12, 12))
    together = run(x, weight, bias, tile)
    assert all(torch.equal(together[i : i + 1], run(x[i : i + 1], weight, bias, tile)) for i in range(5))


@pytest.mark.parametrize("tile", module.TILES)
def test_results_do_not_depend_on_threads(tile):
    """Few threads take rows of tiles each on its own; many, of which each would have few, go through the stages."""
    x, weight, bias = operands((2, 40, 70, 20, 20))
    threads = torch.get_num_threads()
    try:
        results = []
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            results.append(run(x, weight, bias, tile))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(results[0], each) for each in results[1:])


def test_several_turns():
    """More rows of tiles than fit the scratch memory at a time."""
    x, weight, bias = operands((2, 256, 256, 64, 64))
    torch.testing.assert_close(run(x, weight, bias, 4), F.conv2d(x, weight, bias, padding=1), rtol=0, atol=2e-5)


@pytest.mark.parametrize("tile", module.TILES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("first", "count"), [(0, 16), (0, 7), (5, 16), (17, 33), (49, 1)])
@pytest.mark.usefixtures("_nan_memory")
def test_some_of_the_input_channels(first, count, dtype, tile):
    x, weight, bias = operands((2, 50, 70, 9, 12), dtype)
    kept, some = ops.convolution_weights(weight, tile), slice(first, first + count)
    out = ops.convolution(x[:, some], kept, bias, first=first)
    exact = F.conv2d(x[:, some].double(), weight[:, some].double(), bias.double(), padding=1)
    limit = {torch.float32: 3e-6, torch.bfloat16: 2e-2, torch.float64: 1e-12}[dtype]
    assert float((out - exact).abs().max()) <= limit * float(exact.abs().max())
    assert torch.equal(out, run(x[:, some], weight[:, some], bias, tile))
    with ops.use_backend("reference"):
        expected = F.conv2d(x[:, some], weight[:, some], bias, padding=1)
        assert torch.equal(ops.convolution(x[:, some], kept, bias, first=first), expected)
    leaf = x[:, some].clone().requires_grad_()
    ops.convolution(leaf, kept, bias, first=first).sum().backward()
    assert leaf.grad.shape == leaf.shape


def doubled_by_hand(x):
    """Return x with every pixel four times."""
    return x.repeat_interleave(2, 2).repeat_interleave(2, 3)


@pytest.mark.parametrize("tile", module.TILES)
@pytest.mark.parametrize("shape", [*SHAPES, (2, 20, 33, 1, 5), (1, 3, 40, 5, 1)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.usefixtures("_nan_memory")
def test_doubled_pixels(shape, dtype, tile):
    x, weight, bias = operands(shape, dtype, 2.0)
    whole, some = doubled_by_hand(x), slice(shape[1] // 3, None)
    with ops.use_backend("cpp", "convolution"):
        kept = ops.convolution_weights(weight, tile)
        out = ops.convolution(x, kept, bias, doubled=True)
        part = ops.convolution(x[:, some], kept, bias, first=some.start, doubled=True)
    assert torch.equal(out, run(whole, weight, bias, tile))
    with ops.use_backend("reference"):
        assert torch.equal(ops.convolution(x, kept, bias, doubled=True), F.conv2d(whole, weight, bias, padding=1))
    assert torch.equal(part, run(whole[:, some], weight[:, some], bias, tile))
    leaf = x.clone().requires_grad_()
    ops.convolution(leaf, kept, bias, doubled=True).sum().backward()
    assert leaf.grad.shape == x.shape


@pytest.mark.parametrize("tile", module.TILES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("own", [True, False], ids=["in the addend's place", "elsewhere"])
@pytest.mark.usefixtures("_nan_memory")
def test_into_memory_that_is_there(shape, dtype, tile, own):
    x, weight, bias = operands(shape, dtype, 1.0)
    with ops.use_backend("cpp", "convolution"):
        kept = ops.convolution_weights(weight, tile)
    exact = run(x.double(), weight.double(), bias.double(), tile)
    addend = 3 * torch.randn(exact.shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    given, out = addend.clone(), addend if own else torch.full_like(addend, float("nan"))
    module.run_into(out, x, kept, bias, addend)
    limit = {torch.float32: 1e-5, torch.bfloat16: 1e-2, torch.float64: 1e-12}[dtype]
    expected = exact + given.double()
    assert float((out.double() - expected).abs().max()) <= limit * float(expected.abs().max())
    assert own or torch.equal(addend, given)
    # Added before the result is rounded.
    if dtype != torch.bfloat16:
        assert torch.equal(out, run(x, weight, bias, tile) + given)


def test_bad_memory():
    x, weight, bias = operands((2, 16, 16, 8, 8))
    kept = ops.convolution_weights(weight, 4)
    good = torch.zeros(2, 16, 8, 8)
    for out, addend, said in [
        (good[:1], good, "out must be a contiguous result of x"),
        (good.double(), good, "out must be a contiguous result of x"),
        (good.transpose(2, 3), good, "out must be a contiguous result of x"),
        (torch.zeros(2, 70, 8, 8), torch.zeros(2, 70, 8, 8), "what winograd_weights returns"),
        (good, good[:, :8], "addend must be as out"),
        (good, good.double(), "addend must be as out"),
        (good, good.transpose(2, 3), "addend must be as out"),
        (x, good, "out must not be x"),
    ]:
        with pytest.raises(RuntimeError, match=said):
            module.run_into(out, x, kept, bias, addend)
    empty = torch.empty(0, 16, 8, 8)
    module.run_into(empty, empty.clone(), kept, bias, empty)


def test_layouts():
    x, weight, bias = operands((2, 16, 16, 8, 8))
    expected = run(x, weight, bias, 4)
    for other in (x.contiguous(memory_format=torch.channels_last), x.repeat_interleave(2, 3)[..., ::2]):
        assert torch.equal(run(other, weight, bias, 4), expected)
    assert torch.equal(run(x, weight.contiguous(memory_format=torch.channels_last), bias, 4), expected)
    assert torch.equal(run(x, weight, bias.repeat_interleave(2)[::2], 4), expected)
    assert torch.equal(run(x, weight, None, 4), run(x, weight, torch.zeros(16), 4))


def test_what_is_not_finite_stays_in_its_tiles():
    x, weight, bias = operands((2, 16, 32, 16, 16))
    expected = run(x, weight, bias, 4)
    x[0, 3, 5, 5] = float("nan")
    out = run(x, weight, bias, 4)
    assert out[0, :, 4:7, 4:7].isnan().all()
    wrong = ~out.isfinite()
    assert not wrong[1].any()
    assert not wrong[0, :, 8:].any()
    assert not wrong[0, :, :, 8:].any()
    assert torch.equal(out[1], expected[1])
    x, weight, bias = operands((1, 16, 32, 16, 16))
    weight[7, 2, 1, 1] = float("inf")
    out = run(x, weight, bias, 2)
    assert not out[:, 7].isfinite().any()
    assert out[:, [*range(7), *range(8, 32)]].isfinite().all()


def test_where_a_gradient_is_wanted_the_reference_runs():
    x, weight, bias = operands((1, 16, 32, 8, 8))
    kept = ops.convolution_weights(weight, 4)
    leaf = x.clone().requires_grad_()
    ops.convolution(leaf, kept, bias).square().sum().backward()
    expected = x.clone().requires_grad_()
    F.conv2d(expected, weight, bias, padding=1).square().sum().backward()
    assert torch.equal(leaf.grad, expected.grad)
    with pytest.raises(RuntimeError, match="no backward pass"):
        torch.ops.difffast.winograd_convolution(leaf, kept.transformed, bias, 32, 4).sum().backward()


def test_without_a_kernel_weights_are_used_as_they_are():
    x, weight, bias = operands((1, 16, 32, 8, 8))
    with ops.use_backend("reference"):
        kept = ops.convolution_weights(weight, 4)
    assert kept.tile == 0
    assert kept.transformed.numel() == 0
    assert torch.equal(ops.convolution(x, kept, bias), F.conv2d(x, weight, bias, padding=1))
    with ops.use_backend("reference"):
        assert torch.equal(ops.convolution(x, ops.convolution_weights(weight, 2)), F.conv2d(x, weight, padding=1))
    assert ops.convolution_weights(weight.half(), 4).tile == 0


def test_images_of_one_row_take_the_reference():
    """Numbers that only ever meet the border, as weights above and below, would add their rounding errors."""
    x, weight, bias = operands((1, 16, 32, 1, 9))
    kept = ops.convolution_weights(weight, 4)
    assert torch.equal(ops.convolution(x, kept, bias), F.conv2d(x, weight, bias, padding=1))
    with pytest.raises(RuntimeError, match="one row or column"):
        run(x, weight, bias, 4)


def test_bad_input():
    x, weight, bias = operands((1, 16, 32, 8, 8))
    kept = ops.convolution_weights(weight, 4)
    for arguments, said in [
        ((x[0], kept), r"x must be \[B, 16, H, W\].*got shape \(16, 8, 8\)"),
        ((x[:, :4], kept), r"x must be \[B, 16, H, W\]"),
        ((x[:, :4], kept, bias, 13), "weight has 16 channels, got first 13 for x of 4"),
        ((x[:, :4], kept, bias, -1), "got first -1 for x of 4"),
        ((x[:, :0], kept, bias, 3), "got first 3 for x of 0"),
        ((x, kept, bias[:3]), r"bias must be \[32\], got shape \(3,\)"),
        ((x.double(), kept), "weight must be torch.float64 on cpu as x, got torch.float32"),
        ((x, kept, bias.double()), "bias must be torch.float32"),
    ]:
        with pytest.raises(ValueError, match=said):
            ops.convolution(*arguments[:3], **dict(zip(("first",), arguments[3:], strict=False)))
    for bad in (weight[0], weight[..., :2], weight[:, :0]):
        with pytest.raises(ValueError, match=r"weight must be \[O, C, 3, 3\], got shape"):
            ops.convolution_weights(bad, 4)
    with pytest.raises(ValueError, match="tile must be 2 or 4, got 3"):
        ops.convolution_weights(weight, 3)
    with (
        pytest.raises(RuntimeError, match="got float16"),
        ops.use_backend("cpp", "convolution"),
    ):
        ops.convolution_weights(weight.half(), 4)
    for wrong in (kept.transformed[:-1], kept.transformed.double()):
        with pytest.raises(RuntimeError, match="what winograd_weights returns"):
            torch.ops.difffast.winograd_convolution(x, wrong, bias, 32, 4)
    for first, channels in ((1, 16), (-1, 17), (0, 15)):
        with pytest.raises(RuntimeError, match=f"weights of {channels} channels have no 16 from {first} on"):
            torch.ops.difffast.winograd_convolution(x, kept.transformed, bias, 32, 4, first, channels)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_opcheck(dtype):
    x, weight, bias = operands((2, 5, 7, 6, 9), dtype)
    torch.library.opcheck(torch.ops.difffast.winograd_weights.default, (weight, 4))
    kept = ops.convolution_weights(weight, 4)
    torch.library.opcheck(
        torch.ops.difffast.winograd_convolution.default,
        (x, kept.transformed, bias, 7, 4),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )
    torch.library.opcheck(
        torch.ops.difffast.winograd_convolution.default,
        (x, kept.transformed, bias, 7, 4, 0, None, True),
        test_utils=("test_schema", "test_faketensor"),
    )
    out = torch.zeros(2, 7, 6, 9, dtype=dtype)
    torch.library.opcheck(
        torch.ops.difffast.winograd_convolution_into.default,
        (out, x, kept.transformed, bias, 4, torch.ones_like(out)),
        test_utils=("test_schema", "test_faketensor"),
    )
    with torch.no_grad():
        compiled = torch.compile(lambda x: ops.convolution(x, kept, bias), backend="eager", fullgraph=True)
        assert torch.equal(compiled(x), ops.convolution(x, kept, bias))


@pytest.mark.parametrize("instruction_set", instruction_sets.SMALLER)
def test_smaller_instruction_sets(instruction_set):
    code = """
        import torch
        import importlib
        import torch.nn.functional as F
        module = importlib.import_module("difffast.ops.convolution")
        torch.set_num_threads(1)
        generator = torch.Generator().manual_seed(0)
        for tile in (2, 4):
            for shape in ((1, 1, 1, 2, 2), (2, 33, 65, 7, 9), (1, 64, 48, 16, 33)):
                x = torch.randn(*shape[:2], *shape[3:], generator=generator)
                weight = torch.randn(shape[2], shape[1], 3, 3, generator=generator)
                bias = torch.randn(shape[2], generator=generator)
                with ops.use_backend("cpp", "convolution"):
                    kept = ops.convolution_weights(weight, tile)
                    out = ops.convolution(x, kept, bias)
                right = F.conv2d(x.double(), weight.double(), bias.double(), padding=1)
                error = (out - right).abs().max() / right.abs().max()
                assert error < 3e-6, (tile, shape, error)
                some = slice(shape[1] // 3, None)
                out = ops.convolution(x[:, some], kept, bias, first=some.start)
                right = F.conv2d(x[:, some].double(), weight[:, some].double(), bias.double(), padding=1)
                assert (out - right).abs().max() / right.abs().max() < 3e-6
                twice = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
                right = F.conv2d(twice.double(), weight.double(), bias.double(), padding=1)
                out = ops.convolution(x, kept, bias, doubled=True)
                assert (out - right).abs().max() / right.abs().max() < 3e-6
                module.run_into(out, twice, kept, bias, out)
                assert (out - 2 * right).abs().max() / right.abs().max() < 6e-6
                assert kept.transformed.shape == torch.empty_like(
                    torch.ops.difffast.winograd_weights(weight.to("meta"), tile), device="cpu").shape
    """
    instruction_sets.run(code, instruction_set)
