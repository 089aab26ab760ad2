"""What is measured: pipelines with random weights at full or CPU size, and one batch of images made with each.

Text embeddings are random and given; encoding the text is no part of what is measured, decoding the latents is.
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from peak_memory import PeakMemory
from torch import Tensor, nn

from difffast import models
from difffast.engines.programs import count_graph_bytes
from difffast.models.tiny import ddim_scheduler

PROMPT = "a red circle on a blue square"
_TOKENS = 77
#: Widths of the small Stable Diffusion.
TINY = (32, 64, 96)

#: CPU-sized UNets in the layout of the published ones (``models.UNET_CONFIGS``): narrower, shallower, smaller images.
_SMALL: dict[str, dict[str, Any]] = {
    "sd15": {"sample_size": 16},  # of the tests' pipeline, which is built elsewhere
    "sd21": {
        "sample_size": 16,
        "block_out_channels": (32, 64, 96),
        "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 64,
        "attention_head_dim": (1, 2, 3),
    },
    "sdxl": {
        "sample_size": 16,
        "block_out_channels": (32, 64, 96),
        "transformer_layers_per_block": (1, 1, 2),
        "attention_head_dim": (1, 2, 3),
        "cross_attention_dim": 64,
        "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 6 * 8 + 32,
    },
    "if-i-xl": {
        "sample_size": 16,
        "block_out_channels": (32, 64, 64, 96),
        "layers_per_block": 1,
        "attention_head_dim": 16,
        "addition_embed_type_num_heads": 4,
        "cross_attention_dim": 96,
        "encoder_hid_dim": 64,
    },
    "if-ii-l": {
        "sample_size": 32,
        "block_out_channels": (32, 32, 64, 64, 96),
        "layers_per_block": 1,
        "attention_head_dim": 16,
        "addition_embed_type_num_heads": 4,
        "cross_attention_dim": 96,
        "encoder_hid_dim": 64,
    },
    "x4-upscaler": {"sample_size": 32, "block_out_channels": (32, 64, 64, 96), "cross_attention_dim": 64},
}

#: The third stage of the cascade, as published (stabilityai/stable-diffusion-x4-upscaler, unet/config.json).
_UPSCALER: dict[str, Any] = {
    "sample_size": 128,
    "in_channels": 7,
    "block_out_channels": (256, 512, 512, 1024),
    "down_block_types": ("DownBlock2D",) + 3 * ("CrossAttnDownBlock2D",),
    "up_block_types": 3 * ("CrossAttnUpBlock2D",) + ("UpBlock2D",),
    "only_cross_attention": (True, True, True, False),
    "cross_attention_dim": 1024,
    "num_class_embeds": 1000,
    "use_linear_projection": True,
}


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


def tiny(channels: Sequence[int], sample_size: int, *, batch: int = 1) -> Stage:
    """The small Stable Diffusion pipeline of the tests, with its text encoder."""
    pipe = models.tiny_pipeline("sd", channels=channels, sample_size=sample_size)
    return Stage(pipe, {"prompt": [PROMPT] * batch})


def embedded() -> Stage:
    """The embedded model, which is trained."""
    return Stage(models.embedded_pipeline(), {"prompt": PROMPT})


def checkpoint(model: str, *, device: str, dtype: torch.dtype) -> Stage:
    """A user's own pipeline, from a folder in Diffusers format."""
    return Stage(models.load_pipeline(model).to(device, dtype), {"prompt": PROMPT})


def stages(name: str, *, full: bool, batch: int, device: str, dtype: torch.dtype) -> tuple[Stage, ...]:
    """The pipeline, or the pipelines of the cascade, with random weights.

    Args:
        name: one of :data:`NAMES`.
        full: the published UNet; else the small one of the same layout.

    Raises:
        ValueError: unknown name.
    """
    if name not in _BUILDERS:
        raise ValueError(f"unknown pipeline {name!r}; available: {', '.join(NAMES)}")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return _BUILDERS[name](_Builder(full, batch, torch.device(device), dtype))


def latent_size(name: str, *, full: bool) -> int:
    """Height and width of what the (first) UNet works on."""
    unet = {"SD2.1": "sd21", "SDXL": "sdxl", "IF-I": "if-i-xl", "IF-II": "if-ii-l", "IF cascade": "if-i-xl"}
    return (models.UNET_CONFIGS if full else _SMALL)[unet.get(name, "sd15")]["sample_size"]


@dataclass(frozen=True)
class _Builder:
    full: bool
    batch: int
    device: torch.device
    dtype: torch.dtype

    def unet(self, name: str) -> nn.Module:
        from diffusers import UNet2DConditionModel

        config = _UPSCALER if name == "x4-upscaler" else models.UNET_CONFIGS[name]
        config = config if self.full else {**config, **_SMALL[name]}
        return self._made(lambda: UNet2DConditionModel(**config))

    def vae(self, widths: tuple[int, ...] = (128, 256, 512, 512), **options: Any) -> nn.Module:
        from diffusers import AutoencoderKL

        widths = widths if self.full else (32, 32, 64)
        return self._made(
            lambda: AutoencoderKL(
                block_out_channels=widths,
                down_block_types=("DownEncoderBlock2D",) * len(widths),
                up_block_types=("UpDecoderBlock2D",) * len(widths),
                layers_per_block=2 if self.full else 1,
                **options,
            )
        )

    def controlnet(self, unet: nn.Module) -> nn.Module:
        from diffusers import ControlNetModel

        # As deep as the VAE, so that the picture meets the latents.
        widths = (16, 32, 96, 256) if self.full else (16, 32, 96)
        return self._made(lambda: ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=widths))

    def _made(self, make: Callable[[], nn.Module]) -> nn.Module:
        with self.device:
            module = make().eval()
        return module if module.dtype == self.dtype else module.to(dtype=self.dtype)

    def text(self, unet: nn.Module, **extra: int) -> dict[str, Tensor]:
        """Random embeddings, with their negatives, of the width that the UNet takes."""
        width = unet.config.encoder_hid_dim or unet.config.cross_attention_dim
        shapes = {"prompt_embeds": (_TOKENS, width), **{name: (size,) for name, size in extra.items()}}
        return {
            f"{sign}{name}": torch.randn(self.batch, *shape).to(self.device, self.dtype)
            for name, shape in shapes.items()
            for sign in ("", "negative_")
        }

    def picture(self, size: int) -> Tensor:
        return torch.rand(self.batch, 3, size, size).to(self.device, self.dtype)


