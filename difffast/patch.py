"""patch, unpatch, patched: put difffast behind a stock Diffusers pipeline and take it out again without a trace."""

from __future__ import annotations

import contextlib
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, overload

from . import attention, controlnet, linears, ops, resnets, self_attention
from .guidance.binder import Binder
from .guidance.binding import BindingTrace, SemanticBinding
from .ops.linear import backend_of_large
from .plan import PRESETS, EncoderPropagation, FeatureReuse, GuidanceReuse, Plan
from .programs import BATCHES, ProgramStats
from .propagation import Controller, Settings
from .run import RunStats
from .support import PIPELINES, UNETS, Support, denoiser_of, support_of
from .swap import is_swapped, plain_class, swap_in, swap_out
from .unet import reentry

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch import nn

#: How steps share features.
Sharing = EncoderPropagation | FeatureReuse

#: Kinds of layers that are fused, each with an install(unet) and an uninstall(unet).
_FUSED = (attention, resnets, self_attention, linears)

#: Arguments of :func:`patch` that replace a part of the preset.
_REPLACING = ("propagation", "guidance", "fused")

_patches: weakref.WeakKeyDictionary[Any, _Patch] = weakref.WeakKeyDictionary()
_lock = threading.RLock()


@dataclass
class _Patch:
    """What has to be undone for one pipeline."""

    arguments: dict[str, Any]
    settings: Settings
    unet: nn.Module
    compiled: Any
    controlnets: Sequence[nn.Module]


@dataclass(frozen=True)
class PatchReport:
    """What :func:`patch` did; prints as text and shows as a table in a notebook.

    Attributes:
        pipeline, unet: class names.
        preset: name of the preset, or "custom" where ``propagation``, ``guidance`` or ``fused`` was given.
        propagation, guidance: the configurations in force.
        fused: whether fused layers are on.
        replaced: (what, by what) pairs.
        notes: what was left alone or changed on the way, and why.
    """

    pipeline: str
    unet: str
    preset: str
    propagation: EncoderPropagation | FeatureReuse
    guidance: GuidanceReuse | None
    fused: bool
    replaced: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]
    _settings: Settings = field(repr=False)
    _controller: Controller = field(repr=False)

    @property
    def last_run(self) -> RunStats | None:
        """Counts of the latest run's UNet calls and reasons for every fallback; None before the first run."""
        return self._settings.last_run

    def plan(self, total: int) -> Plan:
        """The plan of a schedule with ``total`` UNet calls, on the device where the pipeline is now."""
        pipe = self._settings.pipe()
        return self._settings.plan(total, pipe.device.type if pipe is not None else "cpu")

    @property
    def trace(self) -> BindingTrace | None:
        """Losses and maps of semantic binding in the latest run; None without binding, or before the first run."""
        return self._settings.binding.trace if self._settings.binding is not None else None

    @property
    def programs(self) -> ProgramStats:
        """How many compiled programs the UNet has, and the GPU memory of their CUDA graphs; zeros without any."""
        return self._controller.program_stats()

    def invalidate(self) -> None:
        """Make the next step a key step, e.g. from a callback after a large edit of the latents."""
        self._controller.invalidate(self._settings)

    def __str__(self) -> str:
        rows = self._rows()
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {value}" for name, value in rows)

    def _rows(self) -> list[tuple[str, str]]:
        head = [("pipeline", self.pipeline), ("unet", self.unet), ("preset", self.preset)]
        return [*head, *self.replaced, *(("note", note) for note in self.notes)]

    def _repr_html_(self) -> str:
        import html

        cells = (f"<tr><th>{html.escape(name)}</th><td>{html.escape(value)}</td></tr>" for name, value in self._rows())
        return f"<table>{''.join(cells)}</table>"


@overload
def patch(pipe: DiffusionPipeline, preset: str = ..., **options: Any) -> PatchReport: ...


@overload
def patch(pipe: Sequence[DiffusionPipeline], preset: str = ..., **options: Any) -> tuple[PatchReport, ...]: ...


