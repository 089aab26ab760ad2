"""Kernels prove themselves: what is wrong, slow or breaks a process is never chosen; what is right and faster stays."""

import errno
import json
import os
import subprocess
import sys
from typing import ClassVar

import pytest
import torch

from difffast.ops._keys import Key
from difffast.proofs import child, parent, timing
from difffast.proofs.report import list_rows
from difffast.proofs.run import prove, prove_keys

CPU = torch.device("cpu")
#: One key of a text: see :mod:`planted`.
KEY = Key.parse("cross_attention float32 2x4x1024x32,2x4x1x32,2x4x1x32 any sink=0,maps=0,gradient=0")
EAGER = KEY.text("eager")
pytestmark = pytest.mark.usefixtures("proof_cache")


def entry(choice, **more):
    return {"choice": choice, "default": "sdpa", "microseconds": {}, "refused": {}, **more}


class Events(list):
    """In place of the pipe to the parent."""

    def write(self, line):
        self.append(json.loads(line))

    def flush(self):
        pass


def prove_here(key, extras):
    events = Events()
    child.Prover(CPU, [extras], events).prove(key, {}, ["eager"])
    return events[-1]["entries"]["eager"]


REASONS = {
    "one_element": "(normal data, shapes 2x4x1024x32",
    "ragged_tail": "1x2x1023x32,1x2x1x32",
    "uncentred": "not finite",
    "beyond_operands": "it wrote into its operands or into memory beside them",
    "unwritten": "1 of 262144 elements are not finite, or were not written",
    "undetermined": "two runs gave different bits",
    "raising": "RuntimeError: no image for this architecture",
}


@pytest.mark.usefixtures("_one_thread")
def test_what_is_wrong_is_refused_with_the_reason():
    found = prove_here(KEY, "planted:HARMLESS")
    assert found["choice"] == "right"
    assert set(found["refused"]) >= set(REASONS)
    for name, reason in REASONS.items():
        assert reason in found["refused"][name], name
    assert "uncentred data" in found["refused"]["uncentred"]
    assert {"right", "slow", "sdpa"} <= set(found["microseconds"])
    assert not set(REASONS) & set(found["microseconds"]), "what is not proved is not timed"
    assert found["microseconds"]["right"][1] < 0.97 * found["microseconds"]["sdpa"][1]


@pytest.mark.slow
def test_what_breaks_a_process_is_refused_and_the_rest_is_proved():
    report = prove_keys([KEY], CPU, 60, planted=parent.Planted(["planted:ALL"], 4.0))
    found = report.proofs[EAGER]
    assert found["choice"] == "right"
    assert "SIGSEGV" in found["refused"]["crashing"]
    assert "it took more than 4 s (normal data" in found["refused"]["endless"]
    assert set(found["refused"]) >= set(REASONS)
    again = prove_keys([KEY], CPU, 60, planted=parent.Planted(["planted:ALL"]))
    assert (again.proved, again.known) == (0, 1), "nothing is proved twice"
    code = (
        "import torch; from difffast.ops import _local;"
        "print(_local.table_of(torch.device('cpu')).proofs[__import__('sys').argv[1]]['choice'])"
    )
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    assert subprocess.check_output([sys.executable, "-c", code, EAGER], env=environment, text=True).strip() == "right"


@pytest.mark.parametrize(
    ("ours", "other", "gain", "least", "winner"),
    [
        ((90, 90, 90), (100, 100, 100), 0.05, 1.0, "ours"),
        ((200, 210, 205), (100, 105, 100), 0.03, 0.0, "sdpa"),
        ((96, 96, 96), (100, 100, 100), 0.05, 1.0, "sdpa"),  # less than 5%
        ((3.5, 3.5, 3.5), (4, 4, 4), 0.05, 1.0, "sdpa"),  # less than a microsecond
        ((3.5, 3.5, 3.5), (4, 4, 4), 0.03, 0.0, "ours"),
        ((50, 50, 400), (100, 300, 100), 0.05, 1.0, "ours"),  # two rounds of three
        ((50, 400, 400, 50), (100, 100, 100, 300), 0.05, 1.0, "sdpa"),  # two of four
    ],
)
def test_a_winner_wins_by_enough(ours, other, gain, least, winner):
    times = {"sdpa": timing.Times(other), "ours": timing.Times(ours)}
    assert timing.pick(times, ["ours"], "sdpa", gain, least) == winner


def test_a_winner_beats_the_fastest_of_pytorchs_ways():
    times = {"sdpa": timing.Times((100.0,) * 3), "cudnn": timing.Times((80.0,) * 3), "ours": timing.Times((78.0,) * 3)}
    assert timing.pick(times, ["ours"], "sdpa", 0.05, 1.0) == "cudnn"
    assert timing.pick({**times, "ours": timing.Times((70.0,) * 3)}, ["ours"], "sdpa", 0.05, 1.0) == "ours"
    host = timing.Times((70.0,) * 3, host=90.0)
    assert timing.pick({**times, "ours": host}, ["ours"], "sdpa", 0.05, 1.0) == "cudnn"
    assert host.microseconds == 90.0, "an eager call takes as long as the host does"


