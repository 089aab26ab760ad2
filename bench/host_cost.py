"""Measure what a GPU user's UNet call costs the host, without a GPU: launches, and milliseconds of Python.

``python bench/host_cost.py sd15`` runs a UNet with that one's layers, but 32 channels and a few pixels, so that next to
nothing is computed: stock, ``exact`` eagerly, one decoded step, and the replay of a recorded graph with all that is
looked at before it.  ``--check`` exits with 1 where ``exact`` or the decoded step costs more than :data:`MOST` times
stock's time, or makes more launches.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from difffast.engines import graphs
from difffast.engines.inputs import InputReader
from difffast.layers.context import CallContext, Text, use_context
from difffast.layers.kind import ProgramCall
from difffast.layers.registry import LAYERS
from difffast.layers.text_kv import TextKV
from difffast.models.configs import UNET_CONFIGS
from difffast.unet import split
from difffast.unet.parts import run_whole

#: Most that a call may cost, as a multiple of stock's.
MOST = 1.1
ROUNDS = 9


class CountLaunches(TorchDispatchMode):
    """Counts operators that start a kernel on a GPU: all but views and those that only allocate."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        views = any(each.alias_info is not None and not each.alias_info.is_write for each in function._schema.returns)
        name = function._schema.name
        if not views and not name.startswith(("aten::empty", "aten::new_empty", "aten::detach", "aten::lift")):
            self.count += 1
        return function(*args, **(kwargs or {}))


class NoRecorder:
    """Replays nothing: what is left is what comes before a replay."""

    def refuse(self, device: torch.device) -> None:
        return None

    def on(self, device: torch.device) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def place(self) -> str:
        return "nowhere"

    def warm_up(self, function: Callable[[], Any]) -> Any:
        return function()

    def record(self, function: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
        return function(), lambda: None


def make_narrow(name: str) -> nn.Module:
    """Return a UNet with the layers of a published one, 32 channels wide."""
    from diffusers import UNet2DConditionModel

    config = dict(UNET_CONFIGS[name])
    levels = len(config["block_out_channels"])
    config |= {"block_out_channels": (32,) * levels, "cross_attention_dim": 32, "attention_head_dim": 8}
    return UNet2DConditionModel(**config).eval().requires_grad_(False)


def make_call(model: nn.Module) -> dict[str, Any]:
    """Return the arguments of a guided call: 2x2 pixels at the deepest level."""
    config = model.config
    size = 2 ** len(config.block_out_channels)
    call: dict[str, Any] = {
        "sample": torch.randn(2, config.in_channels, size, size),
        "timestep": torch.tensor(1.0),
        "encoder_hidden_states": torch.randn(2, 77, config.cross_attention_dim),
    }
    if config.addition_embed_type == "text_time":
        call["added_cond_kwargs"] = {"text_embeds": torch.randn(2, 1280), "time_ids": torch.randn(2, 6)}
    return call


def cases(model: nn.Module) -> dict[str, Callable[[], object]]:
    """Return calls of a UNet, whose layers are patched here."""
    call = make_call(model)
    stock = functools.partial(model, **call, return_dict=False)
    for kind in LAYERS:
        kind.put_in(model)
    kv = TextKV(call["encoder_hidden_states"], Counter())
    text = Text(call["encoder_hidden_states"], kv.text, kv)
    context = CallContext(True, _ignore, _ignore, text, (), tuple(call["sample"].shape[-2:]))
    reader, engine = InputReader(model), graphs.Graphs(NoRecorder())

    def exact() -> object:
        with use_context(context):
            return run_whole(model, call)

    features = split.encode(model, call)

    def decode() -> object:
        with use_context(context):
            return split.decode(model, features, call, call["timestep"][None])

    def replay() -> object:
        engine.refuse(model)
        inputs = reader.read(ProgramCall(model, call, True, kv))
        return engine.run(inputs, _ignore, run_whole, model, call)

    return {"stock": stock, "exact, eager": exact, "decoded step, eager": decode, "replayed graph": replay}


def count_launches(call: Callable[[], object]) -> int:
    """Return how many kernels a call would start."""
    for _ in range(2):  # what is made once, and recorded at the second call
        call()
    with CountLaunches() as counted:
        call()
    return counted.count


def measure(calls: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Return the seconds of CPU time of each call, the median of rounds in turn."""
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(ROUNDS + 2):
        for name, call in calls.items():
            start = time.thread_time()
            call()
            if turn > 1:
                seconds[name].append(time.thread_time() - start)
    return {name: statistics.median(found) for name, found in seconds.items()}


def _ignore(_reason: str) -> None:
    """Nobody reads the report."""


def main() -> int:
    """Print a line for each call."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("unet", choices=("sd15", "sd21", "sdxl"))
    parser.add_argument("--check", action="store_true", help="exit with 1 where a bar is missed")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with torch.no_grad():
        calls = cases(make_narrow(options.unet))
        launches = {name: count_launches(call) for name, call in calls.items()}
        seconds = measure(calls)
    for name, taken in seconds.items():
        ratio = taken / seconds["stock"]
        print(f"{name:<22}{launches[name]:6} launches{taken * 1e3:9.2f} ms{ratio:8.2f} of stock")
    fails = [
        name
        for name in ("exact, eager", "decoded step, eager")
        if seconds[name] > MOST * seconds["stock"] or launches[name] > launches["stock"]
    ]
    return int(options.check and bool(fails))


if __name__ == "__main__":
    sys.exit(main())