_NO_CHECKER = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
_NO_TEXT = {"tokenizer": None, "text_encoder": None}


def _sd15(build: _Builder) -> tuple[Stage, ...]:
    from diffusers import StableDiffusionPipeline

    if not build.full:
        return (tiny(TINY, latent_size("SD1.5", full=False), batch=build.batch),)
    unet = build.unet("sd15")
    pipe = StableDiffusionPipeline(vae=build.vae(), unet=unet, scheduler=ddim_scheduler(), **_NO_TEXT, **_NO_CHECKER)
    return (Stage(pipe, build.text(unet)),)


def _sd21(build: _Builder) -> tuple[Stage, ...]:
    from diffusers import StableDiffusionPipeline

    unet, scheduler = build.unet("sd21"), ddim_scheduler(prediction_type="v_prediction")
    pipe = StableDiffusionPipeline(vae=build.vae(), unet=unet, scheduler=scheduler, **_NO_TEXT, **_NO_CHECKER)
    return (Stage(pipe, build.text(unet)),)


def _controlnet(build: _Builder) -> tuple[Stage, ...]:
    from diffusers import StableDiffusionControlNetPipeline

    unet = build.unet("sd15" if build.full else "sd21")
    pipe = StableDiffusionControlNetPipeline(
        vae=build.vae(),
        unet=unet,
        controlnet=build.controlnet(unet),
        scheduler=ddim_scheduler(),
        **_NO_TEXT,
        **_NO_CHECKER,
    )
    picture = build.picture(unet.config.sample_size * pipe.vae_scale_factor)
    return (Stage(pipe, {**build.text(unet), "image": picture}),)


def _sdxl(build: _Builder) -> tuple[Stage, ...]:
    from diffusers import StableDiffusionXLPipeline

    unet = build.unet("sdxl")
    pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
    pipe = StableDiffusionXLPipeline(
        vae=build.vae(scaling_factor=0.13025),
        unet=unet,
        scheduler=ddim_scheduler(),
        text_encoder_2=None,
        tokenizer_2=None,
        add_watermarker=False,
        **_NO_TEXT,
    )
    return (Stage(pipe, build.text(unet, pooled_prompt_embeds=pooled)),)


def _if_scheduler() -> Any:
    """DDIM here too: a sampler that draws noise gives another image for another number of steps."""
    scheduler = ddim_scheduler()
    scheduler.register_to_config(variance_type="fixed_small")  # tells IF's loop to drop the learned variance
    return scheduler


def _if_one(build: _Builder) -> tuple[Stage, ...]:
    from diffusers import IFPipeline

    unet = build.unet("if-i-xl")
    pipe = IFPipeline(unet=unet, scheduler=_if_scheduler(), watermarker=None, **_NO_TEXT, **_NO_CHECKER)
    return (Stage(pipe, build.text(unet)),)


def _if_two(build: _Builder, *, alone: bool = True) -> tuple[Stage, ...]:
    from diffusers import IFSuperResolutionPipeline

    unet = build.unet("if-ii-l")
    pipe = IFSuperResolutionPipeline(
        unet=unet,
        scheduler=_if_scheduler(),
        image_noising_scheduler=_if_scheduler(),
        watermarker=None,
        **_NO_TEXT,
        **_NO_CHECKER,
    )
    given = {"image": build.picture(unet.config.sample_size // (4 if build.full else 2))} if alone else {}
    return (Stage(pipe, {**build.text(unet), **given}, takes_image=not alone),)


def _cascade(build: _Builder) -> tuple[Stage, ...]:
    from diffusers import DDPMScheduler, StableDiffusionUpscalePipeline

    unet = build.unet("x4-upscaler")
    pipe = StableDiffusionUpscalePipeline(
        vae=build.vae((128, 256, 512), scaling_factor=0.08333),
        unet=unet,
        scheduler=ddim_scheduler(prediction_type="v_prediction"),
        low_res_scheduler=DDPMScheduler(beta_schedule="scaled_linear"),
        **_NO_TEXT,
    )
    return (*_if_one(build), *_if_two(build, alone=False), Stage(pipe, build.text(unet), takes_image=True))


_BUILDERS: dict[str, Callable[[_Builder], tuple[Stage, ...]]] = {
    "SD1.5": _sd15,
    "SD2.1": _sd21,
    "SDXL": _sdxl,
    "ControlNet": _controlnet,
    "IF-I": _if_one,
    "IF-II": _if_two,
    "IF cascade": _cascade,
}
NAMES = tuple(_BUILDERS)