def patch(
    pipe: DiffusionPipeline | Sequence[DiffusionPipeline],
    preset: str = "balanced",
    *,
    propagation: EncoderPropagation | FeatureReuse | None = None,
    fused: bool | None = None,
    compile: bool = False,
    binding: SemanticBinding | None = None,
    guidance: GuidanceReuse | None = None,
    force: bool = False,
) -> PatchReport | tuple[PatchReport, ...]:
    """Speed up a Diffusers pipeline in place; its stock ``pipe(...)`` call stays as it is.

    Args:
        pipe: a pipeline with a UNet; see ``difffast.support.PIPELINES``.  Or several, such as the stages of a cascade.
        preset: a name from ``difffast.plan.PRESETS``.
        propagation: replaces what the preset says about steps that share features, or guidance.
        fused: replaces what the preset says about fused layers: True, or False for stock layers everywhere.
        compile: run the UNet's halves as programs made by torch.compile, once per shape (:mod:`difffast.programs`); the
            first image waits for them.
        binding: semantic binding of the things that a prompt marks, as in ``"a [black cat] and a [white dog]"``; None:
            prompts are taken as they are.
        guidance: run the unconditional half of guidance's batch at some key steps only; replaces what the preset says.
        force: allow schedules with fewer than 8 steps.

    Returns:
        A report of what was replaced; for several pipelines as many, in their order.  Patching again replaces the first
        patch.

    Raises:
        TypeError: ``pipe`` is no pipeline, ``propagation`` no :class:`EncoderPropagation` or :class:`FeatureReuse`,
            ``fused`` or ``compile`` no bool, ``binding`` no :class:`SemanticBinding`, ``guidance`` no
            :class:`GuidanceReuse`.
        ValueError: no UNet, an unsupported pipeline or UNet, an unknown preset, feature reuse, prior noise or binding
            where the pipeline's kind rules it out, a branch that the UNet does not have, or no layers for binding's
            maps.  Nothing is changed then.
    """
    if isinstance(pipe, (list, tuple)):
        options = {"propagation": propagation, "fused": fused, "compile": compile, "binding": binding}
        return _patch_all(pipe, preset, {**options, "guidance": guidance, "force": force})
    support, unet, _ = _checked_target(pipe)
    if preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}; available: {', '.join(PRESETS)}")
    if propagation is not None and not isinstance(propagation, (EncoderPropagation, FeatureReuse)):
        raise TypeError(
            f"propagation must be a difffast.EncoderPropagation or FeatureReuse, got {type(propagation).__name__}"
        )
    if fused is not None and not isinstance(fused, bool):
        raise TypeError(f"fused must be True, False or None, got {fused!r}")
    if not isinstance(compile, bool):
        raise TypeError(f"compile must be True or False, got {compile!r}")
    if binding is not None and not isinstance(binding, SemanticBinding):
        raise TypeError(f"binding must be a difffast.SemanticBinding, got {type(binding).__name__}")
    if guidance is not None and not isinstance(guidance, GuidanceReuse):
        raise TypeError(f"guidance must be a difffast.GuidanceReuse, got {type(guidance).__name__}")
    if binding is not None and not denoiser_of(type(unet)).binding:
        raise ValueError(f"semantic binding is for pictures, got a {type(unet).__name__}")
    binder = Binder(binding, pipe, unet) if binding is not None else None
    arguments = {
        "preset": preset,
        "propagation": propagation,
        "fused": fused,
        "compile": compile,
        "binding": binding,
        "guidance": guidance,
        "force": force,
    }
    config = propagation or PRESETS[preset].propagation
    _check_meant(config, type(pipe).__name__, support)
    fused = PRESETS[preset].fused if fused is None else fused
    wanted = PRESETS[preset].guidance if guidance is None and propagation is None else guidance
    no_halves = guidance_obstacle(pipe, support) if wanted is not None else ""
    if guidance is not None and no_halves:
        raise ValueError(f"guidance cannot be reused with {type(pipe).__name__}: {no_halves}")
    guidance = None if no_halves else wanted
    settings = Settings(pipe, config, fused, compile, support, force, binder, guidance)

    with _lock:
        _check_shared(pipe, unet, settings)
        if isinstance(config, FeatureReuse):
            reentry(unet, config.branch)
        earlier = _patches.get(pipe)
        unpatch(pipe)
        _, unet, compiled = _checked_target(pipe)  # unpatch may have put a compiled UNet back
        if not is_swapped(unet):
            swap_in(unet, _unet_methods(unet))
        for layers in _FUSED:
            layers.install(unet)
        controller = _controller(unet)
        if earlier is not None:
            settings.collectors = earlier.settings.collectors
        controller.add(settings)
        nets = _controlnets(pipe)
        for net in nets:
            controlnet.install(net, controller)
        notes = []
        if compiled is not None:
            pipe.unet = unet
            notes.append(
                "pipe.unet was torch.compile'd: the plain UNet runs instead (patch with compile=True for compiled "
                "halves); unpatch puts the compiled one back"
            )
        if getattr(unet, "_compiled_call_impl", None) is not None:
            notes.append("unet.compile() is in effect for unsplit calls only; encoder and decoder halves run eagerly")
        if not support.parallel:
            notes.append(f"steps are decoded one at a time: {support.note}")
        if no_halves:
            notes.append(f"guidance's halves run together: {no_halves}")
        settings.adopt_scheduler()
        if binder is not None:
            swap_in(pipe, binder.methods())
        _patches[pipe] = _Patch(arguments, settings, unet, compiled, nets)

    reason = ops.missing("cpp")
    if reason is not None:
        notes.append(f"operators run on the PyTorch reference: {reason}")
    return PatchReport(
        pipeline=type(pipe).__name__,
        unet=type(unet).__name__,
        preset="custom"
        if any(arguments[name] is not None for name in ("propagation", "guidance", "fused"))
        else preset,
        propagation=config,
        guidance=guidance,
        fused=fused,
        replaced=tuple(_replaced(unet, settings)),
        notes=tuple(notes),
        _settings=settings,
        _controller=controller,
    )


