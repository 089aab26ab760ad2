"""Files are written as a whole or not at all, under names that nobody else uses."""

import errno
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from small_disk import small_disk

from difffast import files
from difffast.files import check_writable, write_whole

#: Adds 1 to a number in a file, 100 times, under the lock; it imports the file alone, which takes no torch.
COUNTING = """
import importlib.util, pathlib, sys
spec = importlib.util.spec_from_file_location("files", sys.argv[1])
files = importlib.util.module_from_spec(spec)
spec.loader.exec_module(files)
path = pathlib.Path(sys.argv[2])
for _ in range(100):
    with files.lock_file(path):
        count = int(path.read_text())
        with files.write_whole(path) as part:
            part.write_text(str(count + 1))
"""


def write(path, text):
    with write_whole(path) as part:
        part.write_text(text)


def write_half(path, reason):
    with write_whole(path) as part:
        part.write_text("half")
        assert path.read_text() == "one"
        assert part.suffix == ".json"
        raise reason


def test_a_file_is_replaced_as_a_whole(tmp_path):
    path = tmp_path / "deep" / "plans.json"
    write(path, "one")
    for reason in (KeyboardInterrupt, ValueError):
        with pytest.raises(reason):
            write_half(path, reason)
    with small_disk(1000), pytest.raises(OSError, match=re.escape(str(path))) as raised:
        write(path, "x" * 5000)
    assert raised.value.errno == errno.EFBIG
    assert path.read_text() == "one"
    write(path, "two")
    assert path.read_text() == "two"
    assert [each.name for each in path.parent.iterdir()] == ["plans.json"]


def test_names_of_others_are_left_alone(tmp_path):
    others = {tmp_path / name: name for name in ("plans.part", "plans.json.part", ".plans.json.part", "plans.lock")}
    for path, text in others.items():
        path.write_text(text)
    write(tmp_path / "plans.json", "mine")
    with files.lock_file(tmp_path / "plans.json"):
        pass
    assert {path: path.read_text() for path in others} == others


def test_links_stay_links_and_modes_stay(tmp_path):
    real, link = tmp_path / "real.json", tmp_path / "link.json"
    real.write_text("one")
    real.chmod(0o640)
    link.symlink_to(real)
    write(link, "two")
    assert link.is_symlink()
    assert real.read_text() == "two"
    assert real.stat().st_mode & 0o777 == 0o640
    mask = os.umask(0o077)
    os.umask(mask)
    write(tmp_path / "new.json", "")
    assert (tmp_path / "new.json").stat().st_mode & 0o777 == 0o666 & ~mask


def test_what_is_no_regular_file_is_written_in_place(tmp_path):
    null = Path(os.devnull)
    before = null.stat().st_ino
    write(null, "gone")
    assert null.stat().st_ino == before
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        write("/dev/full", "x")


def test_what_cannot_be_written_is_known_beforehand(tmp_path, monkeypatch):
    path = tmp_path / "file"
    check_writable(path)
    assert list(tmp_path.iterdir()) == []
    path.write_text("kept")
    check_writable(path)
    assert path.read_text() == "kept"
    assert list(tmp_path.iterdir()) == [path]
    for wrong in (tmp_path, path / "below", "/proc/nothing/file"):
        with pytest.raises(OSError, match=re.escape(str(wrong))):
            check_writable(wrong)
    monkeypatch.setattr(os, "access", lambda *_: False)  # root may write everything
    for refuse in (check_writable, lambda path: write(path, "new")):
        with pytest.raises(PermissionError, match=re.escape(str(path))):
            refuse(path)
    assert path.read_text() == "kept"


def test_the_lock_holds_between_processes(tmp_path):
    path = tmp_path / "count"
    path.write_text("0")
    command = [sys.executable, "-S", "-c", COUNTING, files.__file__, str(path)]
    running = [subprocess.Popen(command, stderr=subprocess.PIPE, text=True) for _ in range(3)]
    assert [process.communicate()[1] for process in running] == [""] * 3
    assert path.read_text() == "300"
    assert sorted(each.name for each in tmp_path.iterdir()) == [".count.lock", "count"]
