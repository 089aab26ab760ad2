"""Convolutions of many weights and few pixels: PyTorch's, oneDNN's with packed weights, and as products of patches.

    pytest bench/ops/bench_patch_products.py -W default --benchmark-enable \\
        --benchmark-json=bench/results/patch_products.json -s

Each provider goes through as many layers as make 400 MB of weights, as a UNet does.  The table of docs/operators.md
comes from this file (bench/engine_tables.py).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import pytest
import torch
from interleaved import in_turn, measure, ratio
from torch import Tensor, nn

from difffast.layers.convolution import Way, choose_way
from difffast.layers.products import has_few_results, has_many_weights, multiply_patches

#: name -> (rows, input channels, output channels, side of the image, stride); guidance included in the rows.
SHAPES = {
    "SD 1.5 at 512 pixels, 8x8": (2, 1280, 1280, 8, 1),
    "SD 1.5 at 512 pixels, 8x8, decoder": (2, 2560, 1280, 8, 1),
    "SD 1.5 at 512 pixels, 16x16 to 8x8": (2, 1280, 1280, 16, 2),
    "SD 1.5 at 512 pixels, 8x8, without guidance": (1, 1280, 1280, 8, 1),
    "SD 1.5 at 256 pixels, 4x4": (2, 1280, 1280, 4, 1),
    "SD 1.5 at 256 pixels, 4x4, decoder": (2, 2560, 1280, 4, 1),
    "UNet (128, 256, ...), 4x4, decoder": (2, 1024, 512, 4, 1),
}
#: Bytes of the weights that a provider goes through.
_WEIGHTS = 4e8
#: Largest error, of the largest number.
_GATE = 1e-5


def packed(x: Tensor, layer: nn.Conv2d) -> Callable[[], Tensor]:
    geometry = list(layer.padding), list(layer.stride), [1, 1], 1
    laid_out = torch._C._nn.mkldnn_reorder_conv2d_weight(layer.weight.to_mkldnn(), *geometry, list(x.shape))
    return lambda: torch.ops.mkldnn._convolution_pointwise(x, laid_out, layer.bias, *geometry, "none", [], "")


@pytest.mark.benchmark(group="patch products")
@pytest.mark.parametrize("shape", SHAPES)
@torch.inference_mode()
def test_forward(benchmark, environment, shape):
    rows, channels, made, side, stride = SHAPES[shape]
    torch.manual_seed(0)
    x = torch.randn(rows, channels, side, side)
    count = max(1, round(_WEIGHTS / (36 * channels * made)))
    layers = [nn.Conv2d(channels, made, 3, stride=stride, padding=1) for _ in range(count)]
    assert has_many_weights(layers[0])
    assert has_few_results(layers[0], x.shape)
    assert choose_way(layers[0], x) in (Way.STOCK, Way.PATCHES), "tiles of few products would be taken"
    providers = {
        "PyTorch": in_turn([lambda layer=layer: layer(x) for layer in layers]),
        "packed": in_turn([packed(x, layer) for layer in layers]),
        "patches": in_turn([lambda layer=layer: multiply_patches(layer, x) for layer in layers]),
    }
    exact = torch.nn.functional.conv2d(
        x.double(), layers[0].weight.double(), layers[0].bias.double(), stride=stride, padding=1
    )
    for name, provide in providers.items():
        error = float((provide() - exact).abs().max() / exact.abs().max())
        assert error <= _GATE, f"{name}: a wrong result must not be timed ({error})"
        for _ in range(count - 1):
            provide()
    seconds: dict[str, list[float]] = {}
    benchmark.pedantic(lambda: seconds.update(measure(providers, rounds=15)), rounds=1, iterations=1)
    benchmark.extra_info.update(
        environment,
        case=f"{shape}: {rows} x {channels} to {made} channels",
        dtype="float32",
        gate=f"largest error against float64 at most {_GATE} of the largest number",
        seconds=seconds,
    )
    print(f"\n{shape}, {count} layers")
    for name, values in seconds.items():
        low, middle, high = statistics.quantiles(values, n=4)
        print(f"  {name:10s} {middle * 1e3:8.3f} ms (quartiles {low * 1e3:.3f} to {high * 1e3:.3f})")
    assert ratio(seconds, "PyTorch", "patches")[1] >= 1.0, "what loses on a shape must not be chosen for it"
