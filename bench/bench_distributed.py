"""Seconds a picture of two processes with one thread each, against one process with one thread; and what a model says.

    python bench/bench_distributed.py --out bench/results/distributed.json

The ways run in turn, in the same two processes: for one process, the other one waits.  The model knows the times of one
process, what each way divides, and how long an exchange takes; docs/distributed.md has it in words.  Needs two idle
cores.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import socket
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

import difffast
from difffast.distributed.exchange import gather
from difffast.distributed.launch import join_processes
from difffast.files import write_whole
from difffast.tools.demo import device_name

PROMPT = "a red triangle above a dotted purple circle"
#: Gaps of up to 5 steps: the windows of decoded steps.
WINDOWS = difffast.EncoderPropagation(key_steps=5, prior_noise=None)


@dataclass(frozen=True)
class Link:
    """What an exchange costs: seconds a call, and bytes a second."""

    latency_s: float
    bandwidth: float

    def cost(self, calls: int, received: int) -> float:
        """Return the seconds of some exchanges together."""
        return calls * self.latency_s + received / self.bandwidth


def predict_speedup(image_s: float, divided_s: float, share: float, exchange_s: float = 0.0) -> float:
    """Return how much faster a picture is made by several processes.

    Args:
        image_s: seconds a picture of one process.
        divided_s: those of them that are divided among the processes.
        share: seconds that the part of the slowest process takes, over those of the whole: at best 1 over their number.
        exchange_s: seconds of all exchanges of a picture.
    """
    return image_s / (image_s - divided_s + share * divided_s + exchange_s)


class _Timed:
    """A pipeline whose UNet calls are timed."""

    def __init__(self, pipe: Any, steps: int) -> None:
        self._pipe, self._steps = pipe, steps

    def draw(self, seed: int = 0, pictures: int = 1) -> float:
        """Return the seconds of some pictures."""
        start = time.perf_counter()
        for number in range(pictures):
            generator = torch.Generator().manual_seed(seed + number)
            self._pipe(PROMPT, num_inference_steps=self._steps, generator=generator)
        return time.perf_counter() - start


def measure_link(group: Any, shape: tuple[int, ...]) -> Link:
    """Return what an exchange of two processes costs, from small tensors and from those of a picture's steps."""

    def median(tensor: torch.Tensor) -> float:
        times = []
        for _ in range(50):
            dist.barrier(group)
            start = time.perf_counter()
            gather(tensor, group, "a measurement")
            times.append(time.perf_counter() - start)
        return statistics.median(times)

    small, large = torch.zeros(1), torch.zeros(64, *shape)
    latency = median(small)
    size = large.numel() * large.element_size()
    return Link(latency, size / max(median(large) - latency, 1e-9))


def _measure_shares(pipe: Any, steps: int) -> dict[str, float]:
    """Return seconds of a UNet call with both halves and with one, and of decoding several steps and one part."""
    times: dict[str, list[float]] = {"both": [], "half": []}
    text = torch.zeros(2, 77, pipe.unet.config.cross_attention_dim)
    size = pipe.unet.config.sample_size
    sample = torch.randn(2, 4, size, size)
    with torch.no_grad(), difffast.patched(pipe, "exact"):
        pipe.scheduler.set_timesteps(steps)
        for _ in range(5):
            for name, rows in (("both", 2), ("half", 1)):
                start = time.perf_counter()
                for moment in pipe.scheduler.timesteps[:2]:
                    pipe.unet(sample[:rows], moment, text[:rows])
                times[name].append((time.perf_counter() - start) / 2)
    return {name: statistics.median(values) for name, values in times.items()}


