"""What executes the functions of a UNet in a run: Python, compiled programs, recorded graphs, or the user's compile."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..engines.engine import choose_engine
from ..engines.graphs import Graphs
from ..engines.inputs import InputReader, apply_lora_scale
from ..engines.openvino import OpenVino
from ..engines.programs import Programs
from ..engines.user_compiled import UserCompile, has_compiled_parts
from ..layers.kind import ProgramCall
from ..unet.contents import contents_of
from ..unet.parts import Execute, execute_eagerly
from .state import RunState

#: Engines but Python itself.
Engine = Programs | Graphs | OpenVino
#: Those that compare what they have taken in before every call, and what reports call it.
_WATCHFUL = {Graphs: "CUDA graphs", OpenVino: "OpenVINO"}


class Execution:
    """What executes functions of a UNet in one run.

    Args:
        state: the run's counts and reasons.
        asked: the engine that the user asked for; None: what suits the device.
        precision: of OpenVINO's models, as the user asked for it.
        following: how the user has compiled the UNet, or None.
        engines: what executes functions, by name.
        unet: the UNet.
        device: where it runs.
    """

    def __init__(
        self,
        state: RunState,
        asked: str | None,
        precision: str | None,
        following: UserCompile | None,
        engines: Mapping[str, Engine],
        unet: nn.Module,
        device: torch.device,
    ) -> None:
        self._following, self._precision = following, precision
        self._has_compiled_parts = following is not None or has_compiled_parts(contents_of(unet).modules)
        #: Whether whole calls run the user's own compiled UNet.
        self.follows_user = following is not None and asked is None
        #: Who is told that it cannot: whoever has asked for it is warned.
        self._tell = state.record if asked is None and following is None else state.note
        self._engine: Engine | None
        if asked is None and self._has_compiled_parts:
            self._engine = engines["inductor"] if following is not None else None
        else:
            self._engine = engines.get(choose_engine(asked, device))
        self.distrust()
        self._inputs: InputReader | None = None
        self._changes = 0  # of the UNet, as graphs count them, that the inputs' layers were looked for after

    def distrust(self) -> None:
        """Have what has taken weights in compare all of their bytes at the next call."""
        if isinstance(self._engine, OpenVino):
            self._engine.distrust()

    def find_engine(self, unet: nn.Module, foreign: str | None, *, watched: str) -> Engine | None:
        """Return what executes the functions of a call, or None where Python does.

        It does where attention maps are wanted or attention is edited, which programs and graphs do not do, and where
        there is others' code in the UNet, which may do something else at every call.

        Args:
            unet: the UNet.
            foreign: what others have put into it, or None.
            watched: what is wanted of single layers, as text, or nothing.
        """
        if watched and (self._engine is not None or self._has_compiled_parts):
            self._tell(f"programs and graphs are not used while {watched}")
            return None
        if self._engine is None:
            return None
        name = _WATCHFUL.get(type(self._engine))
        reason = foreign if name is None else self._engine.refuse(unet)
        if reason is not None:
            self._tell(f"no {name or 'programs'}: {reason}")
            return None
        return self._engine

    def uncompile(self, stock: Callable[..., Any]) -> Callable[..., Any]:
        """Return ``stock`` without what the user has compiled of the UNet: layers in there hand nothing out."""
        if not self._has_compiled_parts:
            return stock

        def run(*args: Any, **kwargs: Any) -> Any:
            with torch.compiler.set_stance("force_eager"):
                return stock(*args, **kwargs)

        return run

    def prepare(self, call: ProgramCall, engine: Engine | None) -> tuple[Execute, Mapping[str, Any]]:
        """Return what executes the functions of a call, and its arguments as they take them."""
        if engine is None:
            return execute_eagerly, call.arguments
        changes = engine.changes if type(engine) in _WATCHFUL else 0
        if self._inputs is None or self._changes != changes:
            self._inputs, self._changes = InputReader(call.unet), changes
        options: dict[str, Any] = {}
        if isinstance(engine, Programs):
            options["following"] = self._following
        elif isinstance(engine, OpenVino):
            options |= {"precision": self._precision, "compare": call.fused}
            call = replace(call, fused=False)  # it fuses layers itself
        with apply_lora_scale(call.unet, call.arguments) as arguments:
            inputs = self._inputs.read(replace(call, arguments=arguments))
        return functools.partial(engine.run, inputs, self._tell, **options), arguments
