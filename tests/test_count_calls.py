"""What a step and an import may cost in Python: the bars of bench/count_calls.py that do not depend on the machine."""

import subprocess
import sys

import call_cost
import count_calls
import pytest

from difffast import ops

#: Seconds each, and of use to few who import difffast.
HEAVY = ("torch._dynamo", "torch._inductor", "sympy", "triton", "diffusers", "transformers", "PIL", "rich")


def test_import_brings_in_neither_the_compiler_nor_diffusers():
    code = f"import sys, difffast; print(*(name for name in {HEAVY} if name in sys.modules))"
    assert subprocess.check_output([sys.executable, "-W", "error", "-c", code], text=True).split() == []


@pytest.mark.usefixtures("_one_thread")
def test_steps_stay_below_the_bars(pipe_of_all_layers):
    calls = count_calls.count(pipe_of_all_layers)
    assert count_calls.complaints(calls, {"torch": 1.0, "difffast": 1.0}) == []
    assert calls["key step"].deciding > 0, "nothing was counted"
    assert calls["in between, from the queue"].deciding == 0


def test_what_is_counted():
    made = [
        ("difffast.run", "answer"),
        ("difffast.ops._dispatch", "recall"),
        ("difffast.ops.linear", "choose"),
        ("difffast.ops.linear", "linear"),
        ("difffast.layers.linear", "pays"),
    ]
    assert count_calls.calls_of(made) == count_calls.Calls(total=5, changes=3, deciding=1, asking=3)


def test_missed_bars_are_named():
    over = count_calls.Calls(total=count_calls.MOST_CALLS, changes=1, deciding=100, asking=100)
    missed = count_calls.complaints(dict.fromkeys(count_calls.KEY_STEPS, over), {"torch": 1.0, "difffast": 1.2})
    assert len(missed) == 2 * len(count_calls.KEY_STEPS) + 1
    assert missed[-1] == "import difffast takes 1.20 times import torch, the bar is 1.15"


def test_the_cost_of_every_operators_call_is_measured():
    cases = call_cost.cases()
    assert set(ops.OPERATORS) <= set(cases)
    for call in cases.values():
        call()
