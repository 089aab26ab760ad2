"""Run the C++ kernels' tests with a build of the package under AddressSanitizer: ``make test-sanitized``.

python tests/helpers/sanitized.py build/sanitized/lib [ARGUMENTS FOR PYTEST]
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
#: What calls the kernels in this process, on small operands; compiled programs and other processes say nothing here.
FILES = (
    *("test_fuzzed", "test_extremes", "test_group_norm_silu", "test_norm_in_place", "test_skip_norm_silu"),
    "test_convolution",
)
CHOSEN = (
    "(hostile or extremes or cpp_is_the_definition or test_definition or same_bits or doubled_pixels or into_memory)"
    " and not triton"
)


def find(library):
    """Return where the compiler keeps a library of its own."""
    compiler = next(name for name in (os.environ.get("CXX", "c++"), "g++") if shutil.which(name))
    found = subprocess.run([compiler, f"-print-file-name={library}"], check=True, capture_output=True, text=True)
    return found.stdout.strip()


def main(package, *arguments):
    """Run them; returns the exit status."""
    package = Path(package).resolve()
    libraries = list((package / "difffast").glob("_C*.so"))
    if not libraries or b"__asan_report_load" not in libraries[0].read_bytes():
        raise SystemExit(f"{package}/difffast has no _C*.so with sanitizers inside: `make test-sanitized` builds it")
    environment = {
        **os.environ,
        "LD_PRELOAD": f"{find('libasan.so')} {find('libubsan.so')}",
        "ASAN_OPTIONS": "detect_leaks=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    code = "import sys, difffast, pytest; assert difffast.__file__.startswith(sys.argv[1]), difffast.__file__; "
    code += "sys.exit(pytest.main(sys.argv[2:]))"
    options = [
        "-c",
        str(TESTS.parent / "pyproject.toml"),
        f"--rootdir={TESTS.parent}",
        "-p",
        "no:cacheprovider",
        "--capture=sys",
    ]
    files = [str(TESTS / "ops" / f"{name}.py") for name in FILES]
    command = [sys.executable, "-c", code, str(package), *options, "-q", "-x", "-k", CHOSEN, *arguments, *files]
    # From there, so that Python finds this build of the package first.
    return subprocess.run(command, env=environment, cwd=package).returncode


if __name__ == "__main__":
    raise SystemExit(main(*sys.argv[1:]))
