"""Who competes: providers of one batch of images.

Each works on a copy of the pipeline of its own, so that nobody's patches, compiled programs or caches meet anybody
else's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import peers
import torch
from registry import (
    APPROXIMATION,
    COMPILATION,
    COMPILED,
    FEWER_STEPS,
    PLAIN_OPENVINO,
    ROUNDING,
    STOCK,
    Gate,
    Missing,
    Provider,
)
from workloads import Images, Run

from difffast import CfgReuse, EncoderPropagation, FeatureReuse, MeasuredPlan, ops, patched
from difffast.layers.registry import LAYERS
from difffast.options import PatchOptions
from difffast.presets import PRESETS
from difffast.target import Target


def on_images(
    name: str,
    kind: str,
    prepare: Callable[[Images, ExitStack], object],
    gate: Gate,
    *,
    own_weights: bool = False,
    startup: float = 0.0,
    during: Callable[[], Any] = contextlib.nullcontext,
) -> Provider:
    """A provider that prepares its copy once and then makes the images with the stock call.

    Args:
        own_weights: it changes the weights (their memory format): they must not be shared.
        during: a context for each call.
    """

    def enter(images: Images, stack: ExitStack) -> Callable[[], Run]:
        mine = images.copy(own_weights=own_weights)
        prepare(mine, stack)

        def run() -> Run:
            with during():
                return mine.run()

        return run

    return Provider(name, kind, enter, gate, startup)


def stock() -> Provider:
    return on_images(STOCK, "stock", lambda images, stack: None, Gate())


def stock_channels_last() -> Provider:
    """SDPA (Diffusers' default) with channels_last weights."""
    return on_images(
        "stock channels_last", "stock", lambda images, stack: _channels_last(images), Gate(), own_weights=True
    )


def stock_compiled() -> Provider:
    """The strongest baseline: channels_last and torch.compile; on a GPU with max-autotune, thus CUDA graphs."""

    def prepare(images: Images, stack: ExitStack) -> None:
        if images.device.type == "cuda":
            _channels_last(images)
            images.compile_unets(mode="max-autotune", fullgraph=True)
        else:  # oneDNN blocks the layout itself; max-autotune would tune for minutes a UNet
            images.compile_unets(fullgraph=True)

    return on_images(COMPILED, "stock", prepare, Gate(), own_weights=True, startup=COMPILATION)


def stock_steps(steps: int, of: int) -> Provider:
    """The honest control of every approximation: stock with fewer steps."""

    def prepare(images: Images, stack: ExitStack) -> None:
        images.steps = steps

    return on_images(f"stock, {steps} steps", "stock", prepare, Gate(tolerance=FEWER_STEPS, share=steps / of))


def _channels_last(images: Images) -> None:
    for stage in images.stages:
        stage.pipe.unet.to(memory_format=torch.channels_last)
        if getattr(stage.pipe, "vae", None) is not None:
            stage.pipe.vae.to(memory_format=torch.channels_last)


def deepcache(interval: int, branch: int) -> Provider:
    return _peer(f"DeepCache {interval}, branch {branch}", lambda pipe: peers.deepcache(pipe, interval, branch))


def token_merging(ratio: float) -> Provider:
    return _peer(f"tomesd {ratio:.0%}", lambda pipe: peers.token_merging(pipe, ratio))


def pyramid_attention_broadcast() -> Provider:
    return _peer("PAB 2, 4", lambda pipe: peers.pyramid_attention_broadcast(pipe, 2, 4))


def plain_openvino(precision: str) -> Provider:
    """The UNet converted by hand, the rest stock: what a user of a CPU has without this library."""
    gate = Gate() if precision == "f32" else Gate(tolerance=APPROXIMATION)

    def prepare(images: Images, stack: ExitStack) -> None:
        images.stop_counting()
        for stage in images.stages:
            try:
                stack.enter_context(peers.plain_openvino(stage.pipe, precision))
            except ImportError as error:
                raise Missing(f"{error}; pip install -e .[openvino]") from None

    return on_images(f"{PLAIN_OPENVINO} {precision}", "peer", prepare, gate, startup=COMPILATION)


def openvino_presets() -> tuple[Provider, ...]:
    """The presets with engine="openvino", in float32 and in bfloat16, without their guards."""
    return tuple(
        difffast(
            f"difffast {preset} OpenVINO {precision}",
            preset,
            gate if precision == "f32" else _APPROXIMATES,
            engine="openvino",
            precision=precision,
            **_unguarded(preset),
        )
        for precision in ("f32", "bf16")
        for preset, gate in _GATES.items()
    )


def stock_bfloat16(*, channels_last: bool = False) -> Provider:
    """Stock with weights and latents in bfloat16, and with the weights in channels_last if asked for."""

    def prepare(images: Images, stack: ExitStack) -> None:
        images.cast(torch.bfloat16)
        if channels_last:
            _channels_last(images)

    name = "stock bfloat16 channels_last" if channels_last else "stock bfloat16"
    return on_images(name, "stock", prepare, Gate(tolerance=APPROXIMATION), own_weights=True)


def exact_bfloat16() -> Provider:
    """``exact`` of a pipeline whose weights and latents are bfloat16."""

    def prepare(images: Images, stack: ExitStack) -> None:
        images.cast(torch.bfloat16)
        for stage in images.stages:
            stack.enter_context(patched(stage.pipe, "exact"))

    gate = Gate("stock bfloat16", tolerance=ROUNDING["bfloat16"])
    return on_images("difffast exact bfloat16", "difffast", prepare, gate, own_weights=True)


def stock_frozen() -> Provider:
    """Inductor with freezing: weights are constants that it may lay out anew."""

    def prepare(images: Images, stack: ExitStack) -> None:
        from torch._inductor import config  # as the compiler itself: late

        stack.enter_context(config.patch(freezing=True))
        images.compile_unets(fullgraph=True)

    return on_images("stock compiled, frozen", "stock", prepare, Gate(), own_weights=True, startup=COMPILATION)


def _peer(name: str, context: Callable[[Any], Any]) -> Provider:
    def prepare(images: Images, stack: ExitStack) -> None:
        for stage in images.stages:
            try:
                stack.enter_context(context(stage.pipe))
            except ImportError as error:
                raise Missing(f"{error}; pip install -e .[bench]") from None

    return on_images(name, "peer", prepare, Gate(tolerance=APPROXIMATION))


def difffast(
    name: str,
    preset: str,
    gate: Gate,
    *,
    during: Callable[[], Any] = contextlib.nullcontext,
    only: str | None = None,
    **options: Any,
) -> Provider:
    """A preset of difffast, with options of ``difffast.patch``; missing where this version has no such thing.

    Args:
        only: the one kind of fused layers that is left in, by name; None: all.
    """

    def prepare(images: Images, stack: ExitStack) -> None:
        if preset not in PRESETS:
            raise Missing(f"there is no preset {preset!r} yet")
        unknown = sorted(set(options) - set(PatchOptions.__annotations__))
        if unknown:
            raise Missing(f"difffast.patch takes no {', '.join(unknown)} yet")
        if options.get("compile") or options.get("engine") == "openvino":
            images.stop_counting()
        for stage in images.stages:
            taken = dict(options)
            if "cfg" in taken and Target.of(stage.pipe).refuse_cfg_reuse():
                del taken["cfg"]  # as a preset does
            stack.enter_context(patched(stage.pipe, preset, **taken))
            for kind in LAYERS if only is not None else ():
                if kind.name != only:
                    kind.take_out(stage.pipe.unet)

    startup = COMPILATION if options.get("compile") or options.get("engine") == "openvino" else 0.0
    return on_images(name, "difffast", prepare, gate, during=during, startup=startup)


#: Encoder propagation at every 3rd step, in the plainest way.
_PLAIN = EncoderPropagation(key_steps=3, parallel=False, share_skips=False)
#: What computes the same as balanced on stock layers, and what does as propagation without its shortcuts.
_UNFUSED, _STEP_BY_STEP = "balanced, stock layers", "propagation alone, step by step"

_APPROXIMATES = Gate(tolerance=APPROXIMATION)
#: Guidance reuse makes half of the outputs from the other half, which is due at every step.
_REUSES = Gate(tolerance=APPROXIMATION, share=0.5)
#: Of the outputs, forecasts leave at least a quarter to be computed.
_GATES = {
    "balanced": Gate(_UNFUSED, share=0.25),
    "turbo": Gate(tolerance=APPROXIMATION, share=0.25),
    "exact": Gate(),
}


def presets(*, compiled: bool = False, guarded: bool = False) -> tuple[Provider, ...]:
    """The presets, and what balanced has to equal; or all with compile=True.

    Args:
        compiled: with compile=True.
        guarded: with the plans' guards, which are for trained weights: of random ones outputs change so much from step
            to step that guards ask for nearly all of them.
    """
    options = {preset: {} if guarded else _unguarded(preset) for preset in _GATES}
    if compiled:
        return tuple(
            difffast(f"difffast {preset} compiled", preset, gate, compile=True, **options[preset])
            for preset, gate in _GATES.items()
        )
    plain = difffast(_UNFUSED, "balanced", _GATES["turbo"], fused=False, **options["balanced"])
    return (
        *(difffast(f"difffast {preset}", preset, gate, **options[preset]) for preset, gate in _GATES.items()),
        plain,
    )


def _unguarded(preset: str) -> dict[str, Any]:
    return {} if preset == "exact" else {"propagation": MeasuredPlan(preset, guard=None)}


def published_key_steps() -> Provider:
    return difffast("difffast faster-diffusion", "faster-diffusion", _APPROXIMATES)


def reuse(interval: int, branch: int) -> Provider:
    """Feature reuse at one of DeepCache's intervals and branches, and guidance's."""
    options = {"propagation": FeatureReuse(interval, branch), "cfg": CfgReuse(1)}
    return difffast(f"difffast, reuse {interval}, branch {branch}", "exact", _REUSES, **options)


def savings() -> tuple[Provider, ...]:
    """Encoder propagation and guidance reuse, each alone or on top of the one before."""
    keys = _PLAIN.key_steps
    parallel = EncoderPropagation(key_steps=keys, share_skips=False)
    shared = EncoderPropagation(key_steps=keys)
    truth = Gate(_STEP_BY_STEP)
    return (
        difffast(_STEP_BY_STEP, "exact", _APPROXIMATES, propagation=_PLAIN, fused=False),
        difffast("propagation alone, parallel", "exact", truth, propagation=parallel, fused=False),
        difffast("the same with shared skips", "exact", truth, propagation=shared, fused=False),
        difffast("guidance reuse alone", "exact", _REUSES, cfg=CfgReuse(3), fused=False),
    )


def exact_savings() -> tuple[Provider, ...]:
    """What exact is made of, each alone."""

    @contextlib.contextmanager
    def only_text_keys() -> Any:
        with (
            ops.use_backend("sdpa", "cross_attention", "self_attention"),
            ops.use_backend("reference", "group_norm_silu", "linear"),
        ):
            yield

    return (
        difffast("linear layers alone", "exact", Gate(), only="linear layers"),
        difffast("self-attention alone", "exact", Gate(), only="self-attention layers"),
        difffast("norms alone", "exact", Gate(), only="resnets"),
        difffast("text K/V once alone", "exact", Gate(), during=only_text_keys),
        difffast("cross-attention with text K/V", "exact", Gate(), only="cross-attention layers"),
        difffast("the patch alone", "exact", Gate(), fused=False),
    )


def competitors() -> tuple[Provider, ...]:
    """The other libraries."""
    deepcaches = (deepcache(interval, branch) for interval in (3, 5, 2) for branch in (0, 1))
    return (*deepcaches, token_merging(0.5), pyramid_attention_broadcast())
