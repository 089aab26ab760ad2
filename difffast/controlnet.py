"""ControlNet under shared features: it belongs to the encoder and runs at key steps only.

The pipeline calls it at every step, before the UNet.  Between key steps it returns what it returned at the last one.
Source: Faster Diffusion (arXiv 2312.09608), section 4 (ControlNet).
"""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING, Any

from torch import nn

from .swap import is_swapped, plain_class, swap_in, swap_out

if TYPE_CHECKING:
    from .propagation import Controller


def install(controlnet: nn.Module, controller: Controller) -> None:
    """Let ``controller`` decide whether ``controlnet`` runs; pipelines may share it."""
    if not is_swapped(controlnet):
        swap_in(controlnet, _methods(controlnet))
    controllers = type(controlnet)._difffast_controllers
    if controller not in controllers:
        controllers.append(controller)


def uninstall(controlnet: nn.Module, controller: Controller) -> None:
    """Undo :func:`install`."""
    if is_swapped(controlnet):
        controllers = type(controlnet)._difffast_controllers
        controllers[:] = [each for each in controllers if each is not controller]
        if not controllers:
            swap_out(controlnet)


def _methods(controlnet: nn.Module) -> dict[str, Any]:
    plain, controllers = plain_class(controlnet), []

    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        arguments = _signature(plain).bind(self, *args, **kwargs).arguments
        stock = functools.partial(plain.__call__, self, *args, **kwargs)
        for controller in controllers:
            run = controller.run_of(arguments["timestep"], arguments["sample"].device)
            if run is not None:
                return run.control({name: value for name, value in arguments.items() if name != "self"}, stock)
        return stock()

    return {"__call__": call, "_difffast_controllers": controllers}


@functools.cache
def _signature(cls: type) -> inspect.Signature:
    return inspect.signature(cls.forward)
