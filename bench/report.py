"""Reports from recorded results.

    python bench/report.py out/bench/results.json --out out/bench     report.md, report.html and the charts of a run
    python bench/report.py out/bench/results.json --out out/bench --keep    and take it in place of the last results of
                                                                  the groups that it measured

What became slower than the last results is printed in red; with --keep it stays in bench/results/regressions.json, and
in every later report.
"""

from __future__ import annotations

import argparse
import html
import json
import re
import shutil
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from interleaved import ratio
from records import is_measured, where
from rich.console import Console
from session import complaints
from tables import RESULTS, Record, load

from difffast.files import write_whole

#: What names of PyTorch's providers begin with in the operators' benchmarks.
_OTHERS = ("eager", "SDPA", "compiled")

#: A ratio that grew by less is not called a regression, however small the spread.
_NOISE = 1.03

_STYLE = (
    "body{font:15px/1.45 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#222}"
    "table{border-collapse:collapse;margin:.5rem 0}td,th{padding:.15rem .7rem;border-bottom:1px solid #ddd;"
    "text-align:left}td:nth-child(2),td:nth-child(3){font-variant-numeric:tabular-nums}.red{color:#c00}"
    "figure{margin:1.5rem 0}svg{max-width:100%;height:auto}"
)


def baseline(record: Record) -> str:
    """What the ratios of a record refer to; operators' benchmarks name eager PyTorch first."""
    return record.get("baseline") or next(iter(record["seconds"]))


def regressions(new: Sequence[Record], old: Sequence[Record]) -> list[dict[str, Any]]:
    """Providers of ours whose ratio to the baseline of their own run became worse beyond the spread of both runs.

    Absolute seconds are not compared: they belong to a machine and its day.  Runs on another device, or with another
    number of threads, are not compared at all.
    """
    earlier = {(record["group"], record["case"]): record for record in old if record.get("seconds")}
    found = []
    for record in new:
        before = earlier.get((record["group"], record["case"]))
        if before is None or not record.get("seconds"):
            continue
        if any(record[key] != before[key] for key in ("device", "threads", "dtype")):
            continue
        for name in record["seconds"]:
            spreads = [_spread(each, name) for each in (record, before)]
            if None in spreads or name == baseline(record) or not _ours(record, name):
                continue
            (low, now, _), (_, then, high) = spreads
            if low > high and now > _NOISE * then:
                found.append(
                    {
                        "group": record["group"],
                        "case": record["case"],
                        "provider": name,
                        "against": baseline(record),
                        "ratio": now,
                        "earlier": then,
                        "commit": record["commit"],
                        "earlier_commit": before["commit"],
                    }
                )
    return found


def _ours(record: Record, name: str) -> bool:
    """Whether a provider is difffast's; operators' benchmarks name no kinds."""
    return record["kinds"][name] == "difffast" if "kinds" in record else not name.startswith(_OTHERS)


def _spread(record: Record, name: str) -> tuple[float, float, float] | None:
    """Quartiles of a provider's ratio to the baseline."""
    seconds, base = record["seconds"], baseline(record)
    return ratio(seconds, name, base) if name in seconds and base in seconds else None


def markdown(records: Sequence[Record], slower: Sequence[Mapping[str, Any]], kept: Sequence[Mapping[str, Any]]) -> str:
    """The report as text, the summary first."""
    return "\n".join(_lines(records, slower, kept, lambda text: f"**{text}**"))


def _lines(
    records: Sequence[Record],
    slower: Sequence[Mapping[str, Any]],
    kept: Sequence[Mapping[str, Any]],
    red: Callable[[str], str],
) -> Iterator[str]:
    yield "# difffast: benchmarks"
    yield ""
    made = dict.fromkeys(f"torch {r['torch']}, diffusers {r['diffusers']}, commit {r['commit']}" for r in records)
    yield f"{'; '.join(made)}. What each section was measured on is at its top."
    yield ""
    yield "## Summary"
    yield ""
    bars = [(record, bar) for record in records for bar in record.get("bars", ())]
    yield from _summary(records, bars, red)
    yield ""
    yield from _regressions(records, slower, kept, red)
    if bars:
        yield ""
        yield "## Promises"
        yield ""
    for record, bar in bars:
        verdict = {True: "met", False: red("missed"), None: "not measured"}[bar["met"]]
        value = "" if bar["ratio"] is None else f" {bar['ratio']:.3f},"
        yield (
            f"- {record['case']}: {bar['provider']} against {bar['against']} ({bar['of']}):{value} promised at most "
            f"{bar['at_most']:.3f} ({bar['source']}): {verdict}"
        )
    for group in dict.fromkeys(record["group"] for record in records):
        mine = [record for record in records if record["group"] == group]
        yield ""
        yield f"## {group}"
        yield ""
        yield f"{' and '.join(dict.fromkeys(map(where, mine)))}."
        for record in mine:
            yield ""
            yield from _case(record, red)


