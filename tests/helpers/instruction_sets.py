"""The C++ kernels in an instruction set of choice, which a process settles once."""

import os
import subprocess
import sys
import textwrap

import pytest

from difffast import ops

#: From the smallest.
SETS = ("baseline", "avx2", "avx512", "avx512_bf16", "emulated_amx", "amx")
#: With -m slow but for the smallest and the largest: other tests run the best of this machine.
EVERY = [pytest.param(name, marks=[] if name in (SETS[0], SETS[-1]) else pytest.mark.slow) for name in SETS]
#: Those that other tests do not run, on a machine that has all.
SMALLER = SETS[:2]


def run(code, instruction_set):
    """Run ``code`` in a process of its own with that set, or the best of this machine if that is smaller."""
    code = f"from difffast import ops\nprint(ops.INSTRUCTION_SET)\n{textwrap.dedent(code)}"
    environment = {**os.environ, "DIFFFAST_INSTRUCTION_SET": instruction_set}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    asked, found, best = map(SETS.index, (instruction_set, result.stdout.strip(), ops.INSTRUCTION_SET))
    # What is asked for may be more than the best, which leaves out what is slow.
    assert min(asked, best) <= found <= asked
