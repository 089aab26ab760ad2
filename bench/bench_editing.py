"""What suppression, edits, inversions and negative attention do to pictures of the embedded model, and what they cost.

    python bench/bench_editing.py --only inversions --out bench/results

Prints what is found, writes it to editing.json beside what other parts have left there, and draws sheets of pictures.
The table of docs/editing.md comes from this file (bench/editing_tables.py).  Pictures are judged by
bench/drawn/judge.py: an object is present where its shape is found.  "First" and "last" say which of the prompt's two
objects is suppressed.  The PSNR outside leaves out 1.5 radii around the object that an edit is to change.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from drawn.detector import detect
from PIL import Image, ImageDraw
from records import name_model

import difffast
from difffast.steering.inversion.invert import encode_image

STEPS = 20
PAIRS = (
    ("red circle", "blue square"),
    ("green star", "orange ring"),
    ("purple triangle", "yellow cross"),
    ("cyan square", "pink circle"),
    ("blue ring", "red star"),
    ("orange cross", "green triangle"),
)
#: Colours that take the place of the first objects'.
COLOURS = ("green", "purple", "orange", "red", "yellow", "blue")
#: Seeds of each pair, where pictures are cheap.
SEEDS = 3
#: Ways to take a picture for a real one: their guidance, and for how many pairs.  Without inversion a smaller guidance
#: is usual; EDICT's authors take 3, since its two copies drift apart with more; "style" takes hundreds of iterations a
#: picture.
INVERSIONS = {
    "ddim": (7.5, 6),
    "npi": (7.5, 6),
    "direct": (7.5, 6),
    "null": (7.5, 3),
    "style": (7.5, 1),
    "edict": (3.0, 6),
    "ddcm": (2.0, 6),
}
PARTS = ("edits", "suppression", "optimised suppression", "inversions", "negative attention")
#: The authors' step size is for SD 1.x; here it overshoots (from looking at one prompt, which is none of these).
STEP_SIZE = 0.01
Picture = Callable[..., Image.Image]


def make_picture(pipe: Any, seed: int) -> Picture:
    """Return what makes a picture from arguments of the pipeline, always from the same noise."""

    def picture(*prompt: str, **given: Any) -> Image.Image:
        noise = torch.Generator().manual_seed(seed)
        return pipe(*prompt, **given, num_inference_steps=STEPS, generator=noise).images[0]

    return picture


def find_shapes(image: Image.Image) -> list[str | None]:
    return [found.shape for found in detect(image)]


def suppress_all(
    pipe: Any, pictures: dict[str, Image.Image], *, optimise: bool
) -> Iterator[tuple[str, dict[str, float]]]:
    """Suppress either object of every pair; yields in how many pictures objects are, by method."""
    by_embedding: Mapping[str, Callable[[Picture, str, str], Image.Image]] = {
        "embedding alone": lambda picture, prompt, words: picture(**difffast.suppress(pipe, prompt, words)),
        "re-encoded": lambda picture, prompt, words: picture(**difffast.suppress(pipe, prompt, words, reencode=True)),
    }
    by_optimisation: Mapping[str, Callable[[Picture, str, str], Image.Image]] = {
        "optimised": lambda picture, prompt, words: steer(pipe, picture, prompt, words, "paper"),
        "optimised, reference": lambda picture, prompt, words: steer(pipe, picture, prompt, words, "reference"),
    }
    cases = [(pair, seed) for seed in range(1 if optimise else SEEDS) for pair in PAIRS]
    for place in ("first", "last"):
        for name, method in (by_optimisation if optimise else by_embedding).items():
            counts = dict.fromkeys(("gone before", "gone after", "others before", "others after"), 0)
            for pair, seed in cases:
                prompt = f"a {pair[0]} and a {pair[1]}"
                gone, stays = pair if place == "first" else pair[::-1]
                picture, title = make_picture(pipe, seed_of(pair, seed)), name_picture(pair, seed)
                if title not in pictures:
                    with difffast.patched(pipe, "exact"):
                        pictures[title] = picture(prompt)
                with difffast.patched(pipe, "exact"):
                    changed = method(picture, prompt, gone)
                pictures[f"{title} | {name} | {place}"] = changed
                for when, image in (("before", pictures[title]), ("after", changed)):
                    shapes = find_shapes(image)
                    counts[f"gone {when}"] += gone.split()[1] in shapes
                    counts[f"others {when}"] += stays.split()[1] in shapes
            yield f"{name}, {place}", {"pictures": len(cases), **counts}


def seed_of(pair: tuple[str, str], seed: int) -> int:
    """Return the seed of a pair's noise, of which every pair has its own."""
    return PAIRS.index(pair) + seed * len(PAIRS)


