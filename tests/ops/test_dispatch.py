"""Which backend runs, and that what is remembered of it never outlives what it depends on."""

import ast
import contextlib
import functools
import importlib
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import difffast
from difffast import ops
from difffast.ops import _dispatch, _local

needs_cpp = pytest.mark.skipif(ops.missing("cpp") is not None, reason=str(ops.missing("cpp")))
linear = importlib.import_module("difffast.ops.linear")


class Watch(TorchDispatchMode):
    """Inside the block, notes the backend whose operators run; plain PyTorch is the reference."""

    backend = "reference"

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = str(operator)
        if name.startswith("difffast."):
            self.backend = "cpp" if name == "difffast.repeat_batch.default" else name.rpartition(".")[2]
        elif "scaled_dot_product" in name and self.backend == "reference":
            self.backend = "sdpa"
        elif "convolution" in name:
            self.backend = "onednn"
        return operator(*args, **(kwargs or {}))


def ran(call):
    """The backend that a call takes."""
    with Watch() as watch:
        call()
    return watch.backend


@functools.cache
def tensor(*shape, dtype=torch.float32, grad=False, last=False):
    x = torch.ones(shape, dtype=dtype)
    return x.contiguous(memory_format=torch.channels_last if last else torch.contiguous_format).requires_grad_(grad)


def attend(rows=64, keys=77, maps=None, **options):
    q, k = tensor(2, 2, rows, 32, **options), tensor(2, 2, keys, 32, **options)
    return ops.cross_attention(q, k, k, map_tokens=maps)


def attend_to_self(rows=64, keys=77, dim=32, **options):
    q, k = tensor(2, 2, rows, dim, **options), tensor(2, 2, keys, dim, **options)
    return ops.self_attention(q, k, k)


def attend_to_both(maps=None, **options):
    q, k = tensor(2, 2, 64, 32, **options), tensor(2, 2, 7, 32, **options)
    return ops.joint_attention(q, k, k, q, q, map_tokens=maps)


def norm(size=64, **options):
    x, w = tensor(1, 32, size, size, **options), tensor(32, dtype=options.get("dtype", torch.float32))
    return ops.group_norm_silu(x, 4, w, w)


def norm_both(size=64, **options):
    x, w = tensor(2, 16, size, size, **options), tensor(32, dtype=options.get("dtype", torch.float32))
    return ops.skip_norm_silu(x, x, 4, w, w)


def repeat(**options):
    return ops.repeat_batch(tensor(2, 3, **options), 2)


def entropy(**options):
    return ops.attention_entropy(tensor(1, 4, 6, **options), [1], 3)


def multiply(rows=256, **options):
    return ops.linear(tensor(2, rows, 160, **options), tensor(320, 160, **options))


HALF, DOUBLE, NO_GRAD = {"dtype": torch.float16}, {"dtype": torch.float64}, torch.no_grad
REFERENCE = functools.partial(ops.use_backend, "reference")

