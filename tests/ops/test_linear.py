"""linear: oneDNN's product against float64, what it must not do, and when it runs."""

import importlib
import types

import pytest
import torch
import torch.nn.functional as F

from difffast import ops

module = importlib.import_module("difffast.ops.linear")
pytestmark = pytest.mark.skipif(ops.missing("onednn") is not None, reason=str(ops.missing("onednn")))

BACKENDS = ["reference", "onednn"]

#: (shape of x, rows of the weights): one of each, sizes around vectors, vectors and many dimensions.
SHAPES = [((1,), 1), ((5,), 7), ((1, 1), 3), ((3, 1), 1), ((2, 77, 40), 33), ((1, 64, 320), 320), ((2, 3, 4, 15), 17)]
LARGE = (2, 256, 160), 320


@pytest.fixture
def _pays(monkeypatch):
    """As on a processor on which oneDNN is faster, whatever this one is."""
    monkeypatch.setattr(module, "advantage", lambda: 2.0)
    monkeypatch.setattr(module, "advantage_if_large", lambda: 2.0)


def operands(shape, rows, bias=True, dtype=torch.float32):
    torch.manual_seed(0)
    made = torch.randn(shape, dtype=dtype), torch.randn(rows, shape[-1], dtype=dtype)
    return *made, torch.randn(rows, dtype=dtype) if bias else None


def in_float64(x, weight, bias):
    return F.linear(x.double(), weight.double(), None if bias is None else bias.double())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("shape", "rows"), [*SHAPES, LARGE], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.usefixtures("_nan_memory")
def test_it_is_the_product(backend, shape, rows, bias):
    made = operands(shape, rows, bias)
    with ops.use_backend(backend, "linear"):
        y = ops.linear(*made)
    assert y.dtype == torch.float32
    assert y.is_contiguous()
    torch.testing.assert_close(y.double(), in_float64(*made), rtol=1e-5, atol=1e-6 * shape[-1])


@pytest.mark.parametrize(
    "layout",
    [
        lambda x: x.transpose(0, 1),
        lambda x: x[:, ::2],
        lambda x: x[..., 3:-2],
        lambda x: x.expand(3, *x.shape),
        lambda x: x.mT.contiguous().mT,
    ],
    ids=["transposed", "every other row", "part of the columns", "expanded", "columns first"],
)
def test_strides_do_not_matter(layout):
    x = layout(torch.randn(2, 40, 64))
    weight, bias = torch.randn(x.shape[-1], 48).T, torch.randn(96)[::2]
    with ops.use_backend("onednn", "linear"):
        torch.testing.assert_close(ops.linear(x, weight, bias), F.linear(x, weight, bias), rtol=1e-5, atol=1e-4)


@pytest.fixture
def _two_threads():
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("_two_threads")  # with one, PyTorch's convolution of one sample does not take oneDNN
def test_no_operand_is_copied():
    x, weight, bias = operands(*LARGE)
    with ops.use_backend("onednn", "linear"), torch.profiler.profile() as profile:
        ops.linear(x, weight, bias)
    ran = {event.key for event in profile.key_averages()}
    assert "aten::mkldnn_convolution" in ran
    assert not ran & {"aten::copy_", "aten::clone"}


def test_gradients():
    made = operands((2, 20, 24), 30)
    found = []
    for backend in BACKENDS:
        leaves = [each.clone().requires_grad_() for each in made]
        with ops.use_backend(backend, "linear"):
            ops.linear(*leaves).square().sum().backward()
        found.append([each.grad for each in leaves])
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.usefixtures("_pays")
def test_other_dtypes_are_pytorchs(dtype):
    made = operands(*LARGE, dtype=dtype)
    assert module.choose(*made) == module.backend_of_large(made[1]) == "reference"
    torch.testing.assert_close(ops.linear(*made), F.linear(*made), rtol=0, atol=0)


@pytest.mark.usefixtures("_pays")
def test_when_it_runs(monkeypatch):
    x, weight, _ = operands(*LARGE)
    assert module.choose(x, weight, None) == module.backend_of_large(weight) == "onednn"
    assert module.choose(x[:, :100], weight, None) == "onednn"
    assert module.choose(torch.randn(60, 400), torch.randn(4096, 400), None) == "reference"  # too few rows
    assert module.choose(x, weight[:64], None) == "reference"  # too few products
    assert module.choose(x[:, :64, :], torch.randn(5000, 160), None) == "reference"  # PyTorch keeps these from oneDNN
    assert module.choose(x[:, :0], weight, None) == module.choose(x, weight[:0], None) == "reference"
    assert module.choose(x.to("meta"), weight.to("meta"), None) == "reference"
    assert module.backend_of_large(weight.to("meta")) == "reference"
    monkeypatch.setattr(module, "advantage", lambda: 1.1)
    monkeypatch.setattr(module, "advantage_if_large", lambda: 1.05)
    assert module.choose(x, weight, None) == module.backend_of_large(weight) == "reference"
    with ops.use_backend("onednn", "linear"):
        assert module.choose(x, weight[:64], None) == module.backend_of_large(weight) == "onednn"


@pytest.mark.parametrize(("pays", "if_large"), [(1.0, 2.0), (2.0, 1.0)])
def test_large_products_are_measured_by_themselves(monkeypatch, pays, if_large):
    monkeypatch.setattr(module, "advantage", lambda: pays)
    monkeypatch.setattr(module, "advantage_if_large", lambda: if_large)
    x = torch.randn(2048, 320)
    backends = [module.choose(x, torch.randn(rows, 320), None) for rows in (320, 1280)]
    assert backends == [("onednn" if worth > 1 else "reference") for worth in (pays, if_large)]
    assert module.backend_of_large(x) == "onednn"


