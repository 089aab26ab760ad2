"""Operators on hostile operands: what difffast/ops/__init__.py promises of one call, and many draws."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter

import hostile_operands as hostile
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from operator_cases import OPERATORS, Case, reach

from difffast import ops
from difffast.ops._dispatch import CannotRunError

#: What runs on CPUs.  Numbers of "sdpa" are PyTorch's own; Triton's interpreter is too slow for many draws.
ON_CPU = ("reference", "onednn", "cpp")
_F32, _F64, _BF16 = torch.float32, torch.float64, torch.bfloat16
#: Rounding errors of operands, for which a result may change as well.
_ULPS = {_F32: 8, _BF16: 8, _F64: 1e4}


def compute(function, operands, dtype, gradient):
    """Return what ``function`` makes of operands in a dtype, or its gradients for weights that are the same always."""
    made = {name: x.to(dtype) if x.dtype != dtype else x for name, x in operands.items()}
    if not gradient:
        with torch.no_grad():
            return function(**made)
    leaves = {name: x.detach().requires_grad_() for name, x in made.items()}
    generator = torch.Generator().manual_seed(0)
    out = function(**leaves)
    loss = sum((x.double() * torch.randn(x.shape, generator=generator, dtype=_F64)).sum() for x in out)
    return torch.autograd.grad(loss, list(leaves.values()), allow_unused=True, materialize_grads=True)


def shift(case, dtype, seed):
    """Return the operands in float64, each number changed by some rounding errors."""
    generator = torch.Generator().manual_seed(seed)
    by = _ULPS[dtype] * torch.finfo(dtype).eps
    return {
        name: x.double() * (1 + by * torch.randn(x.shape, generator=generator, dtype=_F64))
        for name, x in case.operands.items()
    }


def largest(x, dimensions):
    """Return the largest numbers over the last dimensions."""
    return x.flatten(x.ndim - dimensions).amax(-1) if dimensions and x.numel() else x


def multiply_largest(x, weight, bias=None):
    """Return the size [batch, output channels] of a convolution's terms if every weight met the largest pixel."""
    pixels, weights = (each.double().nan_to_num(0, 0, 0).abs().amax((2, 3)) for each in (x, weight))
    return pixels @ weights.T


def amplify(points, side):
    """Return how much larger than a product of the largest numbers what tiles of side x side add up may be.

    It is what Cook and Toom's matrices for a filter of 3 and these points, and infinity, do to signs that all agree.
    """
    sums = [0.0] * side
    for point in points:
        others = [other for other in points if other != point]
        filtered = sum(abs(point) ** i for i in range(3)) / abs(math.prod(point - other for other in others))
        for i in range(side):
            sums[i] += abs(point) ** i * filtered * add_coefficients(others)
    sums[-1] += add_coefficients(points)
    return max(sums) ** 2  # down and across


def add_coefficients(roots):
    """Return the sum of the sizes of the coefficients of the polynomial with these roots."""
    coefficients = [1.0]
    for root in roots:
        shifted = [0.0, *(-root * each for each in coefficients)]
        coefficients = [a + b for a, b in zip([*coefficients, 0.0], shifted, strict=True)]
    return sum(map(abs, coefficients))


#: By the side of a tile.
_AMPLIFIED = {2: amplify((0.0, 1.0, -1.0), 2), 4: amplify((0.0, 0.625, -0.625, 1.5, -1.5), 4)}


