"""Seconds a picture of two processes with one thread each, against one process with one thread; and what a model says.

    python bench/bench_distributed.py --out bench/results/distributed.json
    python bench/bench_distributed.py --out bench/results/distributed.json --steps 50 --ways cfg

Runs of other steps, or of other sizes, stay in the file.
All ways in turn, in the same two processes: where one works alone, the other one waits.  Needs two idle cores, which
"load" tells; how busy the processes' own processors were is measured besides, and depends little on others.  The model
knows the time of one process, the part of it that a way divides, the slowest process's share of that part, and what an
exchange costs: docs/distributed.md has it in words.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import socket
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
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
from difffast.unet import split

PROMPT = "a red triangle above a dotted purple circle"
#: Gaps of up to 5 steps: the windows of decoded steps.
WINDOWS = difffast.EncoderPropagation(key_steps=5, prior_noise=None)

#: Way of two processes -> the way of one that it is compared with.
BASES = {
    "cfg": "one",
    "dp": "one",
    "dec": "one, decoding ahead",
    "dec, one encodes": "one, decoding ahead",
}
#: The UNet alone, on the whole batch and on one of guidance's halves.
CALLS = ("a call", "half a call")
#: How far pictures may be from those of one process, in 0 .. 1.
TOLERANCE = 1e-4
#: Speed-ups that are promised, by way.
BARS = {"cfg": 1.7, "dp": 1.9}


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


@contextlib.contextmanager
def _time_calls(owner: Any, name: str) -> Iterator[list[float]]:
    """Note the processor's seconds of every call of a function in the block."""
    plain, own, seconds = getattr(owner, name), vars(owner).get(name), []

    def call(*args: Any, **kwargs: Any) -> Any:
        start = time.process_time()
        try:
            return plain(*args, **kwargs)
        finally:
            seconds.append(time.process_time() - start)

    setattr(owner, name, call)
    try:
        yield seconds
    finally:
        if own is None:  # it is the class's
            delattr(owner, name)
        else:
            setattr(owner, name, own)


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


