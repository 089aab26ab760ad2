"""The process that proves: it runs one key after another, as :mod:`.parent` asks, and announces each step.

It has a device context of its own.  A candidate may crash it, or never return; the parent then knows which one it was.
Requests and answers are lines of JSON on what were stdin and stdout; whatever kernels print goes to stderr.
"""

from __future__ import annotations

import concurrent.futures
import ctypes
import json
import os
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

import torch

from .. import ops
from ..ops._dispatch import CannotRunError
from ..ops._keys import Key
from . import timing
from .candidates import Candidate, find_candidates, find_default
from .checks import Expected, RefutedError, check, expect
from .parts import shorten
from .problems import Problem, make_problem, repeat, vary

#: What has to be won to be chosen, by kind of device: a part of the time, and microseconds.
GAIN = {"cuda": (0.05, 1.0), "cpu": (0.03, 0.0)}
#: How the reason begins that an operator gives for operands it cannot take.
OBSTACLE = "it does not serve these operands: "
#: Exit status of a child whose device context is broken.
BROKEN = 3


class Prover:
    """Proves keys on one device.

    Args:
        device: where.
        extras: more candidates (:func:`.candidates.find_candidates`).
        out: where events are written.
    """

    def __init__(self, device: torch.device, extras: Sequence[str], out: TextIO) -> None:
        self.device, self.extras, self._out = device, extras, out
        self._clock = timing.Clock(device)
        self._timed: dict[tuple[Key, str, tuple[str, ...]], tuple[dict[str, timing.Times], dict[str, str]]] = {}
        self._known: dict[tuple[Key, str, int], dict[str, float | str]] = {}

    def say(self, **event: Any) -> None:
        """Tell the parent."""
        self._out.write(json.dumps(event) + "\n")
        self._out.flush()

    def compile(self, keys: Sequence[Key], seconds: float) -> None:
        """Run every Triton kernel of these keys once, in parallel threads: nearly all of that is compiling.

        Args:
            seconds: after which no more are begun.
        """

        def run(key: Key) -> None:
            torch.cuda.set_device(self.device)
            triton = [each for each in find_candidates(key, self.device) if each.name == "triton"]
            for candidate in triton:
                for each in (key, vary(key, 1)):
                    if each is not None:
                        problem = make_problem(each, "normal", self.device)
                        candidate.call(each, *problem.tensors)

        start = time.monotonic()
        with ops.use_backend("triton"), concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            waiting = [pool.submit(run, key) for key in keys]
            concurrent.futures.wait(waiting, timeout=seconds)
            pool.shutdown(cancel_futures=True)
        torch.cuda.synchronize()
        ended = [each for each in waiting if not each.cancelled()]
        errors = [each.exception() for each in ended]
        failed = [describe(each) for each in errors if each is not None and not isinstance(each, CannotRunError)]
        self.say(compiled=len(ended), failed=failed, seconds=round(time.monotonic() - start, 2))

    def prove(self, key: Key, refused: dict[str, str], modes: Sequence[str]) -> None:
        """Prove a key, and say its entries by mode.

        Args:
            refused: candidates that have crashed on this key already, with the reason.
        """
        default = find_default(key)
        candidates = find_candidates(key, self.device, self.extras)
        plain = next(each for each in candidates if each.name == default)
        right: dict[str, float] = {}
        refused = dict(refused)
        for each in candidates:
            if each.name not in refused:
                right[each.name] = 0.0
        problem = self._check_all(key, candidates, plain, right, refused)
        if self.device.type == "cpu":
            short = shorten(key, timing.MOST_ON_CPU)
            problem = problem if short == key else make_problem(short, "normal", self.device)
        sets = [problem, *(problem.copy() for _ in range(timing.count_sets(problem) - 1))]
        gain, least = GAIN[self.device.type]
        entries = {}
        for mode in modes:
            times, lost = self._time_once(key, [each for each in candidates if each.name in right], sets, mode)
            ours = [each.name for each in candidates if each.ours and each.name in times]
            entries[mode] = {
                "choice": timing.pick(times, ours, default, gain, least) if default in times else default,
                "default": default,
                "microseconds": {name: [round(x, 3) for x in each.quartiles] for name, each in times.items()},
                "host": {name: round(each.host, 3) for name, each in times.items() if each.host},
                "error": {name: round(worst, 3) for name, worst in right.items()},
                "refused": {**refused, **lost},
                "date": time.strftime("%Y-%m-%d"),
            }
        self.say(done=key.text(), entries=entries)

    def check_whole(self, what: Mapping[str, Any], entries: Mapping[str, Mapping[str, Any]]) -> None:
        """Check what was chosen for eager calls in a whole UNet (:mod:`.whole`), and say what came of it."""
        # It brings in Diffusers, of which the proofs of keys need nothing.
        from .whole import check_whole

        try:
            self.say(whole=check_whole(what, entries, self.device))
        except Exception as error:  # of the UNet, or for want of memory
            self.say(whole={"error": describe(error)}, broken=self.is_broken())

    def _check_all(
        self,
        key: Key,
        candidates: Sequence[Candidate],
        plain: Candidate,
        right: dict[str, float],
        refused: dict[str, str],
    ) -> Problem:
        """Check all candidates in ``right`` on every problem of a key; those that are not right go to ``refused``.

        Returns:
            The problem of the key itself.
        """
        small = vary(key, 0)
        cases = [(key, "normal"), (small, "uncentred"), (repeat(small), "spike")]
        cases += [(vary(key, i), "normal") for i in (-1, 1)]
        gradients = [False] * len(cases)
        if key.option("gradient"):
            cases, gradients = [*cases, (small, "normal")], [*gradients, True]
        own = make_problem(key, "normal", self.device)
        for number, ((each, data), differentiate) in enumerate(zip(cases, gradients, strict=True)):
            if each is None:
                continue
            # Keys with other numbers of samples have the same small problems.
            known = self._known.setdefault((each, data, number), {}) if number else {}
            waiting = [c for c in candidates if c.name in right and c is not plain and c.name not in known]
            if waiting:
                self.say(at=plain.name, what="the definition")
                problem = own if not number else make_problem(each, data, self.device, number)
                expected = expect(problem, plain, differentiate)
            for candidate in waiting:  # PyTorch's own way is what the others are measured by
                self.say(at=candidate.name, what=f"{data} data, shapes {each.text().split(' ')[2]}")
                known[candidate.name] = self._check(candidate, problem, expected, differentiate)
            for name in [name for name in right if name in known]:
                verdict = known[name]
                if not isinstance(verdict, str):
                    right[name] = max(right[name], verdict)
                elif not (number and verdict.startswith(OBSTACLE)):  # for which dispatch asks as well
                    refused[name] = f"{verdict} ({data} data, shapes {each.text().split(' ')[2]})"
                    del right[name]
        return own

    def _check(self, candidate: Candidate, problem: Problem, expected: Expected, differentiate: bool) -> float | str:
        """Check one candidate; return its error (:func:`.checks.check`), or why it is refused."""
        try:
            return check(candidate, problem, expected, differentiate)
        except CannotRunError as error:
            return f"{OBSTACLE}{str(error).rpartition('cannot run: ')[2]}"
        except Exception as error:
            self._refuse_broken(candidate, error)
            return describe(error)

    def _time_once(
        self, key: Key, candidates: Sequence[Candidate], sets: Sequence[Problem], mode: str
    ) -> tuple[dict[str, timing.Times], dict[str, str]]:
        """Do what :meth:`_time` does; keys of which the same samples are timed share the answer."""
        what = sets[0].key, mode, tuple(each.name for each in candidates)
        if what not in self._timed:
            self._timed[what] = self._time(key, candidates, sets, mode)
        return self._timed[what]

    def _time(
        self, key: Key, candidates: Sequence[Candidate], sets: Sequence[Problem], mode: str
    ) -> tuple[dict[str, timing.Times], dict[str, str]]:
        """Time candidates; return the times, and who has failed, with the reason."""
        lost: dict[str, str] = {}
        now = ""

        def say(name: str) -> None:
            nonlocal now
            now = name
            self.say(at=name, what=f"timing, {mode}")

        while True:
            left = [each for each in candidates if each.name not in lost]
            try:
                if mode == "graph" and self.device.type == "cuda":
                    for each in left:
                        say(each.name)
                        check_graph(each, sets[0])
                return self._clock.time(left, sets, mode, say), lost
            except Exception as error:
                failed = next(each for each in left if each.name == now)
                self._refuse_broken(failed, error)
                lost[now] = f"{describe(error)} ({mode})"
                if now == find_default(key):
                    return {}, lost

    def _refuse_broken(self, candidate: Candidate, error: Exception) -> None:
        """End the process if a candidate has broken its device context; the parent starts another one."""
        if self.is_broken():
            self.say(at=candidate.name, what="", broken=describe(error))
            os._exit(BROKEN)

    def end_if_broken(self) -> None:
        """End the process if its device context is broken."""
        if self.is_broken():
            os._exit(BROKEN)

    def is_broken(self) -> bool:
        """Return whether the device computes no more, as after an illegal address."""
        try:
            if self.device.type == "cuda":
                torch.cuda.synchronize()
                torch.ones(8, device=self.device).sum().item()
        except Exception:
            return True
        return False


