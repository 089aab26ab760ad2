"""Type checkers accept what is right in a user's script, narrow what it returns, and see what is wrong."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

#: Every line that ends in "# wrong" must be an error, and no other.
SCRIPT = """
from diffusers import StableDiffusionPipeline
from torch import Tensor
from typing_extensions import assert_type

import difffast
from difffast import ops


def use(pipe: StableDiffusionPipeline, q: Tensor, k: Tensor, chosen: list[int] | None) -> None:
    assert_type(difffast.patch(pipe), difffast.PatchReport)
    assert_type(difffast.patch([pipe, pipe], "exact", fused=True), tuple[difffast.PatchReport, ...])
    with difffast.patched(pipe, engine="eager") as report:
        assert_type(report, difffast.PatchReport)
    with difffast.patched([pipe]) as reports:
        assert_type(reports, tuple[difffast.PatchReport, ...])
    assert_type(ops.cross_attention(q, k, k), Tensor)
    assert_type(ops.cross_attention(q, k, k, map_tokens=[1]), tuple[Tensor, Tensor])
    assert_type(ops.cross_attention(q, k, k, map_tokens=chosen), Tensor | tuple[Tensor, Tensor])
    assert_type(ops.joint_attention(q, k, k, None, None), Tensor)
    assert_type(ops.joint_attention(q, k, k, q, q, map_tokens=[1]), tuple[Tensor, Tensor])
    with difffast.collect_maps(pipe, tokens=["cat", 3]) as maps:
        assert_type(maps.grid(rows="negative"), Tensor)
    with ops.use_backend("reference") as operators:
        assert_type(operators, tuple[str, ...])
    tuning = difffast.tune(pipe, 10, budget=30.0)
    difffast.patch(pipe, **tuning.options)
    difffast.unpatch([pipe])
    assert_type(difffast.erase(pipe, ["red"], guide="blue"), difffast.Erasure)
    trainer = difffast.EraseTrainer(pipe, "red", method="sdd", pool=10)
    assert_type(trainer.train(3), list[float])
    effects = difffast.erase_report(pipe, trainer, lambda image, prompt: 1.0, {"target": ["red"]})
    assert_type(effects, difffast.EraseReport)
    difffast.patch(pipe, propogation=None)  # wrong
    difffast.patch(pipe, fused="yes")  # wrong
    difffast.patch("pipe")  # wrong
    difffast.patched(pipe, presett="exact")  # wrong
    maps.grid(rows="mine")  # wrong
    ops.cross_attention(q, k, k, map_tokens=[1]).shape  # wrong


def as_in_the_readme() -> None:
    pipe = difffast.models.embedded_pipeline()
    report = difffast.patch(pipe)
    image = pipe("a red circle and a blue square").images[0]
    print(report, report.last_run, image, sep="\\n")
    difffast.unpatch(pipe)
    loaded = StableDiffusionPipeline.from_pretrained("somewhere")
    difffast.patch(loaded, "turbo")
"""


@pytest.mark.slow
def test_a_users_script(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "mypy", "--follow-imports=silent", "--cache-dir", str(tmp_path), str(script)]
    environment = {**os.environ, "MYPYPATH": str(ROOT)}
    ran = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    found = {int(line) for line in re.findall(r"^.*script\.py:(\d+): error", ran.stdout, re.M)}
    wrong = {number for number, line in enumerate(SCRIPT.splitlines(), 1) if line.endswith("# wrong")}
    assert len(wrong) == 6
    assert found == wrong, ran.stdout + ran.stderr
