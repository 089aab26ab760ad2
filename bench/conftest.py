import platform
import subprocess

import diffusers
import pytest
import torch

from difffast.demo import device_name


def pytest_benchmark_update_machine_info(config, machine_info):
    machine_info.pop("node", None)


@pytest.fixture(scope="session")
def environment():
    """What a timing was measured on; goes into every benchmark's ``extra_info``."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True).stdout.strip()
    return {
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "commit": commit,
    }
