"""attention_entropy, forward and backward: eager PyTorch, torch.compile of it, and the C++ kernel, in turn in one run.

``make bench`` prints the table and writes JSON; the correctness gate comes first.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from difffast import ops
from difffast.ops.attention_entropy import reference

#: Calls of one measurement, measurements.
CALLS, ROUNDS, THREADS = 20, 101, 2
#: Relative error of the gradient (of norms) against float64.
GRADIENT_TOLERANCE = 1e-4
#: (batch, pixels, columns), words, anchors: SDXL and Stable Diffusion 1.x with guidance.
CASES = [((1, 1024, 77), 12, (2, 7)), ((2, 256, 77), 12, (2, 7))]

Loss = Callable[[Tensor], Tensor]


def gradient(loss: Loss, maps: Tensor) -> Tensor:
    return torch.autograd.grad(loss(maps).sum(), maps)[0]


def seconds(loss: Loss, maps: Tensor) -> float:
    """Of one forward and backward pass, mean over :data:`CALLS`."""
    start = time.perf_counter()
    for _ in range(CALLS):
        gradient(loss, maps)
    return (time.perf_counter() - start) / CALLS


def providers(words: int, anchors: tuple[int, ...]) -> dict[str, Loss]:
    def eager(maps: Tensor) -> Tensor:
        return reference(maps, anchors, words)

    return {
        "eager": eager,
        "compiled": torch.compile(eager),
        "cpp": lambda maps: ops.attention_entropy(maps, anchors, words),
    }


@pytest.fixture
def _threads() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(THREADS)
    yield
    torch.set_num_threads(before)


@pytest.mark.skipif(ops.missing("cpp") is not None, reason=str(ops.missing("cpp")))
@pytest.mark.benchmark(group="attention_entropy")
@pytest.mark.usefixtures("_threads")
@pytest.mark.parametrize(("shape", "words", "anchors"), CASES, ids=str)
def test_attention_entropy(benchmark, environment, shape, words, anchors):
    torch._dynamo.reset()
    torch.manual_seed(0)
    maps = (2 * torch.randn(shape)).softmax(-1).requires_grad_()
    exact = gradient(lambda x: reference(x, anchors, words), maps.detach().double().requires_grad_())
    with ops.use_backend("cpp", "attention_entropy"):
        everyone = providers(words, anchors)
        gaps = {name: float((gradient(loss, maps) - exact).norm() / exact.norm()) for name, loss in everyone.items()}
        assert max(gaps.values()) <= GRADIENT_TOLERANCE, f"a wrong result must not be timed: {gaps}"

        *others, (ours, our_loss) = everyone.items()
        measured: dict[str, list[float]] = {name: [] for name in everyone}
        for loss in everyone.values():
            seconds(loss, maps)

        def measure_others() -> None:
            for name, loss in others:
                measured[name].append(seconds(loss, maps))

        def measure_ours() -> None:
            measured[ours].append(seconds(our_loss, maps))

        benchmark.pedantic(measure_ours, setup=measure_others, rounds=ROUNDS, iterations=1)

    ratios = {name: [a / b for a, b in zip(s, measured["eager"], strict=True)] for name, s in measured.items()}
    benchmark.extra_info.update(
        {**environment, "threads": THREADS},
        case=f"{list(shape)}, {words} words, {len(anchors)} subjects",
        dtype="float32",
        instruction_set=ops.INSTRUCTION_SET,
        gate={name: f"gradient against float64: {gap:.1e}" for name, gap in gaps.items()},
        seconds=measured,
        against_eager=ratios,
    )
    print()
    for name, values in ratios.items():
        low, middle, high = statistics.quantiles(values, n=4)
        fast, median, slow = (1e6 * x for x in statistics.quantiles(measured[name], n=4))
        print(
            f"{name:21s} {median:7.1f} us (quartiles {fast:.1f} to {slow:.1f})  "
            f"{middle:.3f} of eager (quartiles {low:.3f} to {high:.3f})"
        )
    assert statistics.median(measured[ours]) <= min(statistics.median(measured[name]) for name, _ in others)
