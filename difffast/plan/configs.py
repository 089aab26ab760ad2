"""How steps share work, as a user asks for it; each configuration resolves to a plan for a schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import InitVar, dataclass, replace

from ..renamed import warn_renamed
from .key_steps import (
    check_int,
    check_key_steps,
    count_from,
    resolve_key_steps,
    scale_published_key_steps,
    space_key_steps,
)
from .measured import MeasuredPlan
from .output_forecast import OutputForecast
from .rows import OuterReuse
from .steps import Plan

#: Below this many denoising steps neighbouring steps differ too much for features to be reused.
MIN_STEPS = 8

#: Most decoders in one batch when ``max_parallel`` is None, per device type; activation memory grows linearly with it.
#: Exploratory, four rounds on two CPU cores, UNet time of a (64, 128, 192) UNet at 32x32 against stock: 0.67 at 1, 0.61
#: at 2 and 3, 0.63 at 4; rounds vary by 0.1, so 2 to 4 are not told apart and the smallest is taken.  Accelerators: not
#: measured yet.
DEFAULT_MAX_PARALLEL = {"cpu": 2, "accelerator": 4}


@dataclass(frozen=True)
class EncoderPropagation:
    """Run the UNet's encoder at key steps only, and decode the steps in between from the features of the last one.

    Source: Faster Diffusion (arXiv 2312.09608), sections 3.2 (propagation, parallel decoding), 3.3 (prior noise).

    Args:
        key_steps: which steps run the encoder, counted from the first one that a run executes, which always does.
            - None: the table published for this kind of pipeline, scaled to the number of steps.
            - A string: the published table of another kind, from ``PUBLISHED_KEY_STEPS``.
            - A sequence: these steps, 0 among them.
            - An int m: every m-th step.
            - A float below 1: evenly spaced, at most this share of the schedule apart.  0.06 is every 3rd of 50 steps,
              and every step of 33 or fewer.
            - A function ``(step, total) -> bool``.
        parallel: decode the steps up to the next key step as batches; False decodes one step at a time.
        max_parallel: the most steps in one batch; memory grows with it.  None takes the device's
            ``DEFAULT_MAX_PARALLEL``.
        share_skips: compute what depends on the encoder's features alone once for all steps that share them.  This is
            exact.
        prior_noise: the strength of the initial noise that is added back to the latents in the second half of the
            schedule.  The paper uses 0.003; None adds none.
        extrapolate: 0 takes the features of the last key step.  1 and 2 extrapolate over the last two or three; skips
            are not shared then.

    Raises:
        TypeError, ValueError: a value of the wrong type or out of range.
    """

    key_steps: Iterable[int] | int | float | str | Callable[[int, int], bool] | None = None
    parallel: bool = True
    max_parallel: int | None = None
    share_skips: bool = True
    prior_noise: float | None = None
    extrapolate: int = 0
    order: InitVar[int | None] = None

    def __post_init__(self, order: int | None) -> None:
        if isinstance(self.key_steps, str):
            scale_published_key_steps(self.key_steps, 1)
        else:
            object.__setattr__(self, "key_steps", check_key_steps(self.key_steps))
        for name in ("parallel", "share_skips"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        if self.max_parallel is not None and check_int("max_parallel", self.max_parallel) < 1:
            raise ValueError(f"max_parallel must be at least 1 (or None), got {self.max_parallel}")
        if self.prior_noise is not None:
            if isinstance(self.prior_noise, bool) or not isinstance(self.prior_noise, (int, float)):
                raise TypeError(f"prior_noise must be a number or None, got {self.prior_noise!r}")
            if not (0.0 <= self.prior_noise < math.inf):
                raise ValueError(f"prior_noise must be finite and not negative, got {self.prior_noise}")
        _check_degree(self, order)

    def plan(
        self,
        total: int,
        *,
        start: int = 0,
        kind: str = "sd",
        device: str = "cpu",
        batches: tuple[int, ...] | None = None,
    ) -> Plan:
        """Return the plan of a schedule.

        Args:
            total: the number of UNet calls, ``len(scheduler.timesteps)``.
            start: the first step that is executed, as in img2img; key steps are counted from there.
            kind: the published table that ``key_steps=None`` takes.
            device: the type of the UNet's device, for ``max_parallel=None``.
            batches: the sizes that batches of decoders may have; None allows any.

        Raises:
            ValueError: ``total`` < 1, ``start`` or a key step outside ``0 .. total - 1``, unknown ``kind``.
        """
        if (self.key_steps is None or isinstance(self.key_steps, str)) and total >= 1:
            resolved = scale_published_key_steps(self.key_steps or kind, total)
        else:
            resolved = resolve_key_steps("key_steps", self.key_steps, total)
        default = DEFAULT_MAX_PARALLEL["cpu" if device == "cpu" else "accelerator"]
        most = (self.max_parallel or default) if self.parallel else 1
        keys = count_from(start, resolved, total)
        return Plan(total=total, key_steps=keys, max_batch=most, batches=batches, start=start)


@dataclass(frozen=True)
class FeatureReuse:
    """Run the whole UNet at key steps only, and its outer layers in between, around the deep feature of a key step.

    A reuse step sees the current latents, which a step under :class:`EncoderPropagation` does not.  It computes conv_in
    and the first ``branch`` skips anew.  The up blocks then begin with the resnet that takes the last of these skips.
    Its other input is the cached deep feature.

    Sources: DeepCache (arXiv 2312.00858), sections 3.2 (branches), 3.3 (uniform and non-uniform spacing); for
    ``extrapolate``, TaylorSeer (arXiv 2503.06923), but through the features themselves instead of their differences.

    Args:
        interval: which steps are key steps, counted from the first one that a run executes, which always is one.
            - An int m: every m-th step; with ``schedule="quadratic"`` on average.
            - A float below 1: at most this share of the schedule apart.  0.08 is every 4th of 50 steps.
            - A sequence: these steps, 0 among them.
        branch: how many skips a reuse step computes anew, besides that of conv_in; 0 is the cheapest.  0 is the default
            of DeepCache's package.  The authors' tables are of 1: their pipelines' layer l and block b is branch
            3 * l + b + 1.
        schedule: "uniform" spaces key steps evenly; with "quadratic" they are closer together around ``center``.  This
            is what one would mean by it, but not the released code's list: that raises a negative number to a broken
            power and keeps the real part.  For 50 steps, interval 5, power 1.4 and center 15 it has 0, 5, 9, 13, 17,
            21, 26, 31, 37, 43.
        center: where key steps are closest together, as a share of the schedule after the first executed step.
        power: how fast their distances grow away from ``center``; with 1 they are even.
        extrapolate: 0 takes the feature of the last key step; 1 and 2 extrapolate over the last two or three.

    Raises:
        TypeError, ValueError: a value of the wrong type or out of range.
    """

    interval: int | float | Iterable[int] = 3
    branch: int = 0
    schedule: str = "uniform"
    center: float = 0.3
    power: float = 1.4
    extrapolate: int = 0
    order: InitVar[int | None] = None

    def __post_init__(self, order: int | None) -> None:
        if self.interval is None or callable(self.interval):
            raise TypeError(f"interval must be an int, a float or a sequence of ints, got {self.interval!r}")
        object.__setattr__(self, "interval", check_key_steps(self.interval, "interval"))
        if check_int("branch", self.branch) < 0:
            raise ValueError(f"branch must not be negative, got {self.branch}")
        if self.schedule not in ("uniform", "quadratic"):
            raise ValueError(f'schedule must be "uniform" or "quadratic", got {self.schedule!r}')
        if not 0 <= self.center <= 1:
            raise ValueError(f"center must lie between 0 and 1, got {self.center}")
        if not 1 <= self.power < math.inf:
            raise ValueError(f"power must be at least 1, got {self.power}")
        _check_degree(self, order)

    def plan(self, total: int, *, start: int = 0) -> Plan:
        """Return the plan of a schedule with ``total`` UNet calls; its key steps are counted from the step ``start``.

        Raises:
            ValueError: ``total`` < 1, or ``start`` or a key step outside ``0 .. total - 1``.
        """
        keys = resolve_key_steps("interval", self.interval, total)
        if isinstance(self.interval, (int, float)) and self.schedule == "quadratic":
            keys = space_key_steps(total, len(keys), self.center * (total - 1), self.power)
        keys, reuse = count_from(start, keys, total), OuterReuse(self.branch, self.extrapolate)
        return Plan(total=total, key_steps=keys, max_batch=1, reuse=reuse, start=start)


@dataclass(frozen=True)
class CfgReuse:
    """Run both halves of classifier-free guidance's batch at some key steps, and only the conditional half elsewhere.

    The difference between the halves changes slowly over the steps.  Where only the conditional half runs, the other
    is taken to be the conditional half less their difference at the last step that ran both.

    Source: CFG-Cache in FasterCache (arXiv 2410.19355), without its weighting of frequencies.

    Args:
        interval: how far apart the key steps that run both halves are, at least: a number of steps, or a float below 1
            for a share of the schedule.
        start: the share of the schedule before which all steps run both halves.

    Raises:
        TypeError, ValueError: a value of the wrong type or out of range.
    """

    interval: int | float = 2
    start: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.interval, (int, float)) and not hasattr(self.interval, "__index__"):
            raise TypeError(f"interval must be an int or a float, got {self.interval!r}")
        object.__setattr__(self, "interval", check_key_steps(self.interval, "interval"))
        if not 0 <= self.start <= 1:
            raise ValueError(f"start must lie between 0 and 1, got {self.start}")

    def apply(self, plan: Plan) -> Plan:
        """Return the plan with the steps that run the conditional half alone; full steps never do."""
        total = plan.total
        apart = self.interval if isinstance(self.interval, int) else max(1, round(self.interval * total))
        both, last = set(), -apart
        for key in plan.key_steps:
            early = key < self.start * total
            if early or key - last >= apart or key in plan.full_steps:
                both.add(key)
                last = key
            if early:
                both.update(range(key, min(plan.segment_end(key), math.ceil(self.start * total))))
        both.update(plan.forecasts)
        return replace(plan, halves=tuple(step for step in range(plan.start, total) if step not in both))


#: How steps share work: rules for schedules of any length, or a plan for those of its own.
Sharing = EncoderPropagation | FeatureReuse | OutputForecast | MeasuredPlan | Plan


def _check_degree(config: EncoderPropagation | FeatureReuse, order: int | None) -> None:
    """Take ``order``, the old name of ``extrapolate``, and check the degree."""
    if order is not None:
        warn_renamed(f"{type(config).__name__}(order=)", f"{type(config).__name__}(extrapolate=)", stacklevel=5)
        if config.extrapolate:
            raise TypeError("order is the old name of extrapolate: give one of them")
        object.__setattr__(config, "extrapolate", order)
    if check_int("extrapolate", config.extrapolate) not in (0, 1, 2):
        raise ValueError(f"extrapolate must be 0, 1 or 2, got {config.extrapolate}")
