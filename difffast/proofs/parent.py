"""The process that lets prove: it starts children, watches the time of each step, and knows who was at work at the end.

A candidate during whose step a child dies or takes too long is refuted.  A new child proves the rest.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from ..ops._keys import Key
from .candidates import find_default
from .whole import refuse

#: Most seconds of one step of a candidate; of starting a child, which imports PyTorch; of the last kernels' compiling.
STEP, START, COMPILE = 10.0, 120.0, 30.0
#: The part of the time in which all kernels are compiled at once.
COMPILING = 0.4
#: Most seconds of a step of PyTorch's own way.
PLAIN = 60.0
#: Seconds by which the last key may exceed the time.
GRACE = 10.0


class Planted(NamedTuple):
    """What tests add to a proof.

    Attributes:
        extras: more candidates (:func:`.candidates.find_candidates`).
        step: most seconds that a candidate may take for one step.
    """

    extras: Sequence[str] = ()
    step: float = STEP


class NoChildError(Exception):
    """No child can be started; the message is the reason."""


@dataclass
class Outcome:
    """What came of proving keys.

    Attributes:
        left: keys that the time did not suffice for, or that nothing could be said of.
        notes: what went wrong.
        children: how many processes were started.
        whole: what came of :func:`.whole.check_whole`; nothing if it was not called.
    """

    left: list[Key] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    children: int = 0
    whole: dict[str, Any] = field(default_factory=dict)


class Child:
    """One child process, which begins to start.

    Args:
        device: where it proves.
        extras: more candidates (:func:`.candidates.find_candidates`).

    Raises:
        NoChildError: it cannot be started.
    """

    def __init__(self, device: torch.device, extras: Sequence[str]) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the child
        environment = {name: value for name, value in os.environ.items() if name != "DIFFFAST_BACKEND"}
        environment |= {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path), "DIFFFAST_PROVE": "0"}
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", "from difffast.proofs.child import main; main()"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                text=True,
                encoding="utf-8",
                env=environment,
            )
        except (OSError, ValueError, TypeError, RuntimeError) as error:
            self._errors.close()
            raise NoChildError(f"no process can be started to prove kernels in ({error})") from None
        self._events: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()
        facts = {"threads": torch.get_num_threads(), "precision": torch.get_float32_matmul_precision()}
        self.ask({"device": str(device), "extras": list(extras), **facts})

    def wait(self) -> None:
        """Wait until it is ready.

        Raises:
            NoChildError: it does not start.
        """
        event = self.hear(START)
        if event is None or not event.get("ready"):
            reason = self.close()
            raise NoChildError(f"the process that proves kernels does not start: {reason}")

    def _listen(self) -> None:
        for line in self._process.stdout:
            try:
                self._events.put(json.loads(line))
            except ValueError:
                continue  # half a line, of one that was killed
        self._events.put(None)

    def ask(self, request: Mapping[str, Any]) -> None:
        """Send a request; a child that is gone is noticed by :meth:`hear`."""
        with contextlib.suppress(OSError):
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()

    def hear(self, seconds: float) -> dict[str, Any] | None:
        """Return the next event, or None if the child is gone.

        Raises:
            TimeoutError: there is none for so long.
        """
        try:
            return self._events.get(timeout=max(0.0, seconds))
        except queue.Empty:
            raise TimeoutError from None

    def close(self) -> str:
        """End the child; return how it had ended by itself, or an empty text."""
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        ended = ""
        try:
            code = self._process.wait(timeout=2.0)
            if code:
                ended = f"it crashed with {signal.Signals(-code).name}" if code < 0 else f"it ended with status {code}"
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        except ValueError:
            ended = f"it crashed with signal {-code}"
        self._listener.join(timeout=2.0)  # of a grandchild that holds the pipe nobody waits for the end
        if not self._listener.is_alive():
            self._process.stdout.close()
        self._errors.seek(0)
        last = [line for line in self._errors.read().decode(errors="replace").splitlines() if line.strip()][-1:]
        self._errors.close()
        return ": ".join([ended, *last]) if ended else ""

    def kill(self) -> None:
        """End the child in the middle of a step."""
        self._process.kill()
        self.close()


class Proving:
    """Proves keys one after another.

    Args:
        device: where.
        seconds: for everything; the child's start is a part of it.
        keep: is given each key with its entries by mode.
        planted: what tests add.
        child: a process that has begun to start, if there is one; it is closed at the end.
    """

    def __init__(
        self,
        device: torch.device,
        seconds: float,
        keep: Callable[[Key, dict[str, Any]], None],
        planted: Planted = Planted(),  # noqa: B008 - it cannot be changed
        child: Child | None = None,
    ) -> None:
        self._device, self._keep, self._planted = device, keep, planted
        self._end = time.monotonic() + seconds
        self._child: Child | None = None
        self._begun = child
        self.outcome = Outcome()

    def run(self, keys: Sequence[Key], whole: Callable[[], Mapping[str, Any]] | None = None) -> Outcome:
        """Prove keys in this order until the time is over.

        Args:
            keys: what to prove.
            whole: returns, once all keys are proved, the request that has a whole UNet checked.
        """
        modes = ("eager", "graph") if self._device.type == "cuda" else ("eager",)
        waiting = list(keys)
        try:
            if self._device.type == "cuda":
                self._compile(keys)
            while waiting and time.monotonic() < self._end:
                if not self._prove(waiting[0], modes):
                    self.outcome.left.append(waiting[0])
                del waiting[0]
            if whole is not None and not waiting and not self.outcome.left:
                self._check_whole(whole())
        except NoChildError as error:
            self.outcome.notes.append(str(error))
        finally:
            self.outcome.left += waiting
            for each in (self._child, self._begun):
                if each is not None:
                    each.close()
        return self.outcome

    def _find_child(self) -> Child:
        if self._child is None:
            self.outcome.children += 1
            self._child, self._begun = self._begun or Child(self._device, self._planted.extras), None
            self._child.wait()
        return self._child

    def _lose_child(self, kill: bool) -> str:
        child, self._child = self._child, None
        if kill:
            child.kill()
            return ""
        return child.close()

    def _compile(self, keys: Sequence[Key]) -> None:
        """Compile all Triton kernels beforehand; whatever happens, they are compiled one by one later."""
        child = self._find_child()
        seconds = max(1.0, COMPILING * (self._end - time.monotonic()))
        child.ask({"compile": [key.text() for key in keys], "seconds": seconds})
        try:
            event = child.hear(seconds + COMPILE)
        except TimeoutError:
            self._lose_child(kill=True)
            self.outcome.notes.append("compiling all Triton kernels at once took too long")
            return
        if event is None:
            self.outcome.notes.append(f"compiling all Triton kernels at once failed: {self._lose_child(kill=False)}")
        elif event.get("failed"):
            self.outcome.notes.append(f"{len(event['failed'])} kernels do not compile: {event['failed'][0]}")

    def _check_whole(self, request: Mapping[str, Any]) -> None:
        """Have a whole UNet checked; if it crashes with what was chosen, nothing of that is used in eager calls."""
        limit = self._end + GRACE - time.monotonic()
        self._find_child().ask(request)
        try:
            event = self._child.hear(limit)
        except TimeoutError:
            self._lose_child(kill=True)
            self.outcome.notes.append("the time did not suffice for calling the whole UNet; prove again to go on")
            return
        if event is not None and not event.get("broken"):
            self.outcome.whole = event["whole"]
            self._note_whole(event["whole"])
            return
        lost = self._lose_child(kill=event is not None)
        reason = event["whole"]["error"] if event is not None else lost or "the process ended"
        entries = request["entries"]
        reasons = dict.fromkeys((text.partition(" ")[0] for text in entries), f"the whole UNet: {reason}")
        self.outcome.whole = {"quotient": None, "lost": {}, "entries": refuse(entries, reasons)}
        self.outcome.notes.append(f"the whole UNet with what was chosen: {reason}; PyTorch's operators serve it")

    def _note_whole(self, found: Mapping[str, Any]) -> None:
        if "error" in found:
            self.outcome.notes.append(f"the whole UNet was not called: {found['error']}")
        self.outcome.notes += [
            f"{operator} is PyTorch's in eager calls: others make the whole UNet take {quotient:.3f} of its time"
            for operator, quotient in found.get("lost", {}).items()
        ]

    def _prove(self, key: Key, modes: Sequence[str]) -> bool:
        """Prove a key; return whether there are entries of it."""
        refused: dict[str, str] = {}
        idle = 0
        while True:
            child = self._find_child()
            child.ask({"key": key.text(), "modes": list(modes), "refused": refused})
            at, what = "", ""
            while True:
                # PyTorch's own way is what the others are measured by, however long it takes.
                step = self._planted.step if at != find_default(key) else max(self._planted.step, PLAIN)
                limit = min(step, self._end + GRACE - time.monotonic())
                try:
                    event = child.hear(limit)
                except TimeoutError:
                    self._lose_child(kill=True)
                    if limit < step:
                        return False
                    reason = f"it took more than {step:g} s"
                    break
                if event is None:
                    reason = self._lose_child(kill=False) or "the process ended"
                    break
                if "done" in event:
                    if event.get("error"):
                        self.outcome.notes.append(f"{key.text()}: {event['error']}")
                    if event["entries"]:
                        self._keep(key, event["entries"])
                    return bool(event["entries"])
                at, what = event["at"], event["what"] or what
                if "broken" in event:
                    self._lose_child(kill=True)
                    reason = f"it left the device unusable: {event['broken']}"
                    break
            if not at and not idle:  # the child had died before it heard of this key
                idle += 1
                continue
            if not at or at in refused or what == "the definition":
                self.outcome.notes.append(f"{key.text()}: {at or 'starting'}: {reason}")
                return False
            refused[at] = f"{reason} ({what})"
