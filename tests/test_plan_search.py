"""The search for plans, against every plan that there is."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from difffast.plan.search import RowCost, search_plans


def every_plan(total, rows):
    """(seconds, error) of every way to cut a schedule into rows."""
    if total == 0:
        yield 0.0, 0.0

    def cuts(step):
        if step == total:
            yield ()
        for row in rows:
            end = step + 1 + row.length
            if end <= total and math.isfinite(row.errors[step]):
                yield from (((step, row), *rest) for rest in cuts(end))

    for cut in cuts(0):
        yield sum(row.seconds for _, row in cut), sum(row.errors[step] for step, row in cut)


@st.composite
def costs(draw):
    total = draw(st.integers(1, 7))
    errors = st.lists(st.sampled_from([0.5, 1.0, 2.0, 7.0, math.inf]), min_size=total, max_size=total).map(tuple)
    rows = [RowCost("full", 0, 1.0, (0.0,) * total)]
    for kind, seconds in (("forecast", 0.0), ("half", 0.5), ("outer", 0.25)):
        rows += [RowCost(kind, length, 1 + length * seconds, draw(errors)) for length in (1, 2)]
    return total, rows


@given(costs())
def test_no_plan_is_better(case):
    total, rows = case
    found = search_plans(total, rows)
    every = sorted(every_plan(total, rows))
    assert found[-1].error == 0
    assert found[-1].seconds == total
    for each in found:
        assert each.error == min(error for seconds, error in every if seconds <= each.seconds + 1e-9)
        assert any(each.error == error and seconds == pytest.approx(each.seconds) for seconds, error in every)
    pairs = [(each.seconds, each.error) for each in found]
    assert pairs == sorted(pairs, key=lambda pair: (pair[0], -pair[1]))
    assert all(a[0] < b[0] and a[1] > b[1] for a, b in itertools.pairwise(pairs))
    # Every time that a plan can take has its best one.
    for seconds, error in every:
        assert any(s <= seconds + 1e-9 and e <= error for s, e in pairs)


@given(costs())
def test_plans_cost_what_they_are_said_to(case):
    total, rows = case
    cost = {row.kind: row.seconds - 1 for row in rows if row.length == 1}
    for each in search_plans(total, rows):
        plan = each.plan
        outer = total - len(plan.key_steps) - len(plan.forecasts)
        full = len(plan.key_steps) - len(plan.halves)
        assert each.seconds == pytest.approx(full + cost["half"] * len(plan.halves) + cost["outer"] * outer)
        assert (plan.reuse is not None) == (outer > 0)


def test_rows_that_are_no_good():
    alone = RowCost("full", 0, 1.0, (0.0,) * 3)
    with pytest.raises(ValueError, match="the key step alone"):
        search_plans(3, [RowCost("forecast", 1, 1.0, (1.0,) * 3)])
    with pytest.raises(ValueError, match="outer steps or decoder steps, not both"):
        search_plans(3, [alone, RowCost("outer", 1, 1.2, (1.0,) * 3), RowCost("decoder", 1, 1.6, (1.0,) * 3)])
