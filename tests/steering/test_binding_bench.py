"""The binding table's record: a run of some ways keeps the others' rows, if they are of the same things."""

import bench_binding
import pytest

BEFORE = {
    **{"model": "m", "prompts": 100, "seeds": 2, "steps": 50, "batch": 10, "numbers": {"step_size": 0.3}},
    "rows": {"stock": {"binding": 0.7}, "attribute": {"binding": 0.5}, "a way of old": {"binding": 0.1}},
}


def test_rows_of_other_ways_stay_in_their_order():
    now = {**BEFORE, "device": "another", "rows": {"stock": {"binding": 0.71}, "object": {"binding": 0.6}}}
    rows = bench_binding.keep_rows(BEFORE, now)
    assert list(rows) == ["stock", "object", "attribute"]
    assert rows["stock"] == {"binding": 0.71}
    assert rows["attribute"] == {"binding": 0.5}


@pytest.mark.parametrize(("key", "value"), [("model", "n"), ("steps", 20), ("numbers", {"step_size": 1.0})])
def test_rows_of_other_things_do_not_stay(key, value):
    now = {**BEFORE, key: value, "rows": {"stock": {"binding": 0.71}}}
    assert bench_binding.keep_rows(BEFORE, now) == {"stock": {"binding": 0.71}}