def _patch_all(pipes: Sequence[DiffusionPipeline], preset: str, options: Mapping[str, Any]) -> tuple[PatchReport, ...]:
    """Patch all of them, or leave all as they are."""
    reports = []
    with contextlib.ExitStack() as undo:
        for pipe in pipes:
            earlier = _arguments(pipe)
            reports.append(patch(pipe, preset, **options))
            undo.callback(_put_back, pipe, earlier)
        undo.pop_all()
    return tuple(reports)


def unpatch(pipe: DiffusionPipeline | Sequence[DiffusionPipeline]) -> bool:
    """Take difffast out of a pipeline, or several: classes, attributes and outputs are as before :func:`patch`.

    Returns:
        True if the pipeline, or any of them, was patched.
    """
    if isinstance(pipe, (list, tuple)):
        return any([unpatch(each) for each in pipe])
    with _lock:
        done = _patches.pop(pipe, None)
        if done is None:
            return False
        controller = _controller(done.unet)
        for net in done.controlnets:  # the pipeline may have another one by now
            if not any(net in each.controlnets and each.unet is done.unet for each in _patches.values()):
                controlnet.uninstall(net, controller)
        if controller.remove(done.settings):
            swap_out(done.unet)
            for layers in _FUSED:
                layers.uninstall(done.unet)
        done.settings.release_schedulers()
        swap_out(pipe)
        if done.compiled is not None and pipe.unet is done.unet:
            pipe.unet = done.compiled
        return True


@contextlib.contextmanager
def patched(
    pipe: DiffusionPipeline | Sequence[DiffusionPipeline], preset: str = "balanced", **options: Any
) -> Iterator[PatchReport | tuple[PatchReport, ...]]:
    """:func:`patch` for a ``with`` block; on leaving, earlier patches are put back, or none."""
    earlier = [(each, _arguments(each)) for each in (pipe if isinstance(pipe, (list, tuple)) else (pipe,))]
    report = patch(pipe, preset, **options)
    try:
        yield report
    finally:
        for each, arguments in reversed(earlier):
            _put_back(each, arguments)


