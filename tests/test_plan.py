import importlib.util
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from difffast import CfgReuse, EncoderPropagation, FeatureReuse, Plan
from difffast.plan import PUBLISHED_KEY_STEPS, scale_published_key_steps


def test_published_lists_are_exact():
    assert EncoderPropagation().plan(50).key_steps == (0, 1, 2, 3, 5, 10, 15, 25, 35)
    assert EncoderPropagation().plan(20).key_steps == (0, 1, 2, 3, 5, 10, 15)


@given(st.integers(8, 1000))
def test_scaled_lists_keep_the_published_shares(total):
    keys = scale_published_key_steps("sd", total)
    assert keys[0] == 0
    assert all(a < b < total for a, b in itertools.pairwise(keys))
    shares = [(length - orders[-1]) / length for length, orders in PUBLISHED_KEY_STEPS["sd"].items()]
    once_more = total - 1 in PUBLISHED_KEY_STEPS["sd"]
    assert (total - once_more - keys[-1]) / total <= max(shares)


def test_pndm_calls_the_unet_once_more_and_keeps_the_list():
    """As in the release, which counts its list in calls of the UNet."""
    assert scale_published_key_steps("sd", 51) == (0, 1, 2, 3, 5, 10, 15, 25, 35)
    assert scale_published_key_steps("sd", 21) == (0, 1, 2, 3, 5, 10, 15)
    assert scale_published_key_steps("personalised", 51)[-2:] == (35, 40)


@pytest.mark.parametrize(
    ("kind", "total", "count", "some"),
    [
        ("if-1", 25, 13, (9, 10, 15, 20)),
        ("if-1", 50, 18, (35, 40, 45)),
        ("if-1", 100, 40, (85, 86, 87, 99)),
        ("if-2", 25, 23, (19, 20, 22, 24)),
        ("if-2", 50, 40, (20, 22, 38, 40, 41, 49)),
        ("upscaler", 50, 9, (0, 2, 5, 9, 14, 20, 27, 35, 44)),
        ("upscaler", 75, 11, (54, 65)),
    ],
)
def test_published_rules_hold_for_the_steps_as_they_are(kind, total, count, some):
    """The release runs DeepFloyd IF with 25 steps and the upscaler with 50 by the rules that it has for 100 and 75."""
    keys = scale_published_key_steps(kind, total)
    assert len(keys) == count
    assert set(some) <= set(keys)


def test_key_steps_are_counted_from_the_first_executed_step():
    assert FeatureReuse(5).plan(50, start=18).key_steps == (18, 23, 28, 33, 38, 43, 48)
    assert EncoderPropagation().plan(50, start=20).key_steps == (20, 21, 22, 23, 25, 30, 35, 45)
    assert EncoderPropagation(key_steps=0.06).plan(50, start=40).key_steps == (40, 43, 46, 49)
    later = CfgReuse(6).apply(FeatureReuse(3).plan(20, start=10))
    assert later.halves == (11, 12, 13, 14, 15, 17, 18, 19)
    assert Plan.from_json(later.to_json()) == later
    assert str(later).splitlines()[1].split()[:2] == ["10", "key"]
    assert str(later).endswith("4 of 10 steps run the whole UNet")
    assert [row.step for row in later.steps() if row.key] == [10, 13, 16, 19]


@given(st.data())
def test_batches_cover_every_step_once_and_never_cross_a_key(data):
    total = data.draw(st.integers(1, 120))
    keys = data.draw(st.sets(st.integers(0, total - 1))) | {0}
    cap = data.draw(st.integers(1, 20))
    start = data.draw(st.integers(0, total - 1))
    rows = EncoderPropagation(key_steps=keys, max_parallel=cap).plan(total, start=start).steps()
    assert [row.step for row in rows] == list(range(start, total))
    assert rows[0].key
    for row in rows:
        assert row.step in row.decoded_with
        assert len(row.decoded_with) <= cap
        assert not any(order - start in keys for order in row.decoded_with[1:])
        assert row.key == (row.step - start in keys)


