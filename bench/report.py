"""Reports from recorded results.

    python bench/report.py                                        the README's tables, from the committed results
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
import math
import re
import shutil
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from interleaved import ratio
from rich.console import Console
from session import against, complaints

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results"

Record = Mapping[str, Any]

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


def unet_table(results: Path = RESULTS, group: str = "unet") -> str:
    """Seconds inside the UNet."""
    found = _measured(results, group)
    head = "| provider |" + "".join(f" {info['case'].split(' at ')[0]}, seconds | against stock |" for info in found)
    rows = [head, "|" + "---|" * (1 + 2 * len(found))]
    for name in dict.fromkeys(name for info in found for name in (*info["seconds"], *info.get("absent", {}))):
        cells = [name]
        for info in found:
            if name not in info["seconds"]:
                cells += [info["absent"].get(name, {"status": ""})["status"], ""]
                continue
            low, middle, high = against(info, name)
            cells += [f"{statistics.median(info['seconds'][name]):.2f}", f"{middle:.2f} ({low:.2f} to {high:.2f})"]
        rows.append(f"| {' | '.join(cells)} |")
    rounds = " and ".join(str(len(info["seconds"]["stock"])) for info in found)
    settings = " and ".join(dict.fromkeys(info["case"].split(" at ")[1] for info in found))
    note = f"At {settings}. {_measured_on(found[0])}; {rounds} interleaved rounds, quartiles."
    return "\n".join([*rows, "", note, *_bars(found)])


def demo_table(results: Path = RESULTS) -> str:
    """Medians of the demo, from ``demo.json``."""
    record = json.loads((results / "demo.json").read_text())
    rows = record["rows"]
    stock, fast = (statistics.median(row[key] for row in rows) for key in ("stock_s", "patched_s"))
    speedups = [row["stock_s"] / row["patched_s"] for row in rows]
    psnr = statistics.median(row["psnr_db"] if row["psnr_db"] is not None else math.inf for row in rows)
    info = {**record["versions"], "device": record["device"], "threads": record["threads"], "dtype": record["dtype"]}
    return "\n".join(
        [
            "| | stock | difffast | speed-up | same-seed PSNR |",
            "|---|---|---|---|---|",
            f"| whole `pipe(...)` call, median | {stock:.2f} s | {fast:.2f} s | {statistics.median(speedups):.2f}x "
            f"({min(speedups):.2f}x to {max(speedups):.2f}x) | {psnr:.1f} dB |",
            "",
            f"{record['model']}, {record['steps']} DDIM steps, {len(rows)} images. {_measured_on(info)}.",
        ]
    )


def attention_table(results: Path = RESULTS) -> str:
    """Milliseconds of cross-attention; the C++ kernel against what else there is."""
    rows = [
        "| shape | SDPA | C++ | eager, maps | torch.compile, maps | C++, maps | against eager, maps | against SDPA |",
        "|---|---|---|---|---|---|---|---|",
    ]
    found = _measured(results, "cross_attention")
    for info in found:
        seconds = info["seconds"]
        columns = ("SDPA", "cpp", "eager, maps", "compiled, maps", "cpp, maps")
        times = (f"{statistics.median(seconds[name]) * 1e3:.2f} ms" for name in columns)
        ratios = (_quartiles(seconds, *pair) for pair in (("eager, maps", "cpp, maps"), ("SDPA", "cpp")))
        rows.append(f"| {info['case'].split(':')[0]} | {' | '.join((*times, *ratios))} |")
    rounds = len(found[0]["seconds"]["cpp"])
    return "\n".join(
        [
            *rows,
            "",
            f"77 keys, batch 2, maps of 12 tokens. {_machine(found[0])}; {rounds} interleaved rounds, quartiles.",
        ]
    )


def pixel_attention_table(results: Path = RESULTS) -> str:
    """Milliseconds of attention to pixels, alone and in one softmax with a text; the C++ kernel against PyTorch's."""
    rows = [
        "| shape | SDPA | SDPA compiled | C++ | faster than SDPA | than compiled |",
        "|---|---|---|---|---|---|",
    ]
    found = [*_measured(results, "self_attention"), *_measured(results, "joint_attention")]
    for info in found:
        seconds = info["seconds"]
        names = ("SDPA", "SDPA compiled", "cpp")
        times = (f"{statistics.median(seconds[name]) * 1e3:.2f} ms" for name in names)
        ratios = (_quartiles(seconds, other, "cpp") for other in names[:2])
        rows.append(f"| {info['case'].split(':')[0]} | {' | '.join((*times, *ratios))} |")
    rounds = sorted({len(info["seconds"]["cpp"]) for info in found})
    note = f"{_machine(found[0])}; {' and '.join(map(str, rounds))} interleaved rounds, quartiles."
    return "\n".join([*rows, "", f"IF: `joint_attention` with 77 text keys; SDPA with joining the keys. {note}"])