def _arguments(pipe: DiffusionPipeline) -> dict[str, Any] | None:
    """What the pipeline's patch was asked for, or None."""
    with _lock:
        return next((dict(found.arguments) for each, found in _patches.items() if each is pipe), None)


def _put_back(pipe: DiffusionPipeline, arguments: Mapping[str, Any] | None) -> None:
    unpatch(pipe)
    if arguments is not None:
        patch(pipe, **arguments)


@contextlib.contextmanager
def collecting(pipe: DiffusionPipeline, make: Callable[[nn.Module], Any]) -> Iterator[Any]:
    """Let the pipeline's runs fill ``make(unet)`` inside the block; see :func:`difffast.collect_maps`."""
    _, unet, _ = _checked_target(pipe)
    text = denoiser_of(type(unet)).text
    if text != "given":
        raise ValueError(
            f"no attention maps can be collected from a {type(unet).__name__}: its layers get the text {text}, "
            "which leaves no map a picture"
        )
    with contextlib.ExitStack() as stack:
        if pipe not in _patches:
            stack.enter_context(patched(pipe, "exact"))
        maps = make(_patches[pipe].unet)
        _patches[pipe].settings.collectors += (maps,)
        try:
            yield maps
        finally:
            if pipe in _patches:
                settings = _patches[pipe].settings
                settings.collectors = tuple(each for each in settings.collectors if each is not maps)


def _checked_target(pipe: Any) -> tuple[Support, nn.Module, Any]:
    """What is supported of the pipeline, its plain UNet, and the compiled wrapper around it if there is one."""
    from diffusers import DiffusionPipeline

    name = type(pipe).__name__
    if not isinstance(pipe, DiffusionPipeline):
        raise TypeError(f"pipe must be a diffusers.DiffusionPipeline, got {name}")
    unet = getattr(pipe, "unet", None)
    if unet is None:
        found = ", ".join(key for key in pipe.components if "transformer" in key or "prior" in key) or "none"
        raise ValueError(f"{name} has no UNet (other denoisers: {found}); difffast patches UNet pipelines only")
    supported = support_of(type(pipe))
    if supported is None:
        raise ValueError(f"{name} is not supported; supported pipelines: {', '.join(PIPELINES)}")
    compiled = unet if hasattr(unet, "_orig_mod") else None
    plain = unet._orig_mod if compiled is not None else unet
    if denoiser_of(type(plain)) is None:
        raise ValueError(f"{name}.unet is a {type(plain).__name__}; supported: {', '.join(UNETS)}")
    return supported, plain, compiled


def _check_meant(config: Sharing, pipeline: str, support: Support) -> None:
    """Refuse what the pipeline's kind rules out, with the reason."""
    why = f": {support.note}" if support.note else ""
    if isinstance(config, FeatureReuse) and not support.reuse:
        raise ValueError(f"feature reuse does not work with {pipeline}{why}")
    if isinstance(config, EncoderPropagation) and config.prior_noise and not support.prior_noise:
        raise ValueError(
            f"prior noise is not meant for {pipeline} ({support.family}), got prior_noise={config.prior_noise}: "
            "use prior_noise=None"
        )


def guidance_obstacle(pipe: Any, support: Support) -> str:
    """Why guidance cannot be reused: the UNet's batch is not [unconditional, conditional], or not known to be."""
    if support.guidance:
        return support.guidance
    return "" if hasattr(type(pipe), "do_classifier_free_guidance") else "it does not tell whether a run is guided"


def _controlnets(pipe: Any) -> list[nn.Module]:
    """The pipeline's ControlNet, if it has one; several come as one module."""
    found = getattr(pipe, "controlnet", None)
    return [found] if found is not None and hasattr(found, "forward") else []