def check_graph(candidate: Candidate, problem: Problem) -> None:
    """Check that a captured candidate computes from its operands as they are at each replay.

    Raises:
        RefutedError: it does not.
    """
    with torch.no_grad():
        graph, outputs = timing.capture(candidate, [problem])
        for scale in (1.0, 0.5):
            problem.tensors[0].mul_(scale)
            graph.replay()
            torch.cuda.synchronize()
            with candidate.around():
                again = candidate.call(problem.key, *problem.tensors)
            same = all(torch.equal(a, b) for a, b in zip(outputs, again, strict=True))
            if candidate.ours and not same:
                raise RefutedError("a captured graph gave other bits than a call")
        problem.tensors[0].mul_(2)


def describe(error: Exception) -> str:
    """Return an error as one line."""
    text = str(error).strip().partition("\n")[0]
    return text if isinstance(error, RefutedError) else f"{type(error).__name__}: {text[:300]}"


def main() -> None:
    """Serve the parent until it closes the pipe."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, 9)  # be killed with the parent, also inside a kernel that never returns
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    warnings.simplefilter("ignore")
    start = json.loads(sys.stdin.readline())
    device = torch.device(start["device"])
    torch.set_num_threads(start["threads"])
    torch.set_float32_matmul_precision(start["precision"])
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.ones(8, device=device).sum().item()
    prover = Prover(device, start["extras"], out)
    prover.say(ready=True)
    for line in sys.stdin:
        request = json.loads(line)
        if "compile" in request:
            prover.compile([Key.parse(text) for text in request["compile"]], request["seconds"])
        elif "whole" in request:
            prover.check_whole(request["whole"], request["entries"])
        else:
            try:
                prover.prove(Key.parse(request["key"]), request["refused"], request["modes"])
            except Exception as error:  # of the definition or of PyTorch's own way: nothing can be said of this key
                prover.say(done=request["key"], entries={}, error=describe(error))
                prover.end_if_broken()
    out.close()
