"""Build script: adds the C++ / CUDA extension where it can be built and says why where it cannot.

The extension goes through LibTorch's stable ABI (one wheel serves several PyTorch versions).  Everything works
without it, on the reference path: ``pip install .``, whose isolated build has no torch, makes a pure-Python wheel.
``DIFFFAST_BUILD_CPP=1`` / ``DIFFFAST_BUILD_CUDA=1`` turn a missing part into an error, ``DIFFFAST_BUILD_CPP=0`` leaves
the extension out.
"""

import os
import shutil
import sys
import warnings
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

# torch::stable::parallel_for and torch::stable::empty exist from this version on; difffast.ops refuses older ones.
STABLE_ABI = (2, 10)
# For which the CUDA sources are checked not to spill; newer GPUs compile the PTX.  TORCH_CUDA_ARCH_LIST replaces it.
CUDA_ARCHITECTURES = "8.0;8.6;8.9;9.0+PTX"
#: What to do where the extension is missing; difffast.ops says the same.
REMEDY = (
    "with torch, a C++ compiler and setuptools>=78.0.1 installed, `pip install -v --no-build-isolation .` builds it"
)


def cpp_obstacle():
    """Why the C++ extension is not built here, or None."""
    if os.environ.get("DIFFFAST_BUILD_CPP") == "0":
        return "DIFFFAST_BUILD_CPP=0"
    try:
        import torch
    except ImportError as error:
        return f"torch cannot be imported ({error}), as in an isolated build; {REMEDY}"
    version = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    if version < STABLE_ABI:
        return f"torch {torch.__version__} lacks the stable ABI of {'.'.join(map(str, STABLE_ABI))}"
    compiler = os.environ.get("CXX", "c++" if shutil.which("c++") else "g++")
    if shutil.which(compiler.split()[0]) is None:
        return f"no C++ compiler: {compiler!r} is not on PATH"
    return None


def cuda_obstacle():
    """Why the CUDA sources cannot be built here, or None.

    An ``nvcc`` on PATH proves nothing: it may be a wrapper, from which torch guesses a CUDA_HOME without headers.
    """
    import torch
    from torch.utils.cpp_extension import CUDA_HOME

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a CPU build"
    if CUDA_HOME is None or not Path(CUDA_HOME, "include", "cuda_runtime.h").is_file():
        return f"CUDA_HOME={CUDA_HOME} has no include/cuda_runtime.h"
    versions = Path(CUDA_HOME, "version.json")
    if versions.is_file():
        import json

        toolkit = json.loads(versions.read_text())["cuda"]["version"]
        if toolkit.split(".")[0] != torch.version.cuda.split(".")[0]:
            return f"the toolkit is CUDA {toolkit}, torch was built with CUDA {torch.version.cuda}"
    return None


def report(part, variable, reason):
    """Say why a part is left out; raises SystemExit where ``variable`` asks for it."""
    message = f"difffast: building without {part}: {reason}"
    if os.environ.get(variable) == "1":
        raise SystemExit(f"{message} ({variable}=1 makes this an error)")
    if not {"egg_info", "dist_info"} & set(sys.argv):  # pip runs these first, and nothing is built by them
        warnings.warn(message, stacklevel=2)  # pip 26 shows a build's warnings; what it prints, with -v alone


def extension():
    """Keyword arguments for ``setup`` that build ``difffast._C``, or none."""
    reason = cpp_obstacle()
    if reason is not None:
        report("the C++ extension", "DIFFFAST_BUILD_CPP", reason)
        return {}
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    sources = [str(path) for folder in ("registration", "cpu") for path in sorted(Path("csrc", folder).glob("*.cpp"))]
    cuda_sources = sorted(map(str, Path("csrc/cuda").glob("*.cu")))
    target = f"-DTORCH_TARGET_VERSION=0x{STABLE_ABI[0]:02x}{STABLE_ABI[1]:02x}000000000000"
    # They come after CXXFLAGS, whose own optimisation shall win.
    optimised = [] if " -O" in f" {os.environ.get('CXXFLAGS', '')}" else ["-O3"]
    kind, flags = CppExtension, {"cxx": [*optimised, "-std=c++17", target]}
    reason = cuda_obstacle()
    if reason is None:
        kind, sources = CUDAExtension, sources + cuda_sources
        # USE_CUDA opens the stable ABI's declarations for CUDA streams.
        flags["cxx"] += ["-DDIFFFAST_WITH_CUDA", "-DUSE_CUDA"]
        flags["nvcc"] = ["-O3", "-std=c++17"]
        os.environ.setdefault("TORCH_CUDA_ARCH_LIST", CUDA_ARCHITECTURES)
    else:
        report("the CUDA kernels", "DIFFFAST_BUILD_CUDA", reason)
    module = kind(
        "difffast._C",
        sources,
        include_dirs=[str(Path("csrc").resolve())],
        extra_compile_args=flags,
        depends=sorted(map(str, Path("csrc").glob("**/*.h"))),
        py_limited_api=True,
    )
    return {
        "ext_modules": [module],
        "cmdclass": {"build_ext": BuildExtension.with_options(use_ninja=False)},
        "options": {"bdist_wheel": {"py_limited_api": "cp310"}},
    }


def packages():
    """Every package of the repository that belongs into the wheel.

    Never a top-level ``triton_kernels``: vLLM and the Triton project detect one by that name.
    """
    kernels = find_packages(include=["triton_kernels", "triton_kernels.*"])
    return [*find_packages(include=["difffast", "difffast.*"]), *(f"difffast.{name}" for name in kernels)]


class FreshBuild(build_py):
    """Leaves out what an earlier build copied and the tree no longer has: moved modules would stay in the wheel."""

    def run(self):
        for path in Path(self.build_lib).rglob("*.py"):
            path.unlink()
        super().run()


arguments = extension()
setup(
    packages=packages(),
    package_dir={"difffast.triton_kernels": "triton_kernels"},
    include_package_data=False,  # setuptools would take the model's folders for packages, with a page of warnings
    package_data={"difffast": ["py.typed", "plan/measured.json", "models/embedded/**/*"]},
    cmdclass={"build_py": FreshBuild, **arguments.pop("cmdclass", {})},
    **arguments,
)