def _check_shared(pipe: Any, unet: nn.Module, ours: Settings) -> None:
    """Refuse two pipelines that share a scheduler but want different things: a run could be of either."""
    for other, done in _patches.items():
        if other is pipe or other.scheduler is not pipe.scheduler:
            continue
        theirs = done.settings
        own_steps = any(each.prior_noise or each.binding for each in (theirs, ours))
        if (done.unet is unet and theirs.asked != ours.asked) or own_steps:
            raise ValueError(
                f"another patched {type(other).__name__} shares this pipeline's scheduler, which needs equal settings "
                f"without prior noise and binding (there: {theirs.asked}; here: {ours.asked}); give one of them its "
                "own: pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)"
            )


def _unet_methods(unet: nn.Module) -> dict[str, Any]:
    plain, controller = plain_class(unet), Controller(unet)

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return controller(self, lambda *a, **k: plain.__call__(self, *a, **k), args, kwargs)

    methods = {"__call__": call, "_difffast_controller": controller}
    if hasattr(plain, "process_encoder_hidden_states"):

        def process(self: nn.Module, encoder_hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
            own = plain.process_encoder_hidden_states
            return attention.processed(self, encoder_hidden_states, lambda text: own(self, text, *args, **kwargs))

        methods["process_encoder_hidden_states"] = process
    return methods


def _controller(unet: nn.Module) -> Controller:
    return type(unet)._difffast_controller


def _replaced(unet: nn.Module, settings: Settings) -> Iterator[tuple[str, str]]:
    config, fused, compiled, binder = settings.propagation, settings.fused, settings.compiled, settings.binding
    if settings.guidance is not None:
        yield "guidance", "the conditional half alone between some key steps"
    if isinstance(config, FeatureReuse):
        yield "unet calls", f"whole UNet at key steps, outer layers (branch {config.branch}) in between"
    elif config.key_steps == 1:
        yield "unet calls", "whole UNet at every step"
    else:
        how = "decoders in parallel" if config.parallel else "decoders one at a time"
        yield "unet calls", f"encoder propagation, {how}"
        yield "repeat_batch", "C++ on the CPU" if ops.missing("cpp") is None else "PyTorch reference"
    if compiled:
        yield (
            "programs",
            f"torch.compile, one per shape, decoder batches of {', '.join(map(str, BATCHES))} steps at most",
        )
    weight = next(unet.parameters())
    layers = attention.layers_of(unet)
    kinds = Counter((attention.kind_of(layer), attention.operator_of(layer)) for layer in layers.values())
    for (kind, operator), count in kinds.items() if fused else ():
        backend = ops.default_backend(operator, weight.device, weight.dtype)
        yield f"{kind} ({count} layers)", f"{operator} ({backend}), text keys and values once a prompt"
    layers = self_attention.layers_of(unet)
    if fused and layers and self_attention.wins(weight):
        backend = ops.default_backend("self_attention", weight.device, weight.dtype)
        yield f"self-attention ({len(layers)} layers)", f"self_attention ({backend})"
    layers = linears.layers_of(unet)
    backend = backend_of_large(weight)
    if fused and layers and backend != "reference":
        yield f"linear layers ({len(layers)})", f"linear ({backend}), where large enough"
    layers = resnets.resnets_of(unet)
    backend = ops.default_backend("group_norm_silu", weight.device, weight.dtype)
    if fused and layers and backend != "reference" and not compiled:
        yield f"resnets ({len(layers)} layers)", f"group_norm_silu ({backend})"
    if settings.prior_noise:
        yield "scheduler.step", f"prior noise injection, alpha = {settings.prior_noise}"
    if binder is not None:
        yield "encode_prompt", "things marked by square brackets"
        yield "scheduler.step", "from optimised latents"
        how = f'semantic binding "{binder.config.preset}" ({binder.config.mode})'
        yield "unet calls", f"{how}, maps of {len(binder.layers)} attn2 layers"
