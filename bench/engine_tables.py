"""The tables by engine: of whole pictures, from ``engines.json``, and of UNets alone, from ``engines_unets.json``."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from interleaved import ratio
from records import RESULTS, Record, describe_bars, load, machine, measured_on

#: What somebody has without this library, by precision.
_PLAIN = "plain OpenVINO"
PRESETS = ("exact", "balanced", "turbo")
_TITLES = {"balanced, stock layers": "difffast balanced, stock layers"}


def engines_table(results: Path = RESULTS) -> str:
    """Seconds a picture, and shares of stock and of plain OpenVINO in the same precision."""
    return _tabulate(load(results / "engines.json"))


def engines_unets_table(results: Path = RESULTS, file: str = "engines_unets.json") -> str:
    """The same of the seconds inside the UNet alone."""
    return _tabulate(load(results / file))


def _tabulate(found: Sequence[Record]) -> str:
    heads = [f" {_name_case(info)} | of stock | of plain OpenVINO |" for info in found]
    rows = ["| |" + "".join(heads), "|" + "---|" * (1 + 3 * len(found))]
    for name in dict.fromkeys(name for info in found for name in info["seconds"]):
        cells = [_TITLES.get(name, name)]
        for info in found:
            cells += _describe(info, name) if name in info["seconds"] else ["", "", ""]
        rows.append(f"| {' | '.join(cells)} |")
    rounds = sorted({len(seconds) for info in found for seconds in info["seconds"].values()})
    note = f"{measured_on(found[0])}; {' or '.join(map(str, rounds))} interleaved rounds, medians of ratios."
    return "\n".join([*rows, "", note, *describe_bars(found)])


def convolution_table(results: Path = RESULTS) -> str:
    """Times of convolutions by PyTorch, by oneDNN with packed weights, and by ours, of ``convolution.json``."""
    found = load(results / "convolution.json")
    columns = {"PyTorch": "PyTorch", "packed weights": "packed", "few products": "cpp"}
    rows = [f"| layer | {' | '.join(columns)} | tile | faster than PyTorch | than packed |", "|" + "---|" * 7]
    for info in found:
        times = [f"{statistics.median(info['seconds'][name]) * 1e3:.2f} ms" for name in columns.values()]
        faster = [f"{info['faster'][name]:.2f}x" for name in ("PyTorch", "packed")]
        rows.append(f"| {' | '.join([info['case'], *times, str(info['tile']), *faster])} |")
    note = f"{machine(found[0])}; {len(found[0]['seconds']['cpp'])} interleaved rounds, medians of ratios."
    return "\n".join([*rows, "", note])


def recorded_table(file: str, first: str, columns: Mapping[str, str], *, ours: str, results: Path = RESULTS) -> str:
    """Times of an operator by several providers, a row for each case of a record of its own.

    Args:
        file: the record, pytest-benchmark's.
        first: title of the column of cases.
        columns: title of a column -> provider.
        ours: the provider that the others are compared with.
    """
    found = load(results / file)
    others = {title: name for title, name in columns.items() if name != ours}
    heads = [first, *columns, *(f"faster than {title}" for title in others)]
    rows = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for info in found:
        seconds = info["seconds"]
        times = [f"{statistics.median(seconds[name]) * 1e3:.2f} ms" for name in columns.values()]
        faster = [f"{ratio(seconds, name, ours)[1]:.2f}x" for name in others.values()]
        rows.append(f"| {' | '.join([name_record(info, found), *times, *faster])} |")
    note = f"{machine(found[0])}; {len(found[0]['seconds'][ours])} interleaved rounds, medians of ratios."
    return "\n".join([*rows, "", note])


def name_record(info: Record, found: Sequence[Record]) -> str:
    """The case, and its dtype where the record has several."""
    several = len({each["dtype"] for each in found}) > 1
    return info["case"].split(":")[0] + (f", {info['dtype']}" if several else "")


def openvino_table(results: Path = RESULTS) -> str:
    """How many times as fast as stock pictures are with OpenVINO, in float32: plain, and with the presets."""
    found = load(results / "engines.json")
    rows = ["| |" + "".join(f" {_name_case(info)} |" for info in found), "|" + "---|" * (1 + len(found))]
    names = {f"{_PLAIN} f32": f"{_PLAIN}, by hand"}
    names |= {f"difffast {each} OpenVINO f32": f'`{each}`, `engine="openvino"`' for each in PRESETS}
    for name, title in names.items():
        cells = [f"{ratio(info['seconds'], 'stock', name)[1]:.1f}x" for info in found]
        rows.append(f"| {' | '.join([title, *cells])} |")
    latent, rounds = found[0]["shapes"]["latent"], sorted({len(info["seconds"]["stock"]) for info in found})
    note = f"A UNet of (64, 128, 192) channels, latents of {latent}x{latent}, text encoder and VAE included; "
    return "\n".join([*rows, "", f"{note}{machine(found[0])}; {' or '.join(map(str, rounds))} rounds."])


def full_size_table(results: Path = RESULTS) -> str:
    """How many times as fast as stock in float32 pictures of Stable Diffusion 1.5 are at their full size."""
    ways = {  # title -> in float32, in bfloat16
        "stock": ("stock", "stock bfloat16"),
        "stock, `channels_last`": ("", "stock bfloat16 channels_last"),
        f"{_PLAIN}, by hand": (f"{_PLAIN} f32", f"{_PLAIN} bf16"),
        "`exact`": ("difffast exact", "difffast exact bfloat16"),
        '`exact`, `engine="openvino"`': ("difffast exact OpenVINO f32", "difffast exact OpenVINO bf16"),
    }
    found = [info for info in load(results / "full_size_amx.json") if info["group"] == "pipelines"]
    rows = ["| | float32 | bfloat16 |", "|---|---|---|"]
    for title, names in ways.items():
        pairs = zip(found, names, strict=True)
        cells = [f"{ratio(info['seconds'], 'stock', name)[1]:.1f}x" if name else "" for info, name in pairs]
        rows.append(f"| {' | '.join([title, *cells])} |")
    rounds = sorted({len(info["seconds"]["stock"]) for info in found})
    return "\n".join([*rows, "", f"{machine(found[0])}; {' or '.join(map(str, rounds))} rounds."])


def _describe(info: Record, name: str) -> list[str]:
    seconds = info["seconds"]
    plain = f"{_PLAIN} {'bf16' if any(each in name for each in ('bf16', 'bfloat16')) else 'f32'}"
    shares = [ratio(seconds, name, "stock")[1], ratio(seconds, name, plain)[1] if plain in seconds else None]
    return [f"{statistics.median(seconds[name]):.2f} s", *("" if each is None else f"{each:.2f}" for each in shares)]


def _name_case(info: Record) -> str:
    return str(info["case"]).removeprefix("engines, ").removesuffix(", by engine")
