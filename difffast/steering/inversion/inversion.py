"""Inversion: what was found out about a picture, saved, loaded, and replayed in stock calls."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...files import write_whole
from ...sampling.extension import Extension, ExtensionRun, Method, RunInfo
from ...sampling.position import find_step, is_element
from ...sampling.scheduler_step import Result
from ..negative_attention import refuse_attention_edits
from .ddcm import VirtualReplay
from .moves import check_scheduler
from .values import StyleReplay, ValueTexts, check_steps

METHODS = ("ddim", "direct", "npi", "null", "edict", "style", "ddcm")
#: What files of inversions say that they are.
_FORMAT = "difffast inversion 1"
#: Fields that are tensors, and what the names of the networks' parameters begin with.
_TENSORS, _NETWORKS = ("trajectory", "null", "features"), "networks."


@dataclass(frozen=True)
class Inversion(Method):
    """A picture as a pipeline sees it; :func:`difffast.invert` makes it.

    Reconstruct with ``with difffast.patched(pipe, "exact", steering=inversion): pipe(inversion.prompt,
    **inversion.arguments)``, edit with ``difffast.edit(pipe, inversion.prompt, target, inversion=inversion)``.

    Attributes:
        method: how it was made.
        prompt: what the picture shows.
        guidance: the guidance scale to which it belongs.
        size: (height, width) of the picture in pixels.
        trajectory: [steps + 1, C, h, w], latents before each step from noise to picture; for "edict" [2, C, h, w], the
            coupled noises; for "ddcm" [1, C, h, w], the picture.
        steps: denoising steps.
        null: for "null", [done, T, D]: texts in place of the empty prompt, as many as steps are done.
        features: for "style", [P, D]: tokens of the picture.
        networks: for "style", by parameter, [done, ...]: the networks that make values of texts and features.
        losses: for "null" and "style", the error that each step was left with.
    """

    method: str
    prompt: str
    guidance: float
    size: tuple[int, int]
    trajectory: Tensor
    steps: int
    null: Tensor | None = None
    features: Tensor | None = None
    networks: Mapping[str, Tensor] | None = None
    losses: tuple[float, ...] = field(default=())

    @property
    def arguments(self) -> dict[str, Any]:
        """The arguments with which the pipeline is to be called besides prompts.

        Raises:
            ValueError: an inversion by EDICT, which has a loop of its own (:func:`difffast.steering.inversion.edict`).
        """
        if self.method == "edict":
            raise ValueError("EDICT has a loop of its own: use difffast.steering.generate_edict(pipe, inversion)")
        height, width = self.size
        given = {"num_inference_steps": self.steps, "guidance_scale": self.guidance, "height": height, "width": width}
        return given if self.method == "ddcm" else {"latents": self.trajectory[:1], **given}

    def save(self, path: str | Path) -> None:
        """Write a safetensors file, as a whole or not at all."""
        from safetensors.torch import save

        tensors = {name: getattr(self, name) for name in _TENSORS if getattr(self, name) is not None}
        tensors |= {f"{_NETWORKS}{name}": each for name, each in (self.networks or {}).items()}
        tensors = {name: each.contiguous().cpu() for name, each in tensors.items()}
        said = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in (*_TENSORS, "networks")}
        with write_whole(Path(path)) as part:
            part.write_bytes(save(tensors, {"format": _FORMAT, "inversion": json.dumps(said)}))

    @classmethod
    def load(cls, path: str | Path) -> Inversion:
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is damaged, or no inversion.
        """
        from safetensors import SafetensorError, safe_open

        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"there is no inversion {path}")
        try:
            with safe_open(path, "pt") as file:
                said = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
        except SafetensorError as error:
            raise ValueError(f"{path} is damaged: {error}") from None
        if said.get("format") != _FORMAT or "trajectory" not in tensors:
            raise ValueError(f"{path} is no {_FORMAT}, got {said.get('format', 'no format')!r}")
        known = json.loads(said["inversion"])
        known |= {"size": tuple(known["size"]), "losses": tuple(known["losses"])}
        networks = {name.removeprefix(_NETWORKS): each for name, each in tensors.items() if name.startswith(_NETWORKS)}
        found = [*networks.values(), *(tensors[name] for name in ("null",) if name in tensors)]
        if any(len(each) != len(known["losses"]) for each in found) or (known["method"] == "style") != bool(networks):
            raise ValueError(f"{path} is damaged: it has not what each of its {len(known['losses'])} steps has found")
        return cls(**{name: tensors.get(name) for name in _TENSORS}, networks=networks or None, **known)

    def attach(self, pipe: Any, unet: nn.Module) -> Replay | StyleReplay | VirtualReplay:
        self.check(pipe, unet)
        if self.method == "ddcm":
            return VirtualReplay(self.trajectory, self.steps, pipe)
        if self.method == "style":
            refuse_attention_edits(pipe, unet)
            return StyleReplay(ValueTexts(self.features, self.networks), self.guidance)
        return Replay(self, pipe)

    def check(self, pipe: Any, unet: nn.Module) -> None:
        """Refuse a pipeline in which the picture cannot be made again.

        Raises:
            ValueError: another scheduler or UNet, an inversion by EDICT, or one that is not complete.
        """
        check_scheduler(pipe.scheduler, self.steps, noised=self.method == "ddcm")
        self.arguments  # noqa: B018 - refuses EDICT
        if self.method in ("null", "style") and len(self.losses) < self.steps:
            raise ValueError(f"the inversion is not complete: {len(self.losses)} of {self.steps} steps are done")
        if unet.config.in_channels != self.trajectory.shape[1]:
            raise ValueError(f"latents must have {unet.config.in_channels} channels, got {self.trajectory.shape[1]}")


