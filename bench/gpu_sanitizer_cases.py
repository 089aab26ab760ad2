"""Run every GPU kernel once or a few times on small operands, for compute-sanitizer, and check what comes out.

    python bench/gpu_sanitizer_cases.py --backend triton   # first alone: Triton compiles, and keeps what it compiled
    compute-sanitizer --tool memcheck python bench/gpu_sanitizer_cases.py --backend triton

and so with racecheck, initcheck and synccheck, and with ``--backend cuda``.  Sizes are odd where a kernel takes them,
and chosen so that every path of a launcher is taken.  What is expected is the reference in float64 on the CPU, so that
the tool sees the kernels and copies alone.  Only torch, triton and difffast.ops are needed; with
``TRITON_INTERPRET=1`` and without a GPU the Triton cases run on the CPU.  Exit status 1: a result is wrong, or a kernel
could not run.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

# Every tensor an allocation of its own, so that memcheck and initcheck know where it ends and what was written.
os.environ.setdefault("PYTORCH_NO_CUDA_MEMORY_CACHING", "1")

import torch
from torch import Tensor

from difffast import ops

BACKENDS = ("cuda", "triton")
#: Largest error relative to the largest number that is expected: some roundings of a result, and of what it is made of.
TOLERANCES = {torch.float16: 4e-3, torch.bfloat16: 3e-2, torch.float32: 2e-5}

Operands = dict[str, Tensor]


@dataclass(frozen=True)
class Case:
    """One call of an operator.

    Attributes:
        operator: the name in :data:`difffast.ops.OPERATORS`.
        name: what is special about the call.
        shapes: shape of every operand, by the name of the parameter.
        run: the call.
        backends: those that it is for.
        dtype: of all operands.
        gradient: whether the backward kernels run too.
        channels_last: whether operands of four dimensions have that format.
    """

    operator: str
    name: str
    shapes: dict[str, tuple[int, ...]]
    run: Callable[..., Tensor | tuple[Tensor, ...]]
    backends: Sequence[str] = BACKENDS
    dtype: torch.dtype = torch.float16
    gradient: bool = False
    channels_last: bool = False
    options: dict[str, object] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.operator}: {self.name}"

    def make_operands(self) -> Operands:
        """Random numbers on the CPU, which the dtype holds exactly; those called maps are probabilities."""
        generator = torch.Generator().manual_seed(0)
        operands = {}
        for name, shape in self.shapes.items():
            x = torch.randn(shape, generator=generator)
            x = (x.softmax(-1) if name == "maps" else x).to(self.dtype)
            operands[name] = x.contiguous(memory_format=torch.channels_last) if self._lies_last(x) else x
        return operands

    def _lies_last(self, x: Tensor) -> bool:
        return self.channels_last and x.ndim == 4

    def compute(self, operands: Operands, backend: str) -> list[Tensor]:
        """Results, and if they are asked for the gradients of a weighted sum of them, by a backend."""
        leaves = {name: x.detach().requires_grad_(self.gradient) for name, x in operands.items()}
        with ops.use_backend(backend, self.operator), torch.set_grad_enabled(self.gradient):
            results = self.run(**leaves, **self.options)
        results = [results] if isinstance(results, Tensor) else list(results)
        if not self.gradient:
            return results
        # Small whole numbers, which every dtype holds.
        weights = [torch.arange(x.numel()).remainder(7).sub(3).view(x.shape).to(x) for x in results]
        with ops.use_backend(backend, self.operator):
            found = torch.autograd.grad(results, list(leaves.values()), weights)
        return [x.detach() for x in results] + list(found)


def attention_cases() -> Iterator[Case]:
    """Cross attention and joint attention."""

    def sizes(
        batch: int, heads: int, queries: int, keys: int, d: int, key_batch: int = 1
    ) -> dict[str, tuple[int, ...]]:
        kv = (key_batch, heads, keys, d)
        return {"q": (batch, heads, queries, d), "k": kv, "v": kv}

    cross, bfloat16 = ops.cross_attention, torch.bfloat16
    yield Case("cross_attention", "no maps", sizes(2, 3, 71, 77, 40), cross)
    yield Case("cross_attention", "no maps, sink", sizes(2, 2, 33, 19, 64, 2), cross, options={"sink": 3})
    yield Case("cross_attention", "128 wide keys", sizes(1, 2, 35, 128, 256), cross, dtype=bfloat16)
    yield Case("cross_attention", "one key, one query", sizes(1, 1, 1, 1, 8), cross)
    # Enough query tiles for blocks that walk over several of them.
    yield Case("cross_attention", "walks", sizes(2, 2, 67_701, 5, 8), cross, ("cuda",))
    tokens = {"map_tokens": [0, 2, 16]}
    yield Case("cross_attention", "maps", sizes(2, 5, 71, 77, 64), cross, options={"map_tokens": [0, 5, 63, 64, 76]})
    yield Case("cross_attention", "maps of one head", sizes(1, 1, 71, 33, 40), cross, dtype=bfloat16, options=tokens)
    yield Case(
        "cross_attention", "maps, sink, wide", sizes(2, 3, 17, 81, 160), cross, options={"map_tokens": [80], "sink": 2}
    )
    for dtype in (torch.float16, torch.float32):
        yield Case(
            "cross_attention", f"backward, maps, sink, {dtype}", sizes(2, 3, 71, 77, 40), cross, ("triton",), dtype,
            gradient=True, options={"map_tokens": [1, 64, 76], "sink": 2},
        )  # fmt: skip
    # Enough queries for sums in several parts.
    yield Case("cross_attention", "backward, no maps", sizes(2, 1, 530, 17, 64, 2), cross, ("triton",), gradient=True)

    def joint(pixels: int, d: int) -> dict[str, tuple[int, ...]]:
        text, own = (1, 2, 77, d), (2, 2, pixels, d)
        return {"q": own, "text_k": text, "text_v": text, "k": own, "v": own}

    yield Case("joint_attention", "no maps", joint(67, 64), ops.joint_attention, ("triton",))
    yield Case(
        "joint_attention", "maps", joint(131, 40), ops.joint_attention, ("triton",), bfloat16,
        options={"map_tokens": [0, 76]},
    )  # fmt: skip
    edited = {"source_q": (2, 3, 71, 40), "source_k": (1, 3, 77, 40), "v": (1, 3, 19, 40), "mix": (77, 19)}
    edited |= {"q": (2, 3, 71, 40), "k": (1, 3, 19, 40), "keep": (19,)}
    yield Case("edited_attention", "maps of two texts", edited, ops.edited_attention, ("triton",))
    yield Case("joint_attention", "float32", joint(35, 80), ops.joint_attention, ("triton",), torch.float32)


def norm_cases() -> Iterator[Case]:
    """GroupNorm and SiLU, alone and of a skip beside the hidden state, in both formats."""

    def sizes(batch: int, channels: int, *pixels: int, **others: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        return {"x": (batch, channels, *pixels), "weight": (channels,), "bias": (channels,), **others}

    def norm(groups: int) -> Callable[..., Tensor]:
        return lambda x, **named: ops.group_norm_silu(x, groups, **named)

    def skip(groups: int) -> Callable[..., tuple[Tensor, ...]]:
        return lambda x, skip, **named: ops.skip_norm_silu(x, skip, groups, **named)

    for last in (False, True):
        kind, more = ("NHWC" if last else "NCHW"), {"channels_last": last}
        yield Case("group_norm_silu", f"{kind}, odd", sizes(3, 15, 7, 9), norm(5), **more)
        rows = {"addend": (2, 20), "scale": (4, 20), "shift": (4, 20)}
        yield Case("group_norm_silu", f"{kind}, rows and shift", sizes(4, 20, 9, 11, **rows), norm(2), **more)
        full = {"addend": (2, 24, 13, 6)}
        yield Case(
            "group_norm_silu",
            f"{kind}, full addend",
            sizes(4, 24, 13, 6, **full),
            norm(3),
            dtype=torch.bfloat16,
            **more,
        )
        # Slabs of 32 KiB for the blocks of a cluster, where there are clusters.
        yield Case("group_norm_silu", f"{kind}, cluster", sizes(1, 8, 63, 65), norm(2), **more)
        cluster = sizes(2, 16, 64, 64, addend=(1, 16, 64, 64))
        yield Case("group_norm_silu", f"{kind}, cluster, full addend", cluster, norm(2), dtype=torch.bfloat16, **more)
        # More than eight blocks have room for: two launches.
        yield Case(
            "group_norm_silu", f"{kind}, two launches", sizes(1, 3, 420, 421), norm(1), ("cuda",), torch.float32, **more
        )
        yield Case(
            "group_norm_silu",
            f"{kind}, backward",
            sizes(2, 15, 7, 9, **{**rows, "addend": (1, 15), "scale": (2, 15), "shift": (2, 15)}),
            norm(3),
            ("triton",),
            torch.float32,
            True,
            **more,
        )
        # Channels 10 and 11 are the skip's, in a group that begins in x.
        sizes_of_skip = {"x": (4, 10, 9, 7), "skip": (2, 14, 9, 7), "weight": (24,), "bias": (24,)}
        yield Case("skip_norm_silu", f"{kind}, straddling group", sizes_of_skip, skip(6), **more)
        large = {"x": (2, 12, 64, 65), "skip": (1, 12, 64, 65), "weight": (24,), "bias": (24,)}
        yield Case("skip_norm_silu", f"{kind}, cluster", large, skip(3), dtype=torch.bfloat16, **more)


def entropy_cases() -> Iterator[Case]:
    """The entropy of attention maps and its gradient."""
    maps = {"maps": (2, 131, 77)}

    def entropy(maps: Tensor) -> Tensor:
        return ops.attention_entropy(maps, [1, 4, 7], 11)

    yield Case("attention_entropy", "forward", maps, entropy, ("triton",), torch.float32)
    yield Case("attention_entropy", "backward", maps, entropy, ("triton",), torch.float32, True)


def geglu_cases() -> Iterator[Case]:
    """The gated activation, on a row and a half of a program's numbers and on few."""
    for rows, width in ((3, 1), (71, 88)):
        yield Case("geglu", f"{rows} x {width}", {"x": (rows, 2 * width)}, ops.geglu, ("triton",))