def _summary(records: Sequence[Record], bars: Sequence[tuple[Record, Any]], red: Callable[[str], str]) -> Iterator[str]:
    """How many promises are kept, and how many times as fast as its baseline everybody's fastest is, by group."""
    counts = {verdict: sum(bar["met"] is verdict for _, bar in bars) for verdict in (True, False, None)}
    if bars:
        missed = red(f"{counts[False]} missed") if counts[False] else "none missed"
        unknown = f", {counts[None]} not measured" if counts[None] else ""
        yield f"Promises: {counts[True]} of {len(bars)} met, {missed}{unknown}."
        yield ""
    yield "| group | cases | difffast's fastest, times as fast as the baseline | the fastest of others |"
    yield "|---|---|---|---|"
    for group in dict.fromkeys(record["group"] for record in records):
        mine = [record for record in records if record["group"] == group and record.get("seconds")]
        cells = [_fastest(mine, ours=ours) for ours in (True, False)]
        if any(cells):
            yield f"| {group} | {len(mine)} | {cells[0]} | {cells[1]} |"
    yield ""
    yield "Medians over the cases, in brackets the least and the most."


def _fastest(records: Sequence[Record], *, ours: bool) -> str:
    """Return how many times as fast as the baseline the fastest provider of each case is: median, least and most."""
    found = []
    for record in records:
        shares = {
            name: spread[1]
            for name in record["seconds"]
            if name != baseline(record) and _ours(record, name) == ours and (spread := _spread(record, name))
        }
        if shares:
            best = min(shares, key=shares.__getitem__)
            found.append((1 / shares[best], best))
    if not found:
        return ""
    values, names = sorted(value for value, _ in found), list(dict.fromkeys(name for _, name in sorted(found)[::-1]))
    spread = f" ({values[0]:.2f} to {values[-1]:.2f})" if len(values) > 1 else ""
    some = f" in {len(found)} of {len(records)}" if len(found) < len(records) else ""
    return f"{statistics.median(values):.2f}{spread}{some}: {'; '.join([*names[:2], *(['...'] if names[2:] else [])])}"


def _regressions(
    records: Sequence[Record],
    slower: Sequence[Mapping[str, Any]],
    kept: Sequence[Mapping[str, Any]],
    red: Callable[[str], str],
) -> Iterator[str]:
    """What became slower: than the last results, and, folded up, what these results were found slower than before.

    A row that was kept is about the results that a commit made; where a later commit measured the case again, it says
    nothing any more.
    """
    commits = {(record["group"], record["case"]): record["commit"] for record in records}
    still = [
        row
        for row in kept
        if commits.get((row["group"], row["case"])) == row["commit"] != row["earlier_commit"] and row not in slower
    ]
    if slower:
        yield f"Slower than the last results: {red(str(len(slower)))}."
        yield ""
        for row in slower:
            yield f"- {red(_regression(row))}"
    else:
        yield "Slower than the last results, beyond the spread of both runs: nothing."
    if still:
        yield ""
        yield f"<details><summary>Slower than the results before these, when they were taken: {len(still)}</summary>"
        yield ""
        for row in still:
            yield f"- {_regression(row)}"
        yield ""
        yield "</details>"


def _regression(row: Mapping[str, Any]) -> str:
    return (
        f"{row['group']}, {row['case']}: {row['provider']} now {row['ratio']:.3f} of {row['against']}, "
        f"{row['earlier']:.3f} at {row['earlier_commit']}"
    )


def _case(record: Record, red: Callable[[str], str]) -> Iterator[str]:
    yield f"### {record['case']}"
    yield ""
    seconds, absent = record.get("seconds", {}), record.get("absent", {})
    if "microseconds" in record:
        for name, values in record["microseconds"].items():
            yield f"- {name}: {statistics.median(values):.1f} us"
        return
    peaks = record.get("peak_bytes", {})
    gates = record["gate"] if "kinds" in record else {}  # operators' benchmarks describe theirs in words
    base = record.get("baseline") or (baseline(record) if seconds else "")
    yield f"| provider | {record.get('timed', 'seconds')} | of {base} | error to {base} | |"
    yield "|---|---|---|---|---|"
    for name in record.get("kinds", seconds):
        gate = gates.get(name)
        error = f"{gate['error_to_baseline']:.1e}" if gate else ""
        remark = "changes nothing" if gate and not gate["error_to_baseline"] and record["kinds"][name] == "peer" else ""
        if name in absent:
            reason = f"{absent[name]['status']}: {absent[name]['reason']}"
            yield f"| {name} | | | {error} | {red(reason) if absent[name]['status'] == 'failed' else reason} |"
        elif name in seconds:
            spread = _spread(record, name)
            share = "" if spread is None else "{1:.3f} ({0:.3f} to {2:.3f})".format(*spread)
            yield f"| {name} | {statistics.median(seconds[name]):.4g} | {share} | {error} | {remark} |"
        else:
            share = f"{peaks[name] / peaks[base]:.3f}" if base in peaks else ""
            yield f"| {name} | {peaks[name] / 2**20:.1f} MiB | {share} | {error} | {remark} |"
    if seconds:
        yield ""
        yield f"{len(next(iter(seconds.values())))} interleaved rounds, medians and quartiles."