def test_before_torch_2_9_one_setting_tells_what_may_be_inexact(monkeypatch):
    earlier = types.SimpleNamespace(get_float32_matmul_precision=lambda: "medium", backends=types.SimpleNamespace())
    earlier.backends.mkldnn = types.SimpleNamespace(enabled=True)  # without `conv` and `matmul`
    monkeypatch.setattr(module, "torch", earlier)
    assert module._allowed_precision("conv") == "ieee"
    assert module._allowed_precision("matmul") == "medium"
    earlier.get_float32_matmul_precision = lambda: "highest"
    assert module._allowed_precision("matmul") in module._EXACT


@pytest.mark.skipif(not hasattr(torch.backends.mkldnn, "conv"), reason="settings of torch 2.9 and later")
@pytest.mark.usefixtures("_pays")
def test_settings_that_would_change_the_numbers_are_kept_to():
    made = operands(*LARGE)
    conv, matmul = torch.backends.mkldnn.conv, torch.backends.mkldnn.matmul
    with torch.autocast("cpu", torch.bfloat16):
        assert ops.linear(*made).dtype == torch.bfloat16
    enabled, *_ = torch.backends.mkldnn.set_flags(_enabled=False, _fp32_precision=None)
    try:
        assert module.choose(*made) == "reference"
    finally:
        torch.backends.mkldnn.set_flags(_enabled=enabled, _fp32_precision=None)
    for setting, reason in ((conv, "convolutions may be bf16"), (matmul, None)):
        earlier = setting.fp32_precision
        setting.fp32_precision = "bf16"
        try:
            assert module.choose(*made) == "reference"
            if reason is not None:
                with ops.use_backend("onednn", "linear"), pytest.raises(RuntimeError, match=reason):
                    ops.linear(*made)
        finally:
            setting.fp32_precision = earlier
    assert module.choose(*made) == "onednn"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, w, b: (x[..., :-1], w, b), r"x must be \[..., K\] and weight \[O, K\], got shapes \(2, 3, 4\)"),
        (lambda x, w, b: (torch.tensor(1.0), w, b), r"x must be \[..., K\]"),
        (lambda x, w, b: (x, w[None], b), r"x must be \[..., K\]"),
        (lambda x, w, b: (x, w, b[:-1]), r"bias must be \[6\] as weight's rows, got shape \(5,\)"),
        (lambda x, w, b: (x, w.double(), b), "weight must be torch.float32 on cpu as x, got torch.float64 on cpu"),
        (lambda x, w, b: (x, w, b.to("meta")), "bias must be torch.float32 on cpu as x, got torch.float32 on meta"),
    ],
)
def test_errors_name_value_and_requirement(change, message):
    with pytest.raises(ValueError, match=message):
        ops.linear(*change(*operands((2, 3, 5), 6)))


def test_a_forced_backend_that_cannot_run_is_an_error():
    with ops.use_backend("onednn", "linear"):
        with pytest.raises(RuntimeError, match="it takes float32, got float64"):
            ops.linear(*operands((2, 3), 4, dtype=torch.float64))
        with pytest.raises(RuntimeError, match="an operand is empty"):
            ops.linear(*operands((0, 3), 4))


@pytest.mark.parametrize("bias", [True, False])
def test_the_operator_keeps_pytorchs_contract(bias):
    torch.library.opcheck(torch.ops.difffast.linear.onednn, operands((2, 9, 12), 10, bias))
    # What a projection of a spatial transformer gets of one image.
    _, *weights = operands((1, 12), 10, bias)
    x = torch.randn(1, 12, 9).transpose(1, 2)
    torch.library.opcheck(torch.ops.difffast.linear.onednn, (x, *weights))
    with ops.use_backend("onednn", "linear"):
        assert ops.linear(x, *weights).is_contiguous()


def test_compiles_without_graph_breaks():
    made = operands(*LARGE)
    compiled = torch.compile(ops.linear, fullgraph=True, dynamic=False, backend="aot_eager")
    with ops.use_backend("onednn", "linear"):
        expected = ops.linear(*made)
        with torch.no_grad(), torch.profiler.profile() as profile:
            assert torch.equal(compiled(*made), expected)
        assert "difffast::linear" in {event.key for event in profile.key_averages()}
        made[0].requires_grad_()
        with pytest.raises(RuntimeError, match="compiled it has no backward pass"):
            compiled(*made)
    compiled(*made).sum().backward()
    bias = made[2].clone().requires_grad_()  # alone
    compiled(made[0].detach(), made[1], bias).sum().backward()
    torch.testing.assert_close(bias.grad, torch.full_like(bias, made[0].shape[:-1].numel()))
    torch.testing.assert_close(made[0].grad, made[1].sum(0).expand_as(made[0]))


def test_graphs_keep_settings_as_pytorchs_own_decorator_would():
    """The mark is PyTorch's own business: where it changes, so must ours."""

    def ours():
        pass

    def theirs():
        pass

    module._keep_in_graphs(ours)
    assert vars(ours) == vars(torch.compiler.assume_constant_result(theirs))


def test_the_operator_itself_refuses_gradients():
    x, weight, bias = operands((2, 3), 4)
    with pytest.raises(RuntimeError, match="has no backward pass"):
        torch.ops.difffast.linear.onednn(x.requires_grad_(), weight, bias).sum().backward()


def test_the_advantage_is_measured_once_and_leaves_nothing_behind():
    state = torch.get_rng_state()
    assert 0.2 < module.advantage() == module.advantage() < 20
    assert torch.equal(torch.get_rng_state(), state)
