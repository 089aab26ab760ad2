"""Names that are imported when they are asked for."""

import importlib
import subprocess
import sys

import pytest

PACKAGES = ("difffast", "difffast.steering")


@pytest.mark.parametrize("name", PACKAGES)
def test_every_public_name_is_there(name):
    package = importlib.import_module(name)
    for each in package.__all__:
        assert getattr(package, each) is getattr(package, each), each


@pytest.mark.parametrize("name", PACKAGES)
def test_other_names_are_refused_as_pythons_own_are(name):
    package = importlib.import_module(name)
    with pytest.raises(AttributeError, match=rf"module '{name}' has no attribute 'nothing'"):
        _ = package.nothing


def test_what_a_patch_does_not_need_is_not_imported():
    code = "import sys, difffast; print(*sorted(name for name in sys.modules if name.startswith('difffast.')))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "difffast.patch" in loaded
    unneeded = ("steering.binding", "steering.inversion", "erase.trainer", "editing")
    assert [name for name in loaded if name.removeprefix("difffast.").startswith(unneeded)] == []
