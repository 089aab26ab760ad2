"""Inversion: what was found out about a picture, saved, loaded, and replayed in stock calls."""

from __future__ import annotations

import json
import threading
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
from ..prompt_calls import count_images, is_guided
from .ddcm import VirtualReplay
from .moves import check_scheduler
from .values import StyleReplay, ValueTexts, check_steps, note_guidance

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
        known = _read_fields(path, said.get("inversion", ""))
        networks = {name.removeprefix(_NETWORKS): each for name, each in tensors.items() if name.startswith(_NETWORKS)}
        found = [*networks.values(), *(tensors[name] for name in ("null",) if name in tensors)]
        has = {"style": bool(networks) and "features" in tensors, "null": "null" in tensors}
        missing = any((known["method"] == method) != there for method, there in has.items())
        if any(len(each) != len(known["losses"]) for each in found) or missing:
            raise ValueError(f"{path} is damaged: it has not what each of its {len(known['losses'])} steps has found")
        return cls(**{name: tensors.get(name) for name in _TENSORS}, networks=networks or None, **known)

    def attach(self, pipe: Any, unet: nn.Module) -> Replay | StyleReplay | VirtualReplay:
        self.check(pipe, unet)
        if self.method == "ddcm":
            return VirtualReplay(self.trajectory, self.steps, pipe)
        if self.method == "style":
            refuse_attention_edits(pipe, unet)
            return StyleReplay(ValueTexts(self.features, self.networks), self.guidance, pipe)
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


def _read_fields(path: Path, text: str) -> dict[str, Any]:
    """Return the fields of an inversion that a file's metadata hold.

    Raises:
        ValueError: they do not hold all of them, or something else.
    """
    kinds = {"method": str, "prompt": str, "guidance": (int, float), "size": list, "steps": int, "losses": list}
    try:
        known = json.loads(text)
    except json.JSONDecodeError:
        known = None
    if not isinstance(known, dict) or set(known) != set(kinds):
        said = sorted(known) if isinstance(known, dict) else "none"
        raise ValueError(f"{path} is damaged: its metadata must hold {', '.join(kinds)}, got {said}")
    for name, kind in kinds.items():
        if not isinstance(known[name], kind) or (name == "method" and known[name] not in METHODS):
            raise ValueError(f"{path} is damaged: its metadata say that {name} is {known[name]!r}")
    return known | {"size": tuple(known["size"]), "losses": tuple(known["losses"])}


class Replay(Extension):
    """An inversion in one pipeline."""

    alone = True

    def __init__(self, inversion: Inversion, pipe: Any) -> None:
        self._inversion, self._pipe = inversion, weakref.ref(pipe)
        self._images: dict[int, int] = {}  # of the first prompt, by thread: of the call, and of its run
        self._restored: dict[int, int] = {}

    def describe(self) -> Iterator[tuple[str, str]]:
        yield "unet calls", f"replay of a picture inverted by {self._inversion.method!r}"

    def see_call(self, pipe: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._images[threading.get_ident()] = count_images(pipe, args, kwargs)

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
        thread = threading.get_ident()
        images, guidance = self._images.pop(thread, None), self._inversion.guidance
        self._restored[thread] = images or 1
        guided = is_guided(None if images is None else self._pipe(), guidance)
        if guided and images is not None and self._inversion.method == "null":
            note_guidance(info, self._pipe(), guidance)
        return ReplayRun(self._inversion, guided)

    def _correct(self, scheduler: Any, timestep: Any, latents: Tensor) -> Tensor:
        """Put the first prompt's latents where the picture's were: direct inversion's offset of the source branch."""
        if not is_element(timestep, scheduler.timesteps):
            return latents
        step = find_step(timestep, scheduler.timesteps)
        wanted, images = self._inversion.trajectory[step + 1].to(latents), self._restored.get(threading.get_ident(), 1)
        return torch.cat([wanted.expand(images, -1, -1, -1), latents[images:]])


class ReplayRun(ExtensionRun):
    """An inversion in one run: the text in place of the empty prompt.

    Args:
        inversion: the inversion.
        guided: whether the first half of a batch is unconditional.
    """

    def __init__(self, inversion: Inversion, guided: bool) -> None:
        self._inversion, self._guided = inversion, guided
        self._made: dict[str, tuple[Tensor, Tensor]] = {}  # of which tensor, by what it is

    def edit_call(
        self, call: Mapping[str, Any], step: int, scheduler: Any, stock: Callable[..., Any]
    ) -> Mapping[str, Any]:
        """Return the call with its unconditional half as the inversion has it; without guidance, as it is."""
        text, rows = call["encoder_hidden_states"], call["sample"].shape[0]
        method = self._inversion.method
        if method not in ("null", "npi") or not self._guided or rows % 2:
            return call
        if method == "null":
            half = len(text) // 2
            null = self._inversion.null[step].to(text)
            return {**call, "encoder_hidden_states": torch.cat([null.expand(half, -1, -1), text[half:]])}
        changed = {"encoder_hidden_states": self._repeat_prompt("text", text)}
        added = call.get("added_cond_kwargs") or {}
        if "text_embeds" in added:  # SDXL's pooled embedding is of the prompt as well
            pooled = self._repeat_prompt("pooled", added["text_embeds"])
            changed["added_cond_kwargs"] = {**added, "text_embeds": pooled}
        return {**call, **changed}

    def _repeat_prompt(self, name: str, rows: Tensor) -> Tensor:
        """Return rows [2B, ...] with the first prompt's as unconditional half; the same tensor as long as they are."""
        before, made = self._made.get(name, (None, None))
        if before is not rows or made is None:
            half = len(rows) // 2
            made = torch.cat([rows[half : half + 1].expand_as(rows[half:]), rows[half:]])
            self._made[name] = rows, made
        return made