#: For which bfloat16 loses.
FEW = {"keys": 64, "dim": 48} if ops.INSTRUCTION_SET == "amx" else {"keys": 63}
#: (operator, its backend by default, what changes in the call, what is entered around it, the backend that then runs).
CHANGES = [
    (attend, "cpp", HALF, None, "sdpa"),
    (attend, "cpp", {"rows": 1}, None, "sdpa"),
    (attend, "cpp", {"keys": 1}, None, "sdpa"),
    (attend, "cpp", {}, REFERENCE, "reference"),
    (functools.partial(attend, rows=1), "sdpa", {"maps": [1]}, None, "cpp"),
    (
        functools.partial(attend, rows=1),
        "sdpa",
        {},
        functools.partial(ops.use_backend, "cpp", "cross_attention"),
        "cpp",
    ),
    (attend_to_self, "cpp", HALF, None, "sdpa"),
    (attend_to_self, "cpp", {"rows": 1}, None, "sdpa"),
    (attend_to_self, "cpp", {"grad": True}, None, "sdpa"),
    (functools.partial(attend_to_self, grad=True), "sdpa", {}, NO_GRAD, "cpp"),
    (functools.partial(attend_to_self, **FEW), "cpp", {"dtype": torch.bfloat16}, None, "sdpa"),
    (attend_to_self, "cpp", {}, functools.partial(ops.use_backend, "sdpa"), "sdpa"),
    (attend_to_both, "cpp", HALF, None, "sdpa"),
    (attend_to_both, "cpp", {"grad": True}, None, "sdpa"),
    (functools.partial(attend_to_both, grad=True), "sdpa", {}, NO_GRAD, "cpp"),
    (functools.partial(attend_to_both, grad=True), "sdpa", {"maps": [1]}, None, "cpp"),
    (attend_to_both, "cpp", {}, REFERENCE, "reference"),
    (norm, "cpp", HALF, None, "reference"),
    (norm, "cpp", DOUBLE, None, "reference"),
    (norm, "cpp", {"size": 32}, None, "reference"),
    (norm, "cpp", {"last": True}, None, "reference"),
    (norm, "cpp", {}, REFERENCE, "reference"),
    (norm_both, "cpp", HALF, None, "reference"),
    (norm_both, "cpp", DOUBLE, None, "reference"),
    (norm_both, "cpp", {"size": 32}, None, "reference"),
    (norm_both, "cpp", {"last": True}, None, "reference"),
    (norm_both, "cpp", {}, functools.partial(ops.use_backend, "reference", "skip_norm_silu"), "reference"),
    (repeat, "cpp", {"grad": True}, None, "reference"),
    (functools.partial(repeat, grad=True), "reference", {}, NO_GRAD, "cpp"),
    (repeat, "cpp", {}, REFERENCE, "reference"),
    (entropy, "cpp", {}, REFERENCE, "reference"),
]


def name_of(value):
    function = getattr(value, "func", value)
    return str(getattr(function, "__name__", value))


@needs_cpp
@pytest.mark.parametrize(("call", "default", "change", "around", "other"), CHANGES, ids=name_of)
def test_another_signature_is_another_decision(call, default, change, around, other):
    for _ in range(2):
        assert ran(call) == default
        with around() if around else contextlib.nullcontext():
            assert ran(functools.partial(call, **change)) == other
            assert ran(functools.partial(call, **change)) == other
    assert ran(call) == default


@pytest.fixture
def _pays(monkeypatch):
    monkeypatch.setattr(linear, "advantage", lambda: 2.0)
    monkeypatch.setattr(linear, "advantage_if_large", lambda: 2.0)


@contextlib.contextmanager
def without_onednn():
    enabled, *_ = torch.backends.mkldnn.set_flags(_enabled=False, _fp32_precision=None)
    yield
    torch.backends.mkldnn.set_flags(_enabled=enabled, _fp32_precision=None)


@contextlib.contextmanager
def in_bfloat16(products):
    earlier, products.fp32_precision = products.fp32_precision, "bf16"
    yield
    products.fp32_precision = earlier


@pytest.mark.skipif(ops.missing("onednn") is not None, reason=str(ops.missing("onednn")))
@pytest.mark.parametrize(
    ("change", "around"),
    [
        ({"rows": 64}, None),
        (DOUBLE, None),
        ({}, without_onednn),
        ({}, functools.partial(in_bfloat16, torch.backends.mkldnn.conv)),
        ({}, functools.partial(in_bfloat16, torch.backends.mkldnn.matmul)),
        ({}, functools.partial(torch.autocast, "cpu", torch.bfloat16)),
        ({}, REFERENCE),
    ],
    ids=name_of,
)
@pytest.mark.usefixtures("_pays")
def test_linear_follows_settings(change, around):
    for _ in range(2):
        assert ran(multiply) == "onednn"
        with around() if around else contextlib.nullcontext():
            assert ran(functools.partial(multiply, **change)) == "reference"
    assert ran(multiply) == "onednn"


def test_devices_are_told_apart():
    for operator in ops.OPERATORS:
        default = ops.default_backend(operator, torch.device("cpu"), torch.float32)
        on_meta = ops.default_backend(operator, torch.device("meta"), torch.float32)
        assert on_meta == ("sdpa" if "sdpa" in ops.OPERATORS[operator] else "reference")
        assert ops.default_backend(operator, torch.device("cpu"), torch.float32) == default