def entropy_table(results: Path = RESULTS) -> str:
    """Microseconds of the entropy loss with its gradient."""
    rows = ["| maps | eager | torch.compile | C++ | faster than eager |", "|---|---|---|---|---|"]
    found = _measured(results, "attention_entropy")
    for info in found:
        seconds = info["seconds"]
        times = (f"{statistics.median(seconds[name]) * 1e6:.0f} us" for name in ("eager", "compiled", "cpp"))
        rows.append(f"| {info['case']} | {' | '.join(times)} | {_quartiles(seconds, 'eager', 'cpp')} |")
    rounds = len(found[0]["seconds"]["cpp"])
    return "\n".join(
        [*rows, "", f"Forward and backward. {_machine(found[0])}; {rounds} interleaved rounds, quartiles."]
    )


def linear_table(results: Path = RESULTS) -> str:
    """Milliseconds of linear layers; oneDNN against what PyTorch takes by itself."""
    rows = [
        "| layer | F.linear | compiled | oneDNN | faster than F.linear | than compiled |",
        "|---|---|---|---|---|---|",
    ]
    found = _measured(results, "linear")
    for info in found:
        seconds = info["seconds"]
        times = (f"{statistics.median(seconds[name]) * 1e3:.2f} ms" for name in ("eager", "compiled", "onednn"))
        ratios = (_quartiles(seconds, slow, "onednn") for slow in ("eager", "compiled"))
        rows.append(f"| {info['case'].split(':')[0]} | {' | '.join((*times, *ratios))} |")
    rounds = len(found[0]["seconds"]["onednn"])
    return "\n".join([*rows, "", f"{_machine(found[0])}; {rounds} interleaved rounds, quartiles."])


def norm_table(results: Path = RESULTS) -> str:
    """Microseconds of GroupNorm with SiLU; the C++ kernel against eager and compiled PyTorch."""
    rows = ["| x | eager | torch.compile | C++ | faster than eager | than torch.compile |", "|---|---|---|---|---|---|"]
    found = _measured(results, "group_norm_silu")
    for info in found:
        seconds = info["seconds"]
        times = (f"{statistics.median(seconds[name]) * 1e6:.0f} us" for name in ("eager", "compiled", "cpp"))
        ratios = (_quartiles(seconds, slow, "cpp") for slow in ("eager", "compiled"))
        rows.append(f"| {info['case']} | {' | '.join((*times, *ratios))} |")
    rounds = len(found[0]["seconds"]["cpp"])
    return "\n".join([*rows, "", f"{_machine(found[0])}; {rounds} interleaved rounds, quartiles."])


def fidelity_table(results: Path = RESULTS) -> str:
    """What every way to be faster costs in pictures, from ``fidelity.json`` (``bench/bench_fidelity.py``)."""
    record = json.loads((results / "fidelity.json").read_text())
    columns = "| way | seconds a picture | one thing right | two things | three | points lost (95%) | PSNR | Frechet |"
    lines = [columns, "|" + "---|" * 8]
    for name, row in record["rows"].items():
        right = " | ".join(f"{100 * row[f'{count} things']['binding']:.1f}%" for count in (1, 2, 3))
        lost, low, high = row["binding_points_lost"]
        psnr = "same" if row["psnr_db"] is None else f"{row['psnr_db']:.1f} dB"
        seconds = statistics.median(row["seconds"])
        spread = f"{lost:+.1f} ({low:+.1f} to {high:+.1f})"
        lines.append(f"| {name} | {seconds:.2f} | {right} | {spread} | {psnr} | {row['frechet']:.3f} |")
    return "\n".join(
        [
            *lines,
            "",
            f"{record['prompts']} prompts, the same seeds in every row; right: found in its own shape and colour; "
            f"points lost and PSNR: against stock with 50 steps; Frechet: to drawn scenes. {_machine(record)}.",
        ]
    )


def _bars(found: Sequence[Record]) -> list[str]:
    """A line for every bar that was measured, met or missed."""
    lines = []
    for info in found:
        for bar in info.get("bars", ()):
            if bar["met"] is not None:
                case, verdict = info["case"].split(" at ")[0], "met" if bar["met"] else "**missed**"
                lines.append(
                    f"- {case}: {bar['provider']} takes {bar['ratio']:.2f} of {bar['against']}, "
                    f"promised at most {bar['at_most']:.2f}: {verdict}"
                )
    return ["", *lines] if lines else []


