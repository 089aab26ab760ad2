"""The benchmark of two processes against one: how it sums up what it has seen, and the model in docs/distributed.md."""

import pytest
from bench_distributed import Link, add_run, predict_speedup, summarise


def test_the_model_of_speed_up():
    """By hand: 10 s of which 8 are divided in two are 2 + 4; 100 calls of 1 ms and 1 GB at 2 GB/s are 0.6 s more."""
    assert predict_speedup(10.0, 8.0, 0.5) == pytest.approx(10 / 6)
    assert Link(1e-3, 2e9).cost(100, 10**9) == pytest.approx(0.6)
    assert predict_speedup(10.0, 8.0, 0.5, 0.6) == pytest.approx(10 / 6.6)


def test_what_was_measured_is_summarised():
    """By hand: a picture takes 10 s, 8 of them in the UNet, half of whose calls take 5/8 of whole ones; 100 exchanges
    of 1 ms, and 1 GB at 2 GB/s, take 0.6 s.  Decoders take 6 s alone, 3.5 s in the process with the larger part."""

    def way(seconds, cpu, decoding=0.0, calls=0, received=0, rest=0.0):
        return {
            "seconds": [seconds] * 3,
            "cpu": [cpu] * 3,
            "decoding": [decoding] * 3,
            "rest": [rest] * 3,
            "calls": calls,
            "bytes": received,
        }

    def process(factor, alone):
        return {
            "a call": way(8.8, 8.8 * alone),
            "half a call": way(5.5, 5.5 * factor),
            "one": way(10.0, 10.0 * alone, rest=2.0 * alone),
            "cfg": way(8.0, 7.0 * factor, calls=100, received=10**9),
            "dp": way(11.0, 10.5 * factor),
            "one, decoding ahead": way(10.0, 10.0 * alone, 6.0 * alone),
            "dec": way(8.0, 7.5 * factor, 3.5 * factor, calls=100),
            "dec, one encodes": way(9.0, 7.5 * factor, 3.5 * factor, calls=100, received=10**9),
        }

    link = {"latency_s": 1e-3, "bandwidth": 2e9}
    rows = {row["way"]: row for row in summarise({"link": link, "processes": [process(1.0, 1), process(0.8, 0)]})}
    assert {name: row["speedup"] for name, row in rows.items()} == pytest.approx(
        {"cfg": 1.25, "dp": 20 / 11, "dec": 1.25, "dec, one encodes": 10 / 9}
    )
    assert {name: row["cpu_speedup"] for name, row in rows.items()} == pytest.approx(
        {"cfg": 10 / 7, "dp": 20 / 10.5, "dec": 10 / 7.5, "dec, one encodes": 10 / 7.5}
    )
    assert {name: row["predicted"] for name, row in rows.items()} == pytest.approx(
        {"cfg": 10 / (2 + 5 + 0.6), "dp": 2.0, "dec": 10 / (4 + 3.5 + 0.1), "dec, one encodes": 10 / (4 + 3.5 + 0.6)}
    )
    assert (rows["cfg"]["bar"], rows["dp"]["bar"], rows["dec"]["bar"]) == (1.7, 1.9, None)
    assert (rows["cfg"]["two_s"], rows["dp"]["two_s"], rows["cfg"]["divided"], rows["cfg"]["share"]) == pytest.approx(
        (8.0, 5.5, 0.8, 5 / 8)
    )


def test_a_run_takes_the_place_of_that_of_its_steps_and_size():
    runs = [{"pixels": 128, "steps": 50, "way": 1}, {"pixels": 128, "steps": 20, "way": 2}]
    record = add_run(add_run({}, runs[0]), runs[1])
    assert record["runs"] == [runs[1], runs[0]]
    again = add_run(record, {"pixels": 128, "steps": 50, "way": 3})
    assert [each["way"] for each in again["runs"]] == [2, 3]
    only = summarise({"link": {"latency_s": 0.0, "bandwidth": 1.0}, "processes": [{}, {}]})
    assert only == [], "ways that were not asked for"
