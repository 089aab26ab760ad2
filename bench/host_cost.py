"""Measure what a GPU user's UNet call costs the host, without a GPU: launches, and milliseconds of Python.

``python bench/host_cost.py sd15`` runs a UNet with that one's layers, but 32 channels and a few pixels, so that next to
nothing is computed: stock, ``exact`` eagerly, one decoded step, and replays of recorded graphs with all that is looked
at before them and copied around them.  ``--check`` exits with 1 where ``exact`` or the decoded step costs more than
:data:`MOST` times stock's time, or makes more launches, or where a replay copies more bytes than the latents, the time
and the text have.
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
from difffast.unet.outer_layers import run_recording, run_reuse
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


class CountCopies(TorchDispatchMode):
    """Counts the bytes that are copied from one tensor to another."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function._schema.name in ("aten::copy_", "aten::clone", "aten::_foreach_copy_"):
            self.bytes += args[0].nbytes
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

    def record(self, function: Callable[[], Any], alone: bool = False) -> tuple[Any, Callable[[], None]]:
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

    def execute(function: Callable[..., Any], *arguments: Any) -> Any:
        engine.refuse(model)
        return engine.run(reader.read(ProgramCall(model, call, True, kv)), _ignore, function, *arguments)

    # What a pipeline holds: the features of the latest key step, until the next one's are there.
    held = {"features": features, "deep": None}

    def replay_encoder() -> None:
        held["features"] = split.encode(model, call, share=True, execute=execute)

    def replay_decoder() -> object:
        return split.decode(model, held["features"], call, call["timestep"][None], execute=execute)

    def replay_recording() -> object:
        out, held["deep"] = execute(run_recording, model, call, 2)
        return out

    weights = torch.ones(1)
    return {
        "stock": stock,
        "exact, eager": exact,
        "decoded step, eager": decode,
        "replayed graph": lambda: execute(run_whole, model, call),
        "replayed encoder": replay_encoder,
        "replayed decoder": replay_decoder,
        "replayed key step": replay_recording,
        "replayed reuse": lambda: execute(run_reuse, model, call, [held["deep"]], weights, 2),
    }


def count_copies(calls: dict[str, Callable[[], object]]) -> dict[str, int]:
    """Return the bytes that each replay copies, once everything has been recorded."""
    replays = {name: call for name, call in calls.items() if name.startswith("replayed")}
    for _ in range(8):  # every function is recorded at two places
        for call in replays.values():
            call()
    found = {}
    for name, call in replays.items():
        with CountCopies() as counted:
            call()
        found[name] = counted.bytes
    return found


def count_own_bytes(model: nn.Module) -> int:
    """Return how many bytes the latents, the time and the text of a call have, and SDXL's conditions."""
    call = make_call(model)
    more = call.pop("added_cond_kwargs", {})
    return sum(each.nbytes for each in (*call.values(), *more.values()))


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
        model = make_narrow(options.unet)
        calls = cases(model)
        copied = count_copies(calls)
        launches = {name: count_launches(call) for name, call in calls.items()}
        seconds = measure(calls)
    for name, taken in seconds.items():
        ratio = taken / seconds["stock"]
        print(f"{name:<22}{launches[name]:6} launches{taken * 1e3:9.2f} ms{ratio:8.2f} of stock")
    own = count_own_bytes(model)
    for name, count in copied.items():
        print(f"{name:<22}{count:10} bytes copied; latents, time and text have {own}")
    fails = [
        name
        for name in ("exact, eager", "decoded step, eager")
        if seconds[name] > MOST * seconds["stock"] or launches[name] > launches["stock"]
    ]
    fails += [name for name, count in copied.items() if count > own]
    return int(options.check and bool(fails))


if __name__ == "__main__":
    sys.exit(main())
