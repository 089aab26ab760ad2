"""The one protocol by which methods come into a patched pipeline's sampling.

Semantic binding, prior noise and the collection of attention maps are extensions; so is whatever comes next.  Patching,
the controller and the runs know this protocol and no method by name.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..layers.context import AttentionEdit, MapSink
from .scheduler_step import Edit, Result


@dataclass(frozen=True)
class RunInfo:
    """What an extension is told of a run that begins.

    Attributes:
        total: UNet calls in the schedule.
        fused: whether layers may use the operators.
        note: puts a reason into the report and warns of it, once.
    """

    total: int
    fused: bool
    note: Callable[[str], None]


class ExtensionRun:
    """One extension in one run."""

    def edit_call(
        self, call: Mapping[str, Any], step: int, scheduler: Any, stock: Callable[..., Any]
    ) -> Mapping[str, Any]:
        """Return the arguments with which the UNet is to be called instead of ``call``.

        Args:
            call: the pipeline's arguments by name; tensors in it are never written to.
            step: the position in the schedule.
            scheduler: the pipeline's.
            stock: the unpatched UNet, called with arguments by name.
        """
        return call

    def attention(self, step: int) -> AttentionEdit | None:
        """Return who changes what the attention layers of the UNet call at a step give; asked after :meth:`edit_call`.

        Compiled programs and recorded graphs are not used at such a step.  What holds at some steps only makes those,
        and the one after the last of them, full steps (:meth:`Extension.full_steps`): steps are decoded together.
        """
        return None

    def replace_output(self, step: int) -> Tensor | None:
        """Return what the pipeline is to get at a step in place of the UNet's output; None: the UNet runs."""
        return None

    def see_output(self, step: int, output: Tensor) -> None:
        """Look at what the pipeline gets at a step; it is not to be written to."""


class Extension:
    """One method in one patched pipeline; every hook of this base class does nothing.

    Attributes:
        trace: what the latest run has left to look at; None: nothing.
        alone: whether the pipeline must have its scheduler to itself.
        edits_attention: whether its runs have an :meth:`ExtensionRun.attention`.
        stays: whether it stays with the pipeline when another patch replaces the one that it came with.
    """

    trace: Any = None
    alone = False
    edits_attention = False
    stays = False

    def see_call(self, pipe: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Be told of a call of the pipeline with its arguments, before it begins; runs of the user's own have none."""

    def pipeline_methods(self) -> Mapping[str, Callable[..., Any]]:
        """Return overrides of the pipeline's methods (:mod:`difffast.surgery.subclass`)."""
        return {}

    def scheduler_methods(self, scheduler: Any) -> Mapping[str, Callable[..., Any]]:
        """Return overrides of a scheduler's methods besides ``step``."""
        return {}

    def latent_edits(self) -> Sequence[Edit]:
        """Return what is done, in turn, to the latents from which the scheduler steps."""
        return ()

    def step_results(self) -> Sequence[Result]:
        """Return what is done, in turn, to the latents that a step of the scheduler has made."""
        return ()

    def map_sinks(self) -> Sequence[MapSink]:
        """Return who wants the attention maps of the pipeline's UNet calls."""
        return ()

    def full_steps(self, total: int) -> Sequence[int]:
        """Return the steps that must run in full in a schedule of ``total`` UNet calls."""
        return ()

    def begin(self, info: RunInfo) -> ExtensionRun | None:
        """Begin a run; None: the extension has nothing to do in its UNet calls.

        The UNet must not be called here: the run is not there yet.
        """
        return None

    def describe(self) -> Iterator[tuple[str, str]]:
        """Yield (what is replaced, by what) for reports."""
        return iter(())


class Method(ABC):
    """What a user hands to :func:`difffast.patch`: a configured method that belongs to no pipeline yet."""

    @abstractmethod
    def attach(self, pipe: Any, unet: nn.Module) -> Extension:
        """Return the method's extension for one pipeline; only weak references to it may be kept.

        Args:
            pipe: the pipeline.
            unet: its plain UNet.

        Raises:
            ValueError: the method cannot work with this pipeline.
        """
