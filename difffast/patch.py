"""patch, unpatch, patched: put difffast behind a stock Diffusers pipeline and take it out again without a trace."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, overload

from .options import Options
from .plan import CfgReuse, Sharing
from .report import PatchReport, make_report, note_exceptions
from .sampling.extension import Method
from .sites import Site, find_site, give_back, lock, put_all_back, put_back, put_in, refuse_neighbours, take_out
from .target import Target

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from .options import PatchOptions
    from .support import Pipeline


@overload
def patch(pipe: Pipeline, preset: str = ..., **options: Unpack[PatchOptions]) -> PatchReport: ...


@overload
def patch(pipe: Sequence[Pipeline], preset: str = ..., **options: Unpack[PatchOptions]) -> tuple[PatchReport, ...]: ...


def patch(
    pipe: Pipeline | Sequence[Pipeline],
    preset: str = "balanced",
    *,
    propagation: Sharing | None = None,
    cfg: CfgReuse | None = None,
    fused: bool | None = None,
    engine: str | None = None,
    binding: Method | None = None,
    force: bool = False,
    **more: Any,
) -> PatchReport | tuple[PatchReport, ...]:
    """Speed up a Diffusers pipeline in place; its stock ``pipe(...)`` call stays as it is.

    Patching again replaces the first patch.  Whatever goes wrong, nothing is changed.  What the user compiles, before
    or after, stays compiled.  What ``from_pipe`` makes of a patched pipeline shares UNet and scheduler, and runs alike.

    Args:
        pipe: a pipeline of ``difffast.support.PIPELINES``, or several; another one with a UNet takes ``"exact"`` alone.
        preset: a name from ``difffast.presets.PRESETS``.
        propagation: how steps share features, in place of what the preset says, whose ``cfg`` then counts no more.
        cfg: at which key steps both halves of classifier-free guidance's batch run, in place of what the preset says.
        fused: whether layers are computed by difffast's operators, in place of what the preset says.
        engine: what executes the parts: ``"eager"``; ``"inductor"``, or ``compile=True``: programs made by
            torch.compile, for which the first image waits; ``"cudagraphs"``; ``"openvino"`` on CPUs, which runs text
            encoders, ControlNet and VAE as well, and leaves to Python what is faster there.  None: graphs on CUDA
            devices, else eager.
        binding: bind attributes to the subjects that a prompt marks, as in ``"a [black cat] and a [white dog]"``.
        force: share features even in schedules with fewer than 8 steps, where otherwise every step runs in full.
        more: ``compile``; ``precision``, in which OpenVINO runs: "f32", "bf16" or None, which is the pipeline's own;
            ``profile``, whether ``report.last_run`` tells the seconds of every part; ``steering``, one method or more
            that change pictures on purpose (docs/editing.md); ``controlnet``, whether ControlNet runs at "every step",
            the default where steps reuse outer layers, or at "key steps"; ``mesh`` and ``encoder``, for several
            processes (docs/distributed.md); and old names, each of which gives a warning.

    Returns:
        A report of what was replaced; for several pipelines a tuple of reports.

    Raises:
        TypeError: ``pipe`` is no pipeline, an option has the wrong type, or there is no such option.
        ValueError: there is no UNet; its class or the preset is unknown; this kind of pipeline rules out sharing,
            feature reuse, prior noise or binding; the UNet has no such branch; or no layers have maps for binding.
    """
    options = Options.of(
        preset, propagation=propagation, cfg=cfg, fused=fused, engine=engine, binding=binding, force=force, **more
    )
    if not isinstance(pipe, (list, tuple)):
        return _patch_one(pipe, options)
    earlier = [find_site(each) for each in pipe]
    reports: list[PatchReport] = []
    try:
        for each in pipe:
            reports.append(_patch_one(each, options))
    except BaseException:
        put_all_back(pipe[: len(reports)], earlier)
        raise
    return tuple(reports)


def _patch_one(pipe: Pipeline, options: Options) -> PatchReport:
    target = Target.of(pipe)
    settings = options.resolve(target)
    with lock:
        refuse_neighbours(target, settings)
        earlier = find_site(pipe)
        try:
            take_out(pipe)
            if earlier is not None:
                settings.extensions += tuple(each for each in earlier.settings.extensions if each.stays)
            notes = tuple(note_exceptions(Target.of(pipe), settings, options))  # as it is without a patch
            put_in(pipe, Site(options, settings, target.unet))
            return make_report(target.name, target.unet, options.name, settings, notes)
        except BaseException:
            put_back(pipe, earlier)
            raise


def unpatch(pipe: Pipeline | Sequence[Pipeline]) -> bool:
    """Take difffast out of one pipeline or several: classes, attributes and outputs are as before :func:`patch`.

    Returns:
        Whether any of them was patched.
    """
    return any([take_out(each) for each in (pipe if isinstance(pipe, (list, tuple)) else (pipe,))])


@overload
def patched(
    pipe: Pipeline, preset: str = ..., **options: Unpack[PatchOptions]
) -> AbstractContextManager[PatchReport]: ...


@overload
def patched(
    pipe: Sequence[Pipeline], preset: str = ..., **options: Unpack[PatchOptions]
) -> AbstractContextManager[tuple[PatchReport, ...]]: ...


def patched(pipe: Pipeline | Sequence[Pipeline], preset: str = "balanced", **options: Any) -> Any:
    """Patch for the length of a ``with`` block; afterwards, what was patched before is put back.

    It takes the arguments of :func:`patch` and gives its report to ``as``.
    """
    return _hold(pipe, Options.of(preset, **options))


@contextlib.contextmanager
def _hold(pipe: Pipeline | Sequence[Pipeline], options: Options) -> Iterator[PatchReport | tuple[PatchReport, ...]]:
    pipes = pipe if isinstance(pipe, (list, tuple)) else (pipe,)
    earlier = [find_site(each) for each in pipes]
    report = patch(pipe, **options.as_arguments())
    with give_back(pipes, earlier):
        yield report
