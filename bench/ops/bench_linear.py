"""linear on the shapes of UNets: F.linear, the same compiled, and through oneDNN, in one run.

    pytest bench/ops/bench_linear.py -W default --benchmark-enable --benchmark-json=out/ops.json -s

On a GPU F.linear is what runs, and there is nothing to compare; nor is there on processors where both are as fast.
"""

from __future__ import annotations

import importlib
import statistics

import pytest
import torch
import torch.nn.functional as F
from interleaved import measure, ratio

from difffast import ops

module = importlib.import_module("difffast.ops.linear")

#: name -> (rows, columns of x, rows of the weights); guidance included in the rows.
SHAPES = {
    "SD1.x 64x64, ff in": (8192, 320, 2560),
    "SD1.x 64x64, ff out": (8192, 1280, 320),
    "SD1.x 64x64, to_q": (8192, 320, 320),
    "SD1.x 32x32, ff in": (2048, 640, 5120),
    "SD1.x 16x16, ff in": (512, 1280, 10240),
    "SD1.x 16x16, to_q": (512, 1280, 1280),
    "SD1.x 8x8, ff out": (128, 5120, 1280),
    "SD1.x text": (154, 768, 1280),
    "embedded 32x32, ff in": (2048, 64, 512),
    "embedded 32x32, to_q": (2048, 64, 64),
    "embedded 16x16, ff out": (512, 512, 128),
    "embedded 32x32, ff in, half": (1024, 64, 512),
}

#: Largest relative error: sums of thousands of products, rounded.
_GATE = 1e-6


def forced(*operands: torch.Tensor) -> torch.Tensor:
    with ops.use_backend("onednn", "linear"):
        return ops.linear(*operands)


@pytest.mark.benchmark(group="linear")
@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU F.linear is what runs")
@pytest.mark.skipif(module.backend_of_large(torch.ones(1)) == "reference", reason="F.linear is as fast here")
@pytest.mark.parametrize("shape", SHAPES)
@torch.inference_mode()
def test_forward(benchmark, environment, shape):
    rows, columns, made = SHAPES[shape]
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, rows // 2, columns), torch.randn(made, columns) * columns**-0.5, torch.randn(made)
    torch._dynamo.reset()
    compiled = torch.compile(F.linear, dynamic=False)
    providers = {
        "eager": lambda: F.linear(x, weight, bias),
        "compiled": lambda: compiled(x, weight, bias),
        "onednn": lambda: forced(x, weight, bias),
    }
    exact = F.linear(x[:, :8].double(), weight.double(), bias.double())
    for name, call in providers.items():
        error = float((call()[:, :8] - exact).norm() / exact.norm())
        assert error <= _GATE, f"{name}: a wrong result must not be timed"

    seconds: dict[str, list[float]] = {}
    benchmark.pedantic(lambda: seconds.update(measure(providers, rounds=21, device="cpu")), rounds=1, iterations=1)
    benchmark.extra_info.update(
        environment,
        case=f"{shape}: (rows, K, O) {SHAPES[shape]}",
        dtype="float32",
        gate=f"error of some rows against float64, of norms, at most {_GATE}",
        seconds=seconds,
        bytes=4 * (x.numel() + weight.numel() + rows * made),
        flops=2 * rows * columns * made,
    )
    print(f"\n{shape}")
    for name, values in seconds.items():
        low, middle, high = statistics.quantiles(values, n=4)
        print(f"  {name:10s} {middle * 1e3:8.3f} ms (quartiles {low * 1e3:.3f} to {high * 1e3:.3f})")
    if module.choose(x, weight, bias) == "onednn":
        for other in ("eager", "compiled"):
            assert ratio(seconds, other, "onednn")[1] >= 1.0, "what loses on a shape must not be chosen for it"
