"""Every Triton kernel compiles ahead of time for the GPUs it is meant for, without spilling a register."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = Path(__file__).parents[1] / "helpers" / "triton_aot.py"


def _compile(*arguments):
    # A process of its own: with TRITON_INTERPRET there are no kernels to compile, and this process may have it.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(SCRIPT), *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert " 0 failed" in result.stdout


@pytest.mark.parametrize("names", ["forward", pytest.param("", marks=pytest.mark.slow)])
def test_usual_kernels_compile_without_spills(names):
    _compile("--quick", "--capability", "90", "--only", names)


@pytest.mark.slow
# 8.0 has the instructions of 8.9, and more shared memory.  bfloat16's kernels are float16's but for the products, and
# float32's use no tensor cores, which is where GPUs differ: 8.9, with the least shared memory, stands for all of them.
# "16": both dtypes of 16 bits, in which an assembler's mistake has been seen on 9.0.
@pytest.mark.parametrize(("capability", "names"), [("89", "fp"), ("90", "16"), ("100", "fp16")])
def test_all_kernels_compile_without_spills(capability, names):
    _compile("--capability", capability, "--only", names)


def test_usual_kernels_compile_for_amd():
    """One of each module, with the options that launches choose where PyTorch was built for AMD."""
    _compile("--quick", "--amd", "gfx942", "--only", "forward")
    _compile("--quick", "--amd", "gfx942", "--only", "NHWC added")


@pytest.mark.slow
def test_all_kernels_compile_for_amd():
    _compile("--amd", "gfx942", "--only", "fp16")


def test_the_interpreter_is_refused():
    result = subprocess.run(
        [sys.executable, str(SCRIPT)], env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True
    )
    assert result.returncode == 2
    assert "TRITON_INTERPRET is set" in result.stderr


def test_registers_that_nothing_has_written_are_found():
    """As CUDA 12.8's assembler had them in the machine code of a kernel that was wrong on an H100."""
    import triton_aot

    right = """
        /*2100*/                   USHF.R.U32.HI UR6, URZ, 0x4, UR9 ;
        /*2260*/                   UIADD3 UR12, UP0, UR6, 0x40, URZ ;
        /*22b0*/                   HGMMA.64x32x16.F32 R24, R44, gdesc[UR16].tnspB, R24 ;
    """
    first = "        /*0010*/                   S2UR UR9, SR_CgaCtaId ;\n"
    wrong = "        /*2530*/              @P0  UIADD3 UR4, UP0, UR8, 0x20, URZ ;\n"
    assert triton_aot.find_unwritten(first + right) is None
    assert triton_aot.find_unwritten(right) == "2100 USHF.R.U32.HI UR6, URZ, 0x4, UR9"
    assert triton_aot.find_unwritten(first + right + wrong) == "2530 UIADD3 UR4, UP0, UR8, 0x20, URZ"
    wide = "        /*0020*/                   ULDC.64 UR8, c[0x0][0x210] ;\n"
    assert triton_aot.find_unwritten(wide + right + wrong) is None
