import hashlib
import platform
import subprocess
import time
from pathlib import Path

import diffusers
import pytest
import torch
from ceilings import ceilings
from session import Budget, Session

from difffast.tools.demo import device_name

ROOT = Path(__file__).resolve().parents[1]
_STARTED = pytest.StashKey[float]()


def pytest_addoption(parser):
    options = parser.getgroup("difffast")
    options.addoption("--size", choices=("cpu", "gpu"), help="which selection; default: gpu where there is one")
    options.addoption("--budget-minutes", type=float, default=14.0, help="wall clock for the whole session")
    options.addoption("--records", type=Path, default=ROOT / "out" / "bench" / "cases", help="folder, to go on from")
    options.addoption("--bench-model", help="measure this pipeline (a folder in Diffusers format) instead")


def pytest_configure(config):
    config.stash[_STARTED] = time.perf_counter()


def pytest_generate_tests(metafunc):
    if "case" in metafunc.fixturenames:
        option = metafunc.config.getoption
        size = option("--size") or ("gpu" if torch.cuda.is_available() else "cpu")
        metafunc.parametrize("case", metafunc.module.cases(size, option("--bench-model")), ids=str)


def pytest_collection_modifyitems(items):
    # Operators take as long as they take; the others share what is left.
    items.sort(key=lambda item: "case" in getattr(item, "fixturenames", ()))


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.pop("node", None)


@pytest.fixture(scope="session")
def environment():
    """What a timing was measured on; goes into every benchmark's ``extra_info``."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return {
        "device": device_name(),
        "driver": _driver(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "commit": _commit(),
        "ceilings": ceilings(device, (torch.float32,) if device == "cpu" else (torch.float16, torch.bfloat16)),
    }


@pytest.fixture(scope="session")
def session(request, environment):
    """Measures the cases of this run, within its budget."""
    option = request.config.getoption
    budget = Budget(60 * option("--budget-minutes"), start=request.config.stash[_STARTED])
    made = Session(option("--records"), budget, environment)
    parameters = (item.callspec.params for item in request.session.items if hasattr(item, "callspec"))
    made.expect(found["case"] for found in parameters if "case" in found)
    return made


def _driver():
    if not torch.cuda.is_available():
        return None
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _commit():
    """The commit; where the code differs from it, with a hash of the difference."""

    def git(*arguments):
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True).stdout

    code = ("bench", "csrc", "difffast", "triton_kernels")
    changed = git("diff", "HEAD", "--", *code, ":!bench/results")
    for path in git("ls-files", "--others", "--exclude-standard", "--", *code).splitlines():
        changed += path + hashlib.sha256((ROOT / path).read_bytes()).hexdigest()
    commit = git("rev-parse", "--short", "HEAD").strip()
    return f"{commit}+{hashlib.sha256(changed.encode()).hexdigest()[:7]}" if changed else commit
