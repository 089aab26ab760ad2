"""``difffast prove`` and what ``difffast info`` prints of proofs."""

import json

import pytest
import torch
from rich.console import Console

from difffast.ops import _local
from difffast.proofs import parent, store
from difffast.proofs.parent import Outcome
from difffast.tools import cli, terminal

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _wide(proof_cache, monkeypatch):
    monkeypatch.setattr(terminal, "console", Console(width=300))


class Proving:
    """In place of a child process: proves two keys, and has no time for the others."""

    def __init__(self, device, seconds, keep, planted, child):
        self._child = child
        self._keep = keep

    def run(self, keys, whole):
        assert whole is None, "on a CPU no whole UNet is called"
        for key in keys[:2]:
            times = {"sdpa": [9.0, 10.0, 11.0], "reference": [9.0, 10.0, 11.0], "cpp": [4.0, 5.0, 6.0]}
            default = "reference" if "norm" in key.operator else "sdpa"
            made = {"choice": "cpp", "default": default, "microseconds": times, "refused": {"x[/]": "is [bold]wrong"}}
            self._keep(key, {"eager": made})
        if self._child is not None:
            self._child.close()
        return Outcome(left=list(keys[2:]), notes=["a [red]note[/]"])


def test_prove_a_pipeline_on_disk(pipe, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(parent, "Proving", Proving)
    pipe.save_pretrained(tmp_path / "pipeline")
    report = tmp_path / "deep" / "report.json"
    command = ["prove", "--pipeline", str(tmp_path / "pipeline"), "--device", "cpu", "--report", str(report)]
    assert cli.main(command) == 0
    text = capsys.readouterr().out
    assert "2 keys proved" in text
    assert "note: a [red]note[/]" in text
    assert "x[/]: is [bold]wrong" in text
    found = json.loads(report.read_text())
    assert found["proved"] == 2
    assert found["facts"]["torch"] == torch.__version__
    assert all("float32" in key for key in found["proofs"])
    assert len(found["left"]) > 2

    assert cli.main(command) == 0
    assert "2 known before" in capsys.readouterr().out
    for command in (["prove", "--show", "--device", "cpu"], ["info"]):
        assert cli.main(command) == 0
        shown = [line for line in capsys.readouterr().out.splitlines() if " eager " in line]
        assert shown
        assert all(" cpp " in line and " 5.0 " in line and " 10.0 " in line for line in shown)
    assert cli.main(["prove", "--clear", "--device", "cpu"]) == 0
    assert "cleared." in capsys.readouterr().out
    assert cli.main(["prove", "--clear", "--device", "cpu"]) == 0
    assert "nothing to clear" in capsys.readouterr().out
    assert cli.main(["prove", "--show", "--device", "cpu"]) == 0
    assert "nothing has been proved" in capsys.readouterr().out


def test_info_notes_a_file_that_is_no_good(capsys):
    path = _local.find_path(CPU)
    path.parent.mkdir(parents=True)
    path.write_text("[bold]")
    with pytest.warns(UserWarning, match="is damaged"):
        assert cli.main(["info"]) == 0
    assert "is damaged" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pipeline", "nowhere[/]"], "nowhere[/] holds no pipeline with a UNet"),
        (["--device", "nonsense"], "--device nonsense cannot be used here"),
        (["--device", "meta"], "proofs are made on cpu and cuda, got meta"),
        (["--report", "/proc/nowhere/report.json", "--device", "cpu"], "No such file"),
    ],
)
def test_errors_are_one_sentence(arguments, message, capsys):
    assert cli.main(["prove", *arguments]) == 2
    (line,) = capsys.readouterr().out.strip().splitlines()
    assert message in line


@pytest.mark.parametrize("content", [b"{", b"[]", b"{}", b'{"_class_name": 3}', b'{"_class_name": "Nonsense"}'])
def test_a_configuration_that_is_none_is_refused(content, tmp_path, capsys):
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet" / "config.json").write_bytes(content)
    assert cli.main(["prove", "--pipeline", str(tmp_path)]) == 2
    assert "must be the configuration of a UNet of Diffusers" in capsys.readouterr().out


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf", "many"])
def test_times_are_checked(seconds, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["prove", "--seconds", seconds])
    assert ended.value.code == 2
    assert "--seconds" in capsys.readouterr().err


def test_a_table_from_a_file_is_no_markup(capsys):
    store.merge(CPU, {"[bold] [/] eager": {"choice": "[red]", "refused": {"[/]": "[/x]"}}})
    assert cli.main(["info"]) == 0
    assert "[red]" in capsys.readouterr().out
