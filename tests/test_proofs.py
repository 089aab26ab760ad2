"""Kernels prove themselves: what is wrong, slow or breaks a process is never chosen; what is right and faster stays."""

import errno
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import ClassVar

import pytest
import torch

import difffast
from difffast import ops
from difffast.ops import _dispatch, _local
from difffast.ops._keys import Key, find_strides, name_layout
from difffast.proofs import child, collect, parent, store, timing
from difffast.proofs.report import list_rows
from difffast.proofs.run import prove, prove_keys

CPU = torch.device("cpu")
#: One key of a text: see :mod:`planted`.
KEY = Key.parse("cross_attention float32 2x4x1024x32,2x4x1x32,2x4x1x32 any sink=0,maps=0,gradient=0")
EAGER = KEY.text("eager")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A cache folder of the test's own."""
    monkeypatch.setenv("DIFFFAST_CACHE", str(tmp_path))
    monkeypatch.delenv("DIFFFAST_PROVE", raising=False)
    _local.forget_tables()
    yield tmp_path / "proofs"
    _local.forget_tables()


def entry(choice, **more):
    return {"choice": choice, "default": "sdpa", "microseconds": {}, "refused": {}, **more}


def attend(shape=KEY.shapes):
    q, k, v = (torch.ones(size) for size in shape)
    return _dispatch, ops.cross_attention(q, k, v)


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
def test_what_breaks_a_process_is_refused_and_the_rest_is_proved(folder):
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


@pytest.mark.slow
@pytest.mark.usefixtures("_one_thread")
def test_a_right_one_that_is_slow_is_not_chosen():
    ways = {"slow": timing.Times((20.0, 21.0)), "sdpa": timing.Times((10.0, 10.5))}
    assert timing.pick(ways, ["slow"], "sdpa", 0.03, 0.0) == "sdpa"


