"""edited_attention on SD 1.5's and the embedded model's shapes: explicit maps, and ours, against two plain attentions.

    pytest bench/ops/bench_edited_attention.py -W default --benchmark-enable \\
        --benchmark-json=bench/results/edited_attention.json -s

The bar is 1.2x two plain cross attentions by the same backend, which is what two rows of a batch take anyway.
Values are mixed once a prompt, as their keys are made once; "mixed anew" mixes them in every call.  "Replaced" has no
map of its own, as where words take the place of others.  The table of docs/operators.md comes from
this file (bench/editing_tables.py).
"""

from __future__ import annotations

import statistics

import pytest
import torch
from interleaved import measure
from registry import Bar, judge_bar

from difffast import ops
from difffast.ops.edited_attention import mix_values

TEXT = 77
#: name -> (heads, pixels, head_dim): SD 1.5's four levels, and the embedded model's three.
SHAPES = {
    "SD 1.5, 64x64": (8, 4096, 40),
    "SD 1.5, 32x32": (8, 1024, 80),
    "SD 1.5, 16x16": (8, 256, 160),
    "SD 1.5, 8x8": (8, 64, 160),
    "embedded, 16x16": (2, 256, 32),
    "embedded, 8x8": (4, 64, 32),
    "embedded, 4x4": (6, 16, 32),
}
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32] if DEVICE == "cpu" else [torch.float16, torch.bfloat16]
BACKEND = "cpp" if DEVICE == "cpu" else "triton"
Mixed = tuple[torch.Tensor, torch.Tensor | None]
#: Most of the time of two plain attentions.
BAR = 1.2


def explicit(
    source_q: torch.Tensor,
    source_k: torch.Tensor,
    v: torch.Tensor,
    mix: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    keep: torch.Tensor,
) -> torch.Tensor:
    factor = q.shape[-1] ** -0.5
    maps = (source_q @ source_k.transpose(-1, -2) * factor).softmax(-1) @ mix
    return (maps + (q @ k.transpose(-1, -2) * factor).softmax(-1) * keep) @ v


@pytest.mark.benchmark(group="edited_attention")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@torch.inference_mode()
def test_forward(benchmark, environment, shape, dtype):
    heads, pixels, dim = SHAPES[shape]
    torch.manual_seed(0)
    rows = {"source_q": pixels, "source_k": TEXT, "v": TEXT, "q": pixels, "k": TEXT}
    made = {n: torch.randn(1, r, heads, dim, device=DEVICE, dtype=dtype).transpose(1, 2) for n, r in rows.items()}
    made["mix"], made["keep"] = (torch.rand(*s, device=DEVICE, dtype=dtype) / TEXT for s in ((TEXT, TEXT), (TEXT,)))
    order = [made[name] for name in ("source_q", "source_k", "v", "mix", "q", "k", "keep")]

    def two_plain() -> tuple[torch.Tensor, torch.Tensor]:
        with ops.use_backend(BACKEND, "cross_attention"):
            first = ops.cross_attention(made["source_q"], made["source_k"], made["v"])
            return first, ops.cross_attention(made["q"], made["k"], made["v"])

    def edited(operands: list[torch.Tensor], mixed: Mixed | None = None) -> torch.Tensor:
        with ops.use_backend(BACKEND, "edited_attention"):
            return ops.edited_attention(*operands, mixed=mixed)

    own, alone = mix_values(made["v"], made["mix"], made["keep"]), mix_values(made["v"], made["mix"], None)

    exact = explicit(*(x.double() for x in order))
    providers = {
        "explicit maps": lambda: explicit(*order),
        BACKEND: lambda: edited(order, own),
        f"{BACKEND}, mixed anew": lambda: edited(order),
        f"{BACKEND}, replaced": lambda: edited(order[:4], alone),
        "two plain attentions": two_plain,
    }
    for name in ("explicit maps", BACKEND, f"{BACKEND}, mixed anew"):
        error = float((providers[name]() - exact).abs().max())
        assert error <= 10 * torch.finfo(dtype).eps, f"{name}: a wrong result must not be timed"
    seconds: dict[str, list[float]] = {}
    benchmark.pedantic(lambda: seconds.update(measure(providers, rounds=41, device=DEVICE)), rounds=1, iterations=1)
    bar = judge_bar(Bar(BACKEND, "two plain attentions", BAR, source="the suppression's issue"), seconds)
    benchmark.extra_info.update(
        environment,
        case=f"{shape}: (heads, pixels, head_dim) {SHAPES[shape]}, {TEXT} keys of either text",
        dtype=str(dtype).removeprefix("torch."),
        gate="largest error against float64 at most 10 units in the last place of 1",
        seconds=seconds,
        backend=BACKEND,
        bars=[bar],
    )
    print(f"\n{shape}, {dtype}")
    for name, values in seconds.items():
        low, middle, high = statistics.quantiles(values, n=4)
        print(f"  {name:24s} {middle * 1e3:8.3f} ms (quartiles {low * 1e3:.3f} to {high * 1e3:.3f})")
    print(f"  {bar['ratio']:.2f} of two plain attentions, {'met' if bar['met'] else 'MISSED'}: at most {BAR}")
