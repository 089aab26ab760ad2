"""bench/run.py, the command behind ``make bench``: what it runs, and what it returns."""

import subprocess
from pathlib import Path

import pytest
import run


@pytest.fixture
def commands(monkeypatch):
    """The commands that bench/run.py would run, and the exit status of the first of them."""
    ran, status = [], [0]

    def called(command, **_options):
        ran.append(command)
        (results,) = [word.partition("=")[2] for word in command if word.startswith("--benchmark-json=")] or [None]
        if results is not None and status[0] is not None:
            Path(results).write_text("{}")
        return subprocess.CompletedProcess(command, (status[0] or 0) if results else 0)

    monkeypatch.setattr(run.subprocess, "run", called)
    return ran, status


def test_bench_measures_and_then_reports(commands, tmp_path):
    ran, status = commands
    assert run.main(["--size", "cpu", "--budget-minutes", "3", "--out", str(tmp_path)]) == 0
    measuring, reporting = ran
    assert measuring[3].endswith("/bench")
    assert measuring[4].startswith("--ignore=")
    assert Path(measuring[4].removeprefix("--ignore=")).name == "bench_full_size.py"
    assert {"--size=cpu", "--budget-minutes=3.0", f"--records={tmp_path / 'cases'}"} <= set(measuring)
    assert reporting[1].endswith("bench/report.py")
    assert reporting[2:] == [str(tmp_path / "results.json"), "--out", str(tmp_path), "--size", "cpu"]

    status[0] = 1  # a missed bar: the report is written all the same, and the exit status says it
    assert run.main(["--size", "cpu", "--out", str(tmp_path)]) == 1
    assert len(ran) == 4


def test_bench_of_one_suite_or_your_own_model(commands, tmp_path):
    ran, _ = commands
    for suite in run.BENCHMARKS:
        assert run.main(["--only", suite, "--out", str(tmp_path)]) == 0
        assert Path(ran[-2][3]).exists()
        assert not any(each.startswith("--ignore") for each in ran[-2])
    assert run.main(["--model", "mine", "--out", str(tmp_path)]) == 0
    assert ran[-2][3].endswith("bench_pipelines.py")
    assert "--bench-model=mine" in ran[-2]


def test_bench_reports_nothing_old_when_it_is_interrupted(commands, tmp_path):
    ran, status = commands
    (tmp_path / "results.json").write_text('{"benchmarks": "of yesterday"}')
    status[0] = None
    assert run.main(["--size", "cpu", "--out", str(tmp_path)]) == 1
    assert len(ran) == 1
    assert not (tmp_path / "results.json").exists()


@pytest.mark.parametrize("minutes", ["0", "-3", "soon"])
def test_bench_needs_time(commands, minutes, capsys):
    with pytest.raises(SystemExit) as exit_:
        run.main(["--budget-minutes", minutes])
    assert exit_.value.code == 2
    assert minutes in capsys.readouterr().err
    assert commands[0] == []
