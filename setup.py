"""Build script: adds the C++ / CUDA extension where it can be built and says why where it cannot.

The extension goes through LibTorch's stable ABI (one wheel serves several PyTorch versions).  Everything works
without it, on the reference path.  ``DIFFFAST_BUILD_CPP=1`` / ``DIFFFAST_BUILD_CUDA=1`` turn a missing part into an
error.
"""

import os
import shutil
from pathlib import Path

from setuptools import setup

# torch::stable::parallel_for and torch::stable::empty exist from this version on.
STABLE_ABI = (2, 10)
# For which the CUDA sources are checked not to spill; newer GPUs compile the PTX.  TORCH_CUDA_ARCH_LIST replaces it.
CUDA_ARCHITECTURES = "8.0;8.6;8.9;9.0+PTX"


def cpp_obstacle():
    """Why the C++ extension cannot be built here, or None."""
    try:
        import torch
    except ImportError:
        return "torch cannot be imported (install it first and use --no-build-isolation)"
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
    message = f"difffast: building without {part}: {reason}"
    if os.environ.get(variable) == "1":
        raise SystemExit(f"{message} ({variable}=1 makes this an error)")
    print(message)


def extension():
    """Keyword arguments for ``setup`` that build ``difffast._C``, or none."""
    reason = cpp_obstacle()
    if reason is not None:
        report("the C++ extension", "DIFFFAST_BUILD_CPP", reason)
        return {}
    from torch.utils.cpp_extension import BuildExtension, CppExtension, CUDAExtension

    sources = ["csrc/registration.cpp", *sorted(map(str, Path("csrc/cpu").glob("*.cpp")))]
    cuda_sources = sorted(map(str, Path("csrc/cuda").glob("*.cu")))
    target = f"-DTORCH_TARGET_VERSION=0x{STABLE_ABI[0]:02x}{STABLE_ABI[1]:02x}000000000000"
    kind, flags = CppExtension, {"cxx": ["-O3", "-std=c++17", target]}
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


setup(
    # Never a top-level `triton_kernels`: vLLM and the Triton project detect one by that name.
    packages=["difffast", "difffast.models", "difffast.ops", "difffast.triton_kernels"],
    package_dir={"difffast.triton_kernels": "triton_kernels"},
    package_data={"difffast": ["py.typed", "models/embedded/**/*"]},
    **extension(),
)