def cases(backend: str, only: str = "") -> list[Case]:
    """Those of a backend whose names contain ``only``."""
    everything = [*attention_cases(), *norm_cases(), *entropy_cases(), *geglu_cases()]
    return [case for case in everything if backend in case.backends and only in str(case)]


def find_fault(case: Case, backend: str, device: str) -> str | None:
    """Run a case.  -> what is wrong with its results, or None"""
    operands = case.make_operands()
    expected = case.compute({name: x.double() for name, x in operands.items()}, "reference")
    try:
        results = case.compute({name: x.to(device) for name, x in operands.items()}, backend)
        results = [x.cpu() for x in results]
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}"
    for i, (actual, exact) in enumerate(zip(results, expected, strict=True)):
        if actual.shape != exact.shape:
            return f"result {i} is {tuple(actual.shape)} instead of {tuple(exact.shape)}"
        largest = exact.abs().max().item() if exact.numel() else 0.0
        error = (actual.double() - exact).abs().max().item() if exact.numel() else 0.0
        # Not "error > ...", which NaN is not.
        if not error <= TOLERANCES[case.dtype] * largest:
            return f"result {i} is off by {error:.2e}, where the largest number is {largest:.2e}"
    return None


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the chosen cases, print a line for each, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", choices=BACKENDS, required=True)
    parser.add_argument("--only", default="", help="cases whose names contain this")
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    chosen, failed, start = cases(options.backend, options.only), 0, time.perf_counter()
    for case in chosen:
        fault = find_fault(case, options.backend, device)
        failed += fault is not None
        print(f"{'FAILED' if fault else 'ok':<8}{case}{f': {fault}' if fault else ''}", flush=True)
    print(f"{options.backend} on {device}: {len(chosen)} cases, {failed} failed, {time.perf_counter() - start:.1f} s")
    return 1 if failed or not chosen else 0


if __name__ == "__main__":
    torch.set_num_threads(1)
    sys.exit(main())