def spread_in_tiles(finite, side):
    """Return, for images, of which pixels the whole tile is finite."""
    height, width = finite.shape[-2:]
    rows, columns = (torch.arange(n) // side for n in (height, width))
    tiles = (rows[:, None] * width + columns).flatten().expand(*finite.shape[:-2], -1)
    wrong = torch.zeros(*finite.shape[:-2], height * width, dtype=torch.int64)
    wrong.scatter_add_(-1, tiles, (~finite).flatten(-2).long())
    return (wrong.gather(-1, tiles) == 0).unflatten(-1, (height, width))


def flush(x):
    """Return a tensor with zeros for its subnormal numbers."""
    return torch.where(x.abs() < torch.finfo(x.dtype).smallest_normal, 0, x)


@dataclasses.dataclass
class Expected:
    """What a case should give: in float64, and as plain PyTorch has it in the dtype of the computation."""

    case: Case
    gradient: bool

    def __post_init__(self):
        self.dtype = next(iter(self.case.operands.values())).dtype
        wide = _F64 if self.dtype == _F64 else _F32
        self.exact = compute(self.case.define, self.case.operands, _F64, self.gradient)
        self.eager = compute(self.case.define, self.case.operands, wide, self.gradient)
        self.finite = [a.isfinite() & b.isfinite() for a, b in zip(self.exact, self.eager, strict=True)]
        queries = {name: 1.5 * x for name, x in self.case.operands.items() if name in ("q", "source_q")}
        if queries:  # logits are of base 2 in kernels, and may overflow a little earlier
            roomy = compute(self.case.define, {**self.case.operands, **queries}, wide, self.gradient)
            self.finite = [a & b.isfinite() for a, b in zip(self.finite, roomy, strict=True)]
        if self.dtype == _BF16:  # processors that multiply bfloat16, and PyTorch on them, take subnormals as zeros
            flushed = {name: flush(x) for name, x in self.case.operands.items()}
            flushed = compute(self.case.define, flushed, wide, self.gradient)
            self.finite = [a & b.isfinite() for a, b in zip(self.finite, flushed, strict=True)]
        if self.case.blurs > 1 and not self.gradient and self.exact[0].numel():
            whole = self.case.operands["weight"].isfinite().flatten(1).all(1)[:, None, None]
            self.finite = [spread_in_tiles(a, self.case.blurs) & whole for a in self.finite]
        self.nowhere = [~a.isfinite() & ~b.isfinite() for a, b in zip(self.exact, self.eager, strict=True)]
        self.shifted = None

    def check(self, backend, found):
        """Check one backend's results."""
        assert len(found) == len(self.exact)
        for i, ours in enumerate(found):
            message = f"{backend}: result {i} of {self.case}{' (gradients)' if self.gradient else ''}"
            assert ours.shape == self.exact[i].shape, message
            assert ours[self.finite[i]].isfinite().all(), f"not finite here: {message}"
            assert not ours[self.nowhere[i]].isfinite().any(), f"finite, and not in the reference: {message}"
            self.check_error(i, ours, message)

    def check_error(self, i, ours, message):
        """Check the error: four times eager's, the shift by rounded operands, a floor; a share has one bound."""

        groups = None if self.gradient else self.case.about.get("groups")
        if groups is not None and self.exact[i].shape[1] != self.case.operands["weight"].numel():
            groups = None  # what skip_norm_silu returns besides

        def keep(x):
            x = torch.where(self.finite[i], x, 0.0)
            return x if groups is None else x.unflatten(1, (groups, -1))  # the channels of a group share a bound

        dimensions = self.exact[i].ndim if self.gradient else self.case.shares[i] + (groups is not None)
        exact, eps, tiny = self.exact[i], torch.finfo(self.dtype).eps, torch.finfo(self.dtype).smallest_normal
        error = largest(keep((ours.double() - exact).abs()), dimensions)
        eager = largest(keep((self.eager[i].to(self.dtype).double() - exact).abs()), dimensions)
        size = max(reach(x) for x in self.case.operands.values())
        floor = 8 * eps * largest(keep(exact.abs()), dimensions) + 1e3 * tiny * size
        if self.dtype == _F64:  # where nobody is more exact than the other, and eager is the definition itself
            floor = floor + 1e3 * eps * size * max(self.case.sizes.values(), default=1.0)
        if self.case.blurs > 1 and not self.gradient and self.exact[0].numel():
            # Rounding errors of what tiles add up, which is in float32 for bfloat16; and those of the operands.
            rounded = torch.finfo(_F32 if self.dtype == _BF16 else self.dtype).eps / 2
            most = max(8 * eps, rounded * _AMPLIFIED[self.case.blurs])
            floor = floor + most * multiply_largest(**self.case.operands)
        if self.gradient:
            floor = floor + 64 * eps * [*self.case.sizes.values(), *[1.0] * 9][i]
        if (error <= 4 * eager + floor).all():
            return
        moved = [largest(keep((other[i] - exact).abs().nan_to_num(0, 0, 0)), dimensions) for other in self.shift()]
        beyond = error - 4 * eager - floor - torch.stack(moved).amax(0)
        assert (beyond <= 0).all(), f"error {float(beyond.max())} too large: {message}"

    def shift(self):
        """Return what the definition makes of four sets of operands that differ by rounding errors."""
        if self.shifted is None:
            made = [shift(self.case, self.dtype, seed) for seed in range(4)]
            self.shifted = [compute(self.case.define, each, _F64, self.gradient) for each in made]
        return self.shifted


def check(expected, backends):
    """Check a case on backends; one that cannot run is passed over, and must say why.

    Returns:
        The backends that ran.
    """
    case, gradient, ran = expected.case, expected.gradient, []
    for backend in backends:
        try:
            with ops.use_backend(backend, case.operator):
                found = compute(case.call, case.operands, expected.dtype, gradient)
        except CannotRunError as error:
            assert "was forced but cannot run" in str(error)  # noqa: PT017
            continue
        expected.check(backend, found)
        ran.append(backend)
    return ran


@st.composite
def cases(draw, operator, wild):
    """Draw a case of an operator, finite or not; the maps of attention_entropy are never in half precision."""
    # PyTorch's own products in bfloat16 let infinity reach other pixels, and with AMX other rows.
    narrow = operator == "attention_entropy" or (operator in ("convolution", "linear") and wild)
    dtypes = [_F32, _F64] if narrow else [_F32, _F32, _F32, _BF16, _F64]
    gradient = not wild and draw(st.integers(0, 4)) == 4
    beyond = hostile.wild_kinds if "norm" not in operator else st.sampled_from(["one infinite", "one nan"])
    kinds = hostile.kinds
    if wild:
        kinds = beyond if draw(st.booleans()) else kinds | beyond
    case = draw(OPERATORS[operator](draw(st.sampled_from(dtypes)), kinds))
    assume(case.spread > (1e4 if gradient else 16))
    return case, gradient


def run(operator, draws, backends=ON_CPU):
    """Check so many draws of an operator, a quarter of them with operands that are not finite, or overflow.

    Each backend must run a fifth of the draws, and one in ten of the quarter must give what is not finite, or neither
    was tried.
    """
    ran, wild_ones = Counter(), []
    backends = [b for b in backends if b in ops.OPERATORS[operator] and ops.missing(b) is None]

    def draw(wild, examples):
        @settings(
            max_examples=examples,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(cases(operator, wild))
        def every(drawn):
            expected = Expected(*drawn)
            ran.update(check(expected, backends))
            if wild:
                wild_ones.append(any(x.any() for x in expected.nowhere))

        every()

    draw(False, draws - draws // 4)
    draw(True, draws // 4)
    assert all(ran[backend] >= draws / 5 for backend in backends), ran
    assert sum(wild_ones) >= draws // 40, f"{sum(wild_ones)} of {len(wild_ones)}"
