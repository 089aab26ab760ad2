"""What a step and an import may cost in Python: bars of bench/count_calls.py that do not depend on the machine."""

import subprocess
import sys

#: Seconds each, and of use to few who import difffast.
HEAVY = ("torch._dynamo", "torch._inductor", "sympy", "triton", "diffusers", "transformers", "PIL", "rich")


def test_import_brings_in_neither_the_compiler_nor_diffusers():
    code = f"import sys, difffast; print(*(name for name in {HEAVY} if name in sys.modules))"
    assert subprocess.check_output([sys.executable, "-W", "error", "-c", code], text=True).split() == []
