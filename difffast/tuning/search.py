"""Plans that are made to measure for one pipeline and call: a profile of its steps, and the search in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from ..patch import patched
from ..plan import EncoderPropagation, Plan
from ..plan.search import FoundPlan, RowCost, search_plans
from ..sites import find_site
from ..target import Target
from .costs import Profiles
from .profile import Profile, Stopped, Trial
from .runs import run_once

#: Kinds of steps that one plan may mix.
_MIXED = (
    ("forecast", "half", "outer"),
    ("line", "forecast", "half", "outer"),
    ("forecast", "half", "decoder"),
)


class PlanSearch:
    """Finds plans by measuring what rows of steps cost on a few prompts.

    Args:
        pipe: the pipeline.
        steps: denoising steps.
        prompts: the prompts to measure on, prompt i with seed i.
        call: further arguments of the pipeline's call.
        kept: profiles of earlier calls.
    """

    def __init__(self, pipe: Any, steps: int, prompts: Sequence[str], call: Mapping[str, Any], kept: Profiles) -> None:
        self._pipe, self._steps, self._prompts, self._call, self._kept = pipe, steps, prompts, call, kept

    def find(self, show: Callable[[int], None]) -> list[FoundPlan]:
        """Return the fastest plans for each error, fastest first; none where steps are not what a plan can change.

        Args:
            show: is told how many runs of the pipeline are still to come, whenever that changes.
        """
        with patched(self._pipe, "exact"):
            profile = self._begin()
            if profile is None:
                return []
            missing = [prompt for prompt in self._prompts if prompt not in self._kept]
            runs = len(missing) * profile.count_trials()
            show(runs)
            for prompt in self._prompts:
                if prompt in self._kept:
                    profile.measured.append(self._kept[prompt])
                    continue
                for _ in profile.measure(prompt):
                    runs -= 1
                    show(runs)
                self._kept.add(prompt, profile.measured[-1])
        return list(_search(profile))

    def _begin(self) -> Profile | None:
        """Return an empty profile, or None where the pipeline's UNet calls do not follow its schedule."""
        seen = Trial()
        self._run(EncoderPropagation(key_steps=1), seen, self._prompts[0])
        called = seen.record.calls
        if not called or called != list(range(called[0], called[-1] + 1)):
            return None
        return Profile(self._run, range(called[0], called[-1] + 1), seen.total, list_kinds(Target.of(self._pipe)))

    def _run(self, asked: Plan | EncoderPropagation, trial: Trial, prompt: str) -> Tensor | None:
        site = find_site(self._pipe)
        assert site is not None  # patched by find
        settings = site.settings
        settings.propagation, settings.extensions = asked, (trial,)
        try:
            return run_once(self._pipe, prompt, self._prompts.index(prompt), self._steps, self._call)[1]
        except Stopped:
            return None


def list_kinds(target: Target) -> list[str]:
    """Return the kinds of steps that a pipeline can have in place of full ones."""
    kinds = ["forecast", "line"]
    if not target.refuse_cfg_reuse():
        kinds.append("half")
    if target.support.reuse:
        kinds.append("outer")
    return [*kinds, "decoder"]


def _search(profile: Profile) -> Iterator[FoundPlan]:
    """Yield the plans that no other beats in what is expected of them, fastest first."""
    rows = profile.rows()
    found: list[FoundPlan] = []
    for kinds in _MIXED:
        found += search_plans(profile.end, [row for row in rows if _is_allowed(row, kinds)], start=profile.start)
    least = float("inf")
    for each in sorted(found, key=lambda each: (each.seconds, each.error)):
        if each.error < least:
            least = each.error
            yield replace(each, plan=each.plan.extend(profile.total))


def _is_allowed(row: RowCost, kinds: Sequence[str]) -> bool:
    """Return whether a row may be in a plan that mixes kinds; lone forecasts are of one degree."""
    lone_repeat = (row.kind, row.length) == ("forecast", 1) and "line" in kinds
    return row.length == 0 or (row.kind in kinds and not lone_repeat)
