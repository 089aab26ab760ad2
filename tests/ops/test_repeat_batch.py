import os
import subprocess
import sys

import pytest
import torch

from difffast import ops
from difffast.ops.repeat_batch import reference

SHAPES = [(2, 4, 3, 5), (3, 7), (4,), (1, 32, 8, 8), (2, 0, 3), (0, 4), (2, 1, 3, 3), (2, 3, 1, 1)]
LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": lambda x: x.to(memory_format=torch.channels_last) if x.ndim == 4 else x,
    "transposed": lambda x: x.transpose(-1, -2).contiguous().transpose(-1, -2) if x.ndim > 2 else x,
    "sliced": lambda x: torch.cat([x, x])[::2] if x.shape[0] % 2 == 0 else x,
}

needs_cpp = pytest.mark.skipif(ops.missing("cpp") is not None, reason=str(ops.missing("cpp")))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.bool]
)
def test_every_backend_is_the_definition(shape, layout, dtype):
    x = LAYOUTS[layout]((torch.randn(shape) * 5).to(dtype))
    for backend in [b for b in ops.BACKENDS if ops.missing(b) is None]:
        with ops.use_backend(backend):
            for repeats in (1, 2, 5):
                out = ops.repeat_batch(x, repeats)
                assert torch.equal(out, reference(x, repeats))
                assert out.shape == (x.shape[0] * repeats, *x.shape[1:])
                assert out.stride() == reference(x, repeats).stride()
                if out.numel():
                    out.fill_(1)
                    assert out.data_ptr() != x.data_ptr(), "always a copy"


def test_rows_are_batch_major():
    assert ops.repeat_batch(torch.tensor([1, 2]), 3).tolist() == [1, 1, 1, 2, 2, 2]


def test_large_tensors_use_all_threads_correctly():
    x = torch.randn(4, 64, 64, 64)
    assert torch.equal(ops.repeat_batch(x, 7), reference(x, 7))


def test_is_differentiable():
    x = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: ops.repeat_batch(x, 3), x)


@needs_cpp
@pytest.mark.parametrize("layout", LAYOUTS)
def test_opcheck(layout):
    x = LAYOUTS[layout](torch.randn(2, 4, 3, 5))
    torch.library.opcheck(torch.ops.difffast.repeat_batch.default, (x, 3))


def test_compiles_without_graph_breaks():
    x = torch.randn(2, 4, 3, 5)
    compiled = torch.compile(lambda x: ops.repeat_batch(x, 3) + 1, fullgraph=True, backend="aot_eager")
    for backend in [b for b in ops.BACKENDS if ops.missing(b) is None]:
        with ops.use_backend(backend):
            assert torch.equal(compiled(x), reference(x, 3) + 1)


def test_bad_input():
    with pytest.raises(ValueError, match="repeats must be at least 1, got 0"):
        ops.repeat_batch(torch.ones(2), 0)
    with pytest.raises(ValueError, match="got a 0-d tensor"):
        ops.repeat_batch(torch.tensor(1.0), 2)


def test_forced_backends():
    with (
        pytest.raises(ValueError, match="unknown backend 'mkl'; available: reference, sdpa, onednn, cpp"),
        ops.use_backend("mkl"),
    ):
        pass


@needs_cpp
def test_a_forced_backend_does_not_fall_back():
    with (
        ops.use_backend("cpp"),
        pytest.raises(RuntimeError, match=r"'cpp' was forced but cannot run: it serves cpu tensors"),
    ):
        ops.repeat_batch(torch.ones(2, device="meta"), 2)


@pytest.mark.parametrize(("backend", "outcome"), [("reference", "4"), ("magic", "unknown backend 'magic'")])
def test_backend_from_the_environment(backend, outcome):
    code = "import torch; from difffast import ops; print(len(ops.repeat_batch(torch.ones(2), 2)))"
    environment = {**os.environ, "DIFFFAST_BACKEND": backend}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert outcome in result.stdout + result.stderr


@needs_cpp
@pytest.mark.parametrize("repeats", [2**62, 6148914691236517206])
def test_sizes_that_64_bits_do_not_hold_are_refused(repeats):
    with pytest.raises(RuntimeError, match="repeats must leave a size that 64 bits hold"):
        ops.repeat_batch(torch.zeros(3, 4), repeats)
