"""attention_entropy: what PyTorch asks of an operator, bad input, and which backend runs."""

import math

import instruction_sets
import pytest
import torch
from entropy_operands import EVERY, KERNELS, LAYOUTS, _contiguous, needs_cpp

from difffast import ops
from difffast.ops import _dispatch, _installed
from difffast.ops.attention_entropy import choose


@pytest.mark.parametrize("layout", ["contiguous", "sliced tokens", "transposed"])
@pytest.mark.parametrize("backend", KERNELS)
def test_opcheck(backend, layout):
    torch.manual_seed(0)
    maps = LAYOUTS[layout](2, 33, 12, torch.float32)
    arguments = ([2, 7], 9, 0.5, 1e-5, 2.0)
    operator = getattr(torch.ops.difffast.attention_entropy, backend)
    torch.library.opcheck(operator, (maps.detach().requires_grad_(), *arguments, False))
    saved = operator(maps, *arguments, True)[1:]
    backward = getattr(torch.ops.difffast.attention_entropy_backward, backend)
    for grad_loss in (torch.ones(2), torch.ones(1).expand(2)):
        torch.library.opcheck(backward, (grad_loss, maps, *saved, *arguments))


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("backend", EVERY)
def test_compiles_without_graph_breaks(backend, dynamic):
    torch._dynamo.reset()

    def loss(maps):
        return ops.attention_entropy(maps * 2, [5, 1], 6).sin().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    with ops.use_backend(backend, "attention_entropy"):
        for shape in ((2, 20, 9), (3, 33, 12)):
            maps = _contiguous(*shape).requires_grad_()
            expected, value = loss(maps), compiled(maps)
            torch.testing.assert_close(value, expected, rtol=1e-12, atol=1e-12)
            a, b = (torch.autograd.grad(x, maps)[0] for x in (value, expected))
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


MAPS = torch.rand(2, 5, 8)


@pytest.mark.parametrize("backend", EVERY)
@pytest.mark.parametrize(
    ("maps", "anchors", "words", "options", "message"),
    [
        (MAPS[0], [1], 5, {}, r"must be \[batch, pixels, tokens\] with at least one pixel, got \(5, 8\)"),
        (MAPS[:, :0], [1], 5, {}, r"at least one pixel, got \(2, 0, 8\)"),
        (MAPS.half(), [1], 5, {}, r"float32 or float64 \(.*tie at the minimum.*\), got torch.float16"),
        (MAPS.bfloat16(), [1], 5, {}, r"tie at the minimum, which ruins the gradient\), got torch.bfloat16"),
        (MAPS.long(), [1], 5, {}, "got torch.int64"),
        (MAPS, [1], 0, {}, "n_tokens must be an int in 1 .. 127, got 0"),
        (MAPS, [1], 128, {}, "n_tokens must be an int in 1 .. 127, got 128"),
        (MAPS, [1], 5.0, {}, "n_tokens must be an int in 1 .. 127, got 5.0"),
        (MAPS, [1], True, {}, "n_tokens must be an int in 1 .. 127, got True"),
        (MAPS, [1], 8, {}, "a start token and n_tokens = 8 more columns, got 8 in all"),
        (MAPS, [], 5, {}, "anchors must name at least one column, got none"),
        (MAPS, [1, 2, 1], 5, {}, r"anchors must be distinct, got \[1, 2, 1\]"),
        (MAPS, [0], 5, {}, "anchors must be ints in 1 .. n_tokens = 5, got 0"),
        (MAPS, [6], 5, {}, "anchors must be ints in 1 .. n_tokens = 5, got 6"),
        (MAPS, [1.0], 5, {}, "anchors must be ints in 1 .. n_tokens = 5, got 1.0"),
        (MAPS, [True], 5, {}, "anchors must be ints in 1 .. n_tokens = 5, got True"),
        (MAPS, [1], 5, {"tau": 0.0}, "tau must be at least 1.18e-38 and finite, got 0.0"),
        (MAPS, [1], 5, {"tau": 1e-39}, "tau must be at least 1.18e-38 and finite, got 1e-39"),
        (MAPS, [1], 5, {"tau": math.inf}, "tau must be at least 1.18e-38 and finite, got inf"),
        (MAPS, [1], 5, {"eps": 0.0}, r"eps must be positive .* and finite, got 0.0"),
        (MAPS, [1], 5, {"eps": 1e-40}, r"\(a normal number in torch.float32\) and finite, got 1e-40"),
        (MAPS, [1], 5, {"eps": math.nan}, "and finite, got nan"),
        (MAPS, [1], 5, {"weight": math.nan}, "weight must be finite, got nan"),
        (MAPS, [1], 5, {"weight": -math.inf}, "weight must be finite, got -inf"),
    ],
)
def test_bad_input(backend, maps, anchors, words, options, message):
    with ops.use_backend(backend, "attention_entropy"), pytest.raises(ValueError, match=message):
        ops.attention_entropy(maps, anchors, words, **options)


