"""Maps for attention_entropy, and its gradient."""

import pytest
import torch

from difffast import ops

EVERY = [
    pytest.param(b, marks=pytest.mark.skipif(ops.missing(b) is not None, reason=str(ops.missing(b))))
    for b in ops.OPERATORS["attention_entropy"]
]
KERNELS = EVERY[:-1]
needs_cpp = pytest.mark.skipif(ops.missing("cpp") is not None, reason=str(ops.missing("cpp")))
#: (batch, pixels, columns, words, anchors): sizes that are no multiple of a tile or of a vector, one pixel, one word.
SHAPES = [
    (1, 1, 3, 2, (1,)),
    (16, 7, 77, 5, (4, 2)),
    (2, 64, 2, 1, (1,)),
    (3, 65, 200, 12, (2, 12, 5)),
    (2, 256, 77, 75, (63, 3, 75)),
    (4, 256, 3, 2, (2,)),
    (1, 1000, 128, 127, (5, 127, 64)),
    (2, 1024, 77, 12, (3, 7)),
]


def _contiguous(batch, pixels, columns, dtype=torch.float64):
    """Rows like attention probabilities: positive, with sum 1."""
    return (2 * torch.randn(batch, pixels, columns, dtype=torch.float64)).softmax(-1).to(dtype)


#: How maps lie in memory.
LAYOUTS = {
    "contiguous": _contiguous,
    "sliced tokens": lambda b, n, t, d: _contiguous(b, n, 2 * t + 3, d)[:, :, 3 : 2 * t + 3 : 2],
    "sliced pixels": lambda b, n, t, d: _contiguous(2 * b, 3 * n, t + 1, d)[::2, 1 : 3 * n : 3, :t],
    "transposed": lambda b, n, t, d: _contiguous(b, t, n, d).transpose(1, 2),
    "expanded batch": lambda b, n, t, d: _contiguous(1, n, t, d).expand(b, n, t),
}


def run(function, maps, grad_loss, *arguments, **options):
    """-> (loss, gradient), detached"""
    leaf = maps.detach().requires_grad_()
    loss = function(leaf, *arguments, **options)
    return loss.detach(), torch.autograd.grad(loss, leaf, grad_loss.to(loss.dtype))[0]


def run_backend(backend, *arguments, **options):
    with ops.use_backend(backend, "attention_entropy"):
        return run(ops.attention_entropy, *arguments, **options)


def weights(batch):
    return torch.linspace(-1, 2, batch, dtype=torch.float64)