def page(records: Sequence[Record], slower: Sequence[Any], kept: Sequence[Any], charts: Mapping[str, str]) -> str:
    """The report as one HTML file that needs no other; ``charts``: SVG by name."""
    body = _to_html(_lines(records, slower, kept, lambda text: f"\x02{text}\x03"))
    drawings = "".join(f"<figure id='{html.escape(name)}'>{svg}</figure>" for name, svg in charts.items())
    return (
        "<!doctype html><html lang='en'><meta charset='utf-8'><title>difffast: benchmarks</title>"
        f"<style>{_STYLE}</style><body>{body}<h2>Charts</h2>{drawings}</body></html>\n"
    )


def _to_html(lines: Iterable[str]) -> str:
    """The few constructs of :func:`_lines` as HTML; text between the marks is red."""
    made, block = [], ""
    for line in lines:
        if line.startswith(("<details>", "</details>")):  # HTML already; the number in it is our own
            made.append(f"</{block}>{line}" if block else line)
            block = ""
            continue
        text = html.escape(line).replace("\x02", "<b class='red'>").replace("\x03", "</b>")
        kind = "table" if line.startswith("|") else "ul" if line.startswith("- ") else ""
        if block and kind != block:
            made.append(f"</{block}>")
        if kind and kind != block:
            made.append(f"<{kind}>")
        if kind == "table" and not line.startswith("|---"):
            cell = "th" if kind != block else "td"
            cells = "".join(f"<{cell}>{each.strip()}</{cell}>" for each in text.split("|")[1:-1])
            made.append(f"<tr>{cells}</tr>")
        elif kind == "ul":
            made.append(f"<li>{text[2:]}</li>")
        elif line.startswith("#"):
            level = len(line) - len(line.lstrip("#"))
            made.append(f"<h{level}>{text[level + 1 :]}</h{level}>")
        elif not kind and line:
            made.append(f"<p>{text}</p>")
        block = kind
    return "\n".join([*made, f"</{block}>" if block else ""])


def write(source: Path, out: Path, *, last: Path, history: Path) -> list[dict[str, Any]]:
    """Write report.md, report.html and charts/ (PNG, SVG) of a run; -> its regressions against the last results."""
    from charts import figures

    records = load(source)
    if not records:
        raise ValueError(f"{source} holds no benchmark")
    slower = regressions(records, load(last)) if last.is_file() else []
    kept = json.loads(history.read_text()) if history.is_file() else []
    charts = out / "charts"
    shutil.rmtree(charts, ignore_errors=True)
    charts.mkdir(parents=True)
    drawn = {}
    for name, figure in figures(records):
        figure.savefig(charts / f"{name}.png", dpi=110)
        figure.savefig(charts / f"{name}.svg")
        drawn[name] = re.sub(r"^.*?(?=<svg)", "", (charts / f"{name}.svg").read_text(), flags=re.S)
    _write(out / "report.md", markdown(records, slower, kept) + "\n")
    _write(out / "report.html", page(records, slower, kept, drawn))
    return slower


def _write(path: Path, text: str) -> None:
    with write_whole(path) as part:
        part.write_text(text)


def in_place_of(source: Path, last: Path) -> dict[str, Any]:
    """A run's results, and the last ones of the groups of which it measured none; each record names its own commit."""
    run = json.loads(source.read_text())
    earlier = json.loads(last.read_text())["benchmarks"] if last.is_file() else []
    groups = {each["group"] for each in run["benchmarks"] if is_measured(each["extra_info"])}
    ours = [each for each in run["benchmarks"] if each["group"] in groups]
    return {**run, "benchmarks": [*ours, *(each for each in earlier if each["group"] not in groups)]}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="pytest-benchmark JSON of a run")
    parser.add_argument("--out", type=Path, default=Path("out/bench"))
    parser.add_argument("--size", choices=("cpu", "gpu"), default="cpu", help="which committed results it follows")
    parser.add_argument("--keep", action="store_true", help="take it as the committed results")
    arguments = parser.parse_args(argv)
    last, history = RESULTS / f"{arguments.size}.json", RESULTS / "regressions.json"
    slower = write(arguments.results, arguments.out, last=last, history=history)
    console = Console()
    for row in slower:
        console.print(f"slower: {_regression(row)}", style="bold red", markup=False, highlight=False)
    for record in load(arguments.results):
        for complaint in complaints(record):
            console.print(complaint, style="bold red", markup=False, highlight=False)
    if arguments.keep:
        kept = json.loads(history.read_text()) if history.is_file() else []
        _write(history, json.dumps([*kept, *slower], indent=1) + "\n")
        _write(last, json.dumps(in_place_of(arguments.results, last), indent=1) + "\n")
    console.print(f"written: {arguments.out / 'report.html'}", markup=False, highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
