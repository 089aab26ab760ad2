"""Commands that are interrupted by a real signal: one sentence, status 130, and every file as it was or whole."""

import os
import signal
import subprocess
import sys

import pytest

#: Runs generate and then demo, each of which says where it is; in the first, a picture is saved half and then waits.
COMMANDS = """
import signal, sys, time
from pathlib import Path
from PIL import Image
from difffast.tools import cli, demo

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background processes ignore it
folder, whole, compare = sys.argv[1], Image.Image.save, demo.compare

def save_half(image, path, *args, **kwargs):
    whole(image, path, *args, **kwargs)
    written = Path(path).read_bytes()
    Path(path).write_bytes(written[: len(written) // 2])
    print("now", flush=True)
    time.sleep(60)

def compare_aloud(*args, on_step, **kwargs):
    def say():
        on_step()
        print("now", flush=True)
        time.sleep(60)

    return compare(*args, on_step=say, **kwargs)

Image.Image.save, demo.compare = save_half, compare_aloud
options = ("--model", f"{folder}/model", "--prompt", "a", "--steps", "8", "--device", "cpu")
print("status", cli.main(["generate", *options, "--out", f"{folder}/out/image.png"]), flush=True)
print("status", cli.main(["demo", "--steps", "8", "--out", f"{folder}/out"]), flush=True)
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
def test_interrupted_commands_leave_files_whole(pipe, tmp_path):
    pipe.save_pretrained(tmp_path / "model")
    out = tmp_path / "out"
    out.mkdir()
    for name in ("image.png", "grid.png", "demo.json"):
        (out / name).write_text(f"an earlier {name}")
    command = [sys.executable, "-c", COMMANDS, str(tmp_path)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    running = subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    lines = []
    for line in running.stdout:
        lines.append(line.strip())
        if lines[-1].endswith("now"):
            running.send_signal(signal.SIGINT)
    errors = running.communicate()[1]
    assert running.returncode == 0, errors
    assert "Traceback" not in errors
    assert [line for line in lines if line.startswith("status")] == ["status 130", "status 130"]
    assert lines.count("interrupted: no file was left half written.") == 2
    assert {each.name: each.read_text() for each in out.iterdir()} == {
        name: f"an earlier {name}" for name in ("image.png", "grid.png", "demo.json")
    }
