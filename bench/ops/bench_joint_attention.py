"""joint_attention on DeepFloyd IF's shapes: eager, SDPA on joined keys, compiled, and our kernels, in one run.

    pytest bench/ops/bench_joint_attention.py -W default --benchmark-enable --benchmark-json=out/ops.json -s

SDPA is timed with the joining, which is what a stock layer does.
"""

from __future__ import annotations

import statistics

import pytest
import torch
import torch.nn.functional as F
from interleaved import measure, ratio

from difffast import ops

TEXT = 77
WORDS = list(range(1, 13))
#: name -> (heads, pixels, head_dim): IF-I-XL's three levels with attention.
SHAPES = {"IF-I-XL 32x32": (22, 1024, 64), "IF-I-XL 16x16": (33, 256, 64), "IF-I-XL 8x8": (44, 64, 64)}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32] if DEVICE == "cpu" else [torch.float16, torch.bfloat16]
#: Batch, guidance included; 8 on a GPU is four decoders at once.
BATCHES = [2] if DEVICE == "cpu" else [2, 8]


def joined(text: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    return torch.cat([text, pixels], 2)


def eager_maps(
    q: torch.Tensor, text_k: torch.Tensor, text_v: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    p = (q @ joined(text_k, k).transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
    return p @ joined(text_v, v), p[..., WORDS].float().mean(1)


def sdpa(q: torch.Tensor, text_k: torch.Tensor, text_v: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, joined(text_k, k), joined(text_v, v))


def forced(backend: str, *arguments: torch.Tensor, **options: object) -> object:
    with ops.use_backend(backend, "joint_attention"):
        return ops.joint_attention(*arguments, **options)


@pytest.mark.benchmark(group="joint_attention")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("shape", SHAPES)
@torch.inference_mode()
def test_forward(benchmark, environment, shape, batch, dtype):
    heads, pixels, dim = SHAPES[shape]
    torch.manual_seed(0)
    rows = (pixels, TEXT, TEXT, pixels, pixels)
    made = [torch.randn(batch, n, heads, dim, device=DEVICE, dtype=dtype).transpose(1, 2) for n in rows]
    torch._dynamo.reset()
    compiled = torch.compile(sdpa)
    providers = {
        "eager, maps": lambda: eager_maps(*made),
        "SDPA": lambda: sdpa(*made),
        "SDPA compiled": lambda: compiled(*made),
    }
    backend = "cpp" if DEVICE == "cpu" else "triton"
    providers[backend] = lambda: forced(backend, *made)
    providers[f"{backend}, maps"] = lambda: forced(backend, *made, map_tokens=WORDS)
    exact, exact_maps = eager_maps(*(x.double() for x in made))
    tolerance = 10 * torch.finfo(dtype).eps
    for name, call in providers.items():
        result = call()
        out, maps = result if isinstance(result, tuple) else (result, exact_maps)
        assert float((out - exact).abs().max()) <= tolerance, f"{name}: a wrong result must not be timed"
        assert float((maps - exact_maps).abs().max()) <= tolerance, f"{name}: a wrong result must not be timed"

    seconds: dict[str, list[float]] = {}
    benchmark.pedantic(lambda: seconds.update(measure(providers, rounds=21, device=DEVICE)), rounds=1, iterations=1)
    benchmark.extra_info.update(
        environment,
        case=f"{shape}: batch {batch}, (heads, pixels, head_dim) {SHAPES[shape]}, {TEXT} text keys, {len(WORDS)} maps",
        dtype=str(dtype).removeprefix("torch."),
        gate="largest error against float64 at most 10 units in the last place of 1",
        seconds=seconds,
        bytes=sum(x.numel() * x.element_size() for x in (made[0], *made)),
        flops=2 * 2 * made[0].numel() * (TEXT + pixels),
    )
    print(f"\n{shape}, batch {batch}, {dtype}")
    for name, values in seconds.items():
        low, middle, high = statistics.quantiles(values, n=4)
        print(f"  {name:15s} {middle * 1e3:8.3f} ms (quartiles {low * 1e3:.3f} to {high * 1e3:.3f})")
    for other in ("SDPA", "SDPA compiled"):
        assert ratio(seconds, other, backend)[1] >= 1.0, "a kernel that loses on a shape must not be chosen for it"
