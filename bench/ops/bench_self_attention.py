"""self_attention on the shapes of UNets: SDPA, SDPA compiled and our C++ kernel, in one run.

    pytest bench/ops/bench_self_attention.py -W default --benchmark-enable --benchmark-json=out/ops.json -s

On a GPU PyTorch's attention is what runs, and there is nothing to compare.
"""

from __future__ import annotations

import statistics

import pytest
import torch
import torch.nn.functional as F
from interleaved import measure, ratio

from difffast import ops
from difffast.ops.self_attention import choose

#: name -> (batch, heads, queries, head_dim); guidance included in the batch.
SHAPES = {
    "SD1.x 64x64": (2, 8, 4096, 40),
    "SD1.x 32x32": (2, 8, 1024, 80),
    "SD1.x 16x16": (2, 8, 256, 160),
    "SD1.x 8x8": (2, 8, 64, 160),
    "SDXL 64x64": (2, 10, 4096, 64),
    "SDXL 32x32": (2, 20, 1024, 64),
    "16 frames, 32x32": (2048, 8, 16, 40),
    "embedded 32x32": (2, 8, 1024, 8),
    "embedded 16x16": (2, 8, 256, 16),
    "embedded 32x32, half": (1, 8, 1024, 8),
}


def forced(backend: str, *arguments: torch.Tensor) -> torch.Tensor:
    with ops.use_backend(backend, "self_attention"):
        return ops.self_attention(*arguments)


@pytest.mark.benchmark(group="self_attention")
@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU PyTorch's attention is what runs")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@torch.inference_mode()
def test_forward(benchmark, environment, shape, dtype):
    batch, heads, queries, dim = SHAPES[shape]
    torch.manual_seed(0)
    # As Diffusers' layers make them: views of [batch, rows, heads * dim].
    made = [torch.randn(batch, queries, heads, dim).to(dtype).transpose(1, 2) for _ in range(3)]
    torch._dynamo.reset()
    compiled = torch.compile(F.scaled_dot_product_attention)
    providers = {
        "SDPA": lambda: F.scaled_dot_product_attention(*made),
        "SDPA compiled": lambda: compiled(*made),
        "cpp": lambda: forced("cpp", *made),
    }
    some = [x[:1, :1].double() for x in made]
    exact = (some[0] @ some[1].transpose(-1, -2) * dim**-0.5).softmax(-1) @ some[2]
    for name, call in providers.items():
        error = float((call()[:1, :1] - exact).abs().max())
        assert error <= 10 * torch.finfo(dtype).eps, f"{name}: a wrong result must not be timed"

    seconds: dict[str, list[float]] = {}
    benchmark.pedantic(lambda: seconds.update(measure(providers, rounds=11, device="cpu")), rounds=1, iterations=1)
    benchmark.extra_info.update(
        environment,
        case=f"{shape}: (batch, heads, queries, head_dim) {SHAPES[shape]}",
        dtype=str(dtype).removeprefix("torch."),
        instruction_set=ops.INSTRUCTION_SET,
        gate="largest error of the first head against float64 at most 10 units in the last place of 1",
        seconds=seconds,
        bytes=4 * made[0].numel() * made[0].element_size(),
        flops=2 * 2 * made[0].numel() * queries,
    )
    print(f"\n{shape}, {dtype}")
    for name, values in seconds.items():
        low, middle, high = statistics.quantiles(values, n=4)
        print(f"  {name:15s} {middle * 1e3:8.3f} ms (quartiles {low * 1e3:.3f} to {high * 1e3:.3f})")
    if choose(made[0], made[0].shape, made[0].stride()) != "cpp":
        return
    for other in ("SDPA", "SDPA compiled"):
        assert ratio(seconds, other, "cpp")[1] >= 1.0, "a kernel that loses on a shape must not be chosen for it"
