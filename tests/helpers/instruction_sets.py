"""The C++ kernels in an instruction set of choice, which a process settles once."""

import os
import subprocess
import sys
import textwrap

from difffast import ops

#: From the smallest.
SETS = ("baseline", "avx2", "avx512")


def run(code, instruction_set):
    """Run ``code`` in a process of its own with that set, or the best of this machine if that is smaller."""
    code = f"from difffast import ops\nprint(ops.INSTRUCTION_SET)\n{textwrap.dedent(code)}"
    environment = {**os.environ, "DIFFFAST_INSTRUCTION_SET": instruction_set}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == SETS[min(map(SETS.index, (instruction_set, ops.INSTRUCTION_SET)))]