class Replay(Extension):
    """An inversion in one pipeline."""

    alone = True

    def __init__(self, inversion: Inversion, pipe: Any) -> None:
        self._inversion, self._pipe = inversion, weakref.ref(pipe)

    def describe(self) -> Iterator[tuple[str, str]]:
        yield "unet calls", f"replay of a picture inverted by {self._inversion.method!r}"

    def full_steps(self, total: int) -> Sequence[int]:
        return range(total) if self._inversion.method in ("null", "direct") else ()

    def step_results(self) -> Sequence[Result]:
        return (self._correct,) if self._inversion.method == "direct" else ()

    def begin(self, info: RunInfo) -> ReplayRun:
        """Begin a run.

        Raises:
            ValueError: its schedule is not the inversion's.
        """
        check_steps(self._inversion.steps, info)
        return ReplayRun(self._inversion)

    def _correct(self, scheduler: Any, timestep: Any, latents: Tensor) -> Tensor:
        """Put the first picture's latents where they were: direct inversion's offset of the source branch."""
        if not is_element(timestep, scheduler.timesteps):
            return latents
        step = find_step(timestep, scheduler.timesteps)
        wanted = self._inversion.trajectory[step + 1].to(latents)
        return torch.cat([wanted[None], latents[1:]])


class ReplayRun(ExtensionRun):
    """An inversion in one run: the text in place of the empty prompt."""

    def __init__(self, inversion: Inversion) -> None:
        self._inversion = inversion
        self._made: tuple[Any, Tensor] | None = None

    def edit_call(
        self, call: Mapping[str, Any], step: int, scheduler: Any, stock: Callable[..., Any]
    ) -> Mapping[str, Any]:
        """Return the call with its unconditional half as the inversion has it; without guidance, as it is."""
        text, rows = call["encoder_hidden_states"], call["sample"].shape[0]
        method = self._inversion.method
        if method not in ("null", "npi") or self._inversion.guidance == 1 or rows % 2:
            return call
        if method == "npi" and self._made is not None and self._made[0] is text:
            return {**call, "encoder_hidden_states": self._made[1]}
        half = len(text) // 2
        own = text[half] if method == "npi" else self._inversion.null[step].to(text)
        changed = torch.cat([own.expand(half, -1, -1), text[half:]])
        self._made = text, changed
        return {**call, "encoder_hidden_states": changed}
