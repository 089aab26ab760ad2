"""geglu against its definition in float64."""

import math

import pytest
import torch

from difffast import ops
from difffast.ops.geglu import reference

needs_cpp = pytest.mark.skipif(ops.missing("cpp") is not None, reason=str(ops.missing("cpp")))
needs_triton = pytest.mark.skipif(ops.missing("triton") is not None, reason=str(ops.missing("triton")))
#: Of SDXL's and Stable Diffusion's feed-forward layers, and odd ones.
PUBLISHED = [(2, 1024, 10240), (2, 4096, 5120), (2, 4096, 2560), (2, 64, 10240)]
SHAPES = [(2,), (1, 2), (3, 2050), (2, 7, 10), (0, 8), (2, 3, 5, 6)]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
#: Numbers around 0, far from it on either side, and one huge one.
DATA = {
    "normal": lambda x: 3 * x,
    "far below": lambda x: x - 40,
    "far above": lambda x: x + 100,
    "one huge": lambda x: x.index_fill(-1, torch.tensor([x.shape[-1] - 1], device=x.device), 5e3),
}


def define(x):
    """The error function of the definition is Python's own."""
    value, gate = x.double().cpu().chunk(2, -1)
    erf = torch.tensor([math.erf(z / math.sqrt(2)) for z in gate.flatten().tolist()], dtype=torch.float64)
    return value * gate * (1 + erf.view(gate.shape)) / 2


def assert_right(ours, x):
    exact, theirs = define(x).to(x.device), reference(x)
    assert ours.shape == exact.shape
    assert ours.dtype == x.dtype
    if not exact.numel():
        return
    error, other = ((y.double() - exact).norm() / exact.norm().clamp_min(1e-300) for y in (ours, theirs))
    # The interpreter rounds bfloat16 towards zero.
    assert error <= (2.5 if x.dtype == torch.bfloat16 and not x.is_cuda else 1.2) * other + torch.finfo(x.dtype).eps


@needs_triton
@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_triton_is_the_definition(shape, dtype, data):
    torch.manual_seed(0)
    x = DATA[data](torch.randn(shape, dtype=torch.float64)).to(dtype)
    with ops.use_backend("triton", "geglu"):
        assert_right(ops.geglu(x), x)


@needs_cpp
@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (40, 1030)], ids=str)
def test_cpp_is_the_definition(shape, dtype, data):
    torch.manual_seed(0)
    x = DATA[data](torch.randn(shape, dtype=torch.float64)).to(dtype)
    with ops.use_backend("cpp", "geglu"):
        assert_right(ops.geglu(x), x)


@needs_cpp
def test_every_gate_is_right_to_seven_digits():
    gate = torch.cat([torch.linspace(-14, 14, 100_001), torch.tensor([0.0, 1e-30, -1e-30])])
    x = torch.stack([torch.ones_like(gate), gate], -1)
    with ops.use_backend("cpp", "geglu"):
        ours = ops.geglu(x)[..., 0].double()
    exact = torch.tensor([z * math.erfc(-z / math.sqrt(2)) / 2 for z in gate.tolist()], dtype=torch.float64)
    # Down the tail what is left of 1 is a float's rounding of half of the square: 98 of them at -14.
    far = 1 + gate.double().square() / 2
    assert ((ours - exact).abs() <= 4e-7 * far * exact.abs() + 1e-37).all()


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_not_numbers_and_infinity_are_as_the_reference_has_them(dtype):
    odd = torch.tensor([math.nan, math.inf, -math.inf, 0.0, 2.0, -2.0, 3e38, -3e38], dtype=dtype)
    x = torch.stack([each.flatten() for each in torch.meshgrid(odd, odd, indexing="ij")], -1)
    with ops.use_backend("cpp", "geglu"):
        ours, theirs = ops.geglu(x), reference(x)
    assert torch.equal(ours.isnan(), theirs.isnan())
    assert torch.equal(ours.isinf(), theirs.isinf())


@pytest.mark.parametrize("backend", [pytest.param("cpp", marks=needs_cpp), pytest.param("triton", marks=needs_triton)])
def test_strides_are_followed(backend):
    x = torch.randn(6, 5, 4).transpose(0, 2)[::2, :, :4]
    with ops.use_backend(backend, "geglu"):
        assert_right(ops.geglu(x), x)


def test_a_gradient_takes_pytorchs_operators():
    x = torch.randn(2, 6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ops.geglu, x)
    for backend in ("cpp", "triton"):
        if ops.missing(backend) is None:
            with ops.use_backend(backend, "geglu"), pytest.raises(RuntimeError, match="it has no backward pass"):
                ops.geglu(x)


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.ones(2, 3), r"x must have an even last dimension, got \(2, 3\)"),
        (torch.tensor(1.0), "x must have an even last dimension"),
        (torch.ones(2, 4, dtype=torch.int64), "x must be of a floating-point dtype, got torch.int64"),
    ],
)
def test_bad_input(x, message):
    with pytest.raises(ValueError, match=message):
        ops.geglu(x)


@pytest.mark.parametrize("backend", [pytest.param("cpp", marks=needs_cpp), pytest.param("triton", marks=needs_triton)])
def test_opcheck(backend):
    torch.library.opcheck(getattr(torch.ops.difffast.geglu, backend), (torch.randn(2, 3, 8),))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("data", DATA)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, *PUBLISHED], ids=str)
def test_gpu_kernels_triton(shape, dtype, data):
    torch.manual_seed(0)
    x = DATA[data](torch.randn(shape, device="cuda")).to(dtype)
    with ops.use_backend("triton", "geglu"):
        ours = ops.geglu(x)
    value, gate = x.double().chunk(2, -1)
    exact = value * torch.nn.functional.gelu(gate)
    if exact.numel():
        error, other = ((y.double() - exact).norm() for y in (ours, reference(x)))
        assert error <= 1.2 * other + torch.finfo(dtype).eps * exact.norm()