def test_without_processes_there_is_a_note(monkeypatch):
    def fail(*_, **__):
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(subprocess, "Popen", fail)
    report = prove_keys([KEY], CPU, 10)
    assert report.proofs == {}
    assert report.left == (KEY.text(),)
    assert "no process can be started to prove kernels in" in report.notes[0]
    assert "Operation not permitted" in str(report)


class FakeChild:
    """Answers from a script: events of one process after another; "wait" never comes, "end" is its end."""

    scripts: ClassVar[list]

    def __init__(self, device, extras):
        self.events = iter(type(self).scripts.pop(0))
        self.asked = []

    def wait(self):
        pass

    def ask(self, request):
        self.asked.append(request)

    def hear(self, seconds):
        event = next(self.events)
        if event == "wait":
            raise TimeoutError
        return None if event == "end" else event

    def close(self):
        return "it crashed with SIGSEGV"

    def kill(self):
        pass


def done(key, **entries):
    return {"done": key.text(), "entries": entries}


def at(name, what="normal data"):
    return {"at": name, "what": what}


@pytest.mark.parametrize(
    ("events", "refused"),
    [
        ([at("sdpa"), at("bad"), "end"], {"bad": "it crashed with SIGSEGV (normal data)"}),
        ([at("bad", "timing, eager"), "wait"], {"bad": "it took more than 10 s (timing, eager)"}),
        (
            [at("bad"), {"at": "bad", "what": "", "broken": "AcceleratorError: illegal address"}],
            {"bad": "it left the device unusable: AcceleratorError: illegal address (normal data)"},
        ),
    ],
)
def test_who_was_at_work_is_refuted_and_a_new_child_does_the_rest(monkeypatch, events, refused):
    children = []

    class Child(FakeChild):
        scripts: ClassVar = [list(events), [done(KEY, eager=entry("sdpa"))]]

        def __init__(self, *arguments):
            super().__init__(*arguments)
            children.append(self)

    monkeypatch.setattr(parent, "Child", Child)
    kept = {}
    outcome = parent.Proving(CPU, 60, kept.__setitem__).run([KEY])
    assert children[1].asked[0]["refused"] == refused
    assert set(kept) == {KEY}
    assert (outcome.left, outcome.children) == ([], 2)


def test_a_crash_of_pytorchs_own_way_leaves_the_key(monkeypatch):
    class Child(FakeChild):
        scripts: ClassVar = [[at("sdpa", "the definition"), "end"], [done(KEY, eager=entry("sdpa"))]]

    monkeypatch.setattr(parent, "Child", Child)
    other = KEY._replace(dtype=torch.bfloat16)
    kept = {}
    outcome = parent.Proving(CPU, 60, kept.__setitem__).run([KEY, other])
    assert outcome.left == [KEY]
    assert set(kept) == {other}
    assert "it crashed with SIGSEGV" in outcome.notes[0]


def test_kernels_that_cannot_be_compiled_at_once_are_compiled_one_by_one(monkeypatch):
    class Child(FakeChild):
        scripts: ClassVar = [["end"], [done(KEY, eager=entry("sdpa"), graph=entry("sdpa"))]]

    monkeypatch.setattr(parent, "Child", Child)
    kept = {}
    outcome = parent.Proving(torch.device("cuda", 0), 60, kept.__setitem__).run([KEY])
    assert set(kept) == {KEY}
    assert "compiling all Triton kernels at once failed: it crashed with SIGSEGV" in outcome.notes[0]


def test_when_the_time_is_over_the_rest_is_left():
    keys = [KEY, KEY._replace(dtype=torch.bfloat16)]
    assert parent.Proving(CPU, 0.0, lambda *_: None).run(keys).left == keys


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either pipe or model must be given"),
        ({"model": "sd15", "batch": 0}, "batch must be an int of at least 1, got 0"),
        ({"model": "sd15", "batch": True}, "batch must be an int of at least 1, got True"),
        ({"model": "sd15", "seconds": 0}, "seconds must be positive and finite, got 0"),
        ({"model": "sd15", "seconds": float("nan")}, "seconds must be positive and finite, got nan"),
        ({"model": "sd15", "device": "meta"}, "proofs are made on cpu and cuda, got meta"),
        ({"model": "sd15", "dtype": torch.float64}, "dtype must be float16, bfloat16 or float32, got torch.float64"),
        ({"model": "flux"}, "unknown UNet 'flux'"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        prove(**options)


def test_rows_of_files_that_others_have_written():
    rows = list(list_rows({EAGER: {}, "x": {"choice": 3, "refused": 5, "microseconds": {"3": [1, "a"]}}}))
    assert [row[3] for row in rows] == ["?", "3"]