def test_the_cuda_kernel_asks_how_operands_lie_in_memory():
    module = importlib.import_module("difffast.ops.cross_attention")
    q = _dispatch.Operand(torch.Size((2, 2, 64, 32)), torch.float16, torch.device("cuda:0"))
    aligned = ((4096, 2048, 32, 1), 0)

    def obstacle(*layout):
        return module.find_obstacle("cuda", q, q, q, 1.0, False, layout)

    assert obstacle(aligned, aligned, aligned) is None
    assert obstacle(aligned, ((4096, 2048, 33, 1), 0), aligned).startswith("k needs rows of neighbours")
    assert "storage offset 3 modulo 8" in obstacle(aligned, aligned, (aligned[0], 3))
    x = torch.zeros(2, 2, 64, 40)[..., 3:35]
    assert module._find_layout(x, x) == ((x.stride(), 3),) * 2


def test_the_environment_forces_a_backend():
    code = "from difffast.ops import _dispatch; print(*_dispatch.forced_backends[0])"
    environment = {**os.environ, "DIFFFAST_BACKEND": "reference"}
    found = subprocess.check_output([sys.executable, "-c", code], env=environment, text=True)
    assert found.split() == ["None", "reference"]


def test_a_forced_name_is_checked_at_the_first_call(monkeypatch):
    attend()
    monkeypatch.setattr(_dispatch, "forced_backends", ((None, "nonsense"),))
    for _ in range(2):
        with pytest.raises(ValueError, match="unknown backend 'nonsense'; available: reference"):
            attend()


@pytest.mark.parametrize(
    ("good", "bad", "message"),
    [
        (1, True, "sink must be an int of at least 0, got True"),
        (1, 1.0, "sink must be an int of at least 0, got 1.0"),
        (0, False, "sink must be an int of at least 0, got False"),
        (0, [], r"sink must be an int of at least 0, got \[\]"),
    ],
)
def test_equal_values_of_another_type_are_refused(good, bad, message):
    q = tensor(1, 1, 4, 8)
    for _ in range(2):
        ops.cross_attention(q, q, q, sink=good)
        with pytest.raises(ValueError, match=message):
            ops.cross_attention(q, q, q, sink=bad)
    x, w = tensor(1, 4, 2, 2), tensor(4)
    for call in (lambda groups: ops.group_norm_silu(x, groups, w, w), lambda groups: norm_of_two(x, groups)):
        call(1)
        with pytest.raises(ValueError, match="groups must be an int that divides channels, got True and"):
            call(True)


def norm_of_two(x, groups):
    return ops.skip_norm_silu(x, x, groups, tensor(8), tensor(8))


def test_errors_are_not_remembered_as_answers():
    q, k = tensor(1, 1, 4, 8), tensor(1, 1, 0, 8)
    for _ in range(3):
        with pytest.raises(ValueError, match="k must have 1 to 128 keys, got 0"):
            ops.cross_attention(q, k, k)


def test_memory_is_bounded():
    remembered = next(each for each in _dispatch._memories if each.__wrapped__.__module__.endswith("group_norm_silu"))
    w = tensor(4)
    for pixels in range(1, _dispatch.REMEMBERED + 50):
        ops.group_norm_silu(torch.ones(1, 4, pixels), 1, w, w)
    assert remembered.cache_info().maxsize == remembered.cache_info().currsize == _dispatch.REMEMBERED
    assert {each.cache_info().maxsize for each in _dispatch._memories} == {_dispatch.REMEMBERED}
    _dispatch.forget()
    assert remembered.cache_info().currsize == 0


