"""The report of the benchmarks: what is recorded is shown, what is bad is red, what became slower is kept."""

import json
import re
import statistics

import charts
import pytest
import report
import tables
from cases import TRUTH, Clock, case, raising, taking
from PIL import Image
from registry import COMPILED, Bar, Missing, Provider
from session import measure

MACHINE = {"device": "a CPU", "threads": 2, "torch": "2.13.0", "diffusers": "0.42.1", "commit": "abc"}
CEILINGS = {"copy_bytes_per_s": 2e10, "matmul_flop_per_s float32": 1e11}
OPERATOR = {"dtype": "float32", "seconds": {"eager": [3e-3] * 3, "cpp": [1e-3] * 3}, "gate": "against float64"}


def recorded(seconds, **options):
    """A measured case: fast takes ``seconds``, stock 4, compiled stock 3; one is wrong, one is missing."""
    clock = Clock()
    providers = (
        Provider("stock", "stock", taking(clock, 4.0)),
        Provider(COMPILED, "stock", taking(clock, 3.0)),
        Provider("fast", "difffast", taking(clock, seconds)),
        Provider("cheat", "difffast", taking(clock, 0.1, TRUTH * 2)),
        Provider("peer <1>", "peer", raising(Missing("not here & now"))),
    )
    return measure(case(*providers, **options), 1e9, clock=clock)


def benchmark(group, **info):
    return {"group": group, "name": "test", "extra_info": {**MACHINE, "ceilings": CEILINGS, **info}}


def results(path, seconds, *, everything=False, **changes):
    """Write pytest-benchmark's JSON of a run with ``fast`` at this many seconds."""
    bars = (Bar("fast", "stock", 0.3, source="an issue"), Bar("fast", COMPILED, 9.0), Bar("peer <1>", "stock", 1.0))
    benchmarks = [benchmark("unet", **recorded(seconds, name="UNet at 32x32, 50 steps", bars=bars))]
    if everything:
        scaled = (recorded(seconds * k, name=f"k {k}", shapes={"k": k, "batch": 1}) for k in (1, 2))
        benchmarks += [
            *(benchmark("decode", **each) for each in scaled),
            benchmark("norm", case="[2, 320]", bytes=1e6, flops=1e7, **OPERATOR),
            benchmark("norm", case="[2, 640]", bytes=1e6, flops=1e8, **OPERATOR),
            benchmark("overhead", case="a call", dtype="float32", microseconds={"public function": [9.0, 11.0]}),
        ]
    for each in benchmarks:
        each["extra_info"].update(changes)
    path.write_text(json.dumps({"benchmarks": benchmarks}))
    return path


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The folder of a report on a run with everything in it, against last results that were faster."""
    folder = tmp_path_factory.mktemp("report")
    run, last = results(folder / "run.json", 2.0, everything=True), results(folder / "last.json", 1.5)
    report.write(run, folder / "out", last=last, history=folder / "none")
    return folder / "out"


@pytest.fixture(scope="module")
def text(written):
    return (written / "report.md").read_text()


@pytest.fixture(scope="module")
def page(written):
    return (written / "report.html").read_text()


def test_what_was_recorded_is_shown(text, page):
    text = re.sub(" +", " ", text)
    assert "| fast | 2 | 0.500 (0.500 to 0.500) | 0.0e+00 | |" in text
    assert "| stock compiled | 3 | 0.750 (0.750 to 0.750) |" in text
    assert "| peer <1> | | | | missing: not here & now |" in text
    assert "public function: 10.0 us" in text
    assert "torch 2.13.0, diffusers 0.42.1, commit abc. What each section was measured on is at its top." in text
    assert text.count("a CPU, 2 threads, float32.\n") == 4  # a group each
    for number in ("0.500 (0.500 to 0.500)", "peer &lt;1&gt;", "not here &amp; now"):
        assert number in page
    assert page.count("<table>") == page.count("</table>") == 6
    assert page.count("<ul>") == page.count("</ul>")


def test_failures_and_missed_bars_are_red(text, page):
    assert "**failed: wrong: 1.0e+00 from stock, tolerance 1.0e-05**" in text
    assert "fast against stock (seconds): 0.500, promised at most 0.300 (an issue): **missed**" in text
    assert re.search(r"fast against stock compiled .*: met", text)
    assert re.search(r"peer <1> against stock .*: not measured", text)
    red = re.findall(r"<b class='red'>(.*?)</b>", page)
    assert "missed" in red
    assert any(words.startswith("failed: wrong") for words in red)
    assert "met" not in red
    assert ".red{color:#c00}" in page


def test_the_page_needs_no_other_file(written, page):
    assert not re.search(r"""(src|href)\s*=\s*["'](?!#)""", page)
    assert "@import" not in page
    charts = re.findall(r"<figure id='([^']+)'><svg", page)
    assert charts == [*(f"latency-{n:02d}" for n in range(3)), "compiled", "roofline-00", "scaling"]
    for name in charts:
        with Image.open(written / "charts" / f"{name}.png") as picture:
            assert min(picture.size) > 200
    assert "\x02" not in page
    assert "\x03" not in page