@needs_cpp
@pytest.mark.parametrize(
    ("maps", "anchors", "words"),
    [(MAPS[0], [1], 5), (MAPS.half(), [1], 5), (MAPS, [1], 8), (MAPS, [], 5), (MAPS, [2, 1], 5), (MAPS, [6], 5)],
)
def test_the_kernel_checks_for_itself(maps, anchors, words):
    """Called without the public function, e.g. from an exported graph."""
    with pytest.raises(RuntimeError):
        torch.ops.difffast.attention_entropy.cpp(maps, anchors, words, 0.5, 1e-5, 2.0, False)
    saved = torch.ops.difffast.attention_entropy.cpp(MAPS, [1, 2], 5, 0.5, 1e-5, 2.0, False)[1:]
    with pytest.raises(RuntimeError, match="other outputs for these maps"):
        torch.ops.difffast.attention_entropy_backward.cpp(torch.ones(2), MAPS, *saved, [1], 5, 0.5, 1e-5, 2.0)


def test_forced_backends(monkeypatch):
    for backend in ("cpp", "triton"):
        if ops.missing(backend) is None:
            with (
                ops.use_backend(backend, "attention_entropy"),
                pytest.raises(RuntimeError, match=f"attention_entropy: backend '{backend}' was forced but cannot run"),
            ):
                ops.attention_entropy(MAPS.to("meta"), [1], 5)
    if ops.missing("triton") is None:
        monkeypatch.setattr(_installed, "INTERPRETED", False)
        _dispatch.forget()
        with ops.use_backend("triton"), pytest.raises(RuntimeError, match="it takes float64 in the interpreter only"):
            choose(torch.float64, MAPS.device)


def test_the_default():
    assert choose(MAPS.dtype, MAPS.device) == ("reference" if ops.missing("cpp") else "cpp")
    assert choose(MAPS.dtype, torch.device("meta")) == "reference"
    with ops.use_backend("reference"):
        assert choose(MAPS.dtype, MAPS.device) == "reference"


@needs_cpp
@pytest.mark.parametrize("instruction_set", instruction_sets.SMALLER)
def test_smaller_instruction_sets(instruction_set):
    """The same numbers from every instruction set that this machine has; the best one runs in all other tests."""
    code = """
        import torch
        from difffast.ops.attention_entropy import reference
        torch.manual_seed(0)
        for dtype, tolerance in ((torch.float32, 1e-3), (torch.float64, 1e-11)):
            for shape, words, anchors in (((67, 77), 12, [3, 7]), ((1, 4), 3, [2]), ((300, 128), 127, [1, 64, 127])):
                for detach_min in (False, True):
                    leaf = torch.rand(2, *shape).to(dtype).requires_grad_()
                    exact = leaf.detach().double().requires_grad_()
                    with ops.use_backend("cpp"):
                        ours = ops.attention_entropy(leaf, anchors, words, detach_min=detach_min)
                    theirs = reference(exact, anchors, words, detach_min=detach_min)
                    for a, b in ((ours, theirs), (*torch.autograd.grad(ours.sum(), leaf),
                                                  *torch.autograd.grad(theirs.sum(), exact))):
                        assert float((a - b).abs().max()) <= tolerance * float(b.abs().max()), (dtype, shape)
    """
    instruction_sets.run(code, instruction_set)
