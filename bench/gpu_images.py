"""Whole images on a GPU, everybody in turn: stock, stock compiled, DeepCache, and difffast's presets and engines.

    python bench/gpu_images.py --out OUT [--models sd15 sdxl] [--steps 20 50] [--seconds 120] [--compiled]

Random weights in the published layout, float16, one image with guidance, latents only: seconds of the denoising loop.
OUT/images.json is written anew after every figure, so that a run that is cut off leaves what it had.  ``--rehearse``
runs small models on whatever device there is.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import peers
import pipelines
import torch
from torch import Tensor

import difffast
from difffast.files import write_whole

#: By the name of the UNet's configuration: that of the workload.
MODELS = {"sd15": "SD1.5", "sdxl": "SDXL", "if-i-xl": "IF-I"}
#: Steps of the runs that warm a provider up: every graph is met twice.
_WARM_UP = 12
#: Largest and smallest number of timed images.
_MOST, _LEAST = 3, 1

Provider = Callable[[Any], AbstractContextManager[Any]]


@contextlib.contextmanager
def _stock_compiled(pipe: Any) -> Any:
    """PyTorch's own recommendation: channels_last, torch.compile with CUDA graphs."""
    plain = pipe.unet
    plain.to(memory_format=torch.channels_last)
    compiled = torch.compile(plain, mode="reduce-overhead" if plain.device.type == "cuda" else None, fullgraph=True)

    def forward(*args: Any, **kwargs: Any) -> Any:
        torch.compiler.cudagraph_mark_step_begin()
        result = compiled(*args, **kwargs)
        return (result[0].clone(),) if isinstance(result, tuple) else type(result)(sample=result[0].clone())

    pipe.unet = _Wrapped(plain, forward)
    try:
        yield
    finally:
        pipe.unet = plain
        plain.to(memory_format=torch.contiguous_format)


class _Wrapped(torch.nn.Module):
    """A UNet whose calls go elsewhere."""

    def __init__(self, unet: Any, call: Callable[..., Any]) -> None:
        super().__init__()
        self._call = call
        self.__dict__["_unet"] = unet

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_unet"], name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)


def _patched(preset: str, **options: Any) -> Provider:
    return lambda pipe: difffast.patched(pipe, preset, **options)


def list_providers(compiled: bool) -> dict[str, Provider]:
    """Everybody, by name; the first is what the others are compared with."""
    providers: dict[str, Provider] = {"stock": lambda pipe: contextlib.nullcontext()}
    if compiled:
        providers["stock compiled"] = _stock_compiled
    return providers | {
        "difffast exact": _patched("exact"),
        "difffast eager, exact": _patched("exact", engine="eager"),
        "difffast balanced": _patched("balanced"),
        "difffast turbo": _patched("turbo"),
        **{
            f"difffast, reuse 3, branch {branch}": _patched("exact", propagation=difffast.FeatureReuse(3, branch))
            for branch in (0, 1)
        },
        **{
            f"DeepCache 3, branch {branch}": lambda pipe, branch=branch: peers.deepcache(pipe, 3, branch)
            for branch in (0, 1)
        },
    }


class Record:
    """What has been measured, in a file that is written anew after every figure."""

    def __init__(self, folder: Path, facts: dict[str, Any]) -> None:
        self._path = folder / "images.json"
        self.content: dict[str, Any] = {"facts": facts, "rows": []}

    def add(self, row: dict[str, Any]) -> None:
        """Add a row, and print it."""
        self.content["rows"].append(row)
        with write_whole(self._path) as part:
            part.write_text(json.dumps(self.content, indent=1) + "\n")
        seconds = f"{row['seconds'][0]:8.3f} s" if row["seconds"] else f"  {row['reason']}"
        print(
            f"{row['model']:8}{row['steps']:4} steps  {row['provider']:28}{seconds}  {row.get('note', '')}", flush=True
        )


def find_facts() -> dict[str, Any]:
    """Return what the figures depend on."""
    cuda = torch.cuda.is_available()
    return {
        "card": torch.cuda.get_device_name() if cuda else "none",
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "difffast": difffast.__version__,
    }


