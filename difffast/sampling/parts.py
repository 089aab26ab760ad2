"""What a patch puts into a pipeline's objects, part by part; each part registers how it is taken out again.

The way out is registered before the way in is gone, and can be gone from any point in between: whatever interrupts a
patch, nothing of it is left.  Nothing registered holds the pipeline itself, which would never be freed.
"""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from ..engines.user_compiled import is_compiled_wrapper, unwrap
from ..layers.registry import LAYERS
from ..surgery.subclass import is_swapped, plain_class, swap_in, swap_out
from ..surgery.undo import UndoStack
from . import controlnet
from .calls import begin_pipeline_call
from .components import put_in_components
from .controller import drop_controller, find_controller, give_controller, override_compiled, override_unet
from .fused_layers import FusedLayers
from .settings import Settings

#: (pipeline, its plain UNet, what was asked for, where the way out is registered)
Part = Callable[[Any, nn.Module, Settings, UndoStack], None]


def put_in_unet(pipe: Any, unet: nn.Module, settings: Settings, undo: UndoStack) -> None:
    """Let the UNet's calls go to its controller, and its layers to the operators; pipelines may share both.

    A pipeline that ``from_pipe`` makes of a patched one shares its UNet and its scheduler, and runs as that one was
    patched for as long as it does.  Patched as well, it has options of its own; with a scheduler of its own, it runs
    stock.
    """
    undo.add(take_out_unet, unet, settings)
    if find_controller(unet) is None:
        give_controller(unet)
    if not is_swapped(unet):
        swap_in(unet, override_unet(type(unet)), equal=True)
    controller = find_controller(unet)
    controller.add(settings)
    controller.fuse_layers(unet)


def take_out_unet(unet: nn.Module, settings: Settings | None = None) -> None:
    """Undo :func:`put_in_unet`; without settings, of a UNet whose pipelines are gone or unknown."""
    controller = find_controller(unet)
    if controller is not None and not controller.remove(settings):
        return  # another pipeline needs it
    (FusedLayers(LAYERS) if controller is None else controller.layers).take_out(unet)
    swap_out(unet)
    drop_controller(unet)


def put_in_compiled_unet(pipe: Any, unet: nn.Module, settings: Settings, undo: UndoStack) -> None:
    """Let the calls of what ``torch.compile`` has made of the UNet, if the pipeline holds it, go to the controller."""
    compiled = pipe.unet
    if is_compiled_wrapper(compiled):
        undo.add(_take_out_compiled, compiled, unet, settings)
        if not is_swapped(compiled):
            swap_in(compiled, override_compiled(type(compiled)))


def _take_out_compiled(compiled: Any, unet: nn.Module, settings: Settings) -> None:
    controller = find_controller(unet)
    if controller is None or not controller.is_held(compiled, but=settings):
        swap_out(compiled)


def put_in_controlnet(pipe: Any, unet: nn.Module, settings: Settings, undo: UndoStack) -> None:
    """Let the pipeline's ControlNet, if it has one, run at the steps that need it; several come as one module."""
    net = getattr(pipe, "controlnet", None)
    if net is not None and hasattr(net, "forward") and not settings.support.exact_only:
        undo.add(controlnet.take_out, net, settings)
        controlnet.put_in(net, settings, find_controller(unet))


def put_in_scheduler(pipe: Any, unet: nn.Module, settings: Settings, undo: UndoStack) -> None:
    """Let the scheduler step from latents that extensions have edited."""
    undo.add(settings.release_schedulers)
    settings.adopt_scheduler()


def put_in_pipeline(pipe: Any, unet: nn.Module, settings: Settings, undo: UndoStack) -> None:
    """Override the pipeline's own methods: those that extensions name, and its call, which watches the UNet."""
    methods: dict[str, Callable[..., Any]] = {"__call__": _watch_unet(pipe, unet, settings, undo)}
    for extension in settings.extensions:
        for name, method in extension.pipeline_methods().items():
            if name in methods:
                raise ValueError(f"a method of the pipeline can be overridden once, and {name} would be twice")
            methods[name] = method
    undo.add(_take_out_pipeline, weakref.ref(pipe))
    swap_in(pipe, methods)


def _take_out_pipeline(pipe: weakref.ref[Any]) -> None:
    if pipe() is not None:
        swap_out(pipe())


def _watch_unet(pipe: Any, unet: nn.Module, settings: Settings, undo: UndoStack) -> Callable[..., Any]:
    """Return a ``__call__`` that follows a UNet that was changed after patching, and warns where it is another one."""
    plain, patched = plain_class(pipe).__call__, weakref.ref(unet)

    @functools.wraps(plain)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        unet = unwrap(self.unet)
        if unet is patched() and not is_swapped(unet):  # others have given it a class that they made of its plain one
            swap_in(unet, override_unet(type(unet)), equal=True)
        if unet is patched() and not is_swapped(self.unet):
            put_in_compiled_unet(self, unet, settings, undo)
        # What wraps the UNet without being a module (a profiler) still calls it.
        if unet is not patched() and isinstance(unet, nn.Module) and not is_swapped(unet):
            warnings.warn(
                f"difffast: pipe.unet was replaced after difffast.patch(pipe), and the new {type(unet).__name__} "
                "runs stock: call difffast.patch(pipe) again, or difffast.unpatch(pipe)",
                stacklevel=2,
            )
        settings.adopt_scheduler()  # also one that was exchanged: the pipeline calls it before the UNet
        for extension in settings.extensions:
            extension.see_call(self, args, kwargs)
        with begin_pipeline_call(self, profile=settings.profile):
            return plain(self, *args, **kwargs)

    # Diffusers' own ``__call__`` is wrapped in no_grad; who takes that off to differentiate shall find what is inside.
    call.__wrapped__ = getattr(plain, "__wrapped__", plain)
    return call


#: In the order in which they are put in; they are taken out in the opposite one.
PARTS: Sequence[Part] = (
    put_in_unet,
    put_in_compiled_unet,
    put_in_controlnet,
    put_in_components,
    put_in_scheduler,
    put_in_pipeline,
)
