"""What a pipeline runs besides its UNet: text encoders, the VAE's halves, ControlNet.

Each is a function of tensors.  By engine ``"openvino"`` it is a converted model; eagerly, and where that is faster than
its model, the VAE's norms are fused, and its convolutions as the UNet's.  Where that cannot be, it runs stock and the
report says why.
"""

from __future__ import annotations

import contextlib
import functools
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..engines.inputs import apply_lora_scale, read_lora_scales
from ..engines.openvino import OpenVino
from ..engines.programs import ProgramStats
from ..engines.user_compiled import unwrap
from ..layers.context import CallContext, use_context
from ..layers.convolution import Convolution
from ..layers.resnet import Resnet
from ..layers.upsampler import Upsampler
from ..surgery.pristine import is_wrapped
from ..surgery.subclass import is_swapped, plain_class, swap_in, swap_out
from ..surgery.undo import UndoStack
from ..unet.contents import contents_of, drop_contents
from .calls import PipelineCall, find_caller, find_pipeline_call
from .fused_layers import FusedLayers
from .settings import Settings

#: Components of pipelines that are run as a whole.
_WHOLE = ("text_encoder", "text_encoder_2", "text_encoder_3", "image_encoder")
#: Arguments by which outputs are multiplied: numbers that a model takes as inputs.
_FACTORS = ("conditioning_scale",)
#: What is fused in a VAE.
_KINDS = (Resnet(), Upsampler(), Convolution())


class _Component:
    """What is known of one module that is run by an engine."""

    def __init__(self) -> None:
        self.models = OpenVino()
        self.call: weakref.ref[PipelineCall] | None = None

    def see_call(self, call: PipelineCall | None) -> None:
        """Compare all weights anew, once in every call of a pipeline."""
        if call is None or self.call is None or self.call() is not call:
            self.models.distrust()
            self.call = None if call is None else weakref.ref(call)


_components: weakref.WeakKeyDictionary[nn.Module, _Component] = weakref.WeakKeyDictionary()
#: Who has asked for what of a module, and whether its layers are fused.  Its class holds none of it: others may give a
#: class that they derive from it to other modules too.
_users: weakref.WeakKeyDictionary[nn.Module, list[tuple[Settings, bool]]] = weakref.WeakKeyDictionary()


#: What has been put into the layers of modules that are fused.
_fused: weakref.WeakKeyDictionary[nn.Module, FusedLayers] = weakref.WeakKeyDictionary()


def find_components(pipe: Any) -> Iterator[tuple[str, nn.Module]]:
    """Yield the parts of a pipeline that are run as functions of tensors, by the names that reports have for them."""
    for name in _WHOLE:
        module = getattr(pipe, name, None)
        if isinstance(module, nn.Module):
            yield name.replace("_", " "), module
    vae = getattr(pipe, "vae", None)
    for half in ("encoder", "decoder"):
        module = getattr(vae, half, None)
        if isinstance(module, nn.Module):
            yield f"VAE {half}", module


def put_in_components(pipe: Any, unet: nn.Module, settings: Settings, undo: UndoStack) -> None:
    """Let the pipeline's engine run its other parts; where that is or may be Python, the VAE's norms are fused."""
    for name, module in find_components(pipe):
        fuses = settings.fused and name.startswith("VAE") and settings.engine in (None, "eager", "openvino")
        if settings.engine == "openvino" or settings.profile or fuses:
            undo.add(take_out, module, settings)
            if not is_swapped(module):
                swap_in(module, _override(module, name), equal=True)
            _users.setdefault(module, []).append((settings, fuses))
            if fuses:
                _fused.setdefault(module, FusedLayers(_KINDS)).put_in(module, lay_out=_may_lay_out(module))


def take_out(module: nn.Module, user: Settings) -> None:
    """Undo :func:`put_in_components`, for one pipeline of perhaps several."""
    users = _users.get(module, [])
    users[:] = [each for each in users if each[0] is not user and each[0].pipe() is not None]
    if users:
        return
    swap_out(module)
    _users.pop(module, None)
    _fused.pop(module, FusedLayers(_KINDS)).take_out(module)
    forget(module)


def forget(module: nn.Module) -> None:
    """Drop a module's models and all that is known of it."""
    _components.pop(module, None)
    drop_contents(module)


def count_models(pipe: Any) -> Iterator[ProgramStats]:
    """Yield what the models of each part take."""
    modules = [module for _, module in find_components(pipe)]
    net = getattr(pipe, "controlnet", None)
    for module in [*modules, *([net] if isinstance(net, nn.Module) else [])]:
        if module in _components:
            yield _components[module].models.count(torch.device("cpu"))