def test_charts_say_what_is_in_them(tmp_path):
    records = report.load(results(tmp_path / "run.json", 2.0, everything=True))
    latency, *_, compiled, roofline, scaling = (figure for _, figure in charts.figures(records))
    texts = [text.get_text() for text in latency.axes[0].texts]
    assert any("bar missed: 0.50, promised 0.30" in text for text in texts)
    assert "missing: not here & now" in texts
    assert any(text.startswith("failed: wrong") for text in texts)
    widths = [bar.get_width() for bar in latency.axes[0].patches]
    assert widths == [4.0, 3.0, 2.0]
    assert compiled.axes[0].get_xlabel().startswith("times faster than stock compiled")
    ceiling = roofline.axes[0].lines[-1]
    assert ceiling.get_ydata().max() == pytest.approx(100)  # GFLOP/s
    assert [axes.get_xlabel() for axes in scaling.axes] == ["k"]
    line = next(line for line in scaling.axes[0].lines if line.get_label() == "fast")
    assert list(line.get_xdata()) == [1, 2]
    assert list(line.get_ydata()) == [2.0, 4.0]


def test_what_became_slower_is_found_against_the_last_results(text, page):
    assert "- **unet, UNet at 32x32, 50 steps: fast now 0.500 of stock, 0.375 at abc**" in text
    assert "<b class='red'>unet, UNet at 32x32, 50 steps: fast now 0.500" in page


@pytest.mark.parametrize(
    ("seconds", "changes", "found"),
    [
        (1.5, {}, [("fast", 0.375, 0.5)]),
        (1.97, {}, []),
        (2.0, {}, []),
        (3.0, {}, []),
        (1.5, {"device": "another"}, []),
        (1.5, {"threads": 8}, []),
    ],
)
def test_regressions(tmp_path, seconds, changes, found):
    new = report.load(results(tmp_path / "run.json", 2.0))
    slower = report.regressions(new, report.load(results(tmp_path / "last.json", seconds, **changes)))
    assert [(row["provider"], row["earlier"], row["ratio"]) for row in slower] == found
    said = "Slower than the last results, beyond the spread of both runs: nothing."
    assert (said in report.markdown(new, slower, [])) == (not found)


def test_noise_is_no_regression():
    def record(seconds):
        return {**MACHINE, "group": "g", "case": "c", "dtype": "float32", "baseline": "stock", "seconds": seconds}

    before = record({"stock": [1.0] * 4, "fast": [0.4, 0.5, 0.6, 0.7]})
    assert not report.regressions([record({"stock": [1.0] * 4, "fast": [0.5, 0.6, 0.7, 0.8]})], [before])
    assert report.regressions([record({"stock": [1.0] * 4, "fast": [0.9] * 4})], [before])
    # All of the machine slower: the ratio is the same.
    assert not report.regressions([record({"stock": [3.0] * 4, "fast": [1.2, 1.5, 1.8, 2.1]})], [before])
    assert not report.regressions([record({"stock": [1.0] * 4, "new": [0.9] * 4})], [before])
    assert not report.regressions([record({"fast": [0.9] * 4})], [before])


def test_what_others_do_is_no_regression_of_ours():
    def record(seconds, **kinds):
        case = {**MACHINE, "group": "g", "case": "c", "dtype": "float32", "baseline": "stock"}
        return {**case, "seconds": {"stock": [1.0] * 4, **{name: [seconds] * 4 for name in kinds}}, "kinds": kinds}

    kinds = {"fast": "difffast", "DeepCache 3": "peer", "stock compiled": "stock"}
    slower = report.regressions([record(0.9, **kinds)], [record(0.5, **kinds)])
    assert [row["provider"] for row in slower] == ["fast"]
    operators = [
        {**record(each, **kinds), "seconds": {"eager": [1.0] * 4, "SDPA": [each] * 4, "cpp": [each] * 4}}
        for each in (0.9, 0.5)
    ]
    for each in operators:
        del each["kinds"], each["baseline"]
    assert [row["provider"] for row in report.regressions(operators[:1], operators[1:])] == ["cpp"]


