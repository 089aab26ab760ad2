"""The file of tune's measurements: several writers, damage, and disks that are full."""

import json
import math
import re
import threading

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from small_disk import small_disk

from difffast.tuning.cache import Measurements
from difffast.tuning.runs import compare

ERRORS = {"psnr_db": 30.0, "latent_error": 0.25}


def entry(*repeats, **errors):
    return {"repeats": list(repeats), **(errors or ERRORS)}


def test_two_writers_keep_what_the_other_has_added(tmp_path):
    path = tmp_path / "plans.json"
    one, two, third = Measurements(path, "k"), Measurements(path, "k"), Measurements(path, "other")
    one.add("a", "p", 2.0, **ERRORS)
    two.add("a", "p", 1.0, **ERRORS)
    third.add("stock", "p", 9.0)
    one.add("b", "p", 3.0, **ERRORS)
    two.add("a", "q", 4.0, **ERRORS)
    one.add("stock", "p", 5.0)
    assert json.loads(path.read_text()) == {
        "k": {"a": {"p": entry(2.0, 1.0), "q": entry(4.0)}, "b": {"p": entry(3.0)}, "stock": {"p": {"repeats": [5.0]}}},
        "other": {"stock": {"p": {"repeats": [9.0]}}},
    }
    assert one.count("a", "p") == 2
    assert one.column("a", ["p", "q"], "seconds") == (1.0, 4.0)
    assert one.column("a", ["q"], "psnr_db") == (30.0,)
    path.unlink()  # what one knows is not lost with the file
    one.add("b", "p", 2.5, **ERRORS)
    assert Measurements(path, "k").column("a", ["p"], "seconds") == (1.0,)
    assert Measurements(path, "k").count("b", "p") == 2


def test_writers_at_the_same_time_lose_nothing(tmp_path):
    path = tmp_path / "plans.json"
    (tmp_path / "plans.part").write_text("the user's own")
    failed = []

    def add_many(name):
        try:
            kept = Measurements(path, "k")
            for number in range(60):
                kept.add(name, str(number), 1.0, **ERRORS)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=add_many, args=(name,)) for name in "abc"]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert failed == []
    content = json.loads(path.read_text())["k"]
    assert {name: len(prompts) for name, prompts in content.items()} == {"a": 60, "b": 60, "c": 60}
    assert (tmp_path / "plans.part").read_text() == "the user's own"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "holds something that is no JSON (Expecting value"),
        ("{", "holds something that is no JSON (Expecting property name"),
        ("[" * 100_000, "holds something that is no JSON (maximum recursion depth"),
        (b"\xff\xfe\xff", "holds something that is no JSON ("),
        ([1, 2], "holds [1, 2]"),
        ({"k": 3}, "holds no object under k: 3"),
        ({"k": {"a": [1]}}, "holds no object under a: [1]"),
        ({"k": {"a": {"p": 1}}}, "holds no object under a, 'p': 1"),
        ({"k": {"a": {"p": {}}}}, "holds repeats of a, 'p' that are no positive seconds: None"),
        ({"k": {"a": {"p": entry(1.0, -2.0)}}}, "that are no positive seconds: [1.0, -2.0]"),
        ({"k": {"a": {"p": entry(math.nan)}}}, "that are no positive seconds: [nan]"),
        ({"k": {"a": {"p": entry(math.inf)}}}, "that are no positive seconds: [inf]"),
        ({"k": {"a": {"p": entry(10**400)}}}, "that are no positive seconds: [1000"),
        ({"k": {"a": {"p": entry(True)}}}, "that are no positive seconds: [True]"),
        ({"k": {"a": {"p": entry("1")}}}, "that are no positive seconds: ['1']"),
        ({"k": {"a": {"p": entry()}}}, "that are no positive seconds: []"),
        ({"k": {"stock": {"p": {"repeats": 3}}}}, "that are no positive seconds: 3"),
        ({"k": {"a": {"p": entry(1.0, psnr_db=3.0)}}}, "holds latent_error of a, 'p': None"),
        ({"k": {"a": {"p": entry(1.0, psnr_db=math.nan, latent_error=0)}}}, "holds psnr_db of a, 'p': nan"),
        ({"k": {"a": {"p": entry(1.0, psnr_db=3.0, latent_error=-1)}}}, "holds latent_error of a, 'p': -1"),
        ({"k": {"a": {"p": entry(1.0, psnr_db=3.0, latent_error="x")}}}, "holds latent_error of a, 'p': 'x'"),
    ],
    ids=lambda each: "" if isinstance(each, str) and "holds" in each else repr(each)[:40],
)
def test_a_damaged_file_is_refused_by_name_and_left_alone(tmp_path, content, message):
    path = tmp_path / "plans.json"
    if not isinstance(content, (str, bytes)):
        content = json.dumps(content)
    content = content if isinstance(content, bytes) else content.encode()
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"^{re.escape(str(path))} must hold .*{re.escape(message)}") as raised:
        Measurements(path, "k")
    assert len(str(raised.value)) < len(str(path)) + 300
    assert path.read_bytes() == content


