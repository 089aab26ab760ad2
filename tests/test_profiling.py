"""difffast profile: blocks, counts, and that a synchronisation inside a UNet call does not go unseen."""

import json

import pytest
import torch
from sampling import latents

from difffast import models, patched
from difffast.tools import cli
from difffast.tools.profiling import OperatorCounter, blocks_of, profile

STEPS = 8


def _by_name(found):
    return {row.name: row for row in found.blocks}


def test_blocks_of_a_patched_image(pipe, tmp_path):
    before = latents(pipe, steps=STEPS)
    with patched(pipe, "faster-diffusion") as report:
        found = profile(pipe, lambda: latents(pipe, steps=STEPS), tmp_path / "deep" / "trace.json")
        assert pipe.unet is report._settings.pipe().unet
        stats = report.last_run
    assert torch.equal(latents(pipe, steps=STEPS), before)
    assert not any(block._forward_hooks or block._forward_pre_hooks for block in blocks_of(pipe.unet).values())

    rows = _by_name(found)
    assert set(blocks_of(pipe.unet)) <= set(rows)
    assert rows["down_blocks.0"].calls == stats.key < STEPS
    # A batch of decoders is one call; a step without any is a whole UNet.
    assert rows["up_blocks.1"].calls == stats.key + stats.propagated - sum(n - 1 for n in stats.decode_batches)
    assert rows["unet, rest"].calls == STEPS
    assert rows["outside the unet"].calls == 1
    for row in found.blocks:
        assert row.host_s > 0
        assert row.operators > 0
    assert found.synchronisations == 0
    events = json.loads(found.trace.read_text())["traceEvents"]
    assert {"difffast: down_blocks.0", "difffast: unet, rest"} <= {event.get("name") for event in events}


def test_the_rows_add_up(pipe, tmp_path):
    found = profile(pipe, lambda: latents(pipe, steps=1), tmp_path / "trace.json")
    events = json.loads(found.trace.read_text())["traceEvents"]
    (whole,) = [
        e["dur"] for e in events if e.get("name") == "difffast: outside the unet" and e.get("cat") != "gpu_user"
    ]
    assert sum(row.host_s for row in found.blocks) == pytest.approx(whole / 1e6, rel=1e-3)


def test_a_synchronisation_inside_a_block_is_counted(pipe, tmp_path):
    def reads(_block, _arguments, output):
        assert float(output.sum()) == float(output.sum())

    pipe.unet.conv_out.register_forward_hook(reads)
    found = profile(pipe, lambda: latents(pipe, steps=2), tmp_path / "trace.json")
    rows = _by_name(found)
    assert rows["conv_out"].synchronisations == 2 * 2
    assert found.synchronisations == 2 * 2


def test_what_counts_as_a_synchronisation():
    with OperatorCounter() as counter:
        x = torch.arange(4.0)
        y = (x + 1).to(torch.float64)  # from host to host
    assert not sum(counter.synchronisations.values())
    with OperatorCounter() as counter:
        assert y.max().item() == 4
        assert x[x > 1].numel() == 2
        assert x.nonzero().numel() == 3
    assert sum(counter.synchronisations.values()) >= 2


def test_what_cannot_be_profiled(pipe, tmp_path):
    class Compiled:
        _orig_mod = pipe.unet

    vars(pipe)["unet"] = Compiled()
    with pytest.raises(ValueError, match="is compiled"):
        profile(pipe, lambda: None, tmp_path / "trace.json")


def test_the_command(pipe, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(models, "embedded_pipeline", lambda: pipe)
    arguments = ["profile", "--preset", "stock", "--steps", "1", "--device", "cpu", "--out", str(tmp_path)]
    assert cli.main(arguments) == 0
    text = capsys.readouterr().out
    assert "down_blocks.0" in text
    assert "perfetto" in text
    assert (tmp_path / "trace.json").is_file()


def test_the_command_fails_on_a_synchronisation(pipe, monkeypatch, tmp_path, capsys):
    pipe.unet.conv_out.register_forward_hook(lambda module, arguments, output: float(output.sum()) and None)
    monkeypatch.setattr(models, "embedded_pipeline", lambda: pipe)
    arguments = ["profile", "--preset", "exact", "--steps", "2", "--device", "cpu", "--out", str(tmp_path)]
    assert cli.main(arguments) == 1
    assert "2 synchronisations inside UNet calls" in capsys.readouterr().out
