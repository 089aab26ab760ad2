"""How steps share work, as a user asks for it; each configuration resolves to a plan for a schedule."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import InitVar, dataclass, replace

from ..renamed import warn_renamed
from .key_steps import check_int, check_key_steps, publish_key_steps, resolve_key_steps, space_key_steps
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
    """Run the UNet's encoder at key steps only and decode the steps in between from its features.

    Source: Faster Diffusion (arXiv 2312.09608), sections 3.2 (propagation, parallel decoding), 3.3 (prior noise).

    Args:
        key_steps: which steps run the encoder.  None: the published table for the pipeline, scaled to the step
            count.  A string: the table of another kind in ``PUBLISHED_KEY_STEPS``.  A sequence of steps, containing 0.
            An int m: every m-th step.  A float below 1: evenly, at most this share of the schedule apart (0.06: every
            3rd of 50 steps, every step of 33 or fewer).  A callable ``(step, total) -> bool``.  The first step that a
            run executes is always a key step.
        parallel: decode all steps up to the next key step as one batch; False decodes one step at a time.
        max_parallel: most steps decoded in one batch (memory grows with it); None: ``DEFAULT_MAX_PARALLEL`` of the
            device.
        share_skips: compute what depends on the encoder's features alone once for all steps that share them (exact).
        prior_noise: strength of the initial noise that is added back to the latents in the second half of the
            schedule; the paper uses 0.003.  None: off.
        extrapolate: 0 takes the last key step's features; 1 and 2 extrapolate over the last two or three, as
            :class:`FeatureReuse` does (skips are not shared then).

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
            publish_key_steps(self.key_steps, 1)
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
            resolved = publish_key_steps(self.key_steps or kind, total)
        else:
            resolved = resolve_key_steps("key_steps", self.key_steps, total)
        default = DEFAULT_MAX_PARALLEL["cpu" if device == "cpu" else "accelerator"]
        most = (self.max_parallel or default) if self.parallel else 1
        return Plan(total=total, key_steps=resolved, max_batch=most, batches=batches)


@dataclass(frozen=True)
class FeatureReuse:
    """Run the whole UNet at key steps only; in between its outer layers alone, around the key step's deep feature.

    Unlike under :class:`EncoderPropagation`, a reuse step sees the current latents: conv_in and the first ``branch``
    skips are made anew, the up blocks run from the resnet that takes the last of these on, and that resnet's hidden
    input is the cached deep feature.

    Sources: DeepCache (arXiv 2312.00858), sections 3.2 (branches), 3.3 (uniform and non-uniform spacing); for
    ``extrapolate``, TaylorSeer (arXiv 2503.06923), but through the features themselves instead of their differences.

    Args:
        interval: an int m: every m-th step is a key step (on average, with ``schedule="quadratic"``).  A float below 1:
            at most this share of the schedule apart (0.08: every 4th of 50 steps).  A sequence: the key steps,
            containing 0.  The first step that a run executes is always a key step.
        branch: skips that a reuse step makes anew besides conv_in's; 0 is the cheapest.
        schedule: "uniform", or "quadratic": key steps are closer together around ``center``.
        center: where they are closest, as a share of the schedule.
        power: of the spacing around it, 1 being even.
        extrapolate: 0 takes the last key step's feature; 1 and 2 extrapolate over the last two or three.

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

    def plan(self, total: int) -> Plan:
        """Resolve to the plan of a schedule with ``total`` UNet calls.

        Raises:
            ValueError: ``total`` < 1, or a key step outside ``0 .. total - 1``.
        """
        keys = resolve_key_steps("interval", self.interval, total)
        if isinstance(self.interval, (int, float)) and self.schedule == "quadratic":
            keys = space_key_steps(total, len(keys), self.center * (total - 1), self.power)
        return Plan(total=total, key_steps=keys, max_batch=1, reuse=OuterReuse(self.branch, self.extrapolate))


@dataclass(frozen=True)
class CfgReuse:
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
        return replace(plan, halves=tuple(step for step in range(total) if step not in both))


#: How steps share features.
Sharing = EncoderPropagation | FeatureReuse


def _check_degree(config: Sharing, order: int | None) -> None:
    """Take ``order``, the old name of ``extrapolate``, and check the degree."""
    if order is not None:
        warn_renamed(f"{type(config).__name__}(order=)", f"{type(config).__name__}(extrapolate=)", stacklevel=5)
        object.__setattr__(config, "extrapolate", order)
    if check_int("extrapolate", config.extrapolate) not in (0, 1, 2):
        raise ValueError(f"extrapolate must be 0, 1 or 2, got {config.extrapolate}")
