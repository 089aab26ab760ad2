"""Plans with forecasts: by hand, as a picture, and which are refused."""

import pytest

from difffast import OutputForecast, Plan

# Plans as data, and what is refused.


def test_the_plan_by_hand():
    plan = OutputForecast(3, start=0.4).plan(15)
    assert plan.key_steps == (0, 1, 2, 3, 4, 5, 8, 11, 14)
    assert plan.forecasts == (6, 7, 9, 10, 12, 13)
    assert Plan.from_json(plan.to_json()) == plan
    text = str(plan)
    assert "forecast, degree 0" in text
    assert "6 run nothing: their output is forecast" in text
    assert OutputForecast(2, extrapolate=1).plan(10).forecast_degree(4) == 1
    assert OutputForecast(3, extrapolate=1).plan(10).forecast_degree(4) == 0, "a row of two"
    assert plan.cut(8).forecasts == (6, 7)
    assert plan.add_full_steps([6]).forecasts == (7, 9, 10, 12, 13)


def test_the_picture_of_a_plan(tmp_path):
    OutputForecast(3).plan(15).plot(tmp_path / "plan.png")
    assert (tmp_path / "plan.png").stat().st_size > 1000


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"key_steps": 0}, ValueError, "key_steps"),
        ({"key_steps": True}, TypeError, "key_steps"),
        ({"key_steps": "sd"}, TypeError, "key_steps"),
        ({"key_steps": [1, 2]}, ValueError, r"key_steps must contain 0 .* got \(1, 2\)"),
        ({"start": 1.5}, ValueError, "start must lie between 0 and 1, got 1.5"),
        ({"start": "0.4"}, TypeError, "start must be a number, got '0.4'"),
        ({"extrapolate": 2}, ValueError, "extrapolate must be 0 or 1, got 2"),
        ({"longest": 0}, ValueError, "longest must be at least 1, got 0"),
        ({"guard": 0}, ValueError, "guard must be positive and finite, or None, got 0"),
        ({"guard": float("nan")}, ValueError, "guard must be positive and finite, or None, got nan"),
    ],
)
def test_what_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        OutputForecast(**options)


@pytest.mark.parametrize(
    ("forecast", "message"),
    [
        (OutputForecast([0, 2, 11], longest=3), "at most 3 steps in a row may be forecast, got 4 up to step 6"),
        (OutputForecast([0, *range(2, 12)], extrapolate=1), "a forecast of degree 1 needs 2 steps that run before it"),
    ],
)
def test_plans_that_are_refused(forecast, message):
    with pytest.raises(ValueError, match=message):
        forecast.plan(12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"forecasts": (0,)}, r"forecasts must lie in 1 \.\. 11, got 0"),
        ({"forecasts": (12,)}, r"forecasts must lie in 1 \.\. 11, got 12"),
        ({"forecasts": (4, 3)}, "forecasts must increase strictly"),
        ({"forecasts": (2,)}, "step 2 is a forecast, and so no key step and no half step"),
        ({"forecasts": (3,), "halves": (3,)}, "step 3 is a forecast, and so no key step and no half step"),
        ({"forecasts": (3,), "guard": -1.0}, "guard must be positive and finite"),
        ({"forecasts": (3,), "extrapolate": 2}, "extrapolate must be 0 or 1, got 2"),
    ],
)
def test_wrong_plans(options, message):
    with pytest.raises(ValueError, match=message):
        Plan(12, (0, 1, 2, 6), max_batch=1, **options)
