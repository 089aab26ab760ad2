"""convolution on the shapes of Stable Diffusion and smaller UNets: PyTorch's, oneDNN's with packed weights, and ours.

    pytest bench/ops/bench_convolution.py -W default --benchmark-enable \\
        --benchmark-json=bench/results/convolution.json -s

Each provider goes through as many layers as make 400 MB of weights, as a UNet does: weights come from memory, not from
a cache.  "Packed" is what Inductor's freezing calls; its results stay in channels_last, where ours are contiguous.  The
table of docs/operators.md comes from this file (bench/engine_tables.py).
"""

from __future__ import annotations

import importlib
import statistics
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from interleaved import in_turn, measure, ratio
from torch import Tensor, nn

from difffast import ops
from difffast.layers.convolution import choose_way

module = importlib.import_module("difffast.ops.convolution")

#: name -> (rows, input channels, output channels, side of the image); guidance included in the rows.
SHAPES = {
    "SD 1.5, 64x64": (2, 320, 320, 64),
    "SD 1.5, 64x64, decoder": (2, 640, 320, 64),
    "SD 1.5, 32x32": (2, 640, 640, 32),
    "SD 1.5, 16x16": (2, 1280, 1280, 16),
    "SDXL, 32x32": (2, 1280, 1280, 32),
    "UNet (128, 256, ...), 32x32": (2, 128, 128, 32),
    "UNet (128, 256, ...), 16x16": (2, 256, 256, 16),
    "UNet (128, 256, ...), 8x8": (2, 512, 512, 8),
    "embedded, 16x16": (2, 64, 64, 16),
    "embedded, 8x8": (2, 128, 128, 8),
    "VAE decoder, 128x128": (1, 512, 256, 128),
    "VAE decoder, 256x256": (1, 256, 256, 256),
    "VAE decoder, 512x512": (1, 128, 128, 512),
}
#: Bytes of the weights that a provider goes through.
_WEIGHTS = 4e8
#: Largest error, of the largest number.
_GATE = 1e-5


def packed(x: Tensor, weight: Tensor, bias: Tensor) -> Callable[[], Tensor]:
    geometry = [1, 1], [1, 1], [1, 1], 1
    laid_out = torch._C._nn.mkldnn_reorder_conv2d_weight(weight.to_mkldnn(), *geometry, list(x.shape))
    return lambda: torch.ops.mkldnn._convolution_pointwise(x, laid_out, bias, *geometry, "none", [], "")


@pytest.mark.benchmark(group="convolution")
@pytest.mark.skipif(ops.missing("cpp") is not None, reason="the C++ kernels are not built")
@pytest.mark.parametrize("shape", SHAPES)
@torch.inference_mode()
def test_forward(benchmark, environment, shape):
    rows, channels, made, side = SHAPES[shape]
    torch.manual_seed(0)
    x, bias = torch.randn(rows, channels, side, side), torch.randn(made)
    layers = max(1, min(64, round(_WEIGHTS / (36 * channels * made))))
    weights = [torch.randn(made, channels, 3, 3) / (3 * channels**0.5) for _ in range(layers)]
    layer = nn.Conv2d(channels, made, 3, padding=1)
    tile = choose_way(layer, x)
    ready = [module.convolution_weights(weight, tile) for weight in weights]
    providers = {
        "PyTorch": in_turn([lambda w=w: F.conv2d(x, w, bias, padding=1) for w in weights]),
        "packed": in_turn([packed(x, w, bias) for w in weights]),
        "cpp": in_turn([lambda w=w: ops.convolution(x, w, bias) for w in ready]),
    }
    exact = F.conv2d(x.double(), weights[0].double(), bias.double(), padding=1)
    for name, provide in providers.items():
        error = float((provide() - exact).abs().max() / exact.abs().max())
        assert error <= _GATE, f"{name}: a wrong result must not be timed ({error})"
        for _ in range(layers - 1):
            provide()
    seconds: dict[str, list[float]] = {}
    benchmark.pedantic(lambda: seconds.update(measure(providers, rounds=15)), rounds=1, iterations=1)
    benchmark.extra_info.update(
        environment,
        case=f"{shape}: {rows} x {channels} to {made} channels, {side} x {side} pixels",
        dtype="float32",
        gate=f"largest error against float64 at most {_GATE} of the largest number",
        seconds=seconds,
        tile=tile,
        faster={name: ratio(seconds, name, "cpp")[1] for name in ("PyTorch", "packed")},
    )
    print(f"\n{shape}, tile {tile}, {layers} layers")
    for name, values in seconds.items():
        low, middle, high = statistics.quantiles(values, n=4)
        print(f"  {name:10s} {middle * 1e3:8.3f} ms (quartiles {low * 1e3:.3f} to {high * 1e3:.3f})")
    print(f"  {benchmark.extra_info['faster']}")