def test_a_long_segment_is_cut_evenly():
    plan = EncoderPropagation(key_steps=[0], max_parallel=5).plan(12)
    assert [len(row.decoded_with) for row in plan.steps() if row.step == row.decoded_with[0]] == [4, 4, 4]


def test_forms_of_key_steps():
    assert EncoderPropagation(key_steps=4).plan(10).key_steps == (0, 4, 8)
    assert EncoderPropagation(key_steps=[3, 0, 3]).plan(10).key_steps == (0, 3)
    assert EncoderPropagation(key_steps=range(0, 9, 3)).plan(10).key_steps == (0, 3, 6)
    assert EncoderPropagation(key_steps=lambda step, total: step == total // 2).plan(10).key_steps == (0, 5)
    assert EncoderPropagation(key_steps=1).plan(3).key_steps == (0, 1, 2)


@pytest.mark.parametrize(("total", "interval"), [(1, 1), (33, 1), (34, 2), (49, 2), (50, 3), (100, 6)])
def test_a_share_of_the_schedule_between_key_steps(total, interval):
    assert EncoderPropagation(key_steps=0.06).plan(total).key_steps == tuple(range(0, total, interval))


def test_step_by_step_and_capped_plans():
    assert EncoderPropagation(parallel=False).plan(50).max_batch == 1
    assert EncoderPropagation(max_parallel=3).plan(50).max_batch == 3
    assert EncoderPropagation().plan(50).max_batch == 2
    assert EncoderPropagation().plan(50, device="cuda").max_batch == 4


def test_prints_as_a_table():
    text = str(EncoderPropagation(key_steps=[0, 1], max_parallel=3).plan(4))
    assert text.splitlines() == [
        "step  key  decoded with",
        "   0  key  alone",
        "   1  key  1..3 (batch of 3)",
        "   2       1..3 (batch of 3)",
        "   3       1..3 (batch of 3)",
        "2 of 4 steps run the encoder",
    ]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"key_steps": [1, 2]}, ValueError, r"must contain 0 .* got \(1, 2\)"),
        ({"key_steps": []}, ValueError, r"must contain 0"),
        ({"key_steps": [-1, 0]}, ValueError, r"no negative, got \(-1, 0\)"),
        ({"key_steps": 0}, ValueError, "at least 1, got 0"),
        ({"key_steps": 2.5}, ValueError, "between 0 and 1, got 2.5"),
        ({"key_steps": 0.0}, ValueError, "between 0 and 1, got 0.0"),
        ({"key_steps": float("nan")}, ValueError, "between 0 and 1, got nan"),
        ({"key_steps": True}, TypeError, "integers, got True"),
        ({"key_steps": [0, 1.5]}, TypeError, "integers, got 1.5"),
        ({"key_steps": "0,1"}, ValueError, "no published key steps for '0,1'"),
        ({"max_parallel": 0}, ValueError, "max_parallel must be at least 1 .* got 0"),
        ({"max_parallel": 1.0}, TypeError, "max_parallel must hold integers, got 1.0"),
        ({"parallel": 1}, TypeError, "parallel must be True or False, got 1"),
        ({"prior_noise": -0.1}, ValueError, "not negative, got -0.1"),
        ({"prior_noise": float("nan")}, ValueError, "finite"),
        ({"prior_noise": "much"}, TypeError, "a number or None, got 'much'"),
    ],
)
def test_bad_configuration(options, error, message):
    with pytest.raises(error, match=message):
        EncoderPropagation(**options)


def test_bad_schedules():
    with pytest.raises(ValueError, match=r"key_steps contains 30, but the schedule has steps 0 .. 19"):
        EncoderPropagation(key_steps=[0, 30]).plan(20)
    with pytest.raises(ValueError, match="at least one step, got 0"):
        EncoderPropagation().plan(0)
    with pytest.raises(ValueError, match="no published key steps for 'dit'"):
        scale_published_key_steps("dit", 20)
    with pytest.raises(ValueError, match="key_steps must increase strictly"):
        Plan(total=5, key_steps=(0, 2, 2), max_batch=1)
    with pytest.raises(ValueError, match=r"start must lie in 0 .. 4, got 5"):
        FeatureReuse(2).plan(5, start=5)
    with pytest.raises(ValueError, match=r"key_steps must begin with 2 and end before step 5, got 0 .. 3"):
        Plan(total=5, key_steps=(0, 3), max_batch=1, start=2)


