"""Where one pass over a schedule ends and the next begins: what is compared once a picture is compared anew there.

A schedule lives as long as its tensor, so a loop of one's own may go over it many times, and change weights in between.
"""

from __future__ import annotations

from typing import Any

from .calls import find_pipeline_call


class Pass:
    """One pass over a schedule: layers hold weak references to the one in which they have compared their weights."""


class Passes:
    """The passes of a run, one after the other.

    Attributes:
        current: the one that the latest call is part of.
    """

    def __init__(self) -> None:
        self._merges: int | None = None
        self.begin()

    def begin(self) -> None:
        """Begin another pass."""
        self.current = Pass()
        self._step: int | None = None  # of the latest call
        self._texts: list[Any] = []  # of the calls at that step

    def follow(self, step: int, text: Any, merges: int) -> bool:
        """Return whether a call begins another pass, or is to be treated as if it did: once adapters have been merged.

        It does if its step is earlier than the one before.  In a loop of one's own it may as well if both are the same:
        guidance calls the UNet for two texts at a step, but an evaluation at a single step for the same one again.

        Args:
            step: its position in the schedule.
            text: the tensor, which is the same as long as its values are.
            merges: how often adapters have been merged, as :class:`~difffast.unet.contents.Contents` counts.
        """
        merged, self._merges = self._merges not in (None, merges), merges
        again = any(each is text for each in self._texts)
        back = self._step is not None and step < self._step
        another = merged or back or (step == self._step and again and find_pipeline_call() is None)
        if another:
            self.current = Pass()
        if another or step != self._step:
            self._step, self._texts = step, [text]
        elif not again:
            self._texts.append(text)
        return another
