"""Which steps run the encoder: key-step tables, the public configuration, and the plan as printable data.

Nothing here imports torch.  An *order* is the 0-based index into ``scheduler.timesteps``, that is, of a UNet call.
Source of the method and the tables: Faster Diffusion (arXiv 2312.09608).
"""

from __future__ import annotations

import math
import operator
from bisect import bisect_right
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from itertools import pairwise

#: Published key orders per kind of pipeline and schedule length; other lengths are scaled from the nearest list.
PUBLISHED_KEY_STEPS: dict[str, dict[int, tuple[int, ...]]] = {
    "sd": {50: (0, 1, 2, 3, 5, 10, 15, 25, 35), 20: (0, 1, 2, 3, 5, 10, 15)},
}

#: Pipelines whose behaviour under the patch the tests prove, and which published list they take.
SUPPORTED_PIPELINES: dict[str, str] = {
    "StableDiffusionPipeline": "sd",
    "StableDiffusionImg2ImgPipeline": "sd",
    "StableDiffusionInpaintPipeline": "sd",
}

#: Below this many denoising steps neighbouring steps differ too much for features to be reused.
MIN_STEPS = 8

#: Most decoders in one batch when ``max_parallel`` is None, per device type; activation memory grows linearly with it.
#: Exploratory, four rounds on two CPU cores, UNet time of a (64, 128, 192) UNet at 32x32 against stock: 0.67 at 1, 0.61
#: at 2 and 3, 0.63 at 4; rounds vary by 0.1, so 2 to 4 are not told apart and the smallest is taken.  Accelerators: not
#: measured yet.
DEFAULT_MAX_PARALLEL = {"cpu": 2, "accelerator": 4}