def _work(rank: int, port: int, steps: int, rounds: int, found: Any) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    with join_processes("cpu", 600.0):
        meshes = {name: init_device_mesh("cpu", (2,), mesh_dim_names=(name,)) for name in ("dp", "cfg", "dec")}
        pipe = difffast.models.embedded_pipeline()
        pipe.set_progress_bar_config(disable=True)
        timed = _Timed(pipe, steps)
        size = pipe.unet.config.sample_size
        link = measure_link(meshes["cfg"].get_group("cfg"), (4, size, size))
        shares = _measure_shares(pipe, steps) if rank == 0 else {}
        dist.barrier()

        def alone(**options: Any) -> float:
            seconds = 0.0
            if rank == 0:
                with difffast.patched(pipe, **options):
                    seconds = timed.draw()
            dist.barrier()
            return seconds

        exchanged: dict[str, dict[str, int]] = {}

        def together(name: str, **options: Any) -> float:
            with difffast.patched(pipe, mesh=meshes[name], **options) as report:
                dist.barrier()
                seconds = timed.draw(0 if name != "dp" else rank)
                dist.barrier()
                exchanged[name] = dict(report.last_run.exchanged)
            return seconds / 2 if name == "dp" else seconds

        ways: dict[str, Callable[[], float]] = {
            "one": lambda: alone(preset="exact"),
            "cfg": lambda: together("cfg", preset="exact"),
            "dp": lambda: together("dp", preset="exact"),
            "one, decoding ahead": lambda: alone(propagation=WINDOWS),
            "dec": lambda: together("dec", propagation=WINDOWS),
        }
        times: dict[str, list[float]] = {name: [] for name in ways}
        for number in range(rounds + 1):
            for name, way in ways.items():
                seconds = way()
                if number:  # the first round warms up
                    times[name].append(seconds)
    if rank == 0:
        found.send((times, exchanged, asdict(link), shares))


def summarise(
    times: dict[str, list[float]],
    exchanged: dict[str, dict[str, int]],
    link: Link,
    shares: dict[str, float],
    steps: int,
) -> list[dict[str, Any]]:
    """Return a row for each way: seconds, measured and predicted speed-up, calls and bytes a picture."""
    medians = {name: statistics.median(values) for name, values in times.items()}
    half = shares["half"] / shares["both"]
    rows = []
    for name, base in (("cfg", "one"), ("dp", "one"), ("dec", "one, decoding ahead")):
        counts = exchanged[name]
        cost = link.cost(counts.get("calls", 0), counts.get("bytes", 0))
        predicted = None
        if name == "cfg":
            predicted = predict_speedup(medians["one"], steps * shares["both"], half, cost)
        elif name == "dp":
            predicted = predict_speedup(medians["one"], medians["one"], 0.5)
        ratios = [b / t for b, t in zip(times[base], times[name], strict=True)]
        rows.append(
            {
                "way": name,
                "one_s": medians[base],
                "two_s": medians[name],
                "speedup": statistics.median(ratios),
                "predicted": predicted,
                "calls": counts.get("calls", 0),
                "bytes": counts.get("bytes", 0),
                "exchange_s": cost,
            }
        )
    return rows


def main() -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    processes = [
        context.Process(target=_work, args=(rank, port, arguments.steps, arguments.rounds, theirs)) for rank in range(2)
    ]
    for process in processes:
        process.start()
    theirs.close()
    times, exchanged, link, shares = ours.recv()
    for process in processes:
        process.join()
    rows = summarise(times, exchanged, Link(**link), shares, arguments.steps)
    record = {
        "model": "the embedded model",
        "steps": arguments.steps,
        "device": device_name(),
        "threads": 1,
        "load": os.getloadavg()[1],
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "link": link,
        "unet_call_s": shares,
        "times": times,
        "rows": rows,
    }
    with write_whole(arguments.out) as part:
        part.write_text(json.dumps(record, indent=2) + "\n")
    for row in rows:
        said = "" if row["predicted"] is None else f", predicted {row['predicted']:.2f}x"
        print(
            f"{row['way']}: {row['one_s']:.3f} -> {row['two_s']:.3f} s a picture, {row['speedup']:.2f}x{said}; "
            f"{row['calls'] / arguments.steps:.2f} calls and {row['bytes'] / arguments.steps:.0f} bytes a step"
        )


if __name__ == "__main__":
    main()
