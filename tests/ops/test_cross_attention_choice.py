"""cross_attention: which backend runs, and which is refused."""

import pytest
import torch

from difffast import ops

Q, K = torch.randn(2, 2, 5, 8), torch.randn(2, 2, 7, 8)


needs_cpp = pytest.mark.skipif(ops.missing("cpp") is not None, reason=str(ops.missing("cpp")))


@needs_cpp
def test_the_kernel_checks_for_itself():
    """Called without the public function, e.g. from an exported graph."""
    for q, k, tokens in ((Q, torch.ones(2, 2, 129, 8), []), (Q[:1], K, []), (Q, K, [7]), (Q.half(), K.half(), [])):
        with pytest.raises(RuntimeError):
            torch.ops.difffast.cross_attention.cpp(q, k, k, 1.0, 0, tokens)


def test_forced_backends_that_cannot_run():
    for backend, message in (("sdpa", "returns no maps"), ("cpp", "got float16")):
        if ops.missing(backend) is None:
            q, k = (Q.half(), K.half()) if backend == "cpp" else (Q, K)
            with (
                ops.use_backend(backend),
                pytest.raises(RuntimeError, match=rf"cross_attention: backend '{backend}' was forced .*{message}"),
            ):
                ops.cross_attention(q, k, k, map_tokens=[0])


def test_forcing_one_operator_leaves_the_others():
    with ops.use_backend("reference", "cross_attention"):
        assert ops.repeat_batch(torch.ones(2), 2).shape == (4,)
    with (
        pytest.raises(ValueError, match=r"'repeat_batch' has no backend 'sdpa'; .* repeat_batch: cpp, reference"),
        ops.use_backend("sdpa", "repeat_batch"),
    ):
        pass
    with ops.use_backend("sdpa"):
        assert ops.repeat_batch(torch.ones(2), 2).shape == (4,), "an operator without this backend is not concerned"


def test_unproved_gpu_kernels_are_no_default():
    from difffast.ops._proofs import is_proved

    listed = {(p.operator, p.backend) for p in ops.PROVED}
    for operator, backends in ops.OPERATORS.items():
        for backend in {"triton", "cuda"} & set(backends):
            if (operator, backend) not in listed:
                assert not is_proved(operator, backend, torch.device("cuda"), torch.float16)
                assert not is_proved(operator, backend, torch.device("cpu"), torch.float32)


@needs_cpp
@pytest.mark.parametrize(
    ("gradients", "message"),
    [
        ((torch.zeros(1, 2, 4, 8), None), "grad_out must have q's sizes and dtype"),
        ((torch.zeros(1, 2, 5, 8, dtype=torch.bfloat16), None), "grad_out must have q's sizes and dtype"),
        ((None, torch.zeros(1, 5, 1)), r"grad_maps must be \[batch, queries, map_tokens\]"),
        ((None, torch.zeros(1, 5, 2, dtype=torch.float64)), "in float32, or float64 where q is"),
    ],
    ids=str,
)
def test_the_backward_pass_checks_its_gradients(gradients, message):
    q, k = torch.zeros(1, 2, 5, 8), torch.zeros(1, 2, 7, 8)
    with pytest.raises(RuntimeError, match=message):
        torch.ops.difffast.cross_attention_backward.cpp(*gradients, q, k, k, 1.0, 0, [0, 3], True, True)