class _Ways:
    """The ways to make a picture, by one process or by both; both of them go through all ways.

    Args:
        pipe: the pipeline.
        steps: of a picture.
        pixels: its height and width.
        names: of the ways of two processes.
    """

    def __init__(self, pipe: Any, steps: int, pixels: int, names: Sequence[str]) -> None:
        self._pipe, self._steps, self._pixels, self._rank = pipe, steps, pixels, dist.get_rank()
        self._size = pixels // pipe.vae_scale_factor
        self._meshes = {name: init_device_mesh("cpu", (2,), mesh_dim_names=(name,)) for name in ("dp", "cfg", "dec")}
        self._pictures: dict[str, Any] = {}
        #: What this process has seen, by way: seconds by the clock and of its processor in every round, those of the
        #: processor in the decoder, and for texts and pixels; and what a picture has exchanged.
        self.seen: dict[str, dict[str, Any]] = {}
        ahead = {"propagation": WINDOWS}
        ways: dict[str, Callable[[], None]] = {
            "a call": partial(self._call, "a call", 2, alone=True),
            "half a call": partial(self._call, "half a call", 1, alone=False),
            "one": partial(self._alone, "one", preset="exact"),
            "cfg": partial(self._together, "cfg", "cfg", preset="exact"),
            "dp": partial(self._together, "dp", "dp", preset="exact"),
            "one, decoding ahead": partial(self._alone, "one, decoding ahead", **ahead),
            "dec": partial(self._together, "dec", "dec", encoder="every process", **ahead),
            "dec, one encodes": partial(self._together, "dec, one encodes", "dec", encoder="one process", **ahead),
        }
        wanted = {*names, *(BASES[name] for name in names), *(CALLS if "cfg" in names else ())}
        self.all = {name: way for name, way in ways.items() if name in wanted}

    def measure_link(self) -> Link:
        """Return what exchanges cost."""
        return measure_link(self._meshes["cfg"].get_group("cfg"), (4, self._size, self._size))

    def find_errors(self) -> dict[str, float]:
        """Return how far the pictures of two processes are from those of one, in 0 .. 1."""
        shared = [name for name in BASES if name in self._pictures]
        ours = {name: self._pictures[name] for name in shared if name != "dp" or self._rank == 0}
        return {name: float(abs(image - self._pictures[BASES[name]]).max()) for name, image in ours.items()}

    @contextlib.contextmanager
    def _note(self, name: str) -> Iterator[None]:
        dist.barrier()
        start, used = time.perf_counter(), time.process_time()
        with contextlib.ExitStack() as stack:
            decoding = stack.enter_context(_time_calls(split, "decode"))
            rest = [
                stack.enter_context(_time_calls(*each))
                for each in ((self._pipe, "encode_prompt"), (self._pipe.vae, "decode"))
            ]
            yield
        used = time.process_time() - used
        dist.barrier()
        seen = self.seen.setdefault(
            name, {"seconds": [], "cpu": [], "decoding": [], "rest": [], "calls": 0, "bytes": 0}
        )
        seen["seconds"].append(time.perf_counter() - start)
        seen["cpu"].append(used)
        seen["decoding"].append(sum(decoding))
        seen["rest"].append(sum(map(sum, rest)))

    def _draw(self, name: str, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        size = {"height": self._pixels, "width": self._pixels}
        done = self._pipe(PROMPT, num_inference_steps=self._steps, generator=generator, output_type="np", **size)
        self._pictures[name] = done.images

    def _call(self, name: str, rows: int, *, alone: bool) -> None:
        """Call the UNet as often as a picture does, on both of guidance's halves or on one of them."""
        text = torch.zeros(rows, 77, self._pipe.unet.config.cross_attention_dim)
        sample = torch.zeros(rows, 4, self._size, self._size)
        with torch.no_grad(), difffast.patched(self._pipe, "exact"), self._note(name):
            self._pipe.scheduler.set_timesteps(self._steps)
            for moment in () if alone and self._rank else self._pipe.scheduler.timesteps:
                self._pipe.unet(sample, moment, text)

    def _alone(self, name: str, **options: Any) -> None:
        with difffast.patched(self._pipe, **options), self._note(name):
            if self._rank == 0:
                self._draw(name)
        everybody: list[Any] = [self._pictures.get(name)]
        dist.broadcast_object_list(everybody)
        self._pictures[name] = everybody[0]

    def _together(self, name: str, dimension: str, **options: Any) -> None:
        with difffast.patched(self._pipe, mesh=self._meshes[dimension], **options) as report:
            with self._note(name):
                self._draw(name, self._rank if dimension == "dp" else 0)
            self.seen[name].update(report.last_run.exchanged)


def _work(rank: int, port: int, steps: int, pixels: int, rounds: int, names: Sequence[str], found: Any) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )
    torch.set_num_threads(1)
    with join_processes("cpu", 600.0):
        pipe = difffast.models.embedded_pipeline()
        pipe.set_progress_bar_config(disable=True)
        ways = _Ways(pipe, steps, pixels, names)
        link = ways.measure_link()
        for number in range(rounds + 1):
            for way in ways.all.values():
                way()
            if number == 0:  # it warms up
                errors = ways.find_errors()
                wrong = {name: error for name, error in errors.items() if not error < TOLERANCE}
                if wrong:
                    raise ValueError(f"pictures must be those of one process, within {TOLERANCE}, got {wrong}")
                ways.seen.clear()
        everybody: list[Any] = [None, None]
        dist.all_gather_object(everybody, ways.seen)
    if rank == 0:
        found.send({"link": asdict(link), "errors": errors, "processes": everybody})


