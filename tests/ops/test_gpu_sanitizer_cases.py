"""bench/gpu_sanitizer_cases.py: what compute-sanitizer runs on a GPU is complete, right, and notices what is wrong."""

import gpu_sanitizer_cases as sanitizer
import pytest
import torch

from difffast.ops._dispatch import OPERATORS
from difffast.ops._installed import INTERPRETED

interpreted = pytest.mark.skipif(not INTERPRETED, reason="TRITON_INTERPRET=1 runs Triton's kernels on the CPU")


@pytest.mark.parametrize("backend", sanitizer.BACKENDS)
def test_every_operator_of_a_gpu_backend_has_cases(backend):
    assert {case.operator for case in sanitizer.cases(backend)} == {
        operator for operator, backends in OPERATORS.items() if backend in backends
    }


def test_names_tell_cases_apart():
    for backend in sanitizer.BACKENDS:
        names = [str(case) for case in sanitizer.cases(backend)]
        assert len(set(names)) == len(names)


@interpreted
@pytest.mark.parametrize("only", ["one key", "NHWC, odd", "NCHW, straddling", "entropy: backward"])
def test_small_cases_are_right(capsys, only):
    assert sanitizer.main(["--backend", "triton", "--only", only]) == 0
    assert "1 cases, 0 failed" in capsys.readouterr().out


@interpreted
@pytest.mark.slow
def test_all_cases_are_right():
    assert sanitizer.main(["--backend", "triton"]) == 0


@interpreted
@pytest.mark.parametrize("wrong", [float("nan"), 1.0])
def test_one_wrong_number_is_a_failure(monkeypatch, capsys, wrong):
    from difffast.triton_kernels import group_norm_silu as kernels

    right = kernels.forward

    def forward(*arguments, **named):
        out, coefficients = right(*arguments, **named)
        out.view(-1)[-1] += wrong
        return out, coefficients

    monkeypatch.setattr(kernels, "forward", forward)
    assert sanitizer.main(["--backend", "triton", "--only", "NCHW, odd"]) == 1
    assert "FAILED  group_norm_silu: NCHW, odd: result 0 is off by" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels can run here")
def test_a_kernel_that_cannot_run_is_a_failure(capsys):
    """As when the extension was built without CUDA: none of its kernels has been looked at."""
    assert sanitizer.main(["--backend", "cuda", "--only", "one key"]) == 1
    assert "FAILED  cross_attention: one key, one query: RuntimeError: backend 'cuda' cannot" in capsys.readouterr().out


def test_no_case_is_a_failure():
    assert sanitizer.main(["--backend", "triton", "--only", "no such case"]) == 1
