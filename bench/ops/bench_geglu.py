"""geglu on the shapes of UNets: PyTorch eager, the same compiled, and the C++ kernel, in one run.

    pytest bench/ops/bench_geglu.py -W default --benchmark-enable --benchmark-json=out/geglu.json -s

What is timed is the gate alone: the linear layer before it is the same for all.
"""

from __future__ import annotations

import statistics

import pytest
import torch
from interleaved import measure, ratio

from difffast import ops
from difffast.ops.geglu import reference

#: name -> (rows, columns of x); guidance included in the rows.
SHAPES = {
    "SD1.x 64x64": (8192, 2560),
    "SD1.x 32x32": (2048, 5120),
    "SD1.x 16x16": (512, 10240),
    "SD1.x 8x8": (128, 10240),
    "embedded 16x16": (512, 512),
    "embedded 8x8": (128, 1024),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}

#: Largest relative error, of norms; bfloat16 has 8 bits.
_GATES = {torch.float32: 1e-6, torch.bfloat16: 5e-3}


def forced(x: torch.Tensor) -> torch.Tensor:
    with ops.use_backend("cpp", "geglu"):
        return ops.geglu(x)


@pytest.mark.benchmark(group="geglu")
@pytest.mark.skipif(ops.missing("cpp") is not None, reason=str(ops.missing("cpp")))
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@torch.inference_mode()
def test_forward(benchmark, environment, shape, dtype):
    rows, columns = SHAPES[shape]
    torch.manual_seed(0)
    x = torch.randn(2, rows // 2, columns).to(DTYPES[dtype])
    torch._dynamo.reset()
    compiled = torch.compile(reference, dynamic=False)
    providers = {"eager": lambda: reference(x), "compiled": lambda: compiled(x), "cpp": lambda: forced(x)}
    exact = reference(x.double())
    for name, call in providers.items():
        error = float((call() - exact).norm() / exact.norm())
        assert error <= _GATES[x.dtype], f"{name}: a wrong result must not be timed"

    seconds: dict[str, list[float]] = {}
    benchmark.pedantic(lambda: seconds.update(measure(providers, rounds=21, device="cpu")), rounds=1, iterations=1)
    benchmark.extra_info.update(
        environment,
        case=f"{shape}: (rows, columns) {SHAPES[shape]}",
        dtype=dtype,
        gate=f"error against float64, of norms, at most {_GATES[x.dtype]}",
        seconds=seconds,
        bytes=x.element_size() * rows * columns * 3 // 2,
    )
    print(f"\n{shape}, {dtype}")
    for name, values in seconds.items():
        low, middle, high = statistics.quantiles(values, n=4)
        print(f"  {name:10s} {middle * 1e3:8.3f} ms (quartiles {low * 1e3:.3f} to {high * 1e3:.3f})")
    assert ratio(seconds, "eager", "cpp")[1] >= 1.0, "what loses on a shape must not be chosen for it"