def name_picture(pair: tuple[str, str], seed: int) -> str:
    """Return what a picture is called; the first of a pair like its prompt."""
    return f"a {pair[0]} and a {pair[1]}" + (f" ({seed})" if seed else "")


def steer(pipe: Any, picture: Picture, prompt: str, words: str, mode: str) -> Image.Image:
    window = (10, 20) if mode == "paper" else (4, 8)  # the reference's steps are not adapted to the schedule
    method = difffast.Suppression(words, mode=mode, step_size=STEP_SIZE, optimise=window)
    with difffast.patched(pipe, "exact", steering=method):
        return picture(prompt)


def edit_all(pipe: Any, pictures: dict[str, Image.Image]) -> Iterator[tuple[str, float]]:
    """Change the first object's colour; yields how many have it, and the PSNR away from the object."""
    changed, kept, psnr, psnr_plain = 0, 0, [], []
    cases = [(pair, colour, seed) for seed in range(SEEDS) for pair, colour in zip(PAIRS, COLOURS, strict=True)]
    for pair, colour, seed in cases:
        source, target, shape = recolour(pair, colour)
        noise = torch.Generator().manual_seed(seed_of(pair, seed))
        with difffast.edit(pipe, source, target, blend=(shape, shape)) as edited:
            before, after = pipe(edited.prompts, num_inference_steps=STEPS, generator=noise).images
        with difffast.patched(pipe, "exact"):
            plain = make_picture(pipe, seed_of(pair, seed))(target)
        title = name_picture(pair, seed)
        pictures |= {f"{title} | edited": after, f"{title} | source": before, f"{title} | prompt alone": plain}
        seen = [(found.colour, found.shape) for found in detect(after)]
        changed += (colour, shape) in seen
        kept += tuple(pair[1].split()) in seen
        place = next((found for found in detect(before) if found.shape == shape), None)
        if place is not None:
            psnr.append(outside_psnr(before, after, place))
            psnr_plain.append(outside_psnr(before, plain, place))
    yield from {
        "pictures": len(cases),
        "has the new colour": changed,
        "other object as it was": kept,
        "PSNR outside, dB": statistics.median(psnr),
        "PSNR outside, other prompt alone, dB": statistics.median(psnr_plain),
    }.items()


def recolour(pair: tuple[str, str], colour: str) -> tuple[str, str, str]:
    """Return the prompt of a pair, the one with the first object's colour changed, and that object's shape."""
    shape = pair[0].split()[1]
    return f"a {pair[0]} and a {pair[1]}", f"a {colour} {shape} and a {pair[1]}", shape


