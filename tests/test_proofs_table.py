"""The table of proofs: it is what chooses backends, in this process and the next, whatever has become of its file."""

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_proofs import EAGER, KEY, entry
from threads import in_threads

import difffast
from difffast import ops
from difffast.ops import _local
from difffast.ops._keys import Key
from difffast.proofs import store

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("proof_cache")


def attend(shape=KEY.shapes):
    q, k, v = (torch.ones(size) for size in shape)
    return ops.cross_attention(q, k, v)


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
def test_the_choice_of_the_table_runs_in_this_process_and_the_next():
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


class TimeIsUpError(Exception):
    """What somebody's signal handler raises, wherever Python is."""


def raising(error, module):
    """A function that raises an error, as code of a module."""
    space = {"__name__": module, "error": error}
    exec("def fail(*_):\n    raise error", space)
    return space["fail"]


@needs_cpp
@pytest.mark.parametrize(
    ("error", "module"),
    [
        (TimeIsUpError(), "triton.runtime.jit"),  # raised asynchronously
        (RuntimeError("of a hook"), "somebodys.hooks"),
        (TimeoutError(), "somebodys.handlers"),
        (RuntimeError("[enforce fail] . DefaultCPUAllocator: can't allocate memory"), "torch._ops"),
        (torch.OutOfMemoryError(), "torch._ops"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_errors_that_are_not_the_kernels_pass_through_it(monkeypatch, error, module):
    monkeypatch.setitem(ops.cross_attention.__globals__["_OPERATORS"], "cpp", raising(error, module))
    q = torch.randn(2, 2, 64, 32)
    with pytest.raises(type(error)) as found:
        ops.cross_attention(q, q, q)
    assert found.value is error
    assert _local.list_struck() == []


@needs_cpp
def test_what_no_backend_can_answer_strikes_none_out():
    with torch.inference_mode():
        q = torch.randn(2, 2, 64, 32)
    k = torch.randn(2, 2, 64, 32, requires_grad=True)
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved for backward"):
        ops.cross_attention(q, k, k)
    with pytest.raises((RuntimeError, NotImplementedError)):
        ops.geglu(torch.zeros(2, 8).to(torch.float8_e4m3fn))
    assert _local.list_struck() == []


@needs_cpp
def test_checkpointing_leaves_a_recomputation_early():
    q = torch.randn(2, 2, 64, 32, requires_grad=True)

    def attend_twice(q):
        return ops.cross_attention(ops.cross_attention(q, q, q), q, q)

    (expected,) = torch.autograd.grad(attend_twice(q).sum(), q)
    recomputed = torch.utils.checkpoint.checkpoint(attend_twice, q, use_reentrant=False)
    torch.testing.assert_close(torch.autograd.grad(recomputed.sum(), q)[0], expected)
    assert _local.list_struck() == []


@needs_cpp
def test_a_chosen_backend_that_fails_is_struck_out_once(monkeypatch, pipe):
    fail = raising(RuntimeError("no resources for a launch\nmore"), "triton.runtime.jit")
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
    in_threads(lambda i: [store.merge(CPU, {f"{i} {j}": entry("sdpa")}) for j in range(5)], 4)
    ((_, found),) = _local.read_file(_local.find_path(CPU))[0].items()
    assert set(found["proofs"]) == {f"{i} {j}" for i in range(4) for j in range(5)}


@pytest.mark.slow
def test_processes_that_prove_at_once_lose_nothing(proof_cache):
    code = (
        "import sys, torch; from difffast.proofs import store;"
        "[store.merge(torch.device('cpu'), {f'{sys.argv[1]} {j}': {'choice': 'sdpa'}}) for j in range(20)]"
    )
    running = [subprocess.Popen([sys.executable, "-c", code, str(i)], env=os.environ) for i in range(3)]
    assert [each.wait() for each in running] == [0, 0, 0]
    (path,) = (proof_cache / "proofs").glob("*.json")
    ((_, found),) = _local.read_file(path)[0].items()
    assert set(found["proofs"]) == {f"{i} {j}" for i in range(3) for j in range(20)}


@needs_cpp
def test_another_number_of_threads_has_a_table_of_its_own():
    """What is the fastest differs, and so does the file."""
    before = torch.get_num_threads()
    store.merge(CPU, {EAGER: entry("cpp")})
    try:
        torch.set_num_threads(before + 1)
        assert not _local.load(CPU)
        store.merge(CPU, {EAGER: entry("sdpa")})
        assert {each["choice"] for each in _local.table_of(CPU).proofs.values()} == {"sdpa"}
    finally:
        torch.set_num_threads(before)
    assert {each["choice"] for each in _local.table_of(CPU).proofs.values()} == {"cpp"}
    _local.forget_tables()
    assert {each["choice"] for each in _local.table_of(CPU).proofs.values()} == {"cpp"}


def test_old_sets_are_dropped():
    path = _local.find_path(CPU)
    spoil(path, {"schema": 1, "sets": {str(i): {"facts": {}, "written": i, "proofs": {}} for i in range(12)}})
    with pytest.warns(UserWarning, match="no proofs for this installation"):
        store.merge(CPU, {EAGER: entry("sdpa")})
    sets = _local.read_file(path)[0]
    assert len(sets) == 8
    assert "11" in sets
    assert "0" not in sets


def test_a_time_that_nobody_here_has_written_counts_as_none():
    path = _local.find_path(CPU)
    spoil(path, {"schema": 1, "sets": {str(i): {"facts": {}, "written": "then", "proofs": {}} for i in range(12)}})
    with pytest.warns(UserWarning, match="no proofs for this installation"):
        assert store.merge(CPU, {EAGER: entry("sdpa")}) is None
    assert len(_local.read_file(path)[0]) == 8


def test_a_user_without_a_home_has_no_proofs_and_keeps_none(monkeypatch):
    def no_home(path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("DIFFFAST_CACHE")
    monkeypatch.setattr(Path, "expanduser", no_home)
    _local.forget_tables()
    attend()
    assert _local.table_of(CPU).note is None
    assert "cannot be written" in store.merge(CPU, {EAGER: entry("sdpa")})


@pytest.mark.skipif(not hasattr(os, "seteuid") or os.geteuid() != 0, reason="only root can become somebody else")
def test_a_folder_that_may_not_be_looked_into_has_no_proofs(proof_cache, tmp_path):
    """A container's user with the home of root."""
    tmp_path.chmod(0o700)
    os.seteuid(65534)
    try:
        _local.forget_tables()
        attend()
        assert _local.table_of(CPU).note is None
        assert "cannot be written (Permission denied)" in store.merge(CPU, {EAGER: entry("sdpa")})
    finally:
        os.seteuid(0)


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