#: What JSON can hold, and what is nearly an entry.
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)
REPEATS = st.lists(st.floats(0.1, 9) | JSON_VALUES, max_size=3) | JSON_VALUES
ENTRIES = st.fixed_dictionaries(
    {"repeats": REPEATS}, optional={name: st.floats(0, 9) | JSON_VALUES for name in (*ERRORS, "seconds")}
)
PROMPTS = st.dictionaries(st.sampled_from(["p", "q"]), ENTRIES | JSON_VALUES, max_size=2) | JSON_VALUES


@pytest.mark.slow
@settings(max_examples=1000, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.dictionaries(st.sampled_from(["k", "other"]), st.dictionaries(st.sampled_from(["a", "stock"]), PROMPTS)))
def test_any_json_is_measurements_or_a_value_error(tmp_path, content):
    path = tmp_path / "plans.json"
    path.write_text(json.dumps(content))
    before = path.read_bytes()
    try:
        kept = Measurements(path, "k")
    except ValueError:
        kept = None
    assert path.read_bytes() == before
    if kept is None:
        return
    kept.add("a", "p", 1.0, **ERRORS)
    assert 0 < kept.column("a", ["p"], "seconds")[0] <= 1
    again = Measurements(path, "k")
    assert again.count("a", "p") == kept.count("a", "p") >= 1


def test_what_tune_itself_writes_is_read(tmp_path):
    path = tmp_path / "plans.json"
    kept = Measurements(path, "k")
    kept.add("exact", "p", 1.0, psnr_db=math.inf, latent_error=0.0)
    kept.add("broken", "p", 1.0, psnr_db=-math.inf, latent_error=math.inf)
    again = Measurements(path, "k")
    assert again.column("exact", ["p"], "psnr_db") == (math.inf,)
    assert again.column("broken", ["p"], "latent_error") == (math.inf,)
    # Version 0.2 wrote the least of the repeats as well.
    path.write_text(json.dumps({"k": {"a": {"p": {**entry(3.0, 2.0), "seconds": 2.0}}}}))
    assert Measurements(path, "k").column("a", ["p"], "seconds") == (2.0,)


def test_results_that_are_not_finite_are_the_worst(pipe):
    wrong = compare(pipe, torch.full((1, 4, 8, 8), math.nan), torch.ones(1, 4, 8, 8))
    assert wrong == {"psnr_db": -math.inf, "latent_error": math.inf}


@pytest.mark.parametrize("path", ["/proc/nothing/plans.json", "/dev/full", "{folder}"])
def test_a_place_that_keeps_nothing_is_refused_at_once(tmp_path, path):
    path = path.replace("{folder}", str(tmp_path))
    with pytest.raises((OSError, ValueError), match=re.escape(path)):
        Measurements(path, "k")


def test_a_disk_that_fills_up_costs_a_warning_and_no_measurement(tmp_path):
    path = tmp_path / "plans.json"
    kept = Measurements(path, "k")
    kept.add("a", "p", 1.0, **ERRORS)
    before = path.read_text()
    with small_disk(10), pytest.warns(UserWarning, match=rf"in memory only: .*{re.escape(str(path))}"):
        kept.add("b", "p", 2.0, **ERRORS)
    with small_disk(10):
        kept.add("b", "p", 3.0, **ERRORS)  # the second time without a word
    assert path.read_text() == before
    assert kept.column("b", ["p"], "seconds") == (2.0,)
    assert kept.count("b", "p") == 2
    path.write_text("{")  # somebody else's damage is not overwritten
    kept.add("b", "p", 4.0, **ERRORS)
    assert path.read_text() == "{"
    path.write_text(before)
    kept.add("c", "p", 5.0, **ERRORS)
    again = Measurements(path, "k")
    assert again.column("b", ["p"], "seconds") == (2.0,)
    assert again.count("b", "p") == 3
    assert sorted(each.name for each in tmp_path.iterdir()) == [".plans.json.lock", "plans.json"]
