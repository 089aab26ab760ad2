"""group_norm_silu: eager PyTorch, torch.compile of it, and the C++ kernel, in turn in one run.

``make bench`` prints the table and writes JSON; the correctness gate comes first.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from difffast import ops

#: Measurements, numbers that one of them goes over (by repeated calls), threads.
ROUNDS, NUMBERS, THREADS = 15, 1 << 22, 2
#: Relative error (of norms) against float64.
TOLERANCE = 1e-5
#: Batch, channels, height and width: norms of Stable Diffusion 1.x and SDXL with guidance.
SHAPES = [(2, 320, 64, 64), (2, 960, 32, 32), (2, 1280, 16, 16), (2, 2560, 8, 8), (2, 640, 64, 64), (2, 320, 128, 128)]
GROUPS = 32
#: Of one number: sum and square for the statistics (3), normalise (2), scale and shift (2), SiLU (4).
FLOPS = 11


def eager(x: Tensor, weight: Tensor, bias: Tensor, addend: Tensor | None) -> Tensor:
    """As in Diffusers' ResnetBlock2D."""
    if addend is not None:
        x = x + addend[:, :, None, None]
    return F.silu(F.group_norm(x, GROUPS, weight, bias))


def ours(x: Tensor, weight: Tensor, bias: Tensor, addend: Tensor | None) -> Tensor:
    return ops.group_norm_silu(x, GROUPS, weight, bias, addend=addend)


def seconds(function: Callable[..., Tensor], arguments: tuple[Any, ...]) -> float:
    """Of one call, mean over as many as go over :data:`NUMBERS` numbers."""
    calls = max(1, NUMBERS // arguments[0].numel())
    start = time.perf_counter()
    for _ in range(calls):
        function(*arguments)
    return (time.perf_counter() - start) / calls


@pytest.fixture
def _threads() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


@pytest.mark.skipif(ops.missing("cpp") is not None, reason=str(ops.missing("cpp")))
@pytest.mark.benchmark(group="group_norm_silu")
@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize("added", [False, True], ids=["plain", "time embedding"])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@torch.no_grad()
def test_group_norm_silu(benchmark, environment, shape, layout, added):
    torch._dynamo.reset()
    torch.manual_seed(0)
    x = torch.randn(shape).to(memory_format=torch.channels_last if layout == "NHWC" else torch.contiguous_format)
    weight, bias = torch.randn(2, shape[1])
    arguments = (x, weight, bias, torch.randn(shape[:2]) if added else None)
    everyone = {"eager": eager, "compiled": torch.compile(eager), "cpp": ours}
    with ops.use_backend("cpp", "group_norm_silu"):
        exact = eager(*(None if t is None else t.double() for t in arguments))
        gaps = {name: float((f(*arguments) - exact).norm() / exact.norm()) for name, f in everyone.items()}
        assert max(gaps.values()) <= TOLERANCE, f"a wrong result must not be timed: {gaps}"

        measured: dict[str, list[float]] = {name: [] for name in everyone}
        for function in everyone.values():
            seconds(function, arguments)

        def measure_others() -> None:
            for name in ("eager", "compiled"):
                measured[name].append(seconds(everyone[name], arguments))

        def measure_ours() -> None:
            measured["cpp"].append(seconds(ours, arguments))

        benchmark.pedantic(measure_ours, setup=measure_others, rounds=ROUNDS, iterations=1)

    ratios = {name: [a / b for a, b in zip(s, measured["eager"], strict=True)] for name, s in measured.items()}
    benchmark.extra_info.update(
        {**environment, "threads": THREADS},
        case=f"{list(shape)} {layout}{' + time embedding' if added else ''}",
        dtype="float32",
        instruction_set=ops.INSTRUCTION_SET,
        gate={name: f"against float64: {gap:.1e}" for name, gap in gaps.items()},
        seconds=measured,
        against_eager=ratios,
        bytes=2 * x.numel() * x.element_size(),
        flops=FLOPS * x.numel(),
    )
    print()
    for name, values in ratios.items():
        low, middle, high = statistics.quantiles(values, n=4)
        fast, median, slow = (1e6 * t for t in statistics.quantiles(measured[name], n=4))
        print(
            f"{name:9s} {median:8.1f} us (quartiles {fast:.1f} to {slow:.1f})  "
            f"{middle:.3f} of eager (quartiles {low:.3f} to {high:.3f})"
        )
