"""The CUDA sources without a GPU: compiled for the host with an emulator, and by nvcc where a toolkit exists."""

import ctypes
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
FOLDER = TESTS.parent / "csrc" / "cuda"


def emulated(folder: Path, launcher: str) -> ctypes.CDLL:
    """The library of a C++ source, which includes a .cu file, compiled in ``folder`` with ``cuda_emulator.h``."""
    compiler = os.environ.get("CXX") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no g++ on PATH")
    source, library = folder / "launcher.cpp", folder / "launcher.so"
    source.write_text(launcher)
    flags = ["-std=c++17", "-O1", "-shared", "-fPIC", "-Wall", "-Wextra", "-Werror", "-Wno-unknown-pragmas"]
    # Fibers change stacks by jumps, which the fortified longjmp takes for a mistake.  And every library has its own
    # emulator, with what its test has told it.
    flags += ["-U_FORTIFY_SOURCE", "-fno-gnu-unique", f"-I{FOLDER}", f"-I{TESTS / 'ops'}"]
    result = subprocess.run([*compiler.split(), *flags, source, "-o", library], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return ctypes.CDLL(str(library))


def toolkit() -> Path:
    """The folder of a toolkit that has headers; an nvcc on PATH may be a wrapper without."""
    folders = [Path(os.environ["CUDA_HOME"])] if os.environ.get("CUDA_HOME") else []
    folders += sorted(Path("/usr/local").glob("cuda*"))
    for folder in folders:
        if (folder / "include" / "cuda_runtime.h").is_file() and (folder / "bin" / "nvcc").is_file():
            return folder
    pytest.skip(f"no include/cuda_runtime.h in {', '.join(map(str, folders)) or 'CUDA_HOME or /usr/local/cuda*'}")


def memory_of_kernels(stem: str, architecture: str, folder: Path) -> list[tuple[str, str, str]]:
    """Bytes of stack frame, spill stores and spill loads of every kernel of a source; warnings are errors.

    A stack frame is an array in memory, which is as slow as a spilled register.
    """
    command = [
        toolkit() / "bin" / "nvcc", "-std=c++17", "-O3", "-Xptxas", "-v", "-Xcompiler", "-Wall,-Wextra",
        "-Werror", "all-warnings", f"-gencode=arch=compute_{architecture},code=sm_{architecture}",
        "-c", FOLDER / f"{stem}.cu", "-o", folder / f"{stem}.o",
    ]  # fmt: skip
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    memory = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", result.stderr)
    assert len(memory) == len(re.findall("Compiling entry function", result.stderr))
    return memory
