"""GEGLU: the first half of each row times the GELU of the second half, in one pass.

Shapes: x [rows, 2 C], out [rows, C], both contiguous.  The operator's definition is in ``difffast/ops/geglu.py``.
"""

# Constants and sizes in kernels are upper case, as in Triton's own code.
# ruff: noqa: N803

from __future__ import annotations

from collections.abc import Iterator

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import on_device_of

#: Elements of one program.  On an H100 512 to 4096 of them took the same time within 8%.
BLOCK = 1024
OPTIONS = {"num_warps": 4}


@triton.jit
def forward_kernel(x, out, C, TOTAL, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """Program (block of out)."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = index < TOTAL
    first = index // C * C + index  # row * 2 C + column
    value = tl.load(x + first, mask=inside, other=0.0).to(ACC)
    gate = tl.load(x + first + C, mask=inside, other=0.0).to(ACC)
    half_root = tl.full([1], 0.7071067811865476, ACC)  # a plain number would be float32
    result = value * (0.5 * gate * (1 + tl.erf(gate * half_root)))
    tl.store(out + index, result.to(out.dtype.element_ty), mask=inside)


def forward(x: Tensor) -> Tensor:
    """Return value * GELU(gate) [..., C] of x = [value, gate] [..., 2 C]."""
    x = x.contiguous()
    width = x.shape[-1] // 2
    out = x.new_empty([*x.shape[:-1], width])
    if out.numel():
        accumulate = tl.float64 if x.dtype == torch.float64 else tl.float32
        with on_device_of(x):
            forward_kernel[(triton.cdiv(out.numel(), BLOCK),)](
                x, out, width, out.numel(), ACC=accumulate, BLOCK=BLOCK, **OPTIONS
            )
    return out


def aot_cases(capability: int, quick: bool = False) -> Iterator[tuple]:
    """Yield every launch, as the function above makes it, for an ahead-of-time compiler.

    Each is (name, kernel, signature, compile-time arguments, compiler options); a ``:16`` after a type means a multiple
    of 16, as in Triton's own tools.
    """
    for kind in ("fp16",) if quick else ("fp16", "bf16", "fp32"):
        signature = {
            "x": f"*{kind}:16", "out": f"*{kind}:16", "C": "i32:16", "TOTAL": "i64:16",
            "ACC": "constexpr", "BLOCK": "constexpr",
        }  # fmt: skip
        yield f"geglu {kind}", forward_kernel, signature, {"ACC": tl.float32, "BLOCK": BLOCK}, OPTIONS
