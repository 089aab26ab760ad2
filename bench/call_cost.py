"""Measure what one call of each operator costs besides its arithmetic: microseconds on operands of a few numbers.

``python bench/call_cost.py`` prints the median over rounds in which all operators take turns, on one thread.  What
counts is the CPU time of that thread, which other processes disturb less than the clock.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch

from difffast import ops

#: Rounds, and calls of one operator in a round.
ROUNDS, CALLS = 25, 300


def cases() -> dict[str, Callable[[], object]]:
    """One call of every operator, as the layers make it."""
    q, text = torch.randn(2, 2, 4, 8), torch.randn(2, 2, 3, 8)
    x, more, ones = torch.randn(2, 8, 2, 2), torch.randn(1, 8, 2, 2), torch.ones(16)
    rows, weight, temb = torch.randn(2, 4, 8), torch.randn(8, 8), torch.randn(2, 8)
    maps = torch.rand(1, 4, 6)
    return {
        "attention_entropy": lambda: ops.attention_entropy(maps, [1], 3),
        "cross_attention": lambda: ops.cross_attention(q, text, text),
        "cross_attention, maps": lambda: ops.cross_attention(q, text, text, map_tokens=[1]),
        "group_norm_silu": lambda: ops.group_norm_silu(x, 2, ones[:8], ones[:8], addend=temb),
        "joint_attention": lambda: ops.joint_attention(q, text, text, q, q),
        "linear": lambda: ops.linear(rows, weight),
        "repeat_batch": lambda: ops.repeat_batch(more, 2),
        "self_attention": lambda: ops.self_attention(q, q, q),
        "skip_norm_silu": lambda: ops.skip_norm_silu(x, more, 2, ones, ones),
        "default_backend": lambda: ops.default_backend("self_attention", q.device, q.dtype),
    }


def main() -> None:
    """Print a line for each operator."""
    torch.set_num_threads(1)
    seconds: dict[str, list[float]] = {name: [] for name in cases()}
    with torch.no_grad():
        calls = cases()
        for _ in range(ROUNDS):
            for name, call in calls.items():
                start = time.thread_time()
                for _ in range(CALLS):
                    call()
                seconds[name].append((time.thread_time() - start) / CALLS)
    for name, found in seconds.items():
        print(f"{name:<24}{statistics.median(found) * 1e6:8.1f} us")


if __name__ == "__main__":
    main()