def invert_all(
    pipe: Any, pictures: dict[str, Image.Image], methods: Sequence[str]
) -> Iterator[tuple[str, dict[str, float]]]:
    """Take pictures for real ones, invert them, make them again, and edit them; yields counts and PSNRs, by method."""
    for method in methods:
        (guidance, count), psnr, coded, outside, changed, kept = INVERSIONS[method], [], [], [], 0, 0
        for seed, (pair, colour) in enumerate(list(zip(PAIRS, COLOURS, strict=True))[:count]):
            source, target, shape = recolour(pair, colour)
            with difffast.patched(pipe, "exact"):
                original = make_picture(pipe, seed)(source)
            inversion = difffast.invert(pipe, original, source, method, steps=STEPS, guidance=guidance)
            again, after = follow(pipe, inversion, target, seed)
            seen = [(each.colour, each.shape) for each in detect(after)]
            changed += (colour, shape) in seen
            kept += tuple(pair[1].split()) in seen
            psnr.append(compute_psnr(original, again))
            coded.append(compute_psnr(original, decode(pipe, original)))
            place = next((each for each in detect(original) if each.shape == shape), None)
            if place is not None:
                outside.append(outside_psnr(original, after, place))
            pictures |= {f"{source} | original": original, f"{source} | {method}": again}
            pictures[f"{source} | {method}, edited"] = after
        yield (
            method,
            {
                "pictures": count,
                "guidance": guidance,
                "reconstruction, dB": statistics.median(psnr),
                "autoencoder alone, dB": statistics.median(coded),
                "has the new colour": changed,
                "other object as it was": kept,
                "PSNR outside, dB": statistics.median(outside),
            },
        )


def follow(pipe: Any, inversion: difffast.Inversion, target: str, seed: int) -> list[Image.Image]:
    """Return an inverted picture made again, and edited; EDICT, which no edit goes with, has the other prompt."""
    if inversion.method == "edict":
        return [difffast.steering.generate_edict(pipe, inversion, prompt) for prompt in (inversion.prompt, target)]
    noise = torch.Generator().manual_seed(seed)
    with difffast.edit(pipe, inversion.prompt, target, inversion=inversion) as edited:
        return pipe(edited.prompts, generator=noise, **inversion.arguments).images


@torch.inference_mode()
def decode(pipe: Any, image: Image.Image) -> Image.Image:
    """Return what the autoencoder makes of a picture."""
    latents = encode_image(pipe, image) / pipe.vae.config.scaling_factor
    return pipe.image_processor.postprocess(pipe.vae.decode(latents).sample, output_type="pil")[0]


def compute_psnr(one: Image.Image, other: Image.Image) -> float:
    difference = (np.asarray(one, np.float64) - np.asarray(other, np.float64)) / 255
    return float(-10 * np.log10(max((difference**2).mean(), 1e-10)))


def outside_psnr(one: Image.Image, other: Image.Image, place: Any) -> float:
    """Return the PSNR of what lies further than 1.5 radii from an object."""
    a, b = (np.asarray(image, np.float64) / 255 for image in (one, other))
    y, x = (np.mgrid[: a.shape[0], : a.shape[1]] + 0.5) / a.shape[0]
    away = np.hypot(x - place.x, y - place.y) > 1.5 * place.radius
    return float(-10 * np.log10(max(((a - b)[away] ** 2).mean(), 1e-10)))


