"""Attention on data that is not centred: logits far below or above zero, rows of equal logits, one huge element.

Expected values come from float64 PyTorch on the same operands; errors are measured in units of what eager PyTorch makes
in the operands' own dtype.
"""

import instruction_sets
import pytest
import torch
from attention_operands import absent, with_dtypes

from difffast import ops

# Triton's interpreter computes with NumPy, which warns of powers that overflow: those of keys that only fill up a tile.
# They are never stored.
pytestmark = pytest.mark.filterwarnings("ignore:(overflow|invalid value) encountered:RuntimeWarning")

KERNELS = [
    pytest.param(b, marks=pytest.mark.skipif(absent(b) is not None, reason=str(absent(b)))) for b in ("cpp", "triton")
]
#: Numbers of keys that are multiples of vectors and tiles, and that are not.
KEYS = (7, 76, 77, 80)


def exact(q, k, v, tokens):
    p = (q.double() @ k.double().transpose(-1, -2)).softmax(-1)
    return p @ v.double(), p[..., tokens].mean(1)


def eager(q, k, v, tokens):
    p = (q @ k.transpose(-1, -2)).softmax(-1)
    return p @ v, p[..., tokens].mean(1)


def operands(logit, keys, dtype, spread=1.0):
    """Operands whose logits are all near ``logit``, with ``spread`` between keys.

    One picture of two heads: batches are other tests' matter, and Triton's interpreter takes its time for each.
    """
    generator = torch.Generator().manual_seed(keys)
    q = torch.zeros(1, 2, 33, 16, dtype=torch.float64)
    q[..., 0], q[..., 1] = 8.0, 1.0
    k = torch.zeros(1, 2, keys, 16, dtype=torch.float64)
    k[..., 0] = logit / 8.0
    k[..., 1] = spread * torch.randn(1, 2, keys, generator=generator, dtype=torch.float64)
    v = torch.randn(1, 2, keys, 16, generator=generator, dtype=torch.float64) + 10.0
    return q.to(dtype), k.to(dtype), v.to(dtype)


def run(operator, q, k, v, tokens):
    if operator == "cross_attention":
        return ops.cross_attention(q, k, v, scale=1.0, map_tokens=tokens)
    if operator == "self_attention":
        return ops.self_attention(q, k, v, scale=1.0), None
    half = k.shape[2] // 2
    text, pixels = (k[:, :, :half], v[:, :, :half]), (k[:, :, half:], v[:, :, half:])
    return ops.joint_attention(q, *text, *pixels, scale=1.0, map_tokens=tokens)


def assert_close(found, expected, rough, logit=0.0):
    """No worse than twice eager's error, but for a few units in the last place, of the logits as well.

    In float64 the expected values come from eager PyTorch itself, whose error is then not seen.
    """
    units = 16 + abs(logit)
    floor = units * torch.finfo(found.dtype).eps * float(expected.abs().max())
    allowed = 2 * float((rough.double() - expected).abs().max()) + floor
    assert found.isfinite().all()
    assert float((found.double() - expected).abs().max()) <= allowed


LOGITS = (-1e4, -800.0, -400.0, -128.0, -90.0, -80.0, 0.0, 90.0, 800.0, 1e4)
#: Those that Triton's interpreter, which is slow, sees without -m slow.
FEW_LOGITS = (-1e4, -90.0, 0.0, 1e4)


def _slow_in_triton(backend, logit):
    return [pytest.mark.slow] if backend == "triton" and logit not in FEW_LOGITS else []


@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize(
    ("operator", "backend", "dtype", "logit"),
    [
        pytest.param(
            operator,
            *each.values,
            logit,
            marks=[
                *each.marks,
                *([pytest.mark.slow] if each.values[0] == "triton" and logit not in FEW_LOGITS else []),
            ],
            id=f"{operator}-{each.id}-{logit:g}",
        )
        for operator in ("cross_attention", "joint_attention", "self_attention")
        for each in with_dtypes(["reference", *KERNELS], [torch.float32, torch.float64, torch.bfloat16])
        if each.values[0] in ops.OPERATORS[operator]
        for logit in LOGITS
    ],
)
@pytest.mark.usefixtures("_nan_memory")
def test_all_logits_far_from_zero(operator, backend, dtype, keys, logit):
    q, k, v = operands(logit, keys, dtype)
    tokens = [0, 2] if operator == "joint_attention" else [0, keys - 1]
    with ops.use_backend(backend, operator):
        out, maps = run(operator, q, k, v, tokens)
    expected, rough = exact(q, k, v, tokens), eager(q, k, v, tokens)
    assert_close(out, expected[0], rough[0], logit)
    if maps is not None:
        assert_close(maps, expected[1], rough[1].to(maps.dtype), logit)