def flops_table(results: Path = RESULTS) -> str:
    """What the presets leave to do at full size, from ``flops.json`` (``bench/bench_flops.py``)."""
    record = json.loads((results / "flops.json").read_text())
    presets = next(iter(record["unets"].values()))["images"]
    lines = [f"| UNet | one step | a reuse step | {' | '.join(presets)} |", "|" + "---|" * (3 + len(presets))]
    for name, each in record["unets"].items():
        whole = each["parts"]["whole"]
        shares = " | ".join(f"{flops / (record['steps'] * whole):.2f}" for flops in each["images"].values())
        lines.append(f"| {name} | {whole / 1e12:.2f} TFLOP | {each['parts']['reuse step'] / whole:.2f} | {shares} |")
    note = f"Share of stock's; {record['steps']} steps, guidance on; counted on the meta device, not timed."
    return "\n".join([*lines, "", note])


def guidance_table(results: Path = RESULTS) -> str:
    """What semantic binding costs, from ``guidance_flops.json`` (``bench/bench_guidance_flops.py``)."""
    record = json.loads((results / "guidance_flops.json").read_text())
    names = [name for name, value in record.items() if isinstance(value, dict)]
    presets = list(record[names[0]]["images"])
    heads = [*(f"{preset} preset" for preset in presets), "entropy iteration", "binding iteration"]
    lines = [f"| UNet | {' | '.join(heads)} |", "|" + "---|" * (1 + len(heads))]
    for name in names:
        cells = [f"{record[name]['images'][preset]:.2f}x" for preset in presets]
        for kind in ("entropy iteration", "binding iteration"):
            each = record[name]["passes"][kind]
            cells.append(
                f"{each['forward'] / 1e12:.2f} + {each['backward'] / 1e12:.2f} TFLOP, {each['saved'] / 2**30:.2f} GiB"
            )
        lines.append(f"| {name} | {' | '.join(cells)} |")
    note = "Forward + backward, and saved activations, of one image or thing; counted on the meta device, not timed."
    return "\n".join([*lines, "", note])


def binding_table(results: Path = RESULTS) -> str:
    """What semantic binding does to the embedded model's pictures, from ``binding.json`` (bench_binding.py)."""
    record = json.loads((results / "binding.json").read_text())
    kinds = {
        "binding": "shape and colour right",
        "full_binding": "texture and part as well",
        "leakage": "has what is another's",
    }
    heads = " | ".join(f"{title} | points (95%)" for title in kinds.values())
    lines = [f"| way | {heads} |", "|" + "---|" * (1 + 2 * len(kinds))]
    for name, row in record["rows"].items():
        cells = [name]
        for kind in kinds:
            gained = "{:+.1f} ({:+.1f} to {:+.1f})".format(*row[f"{kind}_points_gained"])
            cells += [f"{100 * row[kind]:.1f}%", gained]
        lines.append(f"| {' | '.join(cells)} |")
    note = (
        f"{record['prompts']} prompts x {record['seeds']} seeds, {record['steps']} steps; points: against stock "
        f"on the same prompts and seeds; the model's numbers: {record['numbers']}. {_machine(record)}."
    )
    return "\n".join([*lines, "", note])


def _measured(results: Path, group: str) -> list[dict[str, Any]]:
    """What the benchmarks of a group recorded, from ``cpu.json``: what ``make bench`` wrote, pytest-benchmark's."""
    return [record for record in load(results / "cpu.json") if record["group"] == group]


def _quartiles(seconds: dict[str, list[float]], slow: str, fast: str) -> str:
    low, middle, high = ratio(seconds, slow, fast)
    return f"{middle:.2f}x ({low:.2f} to {high:.2f})"


def _machine(info: dict[str, Any]) -> str:
    return f"{info['device']}, {info['threads']} threads, {info['dtype']}, torch {info['torch']}"


def _measured_on(info: dict[str, Any]) -> str:
    return f"{_machine(info)}, diffusers {info['diffusers']}, baseline: the stock pipeline, eager, in the same run"


def support_table() -> str:
    """Which pipelines are supported; from the code, which the tests prove row by row."""
    from difffast.support import COLUMNS, table

    rows = [COLUMNS, ("---",) * len(COLUMNS), *table()]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def ways_table(results: Path = RESULTS) -> str:
    """Seconds inside UNet and ControlNet of every supported pipeline, from ``support.json`` (bench_support.py)."""
    record = json.loads((results / "support.json").read_text())
    ways = [way for way in max(record["seconds"].values(), key=len) if way != "stock"]
    rows = [f"| pipeline | {' | '.join(ways)} |", "|" + "---|" * (1 + len(ways))]
    for name, seconds in record["seconds"].items():
        shares = (
            statistics.median(a / b for a, b in zip(seconds[way], seconds["stock"], strict=True))
            if way in seconds
            else None
            for way in ways
        )
        rows.append(f"| {name} | {' | '.join('refused' if each is None else f'{each:.2f}' for each in shares)} |")
    note = (
        "Seconds inside the UNet, and ControlNet, of stock's; small UNets (32, 64) on 32x32 latents, 12 steps. "
        f"{_machine(record)}, {record['rounds']} interleaved rounds."
    )
    return "\n".join([*rows, "", note])