def time_negative(pipe: Any, rounds: int) -> Iterator[tuple[str, float]]:
    """Yield the seconds of processor time of ways to a picture, as shares of one without guidance, in turn."""
    ways = {
        "no guidance": ((), 1.0),
        "negative attention": (difffast.NegativeAttention(), 1.0),
        "guidance": ((), 7.5),
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, (method, guidance) in ways.items():
            with difffast.patched(pipe, "exact", steering=method):
                start = time.process_time()
                make_picture(pipe, 0)("a red circle and a blue square", negative_prompt="red", guidance_scale=guidance)
                seconds[name].append(time.process_time() - start)
    base = statistics.median(seconds["no guidance"])
    yield from ((name, statistics.median(each) / base) for name, each in seconds.items())


def draw(pictures: Mapping[str, Image.Image], path: Path) -> None:
    """Write a sheet: for three pairs the picture, four suppressions of the last object, the edit, the prompt alone."""
    titles = ("stock", "embedding alone", "re-encoded", "optimised", "reference", "edited", "other prompt")
    side, gap, head = 128, 6, 34
    sheet = Image.new("RGB", (len(titles) * (side + gap) + gap, 3 * (side + head) + 20), "white")
    pen = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        pen.text((gap + column * (side + gap), 4), title, fill="black")
    for row, (pair, colour) in enumerate(list(zip(PAIRS, COLOURS, strict=True))[:3]):
        prompt, top = f"a {pair[0]} and a {pair[1]}", 20 + row * (side + head)
        names = ["embedding alone", "re-encoded", "optimised", "optimised, reference"]
        keys = [prompt, *(f"{prompt} | {name} | last" for name in names)]
        keys += [f"{prompt} | edited", f"{prompt} | prompt alone"]
        for column, key in enumerate(keys):
            image = pictures[key].resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(image, (gap + column * (side + gap), top))
        words = f"{prompt}; suppressed: {pair[1]}; edited: {pair[0]} to {colour}"
        pen.text((gap, top + side + 4), words, fill="black")
    sheet.save(path)


def draw_sheet(
    pictures: Mapping[str, Image.Image], names: Mapping[str, str], path: Path, rows: int = len(PAIRS)
) -> None:
    """Write a sheet: a row for each pair with the pictures of some names; ``names``: title -> end of the name."""
    side, gap, head = 112, 6, 18
    sheet = Image.new("RGB", (len(names) * (side + gap) + gap, rows * (side + gap) + head), "white")
    pen = ImageDraw.Draw(sheet)
    for column, (title, name) in enumerate(names.items()):
        pen.text((gap + column * (side + gap), 2), title, fill="black")
        for row, pair in enumerate(PAIRS[:rows]):
            image = pictures[f"a {pair[0]} and a {pair[1]}{name}"].resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(image, (gap + column * (side + gap), head + row * (side + gap)))
    sheet.save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for editing.json and the sheets")
    parser.add_argument("--only", choices=PARTS, nargs="+", default=PARTS, help="parts to run")
    parser.add_argument("--methods", choices=INVERSIONS, nargs="+", default=list(INVERSIONS), help="of inversion")
    parser.add_argument("--rounds", type=int, default=7, help="of timing")
    arguments = parser.parse_args()
    pipe = difffast.models.embedded_pipeline()
    pipe.set_progress_bar_config(disable=True)
    pictures: dict[str, Image.Image] = {}
    arguments.out.mkdir(parents=True, exist_ok=True)
    path = arguments.out / "editing.json"
    record: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    record |= {"model": name_model(), "steps": STEPS, "pairs": len(PAIRS), "torch": torch.__version__}
    parts: dict[str, Iterator[tuple[str, Any]]] = {
        "edits": edit_all(pipe, pictures),
        "suppression": suppress_all(pipe, pictures, optimise=False),
        "optimised suppression": suppress_all(pipe, pictures, optimise=True),
        "inversions": invert_all(pipe, pictures, arguments.methods),
        "negative attention": time_negative(pipe, arguments.rounds),
    }
    for part in arguments.only:
        for name, found in parts[part]:
            record.setdefault(part, {})[name] = found
            print(part, name, found, flush=True)
            path.write_text(json.dumps(record, indent=1) + "\n")
    if {"edits", "suppression", "optimised suppression"} <= set(arguments.only):
        draw(pictures, arguments.out / "editing-sheet.png")
    if "suppression" in arguments.only:
        names = {"stock": ""}
        for place in ("first", "last"):
            for name in ("embedding alone", "re-encoded"):
                names[f"{place}, {name.split()[0]}"] = f" | {name} | {place}"
        draw_sheet(pictures, names, arguments.out / "suppression-sheet.png")
    if "edits" in arguments.only:
        names = {"picture": " | source", "edited": " | edited", "other prompt": " | prompt alone"}
        draw_sheet(pictures, names, arguments.out / "edits.png")
    if "inversions" in arguments.only:
        names = {"original": " | original"}
        names |= {name: f" | {name}" for method in arguments.methods for name in (method, f"{method}, edited")}
        draw_sheet(pictures, names, arguments.out / "inversions.png", min(INVERSIONS[m][1] for m in arguments.methods))


if __name__ == "__main__":
    main()
