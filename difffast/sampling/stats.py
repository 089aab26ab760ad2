"""What happened in a run."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


@dataclass
class RunStats:
    """What happened to the UNet calls of one run.

    Attributes:
        total: UNet calls in the schedule.
        key: calls that ran the encoder.
        propagated: calls answered from cached encoder features.
        reused: calls that ran the outer layers alone.
        forecast: calls at which nothing of the UNet ran.
        guarded: forecasts that became key steps, because the guard did not trust them.
        guarded_for: how many of these there were for each picture of the batch, by its number in it; all are
            number 0 where they cannot be told apart.
        forecast_errors: what forecasts of steps that ran would have been off by, as the guard has measured it, by step.
        halves: calls, of any of these kinds, that ran the conditional half of the batch alone.
        stock: calls that ran the unpatched forward on purpose, with the reasons in ``reasons``.
        forced: key steps that the plan did not ask for (conditioning or shape changed, features dropped).
        decode_batches: sizes of the decoder batches, in order.
        unshared: up-resnets whose skip parts were computed at every step, with the reason.
        text_kv: how often a cross-attention layer's text keys and values were "computed" and "reused".
        controlnet: how often ControlNet's outputs were "computed" and "reused".
        exchanged: "calls" of collectives with other processes, and "bytes" that this one has received.
        seconds: of each part of the pipeline's call, with ``profile=True``; on a GPU, parts are waited for.
        reasons: what fell back, or was forced, and why.
    """

    total: int
    key: int = 0
    propagated: int = 0
    reused: int = 0
    forecast: int = 0
    guarded: int = 0
    guarded_for: Counter[int] = field(default_factory=Counter)
    forecast_errors: dict[int, float] = field(default_factory=dict)
    halves: int = 0
    stock: int = 0
    forced: int = 0
    decode_batches: list[int] = field(default_factory=list)
    unshared: dict[str, str] = field(default_factory=dict)
    text_kv: Counter[str] = field(default_factory=Counter)
    controlnet: Counter[str] = field(default_factory=Counter)
    exchanged: Counter[str] = field(default_factory=Counter)
    seconds: dict[str, float] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        text = (
            f"{self.key} key steps ({self.forced} forced), {self.propagated} propagated, {self.reused} reused, "
            f"{self.stock} stock of {self.total}; decoder batches {self.decode_batches}; text keys and values computed "
            f"{self.text_kv['computed']} times, reused {self.text_kv['reused']} times"
        )
        if self.controlnet:
            counts = self.controlnet
            text += f"; ControlNet computed {counts['computed']} times, reused {counts['reused']} times"
        if self.forecast or self.guarded:
            text += f"; {self.forecast} forecast without the UNet"
        if self.guarded:
            text += f", {self.guarded} kept from it by the guard"
        if self.halves:
            text += f"; guidance's conditional half alone {self.halves} times"
        if self.exchanged:
            calls, received = self.exchanged["calls"], self.exchanged["bytes"]
            text += (
                f"; exchanged with other processes: {calls} calls, {received} bytes received "
                f"({calls / self.total:.2f} calls and {received / self.total:.0f} bytes a step)"
            )
        if self.seconds:
            text += "; seconds: " + ", ".join(f"{name} {seconds:.3f}" for name, seconds in self.seconds.items())
        unshared = (f"{name} does not share its skip: {reason}" for name, reason in self.unshared.items())
        return "\n  ".join([text, *self.reasons, *unshared])
