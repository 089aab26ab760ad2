"""What proofs do on a GPU, rehearsed with a stand-in: its stream is the CPU, its graphs replay recorded operators."""

import contextlib
import json
import time
import types

import planted
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from difffast import ops
from difffast.ops import _installed
from difffast.ops._keys import Key
from difffast.proofs import child, timing
from difffast.proofs.candidates import Candidate, find_candidates
from difffast.proofs.checks import RefutedError
from difffast.proofs.problems import make_problem

KEY = Key.parse("cross_attention float32 2x2x64x32,2x2x1x32,2x2x1x32 rows,rows,rows sink=0,maps=0,gradient=0")
CPU = torch.device("cpu")


class Event:
    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = time.perf_counter()

    def elapsed_time(self, end):
        return 1e3 * (end.at - self.at)


class Graph(TorchDispatchMode):
    """Records operators, and replays them into the memory of their results."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        out = operator(*args, **(kwargs or {}))
        self.calls.append((operator, args, kwargs or {}, out))
        return out

    def capture_begin(self):
        self.__enter__()

    def capture_end(self):
        self.__exit__(None, None, None)

    def replay(self):
        for operator, args, kwargs, out in self.calls:
            found = operator(*args, **kwargs)
            pairs = zip(out, found, strict=True) if isinstance(out, tuple) else [(out, found)]
            for old, new in pairs:
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


class Stream:
    def wait_stream(self, _other):
        pass


@pytest.fixture
def card(monkeypatch):
    """torch.cuda, as far as proofs use it."""
    fake = {
        "Event": Event,
        "Stream": Stream,
        "CUDAGraph": Graph,
        "synchronize": lambda: None,
        "current_stream": Stream,
        "stream": contextlib.nullcontext,
        "get_device_properties": lambda device: types.SimpleNamespace(L2_cache_size=1 << 20),
        "set_device": lambda device: None,
    }
    for name, value in fake.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(timing, "_ROTATED", 1 << 22)


def way(function, name="ours"):
    return Candidate(name, True, contextlib.nullcontext, function)


def sdpa():
    return next(each for each in find_candidates(KEY, CPU) if each.name == "sdpa")


def clock():
    found = timing.Clock(torch.device("cuda", 0))
    found._flush = torch.empty(1 << 16, dtype=torch.uint8)
    return found


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize("mode", ["eager", "graph"])
def test_candidates_are_timed_in_turn(mode):
    problem = make_problem(KEY, "normal", CPU)
    asked = []
    times = clock().time([sdpa(), way(planted.slow)], [problem, problem.copy()], mode, asked.append)
    assert set(times) == {"sdpa", "ours"}
    assert times["ours"].microseconds > times["sdpa"].microseconds > 0
    assert len(times["ours"].rounds) == len(times["sdpa"].rounds) >= 4
    assert (times["ours"].host > 0) == (mode == "eager")
    assert {"sdpa", "ours"} == set(asked)
    turns = asked[-4:]
    assert turns[0] != turns[1], "they take turns"


@pytest.mark.usefixtures("card")
def test_graphs_compute_from_operands_as_they_are():
    problem = make_problem(KEY, "normal", CPU)
    before = problem.tensors[0].clone()
    child.check_graph(way(planted.right), problem)
    child.check_graph(sdpa(), problem)
    assert torch.equal(problem.tensors[0], before)

    def forgetful(key, q, k, v):
        constant = float(q.sum())  # read when it is captured
        return (planted.right(key, q, k, v)[0] + constant,)

    with pytest.raises(RefutedError, match="a captured graph gave other bits than a call"):
        child.check_graph(way(forgetful), problem)


class Events(list):
    def write(self, line):
        self.append(line)

    def flush(self):
        pass


@pytest.mark.usefixtures("card")
def test_a_candidate_that_cannot_be_captured_is_refused_in_that_mode_alone(monkeypatch):
    prover = child.Prover(torch.device("cuda", 0), [], Events())
    monkeypatch.setattr(prover, "is_broken", lambda: False)
    prover._clock._flush = torch.empty(1 << 16, dtype=torch.uint8)
    problem = make_problem(KEY, "normal", CPU)

    def uncapturable(key, q, k, v):
        if torch.utils._python_dispatch._get_current_dispatch_mode() is not None:
            raise RuntimeError("operation not permitted when stream is capturing")
        return planted.right(key, q, k, v)

    candidates = [sdpa(), way(uncapturable)]
    times, lost = prover._time(KEY, candidates, [problem], "eager")
    assert (set(times), lost) == ({"sdpa", "ours"}, {})
    times, lost = prover._time(KEY, candidates, [problem], "graph")
    assert set(times) == {"sdpa"}
    assert lost == {"ours": "RuntimeError: operation not permitted when stream is capturing (graph)"}


KEYS = [
    KEY.text(),
    "geglu float16 2x64x128 any gradient=0",
    "self_attention float16 2x2x64x32,2x2x64x32,2x2x64x32 rows,rows,rows gradient=0",
    "self_attention float16 2x2x64x32,2x2x64x32,2x2x64x32 12288.32.192.1,12288.32.192.1,12288.32.192.1 gradient=1",
    "cross_attention bfloat16 4x2x64x32,2x2x7x32,2x2x7x32 rows,rows,rows sink=1,maps=1,gradient=1",
    "joint_attention float16 2x2x64x32,2x2x7x32,2x2x7x32,2x2x64x32,2x2x64x32 rows,rows,rows,rows,rows "
    "maps=0,gradient=0",
    "group_norm_silu float16 2x32x8x8 channels_last groups=4,addends=2,whole=0,modulated=0,gradient=1",
    "group_norm_silu float16 4x32x8x8 contiguous groups=4,addends=2,whole=1,modulated=1,gradient=0",
    "skip_norm_silu float16 4x24x8x8,2x8x8x8 contiguous groups=4,gradient=0",
]


@pytest.mark.usefixtures("card")
@pytest.mark.parametrize("text", KEYS, ids=lambda text: text.split(" ")[0])
def test_a_key_is_proved_in_both_modes(monkeypatch, text):
    """All of a GPU's proof but the GPU."""
    events = Events()
    prover = child.Prover(torch.device("cuda", 0), [], events)
    prover._clock._flush = torch.empty(1 << 16, dtype=torch.uint8)
    monkeypatch.setattr(prover, "is_broken", lambda: False)
    monkeypatch.setattr(child, "make_problem", lambda key, data, device, seed=0: make_problem(key, data, CPU, seed))

    def find(key, device, extras):
        plain = find_candidates(key, CPU)[0]
        return [plain, Candidate("ours", True, plain.around, plain.call)]

    monkeypatch.setattr(child, "find_candidates", find)
    monkeypatch.setattr(timing, "_SECONDS", {"cuda": 0.0})
    prover.prove(Key.parse(text), {}, ["eager", "graph"])
    done = json.loads(events[-1])
    assert done["done"] == text
    assert set(done["entries"]) == {"eager", "graph"}
    for entry in done["entries"].values():
        assert entry["refused"] == {}
        assert set(entry["microseconds"]) == {entry["default"], "ours"}
        assert entry["choice"] in ("ours", entry["default"])


def test_the_candidates_of_a_gpu(monkeypatch):
    monkeypatch.setattr(_installed, "INTERPRETED", False)
    monkeypatch.setattr(_installed, "_missing", dict.fromkeys(ops.BACKENDS))
    monkeypatch.setitem(_installed._DEVICES, "triton", ("cuda",))
    card = torch.device("cuda", 0)

    def names(text):
        return [each.name for each in find_candidates(Key.parse(text), card)]

    attention = "float16 2x2x64x32,2x2x64x32,2x2x64x32 rows,rows,rows"
    assert names(f"self_attention {attention} gradient=0") == ["sdpa", "flash", "cudnn", "efficient"]
    plain = ["sdpa", "cuda", "triton", "flash", "cudnn", "efficient"]
    assert names(f"cross_attention {attention} sink=0,maps=0,gradient=0") == plain
    with_maps = names(f"cross_attention {attention} sink=0,maps=1,gradient=0")
    assert with_maps[:3] == ["reference", "cuda", "triton"]
    norm = "group_norm_silu float16 2x32x8x8 channels_last groups=4,addends=2,whole=0,modulated=0,gradient=0"
    assert names(norm) == ["reference", "cuda", "triton"]
