"""What is measured: pipelines with random weights at full or CPU size, and one batch of images made with each.

Text embeddings are random and given; encoding the text is no part of what is measured, decoding the latents is.
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from peak_memory import PeakMemory
from torch import Tensor, nn

from difffast.engines.programs import count_graph_bytes


@dataclass(frozen=True)
class Run:
    """What one call of a provider gave.

    Attributes:
        result: what the gate compares: images [B, 3, H, W], latents, or a UNet's output.
        seconds: None: the whole call is what counts, and the caller times it.
        outputs: samples that went through the UNets' output layers, guidance included; None: not counted.
        peak_bytes: most tensor memory held at once, weights and the provider's CUDA graphs included; None: not
            tracked.
    """

    result: Tensor
    seconds: float | None = None
    outputs: int | None = None
    peak_bytes: int | None = None


@dataclass(frozen=True)
class Stage:
    """A pipeline and the arguments of its call; of a later stage, ``image`` is what the stage before made."""

    pipe: Any
    arguments: Mapping[str, Any]
    takes_image: bool = False


@dataclass
class Images:
    """One batch of images, made by one pipeline or a cascade of several.

    Args:
        stages: in order.
        steps: denoising steps of every stage.
        latent: stop before the VAE, where there is one.
        unet_only: count the seconds inside the UNets only.
        memory: track the most tensor memory held, weights included.
    """

    stages: Sequence[Stage]
    steps: int
    latent: bool = False
    unet_only: bool = False
    memory: bool = False
    _warm: bool = field(default=False, init=False)
    _graphs: int = field(default=0, init=False)
    _outputs: int = field(default=0, init=False)
    _hooks: list[Any] = field(default_factory=list, init=False)

    def copy(self, *, own_weights: bool) -> Images:
        """Pipelines of the caller's own: modules, schedulers and patches apart; weights shared unless asked for."""
        stages = []
        for stage in self.stages:
            memo = {} if own_weights else {id(tensor): tensor for tensor in _tensors(stage.pipe)}
            pipe = copy.deepcopy(stage.pipe, memo)
            pipe.set_progress_bar_config(disable=True)
            stages.append(Stage(pipe, stage.arguments, stage.takes_image))
        made = replace(self, stages=stages)
        made._hooks += (stage.pipe.unet.conv_out.register_forward_hook(made._count) for stage in stages)
        return made

    def stop_counting(self) -> None:
        """Before a UNet is compiled: the hook that counts outputs would end up in the program."""
        while self._hooks:
            self._hooks.pop().remove()

    def cast(self, dtype: torch.dtype) -> None:
        """Give every stage's weights, and the tensors that it is called with, another dtype."""
        for index, stage in enumerate(self.stages):
            stage.pipe.to(dtype)
            arguments = {
                name: value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value
                for name, value in stage.arguments.items()
            }
            self.stages[index] = replace(stage, arguments=arguments)

    @property
    def device(self) -> torch.device:
        return self.stages[0].pipe.unet.device

    def compile_unets(self, **options: Any) -> None:
        """Put ``torch.compile`` of every stage's UNet in its place."""
        self.stop_counting()
        for stage in self.stages:
            stage.pipe.unet = torch.compile(stage.pipe.unet, **options)

    def run(self, seed: int = 0) -> Run:
        """Make the batch; every run of a seed starts from the same noise."""
        self._outputs = 0
        clocks = [_UNetClock(stage.pipe.unet, self.device) for stage in self.stages] if self.unet_only else []
        if self.memory and not self._warm:
            before = count_graph_bytes(self.device)
            self._make(seed)  # what is allocated once a process is nobody's peak
            # Graphs keep their memory between images, where a peak above what is held does not see it.
            self._graphs = count_graph_bytes(self.device) - before
            self._warm, self._outputs = True, 0
        with ExitStack() as stack:
            for stage, clock in zip(self.stages, clocks, strict=False):
                stack.enter_context(clock.in_place_of(stage.pipe))
            peak = stack.enter_context(PeakMemory(self.device)) if self.memory else None
            images = self._make(seed)
        return Run(
            images,
            seconds=sum(clock.seconds() for clock in clocks) if self.unet_only else None,
            outputs=self._outputs if self._hooks else None,
            peak_bytes=self._weight_bytes() + self._graphs + peak.bytes if peak is not None else None,
        )

    def _make(self, seed: int) -> Tensor:
        images = None
        for stage in self.stages:
            images = stage.pipe(
                **stage.arguments,
                **({"image": images} if stage.takes_image else {}),
                num_inference_steps=self.steps,
                generator=torch.Generator().manual_seed(seed),
                output_type="latent" if self.latent and hasattr(stage.pipe, "vae") else "pt",
            ).images
        return images

    def _weight_bytes(self) -> int:
        tensors = {id(tensor): tensor for stage in self.stages for tensor in _tensors(stage.pipe)}
        return sum(tensor.nbytes for tensor in tensors.values())

    def _count(self, _module: nn.Module, _arguments: tuple[Any, ...], output: Tensor) -> None:
        self._outputs += output.shape[0]

    _count.observes = True  # or it would run at every step


@dataclass
class Decodings(Images):
    """Pictures of random latents, by the VAE alone.

    Args:
        latent_size: height and width of the latents.
    """

    latent_size: int = 32

    @torch.no_grad()
    def _make(self, seed: int) -> Tensor:
        vae = self.stages[0].pipe.vae
        shape = 1, vae.config.latent_channels, self.latent_size, self.latent_size
        latents = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        return vae.decode(latents.to(vae.device, vae.dtype)).sample


class _UNetClock:
    """In place of ``pipe.unet``: remembers how long its calls took, without waiting for a GPU in between."""

    def __init__(self, unet: Any, device: torch.device) -> None:
        self.unet, self._cuda = unet, device.type == "cuda"
        self._calls: list[tuple[Any, Any]] = []

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        start = self._now()
        try:
            return self.unet(*args, **kwargs)
        finally:
            self._calls.append((start, self._now()))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.unet, name)

    @contextlib.contextmanager
    def in_place_of(self, pipe: Any) -> Iterator[None]:
        """Stand where ``pipe.unet`` is looked up."""
        vars(pipe)["unet"] = self
        try:
            yield
        finally:
            del vars(pipe)["unet"]
            pipe.unet = self.unet

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self) -> float:
        if not self._cuda:
            return sum(end - start for start, end in self._calls)
        torch.cuda.synchronize()
        return sum(start.elapsed_time(end) for start, end in self._calls) / 1e3


def _tensors(pipe: Any) -> list[Tensor]:
    modules = [component for component in pipe.components.values() if isinstance(component, nn.Module)]
    return [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