def _override(module: nn.Module, name: str) -> dict[str, Any]:
    plain = plain_class(module)

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.is_grad_enabled():
            return plain.__call__(self, *args, **kwargs)
        stock = functools.partial(plain.__call__, self, *args, **kwargs)
        user = _find_user(_users.get(self, []))
        if user is None:
            return stock()
        settings, fuses = user
        with time_part(name):
            layers = _fused.get(self) if fuses else None
            eager = stock
            if layers is not None:
                layers.follow(self, lay_out=_may_lay_out(self))  # before a model is made of weights as they lie
                eager = functools.partial(_run_fused, layers, stock, next(iter([*args, *kwargs.values()])))
            return run_model(self, name, settings, eager, args, kwargs) if settings.engine == "openvino" else eager()

    return {"__call__": call}


def _run_fused(layers: FusedLayers, stock: Callable[[], Any], sample: Any) -> Any:
    with use_context(CallContext(True, _ignore, _ignore, within=find_pipeline_call())):
        output = stock()
    return layers.give_back(output, sample) if layers.laid_out else output


def _may_lay_out(module: nn.Module) -> bool:
    """Return whether a module's weights may be laid out; on GPUs its norms are proved in the default format."""
    return next(module.parameters()).is_cpu


def _find_user(users: list[tuple[Settings, bool]]) -> tuple[Settings, bool] | None:
    """Return what a call is to run by, or None: stock, for whoever has only the module in common with the users.

    A loop of one's own runs by what all users have asked for alike.
    """
    running = find_pipeline_call()
    caller = find_caller() or (None if running is None else running.pipe())
    alive = [(each[0].pipe(), each) for each in users if each[0].pipe() is not None]
    if caller is None:
        asked = {(each[0].engine, each[0].precision, each[1]) for _, each in alive}
        return alive[0][1] if len(asked) == 1 else None
    own = next((each for pipe, each in alive if pipe is caller), None)
    if own is not None or is_swapped(caller):
        return own
    return next((each for pipe, each in alive if _runs_alike(caller, pipe)), None)


def _runs_alike(pipe: Any, patched: Any) -> bool:
    """Whether a pipeline that is not patched runs as a patched one does: it shares its UNet and its scheduler."""
    unet, scheduler = unwrap(getattr(pipe, "unet", None)), getattr(pipe, "scheduler", None)
    return unet is not None and unet is unwrap(patched.unet) and scheduler is patched.scheduler


def run_model(
    module: nn.Module,
    name: str,
    settings: Settings,
    eager: Callable[[], Any],
    args: tuple[Any, ...],
    kwargs: Mapping[str, Any],
) -> Any:
    """Return what a module returns for a call, by its converted model where there can be one.

    Args:
        module: the part.
        name: what reports call it.
        settings: of the pipeline.
        eager: runs the call in Python.
        args, kwargs: its arguments.
    """
    component = _components.setdefault(module, _Component())
    running = find_pipeline_call()
    component.see_call(running)
    contents_of(module).look()
    reason = component.models.refuse(module)
    if reason is None and is_wrapped(module):
        reason = "it has hooks, or a forward of its own"
    if reason is None and module.training:
        reason = "it is in training mode; call eval()"
    if reason is not None:
        _note(f"{name} runs without OpenVINO: {reason}", running)
        return eager()
    with apply_lora_scale(module, kwargs) as given:
        inputs = read_lora_scales(module)
    given = {key: _make_factor(value) if key in _FACTORS else value for key, value in given.items()}
    return component.models.run(
        inputs,
        lambda reason: _note(f"{name}: {reason}", running),
        _run_forward,
        module,
        args,
        given,
        precision=settings.precision,
        eager=eager,
        compare=settings.fused,
    )


def _run_forward(module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    return module.forward(*args, **kwargs)


def _make_factor(value: Any) -> Any:
    """Return numbers as tensors, which a model takes as inputs."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return torch.tensor(float(value))
    return [_make_factor(each) for each in value] if isinstance(value, list) else value


def _note(reason: str, running: PipelineCall | None) -> None:
    if running is None or running.note(reason):
        warnings.warn(f"difffast: {reason}", stacklevel=7)


def _ignore(_reason: str) -> None:
    """Leave a reason out of the report: a VAE is no place where users would look for what is not fused."""


@contextlib.contextmanager
def time_part(name: str) -> Iterator[None]:
    """Count the seconds of the block for a part of the running pipeline's call, if they are wanted."""
    running = find_pipeline_call()
    if running is None:
        yield
        return
    with running.time(name):
        yield
