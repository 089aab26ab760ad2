"""Every operator on hostile operands, drawn at random: what difffast/ops/__init__.py promises of numbers and of NaN.

Expected values are the definitions of tests/helpers/operator_cases.py in float64. The draws are the same in every run.
"""

from pathlib import Path

import fuzzing
import hostile_operands as hostile
import instruction_sets
import pytest
import torch
from attention_operands import absent
from operator_cases import OPERATORS

from difffast import ops

#: Draws of each operator: always, with -m slow, and of each other instruction set.
FEW, MANY, OTHERS = 40, 1000, 250
#: Operators with a C++ kernel, which each instruction set has its own of.
COMPILED = [name for name, backends in ops.OPERATORS.items() if "cpp" in backends]
needs_cpp = pytest.mark.skipif(ops.missing("cpp") is not None, reason=str(ops.missing("cpp")))


def test_every_operator_is_drawn():
    assert sorted(OPERATORS) == sorted(ops.OPERATORS)


@pytest.mark.parametrize("operator", OPERATORS)
def test_hostile_operands(operator):
    fuzzing.run(operator, FEW)


@pytest.mark.slow
@pytest.mark.parametrize("operator", OPERATORS)
def test_many_hostile_operands(operator):
    fuzzing.run(operator, MANY)


def run_sets(instruction_set, draws, operators):
    tests = Path(__file__).parent
    folders = [str(tests), str(tests.parent / "helpers")]
    code = f"import sys; sys.path += {folders!r}; import torch, fuzzing, test_extremes\n"
    code += "torch.set_num_threads(1); test_extremes.check_all('cpp')\n"
    code += "\n".join(f"fuzzing.run({operator!r}, {draws}, ['cpp'])" for operator in operators)
    instruction_sets.run(code, instruction_set)


@needs_cpp
@pytest.mark.parametrize("instruction_set", instruction_sets.SMALLER)
def test_smaller_instruction_sets(instruction_set):
    run_sets(instruction_set, 10, COMPILED)


@needs_cpp
@pytest.mark.slow
@pytest.mark.parametrize("operator", COMPILED)
@pytest.mark.parametrize("instruction_set", instruction_sets.SMALLER)
def test_smaller_instruction_sets_often(instruction_set, operator):
    run_sets(instruction_set, OTHERS, [operator])


@pytest.mark.slow
@pytest.mark.skipif(absent("triton") is not None, reason=str(absent("triton")))
# Triton's interpreter computes with NumPy, which warns of what becomes infinite or NaN.
@pytest.mark.filterwarnings("ignore:(overflow|invalid value|divide by zero|All-NaN slice) encountered:RuntimeWarning")
@pytest.mark.parametrize("operator", [name for name, backends in ops.OPERATORS.items() if "triton" in backends])
def test_interpreted_kernels(operator):
    fuzzing.run(operator, 20, ["triton"])


@pytest.mark.parametrize("layout", hostile.LAYOUTS)
@pytest.mark.parametrize("kind", [*hostile.FINITE, *hostile.WILD])
def test_operands_are_of_their_kind(kind, layout):
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        x = hostile.make((2, 3, 4, 5), dtype, kind, layout, seed=7)
        assert x.shape == (2, 3, 4, 5)
        assert x.dtype == dtype
        assert (x.storage_offset() > 0) == (layout in ("storage offset", "stepped"))
        assert bool(x.isfinite().all()) == (kind not in ("one infinite", "one nan"))
        if kind == "overflowing":
            assert (x * x).isinf().all()
        if kind == "subnormal":
            assert x.any()
            assert (x.abs() < torch.finfo(dtype).smallest_normal).any()


@pytest.mark.parametrize(
    ("operator", "spoil", "message"),
    [
        ("self_attention", lambda x: x * (1 + 1e-3), "too large"),
        ("group_norm_silu", lambda x: torch.full_like(x, torch.nan), "not finite here"),
        ("cross_attention", lambda x: x.nan_to_num(), "finite, and not in the reference"),
        ("linear", lambda x: x[..., :0], "linear"),
    ],
)
def test_what_is_wrong_is_found(monkeypatch, operator, spoil, message):
    right = getattr(ops, operator)

    def wrong(*arguments, **options):
        out = right(*arguments, **options)
        return tuple(spoil(x) for x in out) if isinstance(out, tuple) else spoil(out)

    monkeypatch.setattr(ops, operator, wrong)
    with pytest.raises((AssertionError, BaseException)) as caught:
        fuzzing.run(operator, FEW, ["reference"])
    assert message in "".join(map(str, [caught.value, *getattr(caught.value, "exceptions", ())]))