def test_plans_need_no_torch():
    folder = str(Path(importlib.util.find_spec("difffast").origin).parent)
    code = (
        "import sys, types; sys.modules['torch'] = None\n"
        f"package = types.ModuleType('difffast'); package.__path__ = [{folder!r}]; sys.modules['difffast'] = package\n"
        "from difffast.presets import PRESETS; print(PRESETS['faster-diffusion'].propagation.plan(50))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "9 of 50 steps run the encoder" in result.stdout


def test_optimised_steps_are_key_steps():
    plan = Plan(total=10, key_steps=(0, 5), max_batch=3).add_full_steps((2, 0, 1))
    assert plan.key_steps == (0, 1, 2, 5)
    assert plan.full_steps == (0, 1, 2)
    assert [row.decoded_with for row in plan.steps()[:4]] == [(0,), (1,), (2, 3, 4), (2, 3, 4)]
    lines = str(plan).splitlines()
    assert ["optimised" in line for line in lines[1:5]] == [True, True, True, False]
    with pytest.raises(ValueError, match="must be key steps"):
        Plan(total=10, key_steps=(0, 5), max_batch=3, full_steps=(1,))


@pytest.mark.parametrize(
    "plan",
    [
        EncoderPropagation().plan(50, batches=(1, 2, 4)),
        EncoderPropagation().plan(20).add_full_steps((0, 1, 7)),
        FeatureReuse(0.1, branch=2, extrapolate=1).plan(50),
        FeatureReuse((0, 3)).plan(9),
    ],
    ids=str,
)
def test_plans_go_through_json(plan):
    assert Plan.from_json(plan.to_json()) == plan


@pytest.mark.parametrize(
    "text", ["", "[]", '{"total": 3}', '{"total": 3, "keys": [1], "max_batch": 1}', '{"steps": 3}']
)
def test_what_is_no_plan_is_refused(text):
    with pytest.raises(ValueError, match="plan"):
        Plan.from_json(text)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"total": 1_000_000_000}, "total must lie in 1 .. 100000, got 1000000000"),
        ({"total": 0}, "total must lie in 1 .. 100000, got 0"),
        ({"total": True}, "total must hold integers, got True"),
        ({"total": "5"}, "total must hold integers, got '5'"),
        ({"max_batch": 1.5}, "max_batch must hold integers, got 1.5"),
        ({"max_batch": float("nan")}, "max_batch must hold integers, got nan"),
        ({"max_batch": True}, "max_batch must hold integers, got True"),
        ({"max_batch": 0}, "max_batch must be at least 1, got 0"),
        ({"key_steps": [0, True]}, "key_steps must hold integers, got True"),
        ({"key_steps": {"0": 1}}, "key_steps must be a sequence of integers, got {'0': 1}"),
        ({"key_steps": None}, "key_steps must be a sequence of integers, got None"),
        ({"key_steps": []}, "key_steps must begin with 0 and end before step 5, got none"),
        ({"key_steps": [0, 5]}, "key_steps must begin with 0 and end before step 5, got 0 .. 5"),
        ({"key_steps": [0, 3, 2]}, "key_steps must increase strictly, got 2 after 3"),
        ({"batches": {"0": 1}}, "batches must be a sequence of integers, got {'0': 1}"),
        ({"batches": [2]}, "batches must ascend from 1, got (2,)"),
        ({"full_steps": [1]}, "full_steps must be key steps, got 1, which is none"),
        ({"halves": "12"}, "halves must be a sequence of integers, got '12'"),
        ({"halves": [3, 1]}, "halves must increase strictly, got 1 after 3"),
        ({"halves": [5]}, "halves must lie in 1 .. 4 and not be full steps, got 5"),
        ({"reuse": 3}, "reuse must be an object with a branch, got 3"),
        ({"reuse": {"branch": "x"}}, "branch must hold integers, got 'x'"),
        ({"reuse": {"branch": -1}}, "branch must not be negative, got -1"),
        ({"reuse": {"branch": 0, "extrapolate": 3}}, "extrapolate must be 0, 1 or 2, got 3"),
        ({"reuse": {"branch": 0}, "max_batch": 2}, "reuse steps depend on the latents: max_batch must be 1, got 2"),
        ({"steps": 3}, "a plan has no 'steps'; it has total, key_steps, max_batch, batches, reuse, full_steps, halves"),
        ({"keys": [0]}, "'keys' must be given once"),
        ({"key_steps": ["a" * 10_000]}, "key_steps must hold integers, got 'aaa"),
    ],
    ids=lambda each: repr(each)[:40] if isinstance(each, dict) else "",
)
def test_what_is_no_plan_says_what_is_required(fields, message):
    text = json.dumps({"total": 5, "key_steps": [0], "max_batch": 1, **fields})
    with pytest.raises(ValueError, match=f"^this is no plan in JSON: {re.escape(message)}") as raised:
        Plan.from_json(text)
    assert len(str(raised.value)) < 400


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"total":' * 100_000, "\ud800", "1" * 10_000, "null", '{"max_batch": 1}']
)
def test_text_that_is_no_plan(text):
    with pytest.raises(ValueError, match=r"^this is no plan in JSON: "):
        Plan.from_json(text)