@dataclass(frozen=True)
class EncoderPropagation:
    """Run the UNet's encoder at key steps only and decode the steps in between from its features.

    Source: Faster Diffusion (arXiv 2312.09608), sections 3.2 (propagation, parallel decoding), 3.3 (prior noise).

    Args:
        key_steps: which orders run the encoder.  None: the published table for the pipeline, scaled to the step
            count.  A sequence of orders, containing 0.  An int m: every m-th step.  A float below 1: evenly, at most
            this share of the schedule apart (0.06: every 3rd of 50 steps, every step of 33 or fewer).  A callable
            ``(step, total) -> bool``.  The first step that a run executes is always a key step.
        parallel: decode all steps up to the next key step as one batch; False decodes one step at a time.
        max_parallel: most steps decoded in one batch (memory grows with it); None: ``DEFAULT_MAX_PARALLEL`` of the
            device.
        share_skips: compute what depends on the encoder's features alone once for all steps that share them (exact).
        prior_noise: strength of the initial noise that is added back to the latents in the second half of the
            schedule; the paper uses 0.003.  None: off.

    Raises:
        TypeError, ValueError: a value of the wrong type or out of range.
    """

    key_steps: Iterable[int] | int | float | Callable[[int, int], bool] | None = None
    parallel: bool = True
    max_parallel: int | None = None
    share_skips: bool = True
    prior_noise: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "key_steps", _checked_key_steps(self.key_steps))
        for name in ("parallel", "share_skips"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if self.max_parallel is not None and _as_int("max_parallel", self.max_parallel) < 1:
            raise ValueError(f"max_parallel must be at least 1 (or None), got {self.max_parallel}")
        if self.prior_noise is not None:
            if isinstance(self.prior_noise, bool) or not isinstance(self.prior_noise, (int, float)):
                raise TypeError(f"prior_noise must be a number or None, got {self.prior_noise!r}")
            if not (0.0 <= self.prior_noise < math.inf):
                raise ValueError(f"prior_noise must be finite and not negative, got {self.prior_noise}")

    def plan(self, total: int, *, kind: str = "sd", device: str = "cpu") -> Plan:
        """Resolve to the plan of a schedule.

        Args:
            total: UNet calls in the schedule, ``len(scheduler.timesteps)``.
            kind: which published list ``key_steps=None`` takes.
            device: type of the device that the UNet runs on, for ``max_parallel=None``.

        Raises:
            ValueError: ``total`` < 1, a key step outside ``0 .. total - 1``, unknown ``kind``.
        """
        if total < 1:
            raise ValueError(f"a schedule needs at least one step, got {total}")
        keys = self.key_steps
        if keys is None:
            resolved = published_key_steps(kind, total)
        elif isinstance(keys, (int, float)):
            interval = keys if isinstance(keys, int) else max(1, math.floor(keys * total + 1e-9))
            resolved = tuple(range(0, total, interval))
        elif callable(keys):
            resolved = tuple(step for step in range(total) if step == 0 or keys(step, total))
        else:
            if keys[-1] >= total:
                raise ValueError(f"key_steps contains {keys[-1]}, but the schedule has orders 0 .. {total - 1}")
            resolved = keys
        default = DEFAULT_MAX_PARALLEL["cpu" if device == "cpu" else "accelerator"]
        return Plan(total=total, keys=resolved, max_batch=(self.max_parallel or default) if self.parallel else 1)


@dataclass(frozen=True)
class PlanStep:
    """One row of a plan: the step's order, whether it runs the encoder, and the orders decoded in its batch."""

    order: int
    key: bool
    decoded_with: tuple[int, ...]


@dataclass(frozen=True)
class Plan:
    """What every step of a schedule does; pure data.  ``print(plan)`` shows it as a table.

    Args:
        total: UNet calls in the schedule.
        keys: sorted orders of the key steps, the first being 0.
        max_batch: most steps decoded in one batch; 1 decodes step by step.
        optimised: orders at which embeddings or latents are optimised; all of them are key steps.
    """

    total: int
    keys: tuple[int, ...]
    max_batch: int
    optimised: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not self.keys or self.keys[0] != 0 or self.keys[-1] >= self.total or self.max_batch < 1:
            raise ValueError(f"invalid plan: {self.total} steps, keys {self.keys}, max_batch {self.max_batch}")
        if any(a >= b for a, b in pairwise(self.keys)):
            raise ValueError(f"keys must increase strictly, got {self.keys}")
        if not set(self.optimised) <= set(self.keys):
            raise ValueError(f"optimised steps must be key steps, got {self.optimised} and keys {self.keys}")

    def with_optimised(self, orders: Iterable[int]) -> Plan:
        """This plan with the encoder run at ``orders`` as well, where guidance changes embeddings or latents."""
        orders = tuple(sorted(set(orders)))
        return replace(self, keys=tuple(sorted({*self.keys, *orders})), optimised=orders)

    def is_key(self, order: int) -> bool:
        """Whether the plan runs the encoder at this order."""
        return self.keys[bisect_right(self.keys, order) - 1] == order

    def segment_end(self, order: int) -> int:
        """The order of the next key step after ``order``, or ``total``."""
        after = bisect_right(self.keys, order)
        return self.keys[after] if after < len(self.keys) else self.total

    def batch(self, order: int) -> range:
        """The orders decoded in one batch when ``order`` is the first of them that is not decoded yet.

        A segment longer than ``max_batch`` is cut into batches of nearly equal size.
        """
        left = self.segment_end(order) - order
        batches = -(-left // self.max_batch)
        return range(order, order - (-left // batches))

    def steps(self, start: int = 0) -> tuple[PlanStep, ...]:
        """All rows from ``start`` on; ``start`` > 0 is a run that enters late (img2img): its first step is a key."""
        if not 0 <= start < self.total:
            raise ValueError(f"start must lie in 0 .. {self.total - 1}, got {start}")
        rows: list[PlanStep] = []
        order = start
        while order < self.total:
            together = self.batch(order)
            rows += (PlanStep(o, o == start or self.is_key(o), tuple(together)) for o in together)
            order = together.stop
        return tuple(rows)

    def __str__(self) -> str:
        lines = ["step  key  decoded with"]
        for row in self.steps():
            first, last = row.decoded_with[0], row.decoded_with[-1]
            together = "alone" if first == last else f"{first}..{last} (batch of {last - first + 1})"
            optimised = ", optimised" if row.order in self.optimised else ""
            lines.append(f"{row.order:4d}  {'key' if row.key else '   '}  {together}{optimised}")
        lines.append(f"{len(self.keys)} of {self.total} steps run the encoder")
        return "\n".join(lines)


def published_key_steps(kind: str, total: int) -> tuple[int, ...]:
    """The published key orders for a kind of pipeline, scaled to ``total`` UNet calls.

    Orders keep their fraction of the schedule (rounded, duplicates dropped), and the last key step is rounded up,
    so that the last segment is never a larger share of the schedule than in the published list.

    Raises:
        ValueError: no list is published for ``kind``.
    """
    if kind not in PUBLISHED_KEY_STEPS:
        raise ValueError(f"no published key steps for {kind!r}; known: {', '.join(PUBLISHED_KEY_STEPS)}")
    lists = PUBLISHED_KEY_STEPS[kind]
    length = min(lists, key=lambda n: (abs(math.log(total / n)), n))
    *body, last = lists[length]
    scaled = {(2 * order * total + length) // (2 * length) for order in body}
    scaled.add(-(-last * total // length))
    return tuple(sorted(order for order in scaled if order < total))


def _checked_key_steps(
    keys: Iterable[int] | int | float | Callable[[int, int], bool] | None,
) -> tuple[int, ...] | int | float | Callable[[int, int], bool] | None:
    if keys is None or callable(keys):
        return keys
    if isinstance(keys, (str, bytes)):
        raise TypeError(f"key_steps must be None, an int, a float, a sequence of ints or a callable, got {keys!r}")
    if isinstance(keys, float):
        if not 0 < keys < 1:
            raise ValueError(f"key_steps as a share of the schedule must lie between 0 and 1, got {keys}")
        return keys
    if not isinstance(keys, Iterable):
        interval = _as_int("key_steps", keys)
        if interval < 1:
            raise ValueError(f"key_steps as an interval must be at least 1, got {interval}")
        return interval
    orders = tuple(sorted({_as_int("key_steps", order) for order in keys}))
    if not orders or orders[0] != 0:
        raise ValueError(f"key_steps must contain 0 (the first step runs the encoder) and no negative, got {orders}")
    return orders


def _as_int(name: str, value: object) -> int:
    if isinstance(value, bool):
        raise TypeError(f"{name} must hold integers, got {value!r}")
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must hold integers, got {value!r}") from None


@dataclass(frozen=True)
class Preset:
    """What one word stands for.

    Attributes:
        propagation: which steps run the encoder.
        fused: fused layers, and text keys and values computed once a prompt.
    """

    propagation: EncoderPropagation
    fused: bool = True


#: Everything a preset stands for.  "exact" approximates nothing: every step runs the whole UNet.  "balanced" keeps what
#: the embedded model's pictures show (bench/bench_fidelity.py).  The published table, with gaps of up to 14 of 50,
#: costs it half of the colours, most of them by the gap at the end; for large models its authors report no such loss.
PRESETS: dict[str, Preset] = {
    "exact": Preset(EncoderPropagation(key_steps=1)),
    "balanced": Preset(EncoderPropagation(key_steps=0.06)),
    "faster-diffusion": Preset(EncoderPropagation()),
}