def summarise(found: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a row for each way of two processes.

    Args:
        found: the "link"; and of each of the "processes" what it has seen, by way: "seconds" by the clock and "cpu"
            seconds of its processor in every round, of which "decoding" in decoders, and "rest" for texts and pixels;
            "calls" and "bytes" of a picture.

    Returns:
        of each way: seconds of one process and of two, the median speed-up over the rounds; what it would be if every
        process had a processor of its own and exchanges took no time ("cpu_speedup"); what the model says ("predicted")
        from the part of the time that is "divided" and the slowest process's "share" of it; "calls", "bytes".
    """
    first, _ = processes = found["processes"]

    def busiest(name: str, what: str = "cpu") -> float:
        return max(statistics.median(each[name][what]) for each in processes)

    rows = []
    for name, base in BASES.items():
        if name not in first:
            continue
        pictures = 2 if name == "dp" else 1
        calls, received = (max(each[name][key] for each in processes) for key in ("calls", "bytes"))
        cost, whole = Link(**found["link"]).cost(calls, received), busiest(base)
        if name == "cfg":
            divided = whole - busiest(base, "rest")
            part = divided * busiest("half a call") / busiest("a call")
        elif name == "dp":
            divided, part = whole, whole / 2
        else:
            divided, part = busiest(base, "decoding"), busiest(name, "decoding")
        pairs = zip(first[base]["seconds"], first[name]["seconds"], strict=True)
        rows.append(
            {
                "way": name,
                "against": base,
                "one_s": statistics.median(first[base]["seconds"]),
                "two_s": statistics.median(first[name]["seconds"]) / pictures,
                "speedup": statistics.median(pictures * one / two for one, two in pairs),
                "cpu_speedup": pictures * whole / busiest(name),
                "predicted": predict_speedup(whole, divided, part / divided, cost),
                "divided": divided / whole,
                "share": part / divided,
                "calls": calls,
                "bytes": received,
                "exchange_s": cost,
                "bar": BARS.get(name),
            }
        )
    return rows


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what two processes have seen, and its summary."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    load = os.getloadavg()[0]
    ours, theirs = context.Pipe(duplex=False)
    asked = (arguments.steps, arguments.pixels, arguments.rounds, arguments.ways)
    processes = [context.Process(target=_work, args=(rank, port, *asked, theirs)) for rank in range(2)]
    for process in processes:
        process.start()
    theirs.close()
    found = ours.recv()
    for process in processes:
        process.join()
    given = {name: getattr(arguments, name) for name in ("steps", "pixels", "rounds")}
    return {**given, "load": load, "rows": summarise(found), **found}


def add_run(record: Mapping[str, Any], run: Mapping[str, Any]) -> dict[str, Any]:
    """Return a record with a run in place of those of its steps and size."""
    place = (run["pixels"], run["steps"])
    others = [each for each in record.get("runs", ()) if (each["pixels"], each["steps"]) != place]
    runs = sorted([*others, run], key=lambda each: (each["pixels"], each["steps"]))
    return {
        "model": "the embedded model",
        "device": device_name(),
        "threads": 1,
        "versions": {"torch": torch.__version__, "python": platform.python_version()},
        "runs": runs,
    }


def main() -> None:
    """Measure, print, and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--pixels", type=int, default=128, help="of a side of the pictures")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--ways", nargs="+", choices=list(BASES), default=list(BASES))
    arguments = parser.parse_args()
    run = measure(arguments)
    record = json.loads(arguments.out.read_text()) if arguments.out.is_file() else {}
    with write_whole(arguments.out) as part:
        part.write_text(json.dumps(add_run(record, run), indent=2) + "\n")
    for row in run["rows"]:
        bar = "" if row["bar"] is None else f" (promised: {row['bar']}x)"
        print(
            f"{row['way']}: {row['one_s']:.3f} -> {row['two_s']:.3f} s a picture, {row['speedup']:.2f}x{bar}, "
            f"by the processors' seconds {row['cpu_speedup']:.2f}x, predicted {row['predicted']:.2f}x; "
            f"{row['calls'] / arguments.steps:.2f} calls and {row['bytes'] / arguments.steps:.0f} bytes a step"
        )


if __name__ == "__main__":
    main()
