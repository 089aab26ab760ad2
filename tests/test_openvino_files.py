"""Files of OpenVINO's models: whole ones are read, all others are made anew, and nothing is left behind."""

import os
import subprocess
import sys
import textwrap
import time

import pytest
import torch
from sampling import latents, relative
from tolerances import ENGINE_RELATIVE

from difffast import patch, patched
from difffast.engines import conversion, model_files

pytest.importorskip("openvino", reason="the extra difffast[openvino] is not installed")

pytestmark = pytest.mark.usefixtures("_one_thread")


def test_another_process_starts_from_files_and_replaces_damaged_ones(one_level, models_folder):
    with patched(one_level, "exact", engine="openvino") as report:
        expected = latents(one_level, steps=2)
        assert (report.programs.kept, report.programs.loaded) == (2, 0)
    with patched(one_level, "exact", engine="openvino") as report:  # new engines, which have nothing but the files
        assert torch.equal(latents(one_level, steps=2), expected)
        assert (report.programs.kept, report.programs.loaded) == (2, 2)
    file = max(models_folder.glob("*.model"), key=lambda each: each.stat().st_size)  # the UNet's
    damaged = bytearray(file.read_bytes())
    damaged[len(damaged) // 2] ^= 4
    file.write_bytes(damaged)
    report = patch(one_level, "exact", engine="openvino")
    with pytest.warns(UserWarning, match="a converted model was damaged and is made anew"):
        assert torch.equal(latents(one_level, steps=2), expected)
    assert [reason.partition(":")[0] for reason in report.last_run.reasons] == [
        "a converted model was damaged and is made anew"
    ]
    assert (report.programs.kept, report.programs.loaded) == (2, 1)
    assert file.read_bytes() != damaged


def test_whatever_is_in_a_file_only_whole_ones_are_read(models_folder):
    tensors = [torch.randn(3, 4)]
    layer = torch.nn.Linear(4, 2)
    model = conversion.convert(layer.forward, layer, tensors, "f32")
    file, notes = models_folder / "a.model", []
    model_files.write(file, model, notes.append)
    whole = file.read_bytes()
    assert torch.equal(model_files.read(file, "f32", notes.append).run(tensors), model.run(tensors))
    assert not notes
    for content in (b"", whole[:30], whole[:-1], whole + b"x", b"{}" * 999, whole.replace(b"tensor", b"tenser", 1)):
        file.write_bytes(content)
        assert model_files.read(file, "f32", notes.append) is None
        assert "was damaged and is made anew" in notes.pop()
        assert not file.exists()


@pytest.mark.slow
def test_whoever_is_killed_while_converting_leaves_nothing_wrong(one_level, models_folder):
    code = """
        from engine_histories import EngineHistory
from lora_changes import load
        from sampling import latents, relative
from tolerances import ENGINE_RELATIVE
        import difffast
        pipe = EngineHistory(0, lambda pipe: None).pipe
        difffast.patch(pipe, "exact", engine="openvino")
        print("begins", flush=True)
        latents(pipe, steps=2)
        """
    for delay in (0.2, 0.8, 2.0, 3.5):
        command = [sys.executable, "-c", textwrap.dedent(code)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=_env()) as process:
            process.stdout.readline()
            time.sleep(delay)
            process.kill()
    expected = latents(one_level, steps=2)
    with patched(one_level, "exact", engine="openvino") as report:
        assert relative(latents(one_level, steps=2), expected) <= ENGINE_RELATIVE
        assert not report.last_run.reasons


def _env():
    return {**os.environ, "PYTHONPATH": ":".join(sys.path)}


def test_files_are_bounded_and_what_killed_processes_have_left_is_deleted(models_folder, monkeypatch):
    layer, notes = torch.nn.Linear(4, 2), []
    model = conversion.convert(layer.forward, layer, [torch.randn(3, 4)], "f32")
    models_folder.mkdir()
    left = models_folder / ".abandoned.1234.model"
    left.write_bytes(b"half")
    os.utime(left, (0, 0))
    monkeypatch.setattr(model_files, "_LIMIT", 1)
    for name in "ab":
        model_files.write(models_folder / f"{name}.model", model, notes.append)
    assert [each.name for each in models_folder.iterdir()] == ["b.model"]
    monkeypatch.setattr(model_files, "_SHARE", 0)
    model_files.write(models_folder / "c.model", model, notes.append)
    assert not (models_folder / "c.model").exists()
    assert "the disk has too little space" in notes.pop()
    assert not notes