@needs_cpp
def test_threads_do_not_remember_each_others_force():
    """A decision made while another thread forces or stops forcing a backend is remembered for that only."""
    wrong, stop = [], threading.Event()

    def ask():
        shape = 64
        while not stop.is_set():
            shape = 64 + (shape + 1) % 32
            if ran(functools.partial(attend_to_self, rows=shape)) not in ("cpp", "reference"):
                wrong.append(shape)

    threads = [threading.Thread(target=ask) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(200):
        with ops.use_backend("reference"):
            ran(attend_to_self)
        ran(attend_to_self)
    stop.set()
    for thread in threads:
        thread.join()
    assert wrong == []
    for rows in range(64, 96):
        assert ran(functools.partial(attend_to_self, rows=rows)) == "cpp"
        with ops.use_backend("reference"):
            assert ran(functools.partial(attend_to_self, rows=rows)) == "reference"


def test_blocks_of_threads_may_end_in_another_order():
    earlier = _dispatch.forced_backends, _local.state.mode
    one, two = ops.use_backend("reference"), ops.use_backend("sdpa", "cross_attention")
    one.__enter__()
    two.__enter__()
    one.__exit__(None, None, None)
    assert dict(_dispatch.forced_backends) == {"cross_attention": "sdpa"}
    two.__exit__(None, None, None)
    first, second = _local.use_mode("graph"), _local.use_mode("graph")
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert _local.state.mode == "graph"
    second.__exit__(None, None, None)
    assert earlier == (_dispatch.forced_backends, _local.state.mode)


@needs_cpp
def test_compiled_code_follows_what_is_forced_and_remembers_nothing():
    compiled = torch.compile(ops.self_attention, fullgraph=True, backend="aot_eager", dynamic=False)
    q = torch.randn(2, 2, 66, 34)  # a shape of this test alone
    known = [each.cache_info().currsize for each in _dispatch._memories]

    def runs(name):
        with torch.no_grad(), torch.profiler.profile() as profile:
            compiled(q, q, q)
        return any(name in event.key for event in profile.key_averages())

    for _ in range(2):
        assert runs("difffast::self_attention")
        with ops.use_backend("sdpa"):
            assert runs("scaled_dot_product")
            assert not runs("difffast::")
    assert [each.cache_info().currsize for each in _dispatch._memories] == known


def test_symbolic_sizes_are_decided_anew():
    x, w = torch.randn(2, 8, 3, 3), torch.ones(8)
    graph = make_fx(lambda x, w: ops.group_norm_silu(x, 2, w, w), tracing_mode="symbolic")(x, w)
    torch.testing.assert_close(graph(x, w), ops.group_norm_silu(x, 2, w, w))


@pytest.mark.parametrize("path", sorted(Path(ops.__file__).parent.glob("*.py")), ids=lambda path: path.stem)
def test_what_is_remembered_sees_no_tensor(path):
    """A deciding function can only read its signature, so that this is all that its answer depends on."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef) and any("remember" in ast.unparse(each) for each in node.decorator_list):
            annotations = [ast.unparse(each.annotation) for each in node.args.args]
            assert annotations[0] == "Forced"
            assert not any("Tensor" in each for each in annotations)


def test_the_public_signature_hides_what_is_forced():
    device = torch.device("cpu")
    named = ops.default_backend(operator="linear", device=device, dtype=torch.float64)
    assert named == ops.default_backend("linear", device, torch.float64)
    assert "forced" not in str(importlib.import_module("inspect").signature(ops.default_backend))


def test_a_backend_forced_for_all_says_whom_it_serves(pipe):
    with ops.use_backend("sdpa") as served:
        assert served == ("cross_attention", "edited_attention", "joint_attention", "self_attention")
        with difffast.patched(pipe, "exact") as report:
            pipe("a", num_inference_steps=2, output_type="latent")
    others = "attention_entropy, convolution, geglu, group_norm_silu, linear, repeat_batch, skip_norm_silu"
    said = f"backend 'sdpa' is forced, but {others} do not have it and keep their own choice"
    assert said in report.last_run.reasons
    assert said in str(report.last_run)
    with ops.use_backend("sdpa", "self_attention") as served:
        assert served == ("self_attention",)
        assert _dispatch.describe_unforced() == ""
    with ops.use_backend("reference"), ops.use_backend("sdpa", "self_attention"):
        assert _dispatch.describe_unforced() == ""
    assert _dispatch.describe_unforced() == ""
