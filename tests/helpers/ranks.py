"""Several processes on one machine, with one thread each, that speak gloo; as torchrun starts them.

They are forked from a server that has imported everything once, and take a fraction of a second to start.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import time
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import wait
from typing import Any

#: What the server imports once; it finds installed packages alone, not these helpers.
PRELOAD = [
    "diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion",
    "diffusers.models.autoencoders.autoencoder_kl",
    "torch.distributed.device_mesh",
    "difffast.distributed.launch",
    "difffast.tools.cli",
]


class Killed:
    """What a process has left that has ended without a result."""


class Failed(str):
    """An exception of a process, as text."""


def run(count: int, function: Callable[..., Any], *arguments: Any, timeout_s: float = 300.0) -> list[Any]:
    """Return what ``function(*arguments)`` returns in each of ``count`` processes, or ``Killed``.

    The function has to be at the top of a module that can be imported.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pipes, processes = [], []
    for rank in range(count):
        ours, theirs = context.Pipe(duplex=False)
        process = context.Process(target=_work, args=(theirs, rank, count, port, function, arguments), daemon=True)
        process.start()
        theirs.close()
        pipes.append(ours)
        processes.append(process)
    results: dict[Any, Any] = {}
    end = time.monotonic() + timeout_s
    try:
        while len(results) < count:
            ready = wait([each for each in pipes if each not in results], timeout=end - time.monotonic())
            assert ready, f"only {len(results)} of {count} processes ended within {timeout_s} s"
            for each in ready:
                try:
                    results[each] = each.recv()
                except EOFError:
                    results[each] = Killed()
    finally:
        for process in processes:
            process.join(5 if len(results) == count else 0)
            process.kill()
    failed = [str(each) for each in results.values() if isinstance(each, Failed)]
    assert not failed, failed[0]
    return [results[each] for each in pipes]


def _work(pipe: Any, rank: int, count: int, port: int, function: Callable[..., Any], arguments: Any) -> None:
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("error")
    for name, value in (("RANK", rank), ("LOCAL_RANK", rank), ("WORLD_SIZE", count), ("MASTER_PORT", port)):
        os.environ[name] = str(value)
    os.environ["MASTER_ADDR"] = "127.0.0.1"
    try:
        result = function(*arguments)
    except BaseException as error:
        result = Failed(f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
    pipe.send(result)
    pipe.close()
