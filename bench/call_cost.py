"""Measure what calls cost besides their arithmetic: of operators, and of compiled programs.

``python bench/call_cost.py`` prints microseconds for each operator, on operands of a few numbers.  ``python
bench/call_cost.py --programs sd15`` prints the milliseconds of each part of that UNet as a compiled program beside
``torch.compile(unet)``: on the meta device, with a backend that computes nothing, so that guards, arguments and inputs
are what is left.  ``--check`` exits with 1 where a program costs more than :data:`MOST` times ``torch.compile(unet)``.

Both are medians over rounds in which everybody takes a turn, on one thread.  What counts is the CPU time of that
thread, which other processes disturb less than the clock.
"""

from __future__ import annotations

import argparse
import functools
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from difffast import ops
from difffast.engines import programs
from difffast.engines.inputs import InputReader
from difffast.layers.kind import ProgramCall
from difffast.layers.text_kv import TextKV
from difffast.models.configs import unet
from difffast.unet import split
from difffast.unet.outer_layers import run_recording, run_reuse
from difffast.unet.parts import run_whole

#: Rounds, and calls of one operator in a round.
ROUNDS, CALLS, PROGRAM_CALLS = 25, 300, 20

#: Most that a program's call may cost, as a multiple of ``torch.compile(unet)``'s.
MOST = 1.2


def cases() -> dict[str, Callable[[], object]]:
    """One call of every operator, as the layers make it."""
    q, text = torch.randn(2, 2, 4, 8), torch.randn(2, 2, 3, 8)
    x, more, ones = torch.randn(2, 8, 2, 2), torch.randn(1, 8, 2, 2), torch.ones(16)
    rows, weight, temb = torch.randn(2, 4, 8), torch.randn(8, 8), torch.randn(2, 8)
    maps, mix = torch.rand(1, 4, 6), torch.eye(3)
    weights = ops.convolution_weights(torch.randn(8, 8, 3, 3), 2)
    return {
        "attention_entropy": lambda: ops.attention_entropy(maps, [1], 3),
        "convolution": lambda: ops.convolution(x, weights),
        "cross_attention": lambda: ops.cross_attention(q, text, text),
        "cross_attention, maps": lambda: ops.cross_attention(q, text, text, map_tokens=[1]),
        "edited_attention": lambda: ops.edited_attention(q, text, text, mix),
        "geglu": lambda: ops.geglu(rows),
        "group_norm_silu": lambda: ops.group_norm_silu(x, 2, ones[:8], ones[:8], addend=temb),
        "joint_attention": lambda: ops.joint_attention(q, text, text, q, q),
        "linear": lambda: ops.linear(rows, weight),
        "repeat_batch": lambda: ops.repeat_batch(more, 2),
        "self_attention": lambda: ops.self_attention(q, q, q),
        "skip_norm_silu": lambda: ops.skip_norm_silu(x, more, 2, ones, ones),
        "default_backend": lambda: ops.default_backend("self_attention", q.device, q.dtype),
    }


def compute_nothing(graph: torch.fx.GraphModule, _inputs: object) -> Callable[..., list[Any]]:
    """A backend of torch.compile whose programs return the same empty tensors at every call."""
    (returned,) = next(node for node in graph.graph.nodes if node.op == "output").args
    values = [node.meta["example_value"] if isinstance(node, torch.fx.Node) else node for node in returned]
    made = [
        torch.empty(v.shape, dtype=v.dtype, device="meta")
        if isinstance(v, Tensor)
        else v  # those of the trace are fake
        for v in values
    ]
    return lambda *_: made


def meta_call(model: nn.Module) -> dict[str, Any]:
    """The arguments of a guided call of a UNet on the meta device; sizes do not matter."""
    half = {"device": "meta", "dtype": torch.float16}
    call: dict[str, Any] = {
        "sample": torch.empty(2, model.config.in_channels, 16, 16, **half),
        "timestep": torch.tensor(1.0, device="meta"),
        "encoder_hidden_states": torch.empty(2, 77, model.config.cross_attention_dim, **half),
    }
    if model.config.addition_embed_type == "text_time":
        call["added_cond_kwargs"] = {
            "text_embeds": torch.empty(2, 1280, **half),
            "time_ids": torch.empty(2, 6, **half),
        }
    return call


def program_cases(name: str) -> dict[str, Callable[[], object]]:
    """``torch.compile(unet)``, and the parts of that UNet as programs with all that a step does to call them."""
    programs.BACKEND = compute_nothing
    model = unet(name, device="meta").eval().requires_grad_(False).half()
    call = meta_call(model)
    whole = torch.compile(model, fullgraph=True, dynamic=False, backend=compute_nothing)
    kv, reader, kept = TextKV(call["encoder_hidden_states"], Counter()), InputReader(model), programs.Programs()

    def refuse(reason: str) -> None:
        raise RuntimeError(reason)

    def execute(function: Callable[..., Any], *arguments: Any) -> Any:
        return kept.run(reader.read(ProgramCall(model, call, True, kv)), refuse, function, *arguments)

    features = split.encode(model, call, share=True, execute=execute)
    _, deep = execute(run_recording, model, call, 2)
    times, weights = torch.empty(4, device="meta"), torch.empty(1, device="meta")
    return {
        "torch.compile(unet)": functools.partial(whole, **call, return_dict=False),
        "whole UNet": lambda: execute(run_whole, model, call),
        "encoder": lambda: split.encode(model, call, share=True, execute=execute),
        "decoder of 4 steps": lambda: split.decode(model, features, call, times, execute=execute),
        "whole UNet, recording": lambda: execute(run_recording, model, call, 2),
        "outer layers": lambda: execute(run_reuse, model, call, [deep], weights, 2),
    }


def measure(calls: dict[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Return the seconds of each call."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        call()  # what is made at a first call
    for _ in range(ROUNDS):
        for name, call in calls.items():
            start = time.thread_time()
            for _ in range(repeats):
                call()
            seconds[name].append((time.thread_time() - start) / repeats)
    return {name: statistics.median(found) for name, found in seconds.items()}


def main() -> int:
    """Print a line for each call; with ``--check``, return 1 where the bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--programs", metavar="UNET", help="a UNet of difffast.models.configs, such as sd15 or sdxl")
    parser.add_argument("--check", action="store_true", help="exit with 1 where a program misses its bar")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with torch.no_grad():
        if options.programs is None:
            for name, seconds in measure(cases(), CALLS).items():
                print(f"{name:<24}{seconds * 1e6:8.1f} us")
            return 0
        found = measure(program_cases(options.programs), PROGRAM_CALLS)
    stock = found["torch.compile(unet)"]
    for name, seconds in found.items():
        print(f"{name:<24}{seconds * 1e3:8.3f} ms{seconds / stock:8.2f} x")
    return int(options.check and max(found.values()) > MOST * stock)


if __name__ == "__main__":
    sys.exit(main())
