"""Key steps: the published tables, and what an interval, a share, a list or a function means in a schedule.

A *step* is the 0-based index into ``scheduler.timesteps``, that is, of a UNet call.
Source of the tables: Faster Diffusion (arXiv 2312.09608) and its released code.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable
from typing import Any

#: Published key steps per kind of pipeline: lists by schedule length, from the nearest of which other lengths are
#: scaled, or a rule by which the release runs schedules of any length.
PUBLISHED_KEY_STEPS: dict[str, dict[int, tuple[int, ...]] | Callable[[int], bool]] = {
    "sd": {50: (0, 1, 2, 3, 5, 10, 15, 25, 35), 20: (0, 1, 2, 3, 5, 10, 15)},
    "personalised": {50: (0, 1, 2, 3, 5, 10, 15, 25, 35, 40)},  # DreamBooth, Custom Diffusion
    "if-1": lambda step: step < 10 or step > 85 or step % 5 == 0,
    "if-2": lambda step: not 20 <= step <= 40 or step % 2 == 0,
    "upscaler": lambda step: math.isqrt(9 + 8 * step) ** 2 == 9 + 8 * step,  # 0, 2, 5, 9, 14, 20, 27, ...
}

#: What ``key_steps`` may be.
KeySteps = Iterable[int] | int | float | Callable[[int, int], bool]


def scale_published_key_steps(kind: str, total: int) -> tuple[int, ...]:
    """Return the published key steps for a kind of pipeline, scaled to ``total`` UNet calls.

    A rule holds for the steps as they are, as in the release: DeepFloyd IF's first stage has 13 key steps of 25.  So
    does a list that is one call shorter than the schedule: PNDM calls the UNet 51 times for 50 steps, and the release
    counts its list in calls.  From other lists, steps keep their fraction of the schedule (rounded, duplicates
    dropped).  The last key step is rounded up, so that the last segment is never a larger share of the schedule than
    in the published list.

    Raises:
        ValueError: nothing is published for ``kind``.
    """
    if kind not in PUBLISHED_KEY_STEPS:
        raise ValueError(f"no published key steps for {kind!r}; known: {', '.join(PUBLISHED_KEY_STEPS)}")
    lists = PUBLISHED_KEY_STEPS[kind]
    if callable(lists):
        return tuple(step for step in range(total) if lists(step))
    if total - 1 in lists:
        return lists[total - 1]
    length = min(lists, key=lambda n: (abs(math.log(total / n)), n))
    *body, last = lists[length]
    scaled = {(2 * step * total + length) // (2 * length) for step in body}
    scaled.add(-(-last * total // length))
    return tuple(sorted(step for step in scaled if step < total))


def resolve_key_steps(name: str, keys: Any, total: int) -> tuple[int, ...]:
    """Return the steps that an interval, a share, a function or a list means in a schedule of ``total`` UNet calls.

    Args:
        name: of the argument, for errors.
        keys: from :func:`check_key_steps`.
        total: UNet calls in the schedule.

    Raises:
        ValueError: ``total`` < 1, or a step outside the schedule.
    """
    if total < 1:
        raise ValueError(f"a schedule needs at least one step, got {total}")
    if isinstance(keys, (int, float)):
        interval = keys if isinstance(keys, int) else max(1, math.floor(keys * total + 1e-9))
        return tuple(range(0, total, interval))
    if callable(keys):
        return tuple(step for step in range(total) if step == 0 or keys(step, total))
    if keys[-1] >= total:
        raise ValueError(f"{name} contains {keys[-1]}, but the schedule has steps 0 .. {total - 1}")
    return keys


def check_key_steps(keys: KeySteps | None, name: str = "key_steps") -> Any:
    """Return ``keys`` with an iterable of steps as a sorted tuple.

    Raises:
        TypeError, ValueError: a value of the wrong type or out of range.
    """
    if keys is None or callable(keys):
        return keys
    if isinstance(keys, (str, bytes)):
        raise TypeError(f"{name} must be None, an int, a float, a sequence of ints or a callable, got {keys!r}")
    if isinstance(keys, float):
        if not 0 < keys < 1:
            raise ValueError(f"{name} as a share of the schedule must lie between 0 and 1, got {keys}")
        return keys
    if not isinstance(keys, Iterable):
        interval = check_int(name, keys)
        if interval < 1:
            raise ValueError(f"{name} as an interval must be at least 1, got {interval}")
        return interval
    steps = tuple(sorted({check_int(name, step) for step in keys}))
    if not steps or steps[0] != 0:
        raise ValueError(f"{name} must contain 0 (the first step runs the encoder) and no negative, got {steps}")
    return steps


def count_from(start: int, keys: tuple[int, ...], total: int) -> tuple[int, ...]:
    """Return key steps of a run that executes the steps from ``start`` on: counted from there, as far as it goes."""
    return tuple(start + key for key in keys if start + key < total)


def space_key_steps(total: int, count: int, center: float, power: float) -> tuple[int, ...]:
    """Return ``count`` steps or fewer, 0 among them, whose distances grow with their distance from ``center``."""
    first, last = -(center ** (1 / power)), (total - 1 - center) ** (1 / power)
    even = (first + (last - first) * i / count for i in range(count))
    return tuple(sorted({0} | {max(0, round(center + math.copysign(abs(x) ** power, x))) for x in even}))


def check_int(name: str, value: object) -> int:
    """Return ``value`` as an int.

    Raises:
        TypeError: it is none.
    """
    if isinstance(value, bool):
        raise TypeError(f"{name} must hold integers, got {value!r}")
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must hold integers, got {value!r}") from None
