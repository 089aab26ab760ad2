"""Which steps run the encoder: key-step tables, the public configuration, and the plan as printable data.

Nothing here imports torch.  An *order* is the 0-based index into ``scheduler.timesteps``, that is, of a UNet call.
Source of the method and the tables: Faster Diffusion (arXiv 2312.09608).
"""

from __future__ import annotations

import json
import math
import operator
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

#: Published key orders per kind of pipeline and schedule length; other lengths are scaled from the nearest list.
PUBLISHED_KEY_STEPS: dict[str, dict[int, tuple[int, ...]]] = {
    "sd": {50: (0, 1, 2, 3, 5, 10, 15, 25, 35), 20: (0, 1, 2, 3, 5, 10, 15)},
    "personalised": {50: (0, 1, 2, 3, 5, 10, 15, 25, 35, 40)},  # DreamBooth, Custom Diffusion
    "if-1": {100: tuple(step for step in range(100) if step < 10 or step > 85 or step % 5 == 0)},
    "if-2": {50: tuple(step for step in range(50) if not 20 <= step <= 40 or step % 2 == 0)},
    "upscaler": {75: (0, 2, 5, 9, 14, 20, 27, 35, 44, 54, 65)},
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
            count.  A string: the table of another kind in ``PUBLISHED_KEY_STEPS``.  A sequence of orders, containing 0.
            An int m: every m-th step.  A float below 1: evenly, at most this share of the schedule apart (0.06: every
            3rd of 50 steps, every step of 33 or fewer).  A callable ``(step, total) -> bool``.  The first step that a
            run executes is always a key step.
        parallel: decode all steps up to the next key step as one batch; False decodes one step at a time.
        max_parallel: most steps decoded in one batch (memory grows with it); None: ``DEFAULT_MAX_PARALLEL`` of the
            device.
        share_skips: compute what depends on the encoder's features alone once for all steps that share them (exact).
        prior_noise: strength of the initial noise that is added back to the latents in the second half of the
            schedule; the paper uses 0.003.  None: off.
        order: 0 takes the last key step's features; 1 and 2 extrapolate over the last two or three, as
            :class:`FeatureReuse` does (skips are not shared then).

    Raises:
        TypeError, ValueError: a value of the wrong type or out of range.
    """

    key_steps: Iterable[int] | int | float | str | Callable[[int, int], bool] | None = None
    parallel: bool = True
    max_parallel: int | None = None
    share_skips: bool = True
    prior_noise: float | None = None
    order: int = 0

    def __post_init__(self) -> None:
        if isinstance(self.key_steps, str):
            published_key_steps(self.key_steps, 1)
        else:
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
        _check_order(self.order)

    def plan(
        self, total: int, *, kind: str = "sd", device: str = "cpu", batches: tuple[int, ...] | None = None
    ) -> Plan:
        """Resolve to the plan of a schedule.

        Args:
            total: UNet calls in the schedule, ``len(scheduler.timesteps)``.
            kind: which published list ``key_steps=None`` takes.
            device: type of the device that the UNet runs on, for ``max_parallel=None``.
            batches: sizes that decoder batches may have; None: any.

        Raises:
            ValueError: ``total`` < 1, a key step outside ``0 .. total - 1``, unknown ``kind``.
        """
        if (self.key_steps is None or isinstance(self.key_steps, str)) and total >= 1:
            resolved = published_key_steps(self.key_steps or kind, total)
        else:
            resolved = _resolved_key_steps("key_steps", self.key_steps, total)
        default = DEFAULT_MAX_PARALLEL["cpu" if device == "cpu" else "accelerator"]
        most = (self.max_parallel or default) if self.parallel else 1
        return Plan(total=total, keys=resolved, max_batch=most, batches=batches)


@dataclass(frozen=True)
class FeatureReuse:
    """Run the whole UNet at key steps only; in between its outer layers alone, around the key step's deep feature.

    Unlike under :class:`EncoderPropagation`, a reuse step sees the current latents: conv_in and the first ``branch``
    skips are made anew, the up blocks run from the resnet that takes the last of these on, and that resnet's hidden
    input is the cached deep feature.

    Sources: DeepCache (arXiv 2312.00858), sections 3.2 (branches), 3.3 (uniform and non-uniform spacing); order > 0:
    polynomial extrapolation over the last key steps, as in TaylorSeer (arXiv 2503.06923) but through the features
    themselves instead of their differences.

    Args:
        interval: an int m: every m-th step is a key step (on average, with ``schedule="quadratic"``).  A float below 1:
            at most this share of the schedule apart (0.08: every 4th of 50 steps).  A sequence: the orders of the key
            steps, containing 0.  The first step that a run executes is always a key step.
        branch: skips that a reuse step makes anew besides conv_in's; 0 is the cheapest.
        schedule: "uniform", or "quadratic": key steps are closer together around ``center``.
        center: where they are closest, as a share of the schedule.
        power: of the spacing around it, 1 being even.
        order: 0 takes the last key step's feature; 1 and 2 extrapolate over the last two or three.

    Raises:
        TypeError, ValueError: a value of the wrong type or out of range.
    """

    interval: int | float | Iterable[int] = 3
    branch: int = 0
    schedule: str = "uniform"
    center: float = 0.3
    power: float = 1.4
    order: int = 0

    def __post_init__(self) -> None:
        if self.interval is None or callable(self.interval):
            raise TypeError(f"interval must be an int, a float or a sequence of ints, got {self.interval!r}")
        object.__setattr__(self, "interval", _checked_key_steps(self.interval, "interval"))
        if _as_int("branch", self.branch) < 0:
            raise ValueError(f"branch must not be negative, got {self.branch}")
        if self.schedule not in ("uniform", "quadratic"):
            raise ValueError(f'schedule must be "uniform" or "quadratic", got {self.schedule!r}')
        if not 0 <= self.center <= 1:
            raise ValueError(f"center must lie between 0 and 1, got {self.center}")
        if not 1 <= self.power < math.inf:
            raise ValueError(f"power must be at least 1, got {self.power}")
        _check_order(self.order)

    def plan(self, total: int) -> Plan:
        """Resolve to the plan of a schedule with ``total`` UNet calls.

        Raises:
            ValueError: ``total`` < 1, or a key step outside ``0 .. total - 1``.
        """
        keys = _resolved_key_steps("interval", self.interval, total)
        if isinstance(self.interval, (int, float)) and self.schedule == "quadratic":
            keys = _spaced(total, len(keys), self.center * (total - 1), self.power)
        return Plan(total=total, keys=keys, max_batch=1, reuse=self)


def _spaced(total: int, count: int, center: float, power: float) -> tuple[int, ...]:
    """``count`` orders or fewer, 0 among them, whose distances grow with their distance from ``center``."""
    first, last = -(center ** (1 / power)), (total - 1 - center) ** (1 / power)
    even = (first + (last - first) * i / count for i in range(count))
    return tuple(sorted({0} | {max(0, round(center + math.copysign(abs(x) ** power, x))) for x in even}))


@dataclass(frozen=True)
class GuidanceReuse:
    """Run both halves of classifier-free guidance's batch at some key steps only, the conditional half at all others.

    There the unconditional half is the conditional one less their difference at the last step that ran both.

    Source: the difference between the halves changes slowly over the steps (CFG-Cache in FasterCache, arXiv
    2410.19355); taken as it is here, without its weighting of frequencies.

    Args:
        interval: both halves run at key steps that are at least so many steps apart; a float below 1: at least this
            share of the schedule.
        start: before this share of the schedule all steps run both.

    Raises:
        TypeError, ValueError: a value of the wrong type or out of range.
    """

    interval: int | float = 2
    start: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.interval, (int, float)) and not hasattr(self.interval, "__index__"):
            raise TypeError(f"interval must be an int or a float, got {self.interval!r}")
        object.__setattr__(self, "interval", _checked_key_steps(self.interval, "interval"))
        if not 0 <= self.start <= 1:
            raise ValueError(f"start must lie between 0 and 1, got {self.start}")

    def applied(self, plan: Plan) -> Plan:
        """The plan with the steps that run the conditional half alone; optimised steps never do."""
        total = plan.total
        apart = self.interval if isinstance(self.interval, int) else max(1, round(self.interval * total))
        both, last = set(), -apart
        for key in plan.keys:
            early = key < self.start * total
            if early or key - last >= apart or key in plan.optimised:
                both.add(key)
                last = key
            if early:
                both.update(range(key, min(plan.segment_end(key), math.ceil(self.start * total))))
        return replace(plan, halves=tuple(order for order in range(total) if order not in both))


@dataclass(frozen=True)
class PlanStep:
    """One row of a plan.

    Attributes:
        order: of the step.
        key: whether it runs the encoder.
        decoded_with: the orders decoded in its batch.
        reuse: whether it runs the outer layers alone.
        half: whether it runs on guidance's conditional half alone.
    """

    order: int
    key: bool
    decoded_with: tuple[int, ...]
    reuse: bool = False
    half: bool = False


@dataclass(frozen=True)
class Plan:
    """What every step of a schedule does; pure data.  ``print(plan)`` shows it as a table.

    Args:
        total: UNet calls in the schedule.
        keys: sorted orders of the key steps, the first being 0.
        max_batch: most steps decoded in one batch; 1 decodes step by step.
        batches: sizes that a batch may have, ascending from 1, so that few programs serve all; None: any.
        reuse: given, steps between key steps run the outer layers alone, and nothing is decoded ahead.
        optimised: orders at which embeddings or latents are optimised; all of them are key steps.
        halves: orders at which guidance's conditional half runs alone; where a key step does, so do the steps up to the
            next key step, which have nothing else to reuse.
    """

    total: int
    keys: tuple[int, ...]
    max_batch: int
    batches: tuple[int, ...] | None = None
    reuse: FeatureReuse | None = None
    optimised: tuple[int, ...] = ()
    halves: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.reuse is not None and self.max_batch != 1:
            raise ValueError(f"reuse steps depend on the latents: max_batch must be 1, got {self.max_batch}")
        if self.batches is not None and (self.batches[:1] != (1,) or list(self.batches) != sorted(self.batches)):
            raise ValueError(f"batches must ascend from 1, got {self.batches}")
        if not self.keys or self.keys[0] != 0 or self.keys[-1] >= self.total or self.max_batch < 1:
            raise ValueError(f"invalid plan: {self.total} steps, keys {self.keys}, max_batch {self.max_batch}")
        if any(a >= b for a, b in pairwise(self.keys)):
            raise ValueError(f"keys must increase strictly, got {self.keys}")
        if not set(self.optimised) <= set(self.keys):
            raise ValueError(f"optimised steps must be key steps, got {self.optimised} and keys {self.keys}")
        halves = set(self.halves)
        if not halves <= set(range(1, self.total)) or halves & set(self.optimised):
            raise ValueError(f"halves must lie in 1 .. {self.total - 1} and not be optimised, got {self.halves}")
        for key in self.keys:
            rest = set(range(key, self.segment_end(key))) - halves
            if key in halves and rest:
                raise ValueError(f"step {min(rest)} needs both halves of key step {key}, which runs one")

    def with_optimised(self, orders: Iterable[int]) -> Plan:
        """This plan with the encoder run at ``orders`` as well, where guidance changes embeddings or latents."""
        orders = tuple(sorted(set(orders)))
        halves = tuple(order for order in self.halves if order not in orders)
        return replace(self, keys=tuple(sorted({*self.keys, *orders})), optimised=orders, halves=halves)

    def until(self, total: int) -> Plan:
        """The first ``total`` steps of this plan."""
        orders = {name: tuple(o for o in getattr(self, name) if o < total) for name in ("keys", "optimised", "halves")}
        return replace(self, total=total, **orders)

    def is_key(self, order: int) -> bool:
        """Whether the plan runs the encoder at this order."""
        return self.keys[bisect_right(self.keys, order) - 1] == order

    def is_half(self, order: int) -> bool:
        """Whether the plan runs guidance's conditional half alone at this order."""
        at = bisect_left(self.halves, order)
        return at < len(self.halves) and self.halves[at] == order

    def segment_end(self, order: int) -> int:
        """The order of the next key step after ``order``, or ``total``."""
        after = bisect_right(self.keys, order)
        return self.keys[after] if after < len(self.keys) else self.total

    def batch(self, order: int) -> range:
        """The orders decoded in one batch when ``order`` is the first of them that is not decoded yet.

        A segment longer than ``max_batch`` is cut into batches of nearly equal size, or of the sizes there are; steps
        that run one half never share a batch with those that run both.
        """
        left = self.segment_end(order) - order
        if self.halves:
            same = (o for o in range(order, order + left) if self.is_half(o) != self.is_half(order))
            left = next(same, order + left) - order
        if self.batches is not None:
            most = min(left, self.max_batch)
            return range(order, order + max(size for size in self.batches if size <= most))
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
            for o in together:
                key = o == start or self.is_key(o)
                half = o != start and self.is_half(o)
                rows.append(PlanStep(o, key, tuple(together), self.reuse is not None and not key, half))
            order = together.stop
        return tuple(rows)

    def picture(self, path: str | Path) -> None:
        """Draw which parts of the UNet run at which step, as PNG or SVG; decoders of one batch share a frame.

        Steps that run guidance's conditional half alone are half as high.

        Raises:
            ImportError: matplotlib is missing.
        """
        from .plots import new_figure

        figure = new_figure(figsize=(max(6.0, 1.5 + self.total / 6), 2.4))
        from matplotlib.patches import Rectangle  # only here: new_figure says what to do where it is missing

        parts = ("outer layers", "encoder", "bottleneck", "decoder")
        axis = figure.subplots()
        for row in self.steps():
            ran = parts if row.key else ("outer layers",) if row.reuse else ("decoder",)
            colour = "C3" if row.order in self.optimised else "C0" if row.key else "C1"
            for part in ran:
                place = (row.order - 0.4, parts.index(part) - 0.4)
                axis.add_patch(Rectangle(place, 0.8, 0.4 if row.half else 0.8, color=colour))
            first, last = row.decoded_with[0], row.decoded_with[-1]
            if row.order == first != last:
                axis.add_patch(Rectangle((first - 0.5, 2.5), last - first + 1, 1, fill=False, linewidth=1.5))
        axis.set(xlim=(-1, self.total), ylim=(3.6, -0.6), xlabel="step", yticks=range(4), yticklabels=parts)
        axis.set_title(
            f"{len(self.keys)} key steps of {self.total} (blue), in between (orange), optimised (red)", size=9
        )
        figure.savefig(path, dpi=120)

    def to_json(self) -> str:
        """The plan as JSON; :meth:`from_json` makes it again."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """The plan that :meth:`to_json` wrote.

        Raises:
            ValueError: not JSON, unknown or missing fields, or no valid plan.
        """
        try:
            fields = {
                name: tuple(value) if isinstance(value, list) else value for name, value in json.loads(text).items()
            }
            if fields.get("reuse") is not None:
                fields["reuse"] = FeatureReuse(**fields["reuse"])
            return cls(**fields)
        except (TypeError, AttributeError, json.JSONDecodeError) as error:
            raise ValueError(f"this is no plan in JSON: {error}") from None

    def __str__(self) -> str:
        lines = ["step  key  decoded with"]
        for row in self.steps():
            first, last = row.decoded_with[0], row.decoded_with[-1]
            together = "alone" if first == last else f"{first}..{last} (batch of {last - first + 1})"
            if row.reuse:
                together = f"outer layers alone (branch {self.reuse.branch})"
            more = ", optimised" if row.order in self.optimised else ", conditional half" if row.half else ""
            lines.append(f"{row.order:4d}  {'key' if row.key else '   '}  {together}{more}")
        what = "encoder" if self.reuse is None else "whole UNet"
        lines.append(f"{len(self.keys)} of {self.total} steps run the {what}")
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


def _resolved_key_steps(name: str, keys: Any, total: int) -> tuple[int, ...]:
    """The key orders that an interval, a share, a callable or a list means in a schedule with ``total`` UNet calls."""
    if total < 1:
        raise ValueError(f"a schedule needs at least one step, got {total}")
    if isinstance(keys, (int, float)):
        interval = keys if isinstance(keys, int) else max(1, math.floor(keys * total + 1e-9))
        return tuple(range(0, total, interval))
    if callable(keys):
        return tuple(step for step in range(total) if step == 0 or keys(step, total))
    if keys[-1] >= total:
        raise ValueError(f"{name} contains {keys[-1]}, but the schedule has orders 0 .. {total - 1}")
    return keys


def _checked_key_steps(
    keys: Iterable[int] | int | float | Callable[[int, int], bool] | None, name: str = "key_steps"
) -> tuple[int, ...] | int | float | Callable[[int, int], bool] | None:
    if keys is None or callable(keys):
        return keys
    if isinstance(keys, (str, bytes)):
        raise TypeError(f"{name} must be None, an int, a float, a sequence of ints or a callable, got {keys!r}")
    if isinstance(keys, float):
        if not 0 < keys < 1:
            raise ValueError(f"{name} as a share of the schedule must lie between 0 and 1, got {keys}")
        return keys
    if not isinstance(keys, Iterable):
        interval = _as_int(name, keys)
        if interval < 1:
            raise ValueError(f"{name} as an interval must be at least 1, got {interval}")
        return interval
    orders = tuple(sorted({_as_int(name, order) for order in keys}))
    if not orders or orders[0] != 0:
        raise ValueError(f"{name} must contain 0 (the first step runs the encoder) and no negative, got {orders}")
    return orders


def _check_order(order: object) -> None:
    if _as_int("order", order) not in (0, 1, 2):
        raise ValueError(f"order must be 0, 1 or 2, got {order}")


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
        propagation: which steps run the encoder, or the whole UNet.
        fused: fused layers, and text keys and values computed once a prompt.
        guidance: at which steps both halves of guidance's batch run; None: at all.
    """

    propagation: EncoderPropagation | FeatureReuse
    fused: bool = True
    guidance: GuidanceReuse | None = None


#: Everything a preset stands for.  "exact" approximates nothing: every step runs the whole UNet.  "balanced" keeps what
#: the embedded model's pictures show (bench/bench_fidelity.py).  The published table, with gaps of up to 14 of 50,
#: costs it half of the colours, most of them by the gap at the end; for large models its authors report no such loss.
#: "turbo" is the widest interval that cost it none (36 prompts, 50 steps: every 4th .99 of the things bound, stock .97,
#: every 5th .85; extrapolated features bound fewer at every interval, key steps closer around any center did not help).
#: Between key steps both run guidance's conditional half alone: over three or four steps that costs nothing (48
#: prompts: no thing lost, PSNR 35.3 -> 36.6 and 30.4 -> 31.2 dB), over six or eight it costs 13 points.
PRESETS: dict[str, Preset] = {
    "exact": Preset(EncoderPropagation(key_steps=1)),
    "balanced": Preset(EncoderPropagation(key_steps=0.06), guidance=GuidanceReuse(1)),
    "faster-diffusion": Preset(EncoderPropagation()),
    "turbo": Preset(FeatureReuse(interval=0.08), guidance=GuidanceReuse(1)),
}
