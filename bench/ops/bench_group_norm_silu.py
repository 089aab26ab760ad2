"""group_norm_silu: eager PyTorch, torch.compile of it, and our kernels (C++; on a GPU Triton and CUDA), in one run.

``make bench`` prints the table and writes JSON; the correctness gate comes first.  On a GPU:

    bench/gpu.sh OUT 540 bench/ops/bench_group_norm_silu.py -k gpu
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from interleaved import copy_bandwidth, measure, ratio
from torch import Tensor

from difffast import ops
from difffast.ops.skip_norm_silu import own_channels

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


#: On a GPU, name -> (channels, height and width): of Stable Diffusion 1.x and SDXL at their usual sizes.
GPU_SHAPES = {
    "SD1.x 64x64": (320, 64),
    "SD1.x 32x32": (640, 32),
    "SD1.x 16x16": (1280, 16),
    "SD1.x 8x8": (2560, 8),
    "SDXL 128x128": (320, 128),
    "SDXL 128x128, decoder": (960, 128),
    "SDXL 64x64": (640, 64),
    "SDXL 32x32": (1280, 32),
}
on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def eager_skip(hidden: Tensor, skip: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    """As in Diffusers' decoder, for every step; what all steps share is a slice."""
    repeats, own = hidden.shape[0] // skip.shape[0], own_channels(hidden.shape[1], skip.shape[1], GROUPS)
    both = F.silu(F.group_norm(torch.cat([hidden, skip.repeat_interleave(repeats, 0)], 1), GROUPS, weight, bias))
    return both[:, :own], both[::repeats, own:]


def compare_on_a_gpu(
    benchmark: Any, operator: str, eager: Callable[..., Any], arguments: tuple[Any, ...], about: dict[str, Any]
) -> None:
    """Times eager, compiled and our kernels on these arguments, the gate first, into the benchmark's ``extra_info``."""
    torch._dynamo.reset()
    run = {"group_norm_silu": ours, "skip_norm_silu": ours_skip}[operator]
    backends = [backend for backend in ("triton", "cuda") if ops.missing(backend) is None]

    def forced(backend: str) -> Callable[[], Any]:
        def call() -> Any:
            with ops.use_backend(backend, operator):
                return run(*arguments)

        return call

    compiled = torch.compile(eager)
    providers = {"eager": lambda: eager(*arguments), "compiled": lambda: compiled(*arguments)}
    providers |= {backend: forced(backend) for backend in backends}

    def flat(result: Any) -> Tensor:
        return torch.cat([t.double().flatten() for t in (result if isinstance(result, tuple) else (result,))])

    exact = flat(eager(*(None if t is None else t.double().contiguous() for t in arguments)))
    gaps = {name: float((flat(call()) - exact).norm() / exact.norm()) for name, call in providers.items()}
    assert max(gaps.values()) <= 4 * torch.finfo(arguments[0].dtype).eps, f"a wrong result must not be timed: {gaps}"

    seconds: dict[str, list[float]] = {}
    benchmark.pedantic(lambda: seconds.update(measure(providers, rounds=21, device="cuda")), rounds=1, iterations=1)
    result = providers["eager"]()
    tensors = [*(t for t in arguments if t is not None), *(result if isinstance(result, tuple) else (result,))]
    moved = sum(t.numel() * t.element_size() for t in tensors)
    copied = copy_bandwidth()
    shares = {name: moved / statistics.median(times) / copied for name, times in seconds.items()}
    benchmark.extra_info.update(
        about, gate=gaps, seconds=seconds, bytes_moved=moved, copy_gb_per_s=copied / 1e9, share_of_copy=shares
    )
    print(f"\n{about['case']}")
    for name, times in seconds.items():
        low, middle, high = (1e6 * t for t in statistics.quantiles(times, n=4))
        print(f"  {name:9s} {middle:8.1f} us (quartiles {low:.1f} to {high:.1f})  {shares[name]:.2f} of copy bandwidth")
    for backend in backends:
        assert ratio(seconds, "compiled", backend)[1] >= 1.0, f"{backend} must not be chosen for this shape"


def ours_skip(hidden: Tensor, skip: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
    return ops.skip_norm_silu(hidden, skip, GROUPS, weight, bias)


def on_gpu(layout: str, dtype: torch.dtype, *shapes: tuple[int, ...]) -> list[Tensor]:
    torch.manual_seed(0)
    last = torch.channels_last if layout == "NHWC" else torch.contiguous_format
    return [
        torch.randn(shape, device="cuda", dtype=dtype).to(
            memory_format=last if len(shape) == 4 else torch.preserve_format
        )
        for shape in shapes
    ]


@on_a_gpu
@pytest.mark.benchmark(group="group_norm_silu on a GPU")
@pytest.mark.parametrize("added", [False, True], ids=["plain", "time embedding"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("batch", [2, 8, 16])
@pytest.mark.parametrize("shape", GPU_SHAPES)
@torch.inference_mode()
def test_gpu_group_norm_silu(benchmark, environment, shape, batch, layout, dtype, added):
    channels, width = GPU_SHAPES[shape]
    sizes = [(batch, channels, width, width), (channels,), (channels,), *([(batch, channels)] if added else [])]
    arguments = (*on_gpu(layout, dtype, *sizes), *([] if added else [None]))
    name = str(dtype).removeprefix("torch.")
    case = f"{shape}: {list(sizes[0])} {layout} {name}{' + time embedding' if added else ''}"
    about = {**environment, "case": case, "dtype": name}
    compare_on_a_gpu(benchmark, "group_norm_silu", eager, arguments, about)
    large = benchmark.extra_info["bytes_moved"] > torch.cuda.get_device_properties(0).L2_cache_size
    if shape.startswith("SDXL") and large and ops.missing("cuda") is None:
        assert benchmark.extra_info["share_of_copy"]["cuda"] >= 0.8


@on_a_gpu
@pytest.mark.benchmark(group="skip_norm_silu on a GPU")
@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("layout", ["NCHW", "NHWC"])
@pytest.mark.parametrize("channels", [(640, 320, 64), (1280, 640, 32), (640, 320, 128)], ids=str)
@torch.inference_mode()
def test_gpu_skip_norm_silu(benchmark, environment, channels, layout, steps):
    of_hidden, of_skip, width = channels
    both = (of_hidden + of_skip,)
    sizes = [(2 * steps, of_hidden, width, width), (2, of_skip, width, width), both, both]
    case = f"{list(sizes[0])} and {list(sizes[1])} {layout} float16"
    about = {**environment, "case": case, "dtype": "float16"}
    compare_on_a_gpu(benchmark, "skip_norm_silu", eager_skip, tuple(on_gpu(layout, torch.float16, *sizes)), about)