def test_regressions_are_kept_when_the_results_are(tmp_path, monkeypatch, capsys):
    folder, out = tmp_path / "committed", tmp_path / "out"
    folder.mkdir()
    monkeypatch.setattr(report, "RESULTS", folder)
    monkeypatch.setattr(charts, "figures", lambda records: ())
    results(folder / "cpu.json", 1.5, commit="before")
    run = results(tmp_path / "run.json", 2.0)
    assert report.main([str(run), "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "slower: unet" in printed
    assert "fast missed its bar: 0.500 of stock" in printed
    assert not (folder / "regressions.json").exists()
    assert report.main([str(run), "--out", str(out), "--keep"]) == 0
    assert json.loads((folder / "cpu.json").read_text()) == json.loads(run.read_text())
    assert len(json.loads((folder / "regressions.json").read_text())) == 1

    assert report.main([str(run), "--out", str(out), "--keep"]) == 0  # nothing new, nothing forgotten
    assert len(json.loads((folder / "regressions.json").read_text())) == 1
    text, page = ((out / f"report.{kind}").read_text() for kind in ("md", "html"))
    row = "unet, UNet at 32x32, 50 steps: fast now 0.500 of stock, 0.375 at before"
    folded = "<details><summary>Slower than the results before these, when they were taken: 1</summary>"
    assert f"{folded}\n\n- {row}\n\n</details>" in text
    assert f"{folded}\n<ul>\n<li>{row}</li>\n</ul>\n</details>" in page.replace("</ul></details>", "</ul>\n</details>")


def test_what_later_results_have_replaced_is_not_shown(tmp_path):
    records = report.load(results(tmp_path / "run.json", 2.0))
    row = {"group": "unet", "case": "UNet at 32x32, 50 steps", "provider": "fast", "against": "stock"}
    row |= {"ratio": 0.5, "earlier": 0.375, "commit": "abc", "earlier_commit": "before"}
    others = ({"commit": "older"}, {"earlier_commit": "abc"}, {"case": "gone"}, {"group": "gone"})
    shown = [report.markdown(records, [], [{**row, **each}]).count("<details>") for each in ({}, *others)]
    assert shown == [1, 0, 0, 0, 0]


def test_the_summary_comes_first(text):
    lines = text.splitlines()
    assert [line for line in lines if line.startswith("## ")] == [
        *("## Summary", "## Promises", "## unet", "## decode", "## norm", "## overhead")
    ]
    assert "Promises: 1 of 3 met, **1 missed**, 1 not measured." in lines
    rows = [re.sub(" +", " ", line) for line in lines if line.startswith(("| unet", "| decode", "| norm"))]
    # fast takes 2 s and stock 4, compiled stock 3; k times as much; eager takes 3 ms and cpp 1.
    assert rows == [
        "| unet | 1 | 2.00: fast | 1.33: stock compiled |",
        "| decode | 2 | 1.50 (1.00 to 2.00): fast | 1.33 (1.33 to 1.33): stock compiled |",
        "| norm | 2 | 3.00 (3.00 to 3.00): cpp | |",
    ]
    assert "Slower than the last results: **1**." in lines


def test_sections_and_charts_say_their_own_threads(tmp_path):
    run = results(tmp_path / "run.json", 2.0, everything=True)
    content = json.loads(run.read_text())
    for each in content["benchmarks"]:
        each["extra_info"]["threads"] = 1 if each["group"] == "norm" else 2
    run.write_text(json.dumps(content))
    records = report.load(run)
    text = report.markdown(records, [], [])
    assert re.findall(r"^## (\w+)\n\na CPU, (\d threads?)", text, re.M) == [
        *(("unet", "2 threads"), ("decode", "2 threads"), ("norm", "1 thread"), ("overhead", "2 threads"))
    ]
    assert "threads" not in text[: text.index("## Promises")]
    drawn = dict(charts.figures(records))
    assert drawn["roofline-00"].axes[0].get_title("left") == "a CPU, 1 thread, float32"
    assert drawn["latency-00"].axes[0].get_title("left").endswith("; a CPU, 2 threads, float32")
    content["benchmarks"][-2]["extra_info"]["threads"] = 2  # the second case of norm: a roof of its own
    run.write_text(json.dumps(content))
    assert [name for name, _ in charts.figures(report.load(run)) if "roof" in name] == ["roofline-00", "roofline-01"]


def test_nothing_is_above_the_roof():
    def operator(rate, moved, **info):
        return {**MACHINE, "ceilings": CEILINGS, "dtype": "float32", "group": "linear", "case": "c", **info} | {
            "flops": rate,
            "bytes": moved,
            "seconds": {"onednn": [1.0] * 3, "slow": [2.0] * 3},
        }

    low = charts.Roof.over([operator(5e10, 1e9)])
    assert (low.bandwidth, low.peak) == (2e10, 1e11)
    assert low.label == "roof: 20.0 GB/s (a copy), 100 GFLOP/s (a matrix product)"
    high = charts.Roof.over([operator(5e10, 3e10), operator(4e11, 1e9)])
    assert (high.bandwidth, high.peak) == (3e10, 4e11)
    assert high.label == "roof: 30.0 GB/s (linear by onednn), 400 GFLOP/s (linear by onednn)"
    assert high.at(1) == 3e10
    assert high.at(1000) == 4e11
    committed = [record for record in report.load(tables.RESULTS / "cpu.json") if "bytes" in record]
    roof = charts.Roof.over(committed)
    for record in committed:
        most = roof.at(record["flops"] / record["bytes"]) * (1 + 1e-9)
        assert all(record["flops"] / statistics.median(seconds) <= most for seconds in record["seconds"].values())


def test_every_committed_result_can_be_reported(tmp_path, monkeypatch):
    monkeypatch.setattr(charts, "figures", lambda records: ())
    files = [file for file in sorted(tables.RESULTS.glob("*.json")) if "benchmarks" in json.loads(file.read_text())]
    assert {"cpu.json", "edited_attention.json", "engines_unets.json"} <= {file.name for file in files}
    for file in files:
        report.write(file, tmp_path, last=tmp_path / "none", history=tmp_path / "none")
        promised = sum(len(record.get("bars", ())) for record in report.load(file))
        assert (tmp_path / "report.md").read_text().count("promised at most") >= promised


def test_groups_that_a_run_did_not_measure_stay(tmp_path):
    last, run = results(tmp_path / "last.json", 1.5), results(tmp_path / "run.json", 2.0)
    earlier = json.loads(last.read_text())
    other = {**earlier["benchmarks"][0], "group": "memory"}
    last.write_text(json.dumps({**earlier, "benchmarks": [*earlier["benchmarks"], other]}))
    kept = report.in_place_of(run, last)["benchmarks"]
    assert kept == [*json.loads(run.read_text())["benchmarks"], other]
    assert report.in_place_of(run, tmp_path / "none")["benchmarks"] == kept[:-1]
    # Of a group for which the time did not suffice, the last results stay; of a case, the tables say nothing.
    short = json.loads(run.read_text())
    for each in short["benchmarks"]:
        each["extra_info"]["seconds"] = {}
    run.write_text(json.dumps(short))
    assert report.in_place_of(run, last)["benchmarks"] == json.loads(last.read_text())["benchmarks"]
    (tmp_path / "cpu.json").write_text(json.dumps(short))
    assert not tables.measured(tmp_path, short["benchmarks"][0]["group"])


def test_the_readme_table_shows_who_is_absent_and_what_is_missed(tmp_path):
    results(tmp_path / "cpu.json", 2.0)
    table = tables.unet_table(tmp_path)
    assert "| fast | 2.00 | 0.50 (0.50 to 0.50) |" in table
    assert "| cheat | failed |  |" in table
    assert "| peer <1> | missing |  |" in table
    assert "- UNet: fast takes 0.50 of stock, promised at most 0.30: **missed**" in table


def test_an_empty_run_is_an_error(tmp_path):
    (tmp_path / "empty.json").write_text('{"benchmarks": []}')
    with pytest.raises(ValueError, match="holds no benchmark"):
        report.write(tmp_path / "empty.json", tmp_path, last=tmp_path / "none", history=tmp_path / "none")