@pytest.mark.parametrize("logit", [-400.0, -90.0, 0.0, 90.0])
@pytest.mark.parametrize("keys", KEYS)
@pytest.mark.parametrize(("backend", "dtype"), with_dtypes(["reference", *KERNELS], [torch.float32, torch.float64]))
@pytest.mark.usefixtures("_nan_memory")
def test_gradients_of_logits_far_from_zero(backend, dtype, keys, logit):
    made = operands(logit, keys, dtype)
    weights = torch.randn(made[0].shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    wanted = [x.to(torch.float64, copy=True).requires_grad_() for x in made]
    (exact(*wanted, [0])[0] * weights).sum().backward()
    leaves = [x.clone().requires_grad_() for x in made]
    with ops.use_backend(backend, "cross_attention"):
        out, _ = ops.cross_attention(*leaves, scale=1.0, map_tokens=[0])
        (out * weights.to(dtype)).sum().backward()
    for leaf, want in zip(leaves, wanted, strict=True):
        # Errors of the logits themselves, which float32 holds to 1e-7 of their size, come back in the gradients.
        largest = max(float(each.grad.abs().max()) for each in wanted) + 1
        allowed = torch.finfo(dtype).eps * (256 + 8 * abs(logit)) * largest
        assert leaf.grad.isfinite().all()
        assert float((leaf.grad.double() - want.grad).abs().max()) <= allowed


@pytest.mark.parametrize("where", ["query", "key", "value"])
@pytest.mark.parametrize(("backend", "dtype"), with_dtypes(["reference", *KERNELS], [torch.float32, torch.float64]))
def test_one_huge_element(backend, dtype, where):
    q, k, v = operands(0.0, 77, dtype)
    {"query": q, "key": k, "value": v}[where][0, 1, 3, 0] = 1e4
    with ops.use_backend(backend, "cross_attention"):
        out, maps = ops.cross_attention(q, k, v, scale=1.0, map_tokens=[3])
    expected, rough = exact(q, k, v, [3]), eager(q, k, v, [3])
    assert_close(out, expected[0], rough[0])
    assert_close(maps, expected[1], rough[1].to(maps.dtype))


@pytest.mark.parametrize("instruction_set", instruction_sets.EVERY)
@pytest.mark.skipif(ops.missing("cpp") is not None, reason=str(ops.missing("cpp")))
def test_every_instruction_set(instruction_set):
    instruction_sets.run(
        """
        import torch
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            for keys in (1, 3, 7, 15, 76, 77, 127):
                for logit in (-1e4, -800.0, -90.0):
                    q = torch.ones(1, 2, 5, 4, dtype=dtype)
                    k = torch.full((1, 2, keys, 4), logit / 4, dtype=dtype)
                    v = torch.arange(keys, dtype=torch.float64)[:, None].expand(1, 2, keys, 4).to(dtype)
                    with ops.use_backend("cpp"):
                        out, maps = ops.cross_attention(q, k, v, scale=1.0, map_tokens=[0])
                    mean = v.double().mean(2, keepdim=True).expand(out.shape)
                    rtol = 1e-2 if dtype == torch.bfloat16 else 1e-5
                    torch.testing.assert_close(out.double(), mean, rtol=rtol, atol=0)
                    equal = torch.full_like(maps.double(), 1 / keys)
                    torch.testing.assert_close(maps.double(), equal, rtol=1e-5, atol=0)
        """,
        instruction_set,
    )


@pytest.mark.parametrize(("batch", "queries"), [(0, 3), (0, 0), (3, 0)])
@pytest.mark.parametrize("operator", ["cross_attention", "joint_attention"])
@pytest.mark.parametrize("backend", ["reference", *KERNELS])
@pytest.mark.usefixtures("_nan_memory")
def test_keys_that_nothing_attends_to_have_gradients_of_zero(backend, operator, batch, queries):
    q = torch.randn(batch, 2, queries, 16, requires_grad=True)
    text = [torch.randn(3, 2, 5, 16, requires_grad=True) for _ in range(2)]
    pixels = [torch.randn(batch, 2, 4, 16, requires_grad=True) for _ in range(2)]
    leaves = [q, *text, *(pixels if operator == "joint_attention" else ())]
    with ops.use_backend(backend, operator):
        out, maps = getattr(ops, operator)(*leaves, map_tokens=[1])
        assert out.shape == q.shape
        assert maps.shape == (batch, queries, 1)
        (out.sum() + maps.sum()).backward()
    for leaf in leaves:
        assert leaf.grad is not None
        assert not leaf.grad.any()