#: What JSON can hold, with the values that plans are made of more often than chance would have them.
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 12) | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
STEPS = st.sets(st.integers(0, 11), max_size=6).map(lambda each: sorted({0} | each)) | JSON_VALUES
REUSE = st.fixed_dictionaries({"branch": st.integers(0, 3) | JSON_VALUES}, optional={"extrapolate": JSON_VALUES})
PLANS = st.fixed_dictionaries(
    {"total": st.integers(1, 12) | JSON_VALUES, "key_steps": STEPS, "max_batch": st.integers(1, 3) | JSON_VALUES},
    optional={
        "batches": st.none() | STEPS,
        "reuse": st.none() | REUSE | JSON_VALUES,
        "full_steps": STEPS,
        "halves": STEPS | st.sets(st.integers(1, 11)).map(sorted),
        "keys": STEPS,
        "": JSON_VALUES,
    },
)


@pytest.mark.slow
@settings(max_examples=2_000, deadline=None)
@given(PLANS | JSON_VALUES)
def test_any_json_is_a_plan_that_travels_or_a_value_error(value):
    try:
        plan = Plan.from_json(json.dumps(value))
    except ValueError:
        return
    numbers = (plan.total, plan.max_batch, *plan.key_steps, *(plan.batches or ()), *plan.full_steps, *plan.halves)
    assert all(type(each) is int and each >= 0 for each in numbers)
    assert Plan.from_json(plan.to_json()) == plan
    assert [row.step for row in plan.steps()] == list(range(plan.total))


@pytest.mark.parametrize("plan", [EncoderPropagation().plan(20), FeatureReuse(4).plan(20)], ids=["decoders", "reuse"])
def test_plans_are_drawn(plan, tmp_path):
    matplotlib = pytest.importorskip("matplotlib.axes")
    drawn = []
    add = matplotlib.Axes.add_patch

    def counted(self, patch):
        drawn.append(patch)
        return add(self, patch)

    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(matplotlib.Axes, "add_patch", counted)
        plan.plot(tmp_path / "plan.png")
    keys, others = len(plan.key_steps), plan.total - len(plan.key_steps)
    filled = [patch for patch in drawn if patch.get_fill()]
    assert len(filled) == 4 * keys + others  # a key step runs everything, the others one part
    assert (len(filled) < len(drawn)) == (plan.reuse is None)  # frames around decoders that run together
    assert (tmp_path / "plan.png").stat().st_size > 5000