TABLES = {
    "ways": ways_table,
    "support": support_table,
    "unet": unet_table,
    "savings": partial(unet_table, group="savings"),
    "full_size": partial(unet_table, group="full size"),
    "demo": demo_table,
    "fidelity": fidelity_table,
    "attention": attention_table,
    "entropy": entropy_table,
    "pixels": pixel_attention_table,
    "linear": linear_table,
    "norms": norm_table,
    "flops": flops_table,
    "guidance": guidance_table,
    "binding": binding_table,
}


def render(text: str) -> str:
    """``text`` with every ``<!-- table NAME -->`` ... ``<!-- end -->`` block made anew."""

    def block(match: re.Match[str]) -> str:
        return f"<!-- table {match[1]} -->\n{TABLES[match[1]]()}\n<!-- end -->"

    return re.sub(r"<!-- table (\w+) -->\n.*?<!-- end -->", block, text, flags=re.S)


def load(path: Path) -> list[Record]:
    """Every case of a pytest-benchmark JSON, with its group."""
    benchmarks = json.loads(path.read_text())["benchmarks"]
    return [{"group": each["group"], **each["extra_info"]} for each in benchmarks]


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
    """The report as text: missed bars and regressions first."""
    return "\n".join(_lines(records, slower, kept, lambda text: f"**{text}**"))


def _lines(
    records: Sequence[Record],
    slower: Sequence[Mapping[str, Any]],
    kept: Sequence[Mapping[str, Any]],
    red: Callable[[str], str],
) -> Iterator[str]:
    first = records[0]
    yield "# difffast: benchmarks"
    yield ""
    yield f"{_machine(first)}, diffusers {first['diffusers']}, commit {first['commit']}."
    yield ""
    yield "## Promises"
    yield ""
    bars = [(record, bar) for record in records for bar in record.get("bars", ())]
    for record, bar in bars:
        verdict = {True: "met", False: red("missed"), None: "not measured"}[bar["met"]]
        value = "" if bar["ratio"] is None else f" {bar['ratio']:.3f},"
        yield (
            f"- {record['case']}: {bar['provider']} against {bar['against']} ({bar['of']}):{value} promised at most "
            f"{bar['at_most']:.3f} ({bar['source']}): {verdict}"
        )
    if not bars:
        yield "None in this selection."
    yield ""
    yield "## Slower than before"
    yield ""
    for row in slower:
        yield f"- {red(_regression(row))}"
    for row in kept:
        yield f"- kept from {row['commit']}: {_regression(row)}"
    if not slower and not kept:
        yield "Nothing beyond the spread of both runs."
    for group in dict.fromkeys(record["group"] for record in records):
        yield ""
        yield f"## {group}"
        for record in records:
            if record["group"] == group:
                yield ""
                yield from _case(record, red)


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
    (out / "report.md").write_text(markdown(records, slower, kept) + "\n")
    (out / "report.html").write_text(page(records, slower, kept, drawn))
    return slower


def in_place_of(source: Path, last: Path) -> dict[str, Any]:
    """A run's results, and the last ones of the groups that it did not measure; each record names its own commit."""
    run = json.loads(source.read_text())
    earlier = json.loads(last.read_text())["benchmarks"] if last.is_file() else []
    groups = {each["group"] for each in run["benchmarks"]}
    return {**run, "benchmarks": [*run["benchmarks"], *(each for each in earlier if each["group"] not in groups)]}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="?", type=Path, help="pytest-benchmark JSON of a run; none: the README")
    parser.add_argument("--out", type=Path, default=Path("out/bench"))
    parser.add_argument("--size", choices=("cpu", "gpu"), default="cpu", help="which committed results it follows")
    parser.add_argument("--keep", action="store_true", help="take it as the committed results")
    arguments = parser.parse_args(argv)
    if arguments.results is None:
        readme = ROOT / "README.md"
        readme.write_text(render(readme.read_text()))
        sys.stdout.write(f"written: {readme}\n")
        return 0
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
        history.write_text(json.dumps([*kept, *slower], indent=1) + "\n")
        last.write_text(json.dumps(in_place_of(arguments.results, last), indent=1) + "\n")
    console.print(f"written: {arguments.out / 'report.html'}", markup=False, highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