@pytest.mark.parametrize(
    ("ours", "other", "gain", "least", "winner"),
    [
        ((90, 90, 90), (100, 100, 100), 0.05, 1.0, "ours"),
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


def runs(call):
    """The operators of PyTorch and difffast that a call runs."""
    with torch.profiler.profile() as profile:
        call()
    return " ".join(event.key for event in profile.key_averages())


def norm(size=64):
    x, w = torch.ones(1, 32, size, size), torch.ones(32)
    return ops.group_norm_silu(x, 4, w, w)


NORM = "group_norm_silu float32 1x32x{0}x{0} contiguous groups=4,addends=0,whole=0,modulated=0,gradient=0"
needs_cpp = pytest.mark.skipif(ops.missing("cpp") is not None, reason=str(ops.missing("cpp")))


@needs_cpp
def test_the_choice_of_the_table_runs_in_this_process_and_the_next(folder):
    small, large = (Key.parse(NORM.format(size)) for size in (16, 64))
    assert "difffast::" not in runs(lambda: norm(16))  # as it is shipped
    assert "difffast::" in runs(lambda: norm(64))
    note = store.merge(CPU, {small.text("eager"): entry("cpp"), large.text("eager"): entry("reference")})
    assert note is None
    for _ in range(2):
        assert "difffast::" in runs(lambda: norm(16)), "remembered answers follow the table"
        assert "difffast::" not in runs(lambda: norm(64))
        with ops.use_backend("cpp"):
            assert "difffast::" in runs(lambda: norm(64)), "what is forced comes first"
        _local.forget_tables()  # as a new process begins
    store.clear(CPU)
    assert "difffast::" not in runs(lambda: norm(16))


@needs_cpp
def test_each_mode_has_its_own_choice():
    key = Key.parse(NORM.format(16))
    store.merge(CPU, {key.text("graph"): entry("cpp")})
    assert "difffast::" not in runs(lambda: norm(16))
    with _local.use_mode("graph"):
        assert "difffast::" in runs(lambda: norm(16))
    with pytest.raises(ValueError, match="mode must be one of eager, graph, got 'warp'"), _local.use_mode("warp"):
        pass


@needs_cpp
def test_compiled_code_keeps_the_choice_and_follows_a_new_table():
    compiled = torch.compile(lambda x, w: ops.group_norm_silu(x, 4, w, w), fullgraph=True, backend="aot_eager")
    x, w = torch.ones(1, 32, 17, 17), torch.ones(32)
    key = Key.parse(NORM.format(17))

    def ran():
        with torch.no_grad():
            return "difffast::" in runs(lambda: compiled(x, w))

    assert not ran()
    store.merge(CPU, {key.text("graph"): entry("cpp")})
    assert ran()
    assert ran()
    store.merge(CPU, {key.text("graph"): entry("reference")})
    assert not ran()


@needs_cpp
def test_sizes_that_are_symbols_are_not_looked_up():
    key = Key.parse(NORM.format(17))
    store.merge(CPU, {key.text("graph"): entry("cpp")})
    compiled = torch.compile(
        lambda x, w: ops.group_norm_silu(x, 4, w, w), fullgraph=True, backend="aot_eager", dynamic=True
    )
    seen = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for size in (17, 19, 23):
        x, w = torch.randn(1, 32, size, size), torch.ones(32)
        torch.testing.assert_close(compiled(x, w), ops.group_norm_silu(x, 4, w, w))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == seen + 1, "one graph for all sizes"


@needs_cpp
def test_reports_name_what_proofs_have_chosen(pipe):
    store.merge(CPU, {EAGER: entry("cpp"), KEY.text("graph"): entry("sdpa")})
    note = "chosen by proofs on this device: cross_attention (cpp) for 1 shapes"
    assert note in difffast.patch(pipe, "exact").notes


@pytest.mark.parametrize("choice", ["nonsense", "cuda", None, 3, ["cpp"]])
def test_a_choice_that_nobody_knows_is_ignored(choice):
    store.merge(CPU, {EAGER: entry(choice)})
    _, out = attend()
    torch.testing.assert_close(out, torch.ones_like(out))  # of values that are all one


@needs_cpp
def test_a_chosen_backend_that_fails_is_struck_out_once(monkeypatch, pipe):
    def fail(*_):
        raise RuntimeError("no resources for a launch\nmore")

    monkeypatch.setitem(ops.cross_attention.__globals__["_OPERATORS"], "cpp", fail)
    q = torch.randn(2, 2, 64, 32)
    with pytest.warns(UserWarning, match="cross_attention takes PyTorch's way from now on.*no resources for a launch$"):
        out = ops.cross_attention(q, q, q)
    torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(q, q, q))
    ops.cross_attention(q, q, q)  # no second warning
    assert _local.list_struck() == [("cross_attention", "cpp", "RuntimeError: no resources for a launch")]
    assert "cross_attention (cpp): RuntimeError: no resources" in str(difffast.patch(pipe, "exact"))
    with ops.use_backend("cpp"), pytest.raises(RuntimeError, match="no resources"):
        ops.cross_attention(q, q, q)


def spoil(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else json.dumps(content).encode())


@pytest.mark.parametrize(
    ("content", "note"),
    [
        (b"", "is damaged"),
        (b"{\x00", "is damaged"),
        (b"[" * 100_000, "is damaged"),
        ([], "has schema None"),
        ({"schema": 99, "sets": {}}, "has schema 99, and this version reads 1"),
        ({"schema": 1, "sets": []}, "is damaged"),
        ({"schema": 1, "sets": {"a": {"proofs": {"x": 3}}}}, "is damaged"),
        (
            {"schema": 1, "sets": {"a": {"facts": {}, "proofs": {EAGER: entry("cpp")}}}},
            "no proofs for this installation",
        ),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_file_that_is_no_good_gives_one_note_and_pytorch(content, note):
    path = _local.find_path(CPU)
    spoil(path, content)
    with pytest.warns(UserWarning, match=note):
        attend()
    attend()
    assert note in _local.table_of(CPU).note
    assert store.merge(CPU, {EAGER: entry("sdpa")}) is None
    assert _local.read_file(path)[1] is None, "the next proof makes it anew"


def test_what_others_have_added_stays():
    """Two processes that read the same file, and write one after the other."""
    path = _local.find_path(CPU)
    store.merge(CPU, {"a eager": entry("sdpa")})
    sets = _local.read_file(path)[0]
    (mark,) = sets
    sets[mark]["proofs"]["b eager"] = entry("sdpa")
    sets["another installation"] = {"facts": {}, "proofs": {}}
    spoil(path, {"schema": 1, "sets": sets})
    store.merge(CPU, {"c eager": entry("sdpa")})
    sets = _local.read_file(path)[0]
    assert set(sets[mark]["proofs"]) == {"a eager", "b eager", "c eager"}
    assert "another installation" in sets


def test_threads_that_prove_at_once_lose_nothing():
    threads = [
        threading.Thread(target=lambda i=i: [store.merge(CPU, {f"{i} {j}": entry("sdpa")}) for j in range(5)])
        for i in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    ((_, found),) = _local.read_file(_local.find_path(CPU))[0].items()
    assert set(found["proofs"]) == {f"{i} {j}" for i in range(4) for j in range(5)}


@pytest.mark.slow
def test_processes_that_prove_at_once_lose_nothing(folder):
    code = (
        "import sys, torch; from difffast.proofs import store;"
        "[store.merge(torch.device('cpu'), {f'{sys.argv[1]} {j}': {'choice': 'sdpa'}}) for j in range(20)]"
    )
    running = [subprocess.Popen([sys.executable, "-c", code, str(i)], env=os.environ) for i in range(3)]
    assert [each.wait() for each in running] == [0, 0, 0]
    (path,) = folder.glob("*.json")
    ((_, found),) = _local.read_file(path)[0].items()
    assert set(found["proofs"]) == {f"{i} {j}" for i in range(3) for j in range(20)}


def test_old_sets_are_dropped():
    path = _local.find_path(CPU)
    spoil(path, {"schema": 1, "sets": {str(i): {"facts": {}, "written": i, "proofs": {}} for i in range(12)}})
    with pytest.warns(UserWarning, match="no proofs for this installation"):
        store.merge(CPU, {EAGER: entry("sdpa")})
    sets = _local.read_file(path)[0]
    assert len(sets) == 8
    assert "11" in sets
    assert "0" not in sets


def test_a_folder_that_cannot_be_made_gives_a_note(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("DIFFFAST_CACHE", str(tmp_path / "file"))
    _local.forget_tables()
    assert "cannot be written" in store.merge(CPU, {EAGER: entry("sdpa")})
    assert _local.table_of(CPU).proofs[EAGER]["choice"] == "sdpa", "the proofs hold for this process"
    attend()


def test_a_full_disk_leaves_the_old_file(monkeypatch):
    store.merge(CPU, {EAGER: entry("sdpa")})
    path = _local.find_path(CPU)
    before = path.read_bytes()

    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(Path, "write_text", fail)
    assert "No space left" in store.merge(CPU, {"x eager": entry("cpp")})
    assert path.read_bytes() == before
    assert sorted(each.suffix for each in path.parent.iterdir()) == [".json", ".lock"]


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


LAYOUTS = [
    ((2, 3, 4, 5), (60, 20, 5, 1), "contiguous"),
    ((2, 3, 4, 5), (60, 5, 15, 1), "rows"),
    ((2, 3, 4, 5), (60, 1, 15, 3), "channels_last"),
    ((2, 3, 4, 5), (180, 5, 45, 1), "180.5.45.1"),
    ((1, 3, 4, 5), (7, 20, 5, 1), "contiguous"),
    ((2, 3, 4), (12, 4, 1), "contiguous"),
]


@pytest.mark.parametrize(("shape", "strides", "name"), LAYOUTS)
def test_layouts_have_names(shape, strides, name):
    assert name_layout(shape, strides) == name
    assert name_layout(shape, find_strides(shape, name)) == name


def test_keys_are_text_and_back():
    key = Key.of(
        "self_attention", torch.float16, [(2, 8, 64, 40)] * 3, [(20480, 40, 320, 1)] * 3, [("gradient", False)]
    )
    text = "self_attention float16 2x8x64x40,2x8x64x40,2x8x64x40 rows,rows,rows gradient=0"
    assert key.text() == text
    assert Key.parse(text) == key
    assert key.text("graph") == f"{text} graph"


@pytest.fixture(scope="module")
def sd15():
    return collect.collect(collect.make_dry("sd15", torch.float16, CPU), 2, torch.device("cuda"))


@pytest.mark.slow
def test_keys_of_a_published_unet(sd15):
    texts = [key.text() for key in sd15]
    assert "self_attention float16 2x8x4096x40,2x8x4096x40,2x8x4096x40 rows,rows,rows gradient=0" in texts
    assert "cross_attention float16 8x8x4096x40,2x8x77x40,2x8x77x40 rows,rows,rows sink=0,maps=0,gradient=0" in texts, (
        "four steps share the keys of the text"
    )
    norms = "group_norm_silu float16 2x320x64x64 contiguous groups=32,addends=2,whole=0,modulated=0,gradient=0"
    assert norms in texts
    assert any(text.startswith("skip_norm_silu float16 8x640x64x64,2x20x64x64") for text in texts)
    batches = [key.shapes[0][0] for key in sd15]
    assert batches == sorted(batches), "whole calls first"


def test_keys_of_a_pipeline_are_those_that_its_run_asks_for(pipe):
    """Collected without memory, against what operators are asked for by the patched UNet itself."""
    keys = collect.collect(collect.make_dry(pipe.unet, torch.float32, CPU), 2, CPU, decoders=())
    asked = []
    original = _dispatch.choose

    def listen(operator, forced, device, dtype, obstacle, loses=None, case=None):
        if case is not None:
            asked.append(Key.of(operator, dtype, *case))
        return original(operator, forced, device, dtype, obstacle, loses or (lambda _: False), case)

    _dispatch.forget()
    with pytest.MonkeyPatch.context() as monkeypatch, ops.use_backend("reference"):
        monkeypatch.setattr(_dispatch, "choose", listen)
        with difffast.patched(pipe, "exact"), ops.use_backend("cpp"):
            pipe("a cat", num_inference_steps=1, output_type="latent")
    tokens = {key.shapes[1][2] for key in asked if key.operator == "cross_attention"}
    assert tokens == {77}
    assert set(asked) <= set(keys)
    assert {key.operator for key in keys} == {"cross_attention", "geglu", "group_norm_silu", "self_attention"}


def test_keys_of_a_vae_are_those_that_its_decoder_asks_for(pipe, monkeypatch):
    size = pipe.unet.config.sample_size
    keys = collect.collect_decoder(pipe.vae, torch.float32, CPU, (1, pipe.unet.config.in_channels, size, size))
    asked = []
    original = _dispatch.choose

    def listen(operator, forced, device, dtype, obstacle, loses=None, case=None):
        if case is not None and "norm" in operator:
            asked.append(Key.of(operator, dtype, *case))
        return original(operator, forced, device, dtype, obstacle, loses or (lambda _: False), case)

    _dispatch.forget()
    monkeypatch.setattr(_dispatch, "choose", listen)
    with difffast.patched(pipe, "exact"), ops.use_backend("reference"):
        pipe.vae.decode(torch.zeros(1, pipe.unet.config.in_channels, size, size))
    assert {key.operator for key in keys} == {"group_norm_silu"}
    assert set(asked) <= set(keys)
    assert collect.collect_decoder(None, torch.float32, CPU, (1, 4, 8, 8)) == []


def test_maps_and_gradients_are_keys_of_their_own(sd15):
    keys = collect.collect_other_uses(sd15, torch.device("cuda"))
    texts = [key.text() for key in keys]
    attention = "cross_attention float16 2x8x4096x40,2x8x77x40,2x8x77x40 rows,rows,rows sink=0"
    assert f"{attention},maps=1,gradient=0" in texts
    assert f"{attention},maps=1,gradient=1" in texts, "what semantic binding asks for"
    assert f"{attention},maps=0,gradient=1" in texts
    assert not set(keys) & set(sd15)
    maps = [key for key in keys if key.option("maps")]
    assert {key.shapes[0][0] for key in maps} == {2}, "of whole calls alone"
    assert not any(key.option("gradient") for key in collect.collect_other_uses(sd15, CPU))


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