class Measuring:
    """One pipeline, on which providers are entered one after another.

    Args:
        model: a name of :data:`MODELS`.
        record: where rows go.
        deadline: by the clock of ``time.monotonic``.
        rehearse: small models.
    """

    def __init__(self, model: str, record: Record, deadline: float, *, rehearse: bool) -> None:
        self._model, self._record, self._deadline = model, record, deadline
        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = torch.float16 if device == "cuda" else torch.float32
        (stage,) = pipelines.stages(MODELS[model], full=not rehearse, batch=1, device=device, dtype=dtype)
        self._pipe, self._arguments = stage.pipe, stage.arguments
        self._pipe.set_progress_bar_config(disable=True)
        if hasattr(self._pipe, "vae"):
            self._pipe.vae.to("cpu")
        self._truth: dict[int, Tensor] = {}
        self._report: Any = None

    def run(self, name: str, provider: Provider, steps: Sequence[int]) -> None:
        """Measure a provider at every number of steps."""
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        try:
            with provider(self._pipe) as self._report:
                start = time.monotonic()
                self._make(_WARM_UP)
                self._make(_WARM_UP)
                ready = time.monotonic() - start
                for number in steps:
                    if time.monotonic() < self._deadline:
                        self._measure(name, number, ready)
        except Exception as error:
            self._add(name, steps[0], [], reason=f"{type(error).__name__}: {str(error)[:200]}")

    def _measure(self, name: str, steps: int, ready: float) -> None:
        if name != "stock":
            self._make(steps)  # graphs of this schedule's own shapes
        seconds: list[float] = []
        while len(seconds) < _MOST and (len(seconds) < _LEAST or time.monotonic() + seconds[-1] < self._deadline):
            start = time.perf_counter()
            result = self._make(steps)
            seconds.append(time.perf_counter() - start)
            if seconds[-1] > 2:
                break
        truth = self._truth.setdefault(steps, result)
        error = float((result.double() - truth.double()).norm() / truth.double().norm())
        stock = next((r for r in self._record.content["rows"] if self._is_stock(r, steps)), None)
        note = f"{stock['seconds'][0] / statistics.median(seconds):5.2f}x stock" if stock else ""
        peak = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
        more = {"error": error, "ready": ready, "peak": peak, "note": note}
        if isinstance(self._report, difffast.PatchReport):
            more |= {"reasons": self._report.last_run.reasons, "programs": str(self._report.programs)}
        self._add(name, steps, [statistics.median(seconds), *seconds], **more)

    def _is_stock(self, row: dict[str, Any], steps: int) -> bool:
        return row["model"] == self._model and row["provider"] == "stock" and row["steps"] == steps and row["seconds"]

    def _add(self, name: str, steps: int, seconds: list[float], **more: Any) -> None:
        self._record.add({"model": self._model, "steps": steps, "provider": name, "seconds": seconds, **more})

    def _make(self, steps: int) -> Tensor:
        kind = "latent" if hasattr(self._pipe, "vae") else "pt"
        images = self._pipe(
            **self._arguments,
            num_inference_steps=steps,
            generator=torch.Generator().manual_seed(0),
            output_type=kind,
        ).images
        return images.cpu()  # waits for the device


def main(argv: Sequence[str] | None = None) -> int:
    """Measure; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["sd15", "sdxl"])
    parser.add_argument("--steps", nargs="+", type=int, default=[20, 50])
    parser.add_argument("--seconds", type=float, default=120.0, help="when to stop")
    parser.add_argument("--compiled", action="store_true", help="also torch.compile of the stock UNet: minutes")
    parser.add_argument("--only", nargs="+", help="providers, by the beginnings of their names; stock always runs")
    parser.add_argument("--rehearse", action="store_true", help="small models, on any device")
    options = parser.parse_args(argv)
    record = Record(options.out, find_facts())
    deadline = time.monotonic() + options.seconds
    for model in options.models:
        measuring = Measuring(model, record, deadline, rehearse=options.rehearse)
        for name, provider in list_providers(options.compiled).items():
            chosen = not options.only or name == "stock" or name.startswith(tuple(options.only))
            if chosen and time.monotonic() < deadline:
                measuring.run(name, provider, options.steps)
        del measuring
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
