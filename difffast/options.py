"""What one patch asks for, checked in one place."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, TypedDict

from .engines.conversion import find_missing
from .engines.engine import ENGINES
from .engines.openvino import PRECISIONS
from .plan import CfgReuse, EncoderPropagation, FeatureReuse, Plan, Sharing
from .presets import PRESETS
from .renamed import warn_renamed
from .sampling.division import ENCODERS, Division
from .sampling.extension import Extension, Method
from .sampling.prior_noise import PriorNoise
from .sampling.settings import Settings
from .target import Target
from .unet.parts import find_reentry

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

#: At which steps ControlNet runs.
CADENCES = ("every step", "key steps")

#: Old names of options -> new ones.
_RENAMED = {"guidance": "cfg"}


class PatchOptions(TypedDict, total=False):
    """The optional arguments of :func:`difffast.patch`, for type checkers."""

    propagation: Sharing | None
    cfg: CfgReuse | None
    fused: bool | None
    compile: bool
    engine: str | None
    precision: str | None
    binding: Method | None
    steering: Method | Sequence[Method]
    controlnet: str | None
    mesh: DeviceMesh | None
    encoder: str | None
    profile: bool
    force: bool


@dataclass(frozen=True)
class Options:
    """The arguments of :func:`difffast.patch`, which says what each of them means.

    Raises:
        TypeError, ValueError: a value of the wrong type, or an unknown preset.
    """

    preset: str = "balanced"
    propagation: Sharing | None = None
    cfg: CfgReuse | None = None
    fused: bool | None = None
    engine: str | None = None
    precision: str | None = None
    binding: Method | None = None
    steering: Method | Sequence[Method] = ()
    controlnet: str | None = None
    mesh: DeviceMesh | None = None
    encoder: str | None = None
    profile: bool = False
    force: bool = False

    def __post_init__(self) -> None:
        if self.preset not in PRESETS:
            raise ValueError(
                f"unknown preset {self.preset!r}{suggest(self.preset, PRESETS)}; available: {', '.join(PRESETS)}"
            )
        for name, kinds, wanted in (
            (
                "propagation",
                Sharing,
                "a difffast.EncoderPropagation, FeatureReuse, OutputForecast, MeasuredPlan or Plan",
            ),
            ("cfg", CfgReuse, "a difffast.CfgReuse"),
            ("binding", Method, "a difffast.SemanticBinding"),
        ):
            value = getattr(self, name)
            if value is not None and not isinstance(value, kinds):
                raise TypeError(f"{name} must be {wanted}, got {type(value).__name__}")
        object.__setattr__(self, "steering", _check_methods(self.steering))
        if self.fused is not None and not isinstance(self.fused, bool):
            raise TypeError(f"fused must be True, False or None, got {self.fused!r}")
        _check_switch("force", self.force)
        _check_switch("profile", self.profile)
        if self.engine is not None and self.engine not in ENGINES:
            names = ", ".join(map(repr, ENGINES))
            raise ValueError(f"unknown engine {self.engine!r}{suggest(self.engine, ENGINES)}; available: {names}, None")
        _check_precision(self.engine, self.precision)
        if self.controlnet not in (None, *CADENCES):
            names = ", ".join(map(repr, CADENCES))
            raise ValueError(f"controlnet must be one of {names}, None, got {self.controlnet!r}")
        if self.encoder not in (None, *ENCODERS):
            names = ", ".join(map(repr, ENCODERS))
            raise ValueError(f"encoder must be one of {names}, None, got {self.encoder!r}")
        if self.encoder is not None and self.mesh is None:
            raise ValueError(f"encoder={self.encoder!r} needs a mesh, which says who the processes are, got mesh=None")

    @classmethod
    def of(cls, preset: str = "balanced", **replaced: Any) -> Options:
        """Return the options of a preset with parts of it replaced.

        Raises:
            TypeError: a name that is no option; the error names the nearest one.
        """
        known = [field.name for field in fields(cls)]
        for old, new in _RENAMED.items():
            if old in replaced:
                warn_renamed(f"patch({old}=)", f"patch({new}=)", stacklevel=4)
                value = replaced.pop(old)
                if replaced.get(new) is not None:
                    raise TypeError(f"{old} is the old name of {new}: give one of them")
                replaced[new] = value
        if "compile" in replaced:  # short for an engine
            compiled, engine = replaced.pop("compile"), replaced.get("engine")
            _check_switch("compile", compiled)
            if compiled and engine not in (None, "inductor"):
                raise ValueError(f"compile=True is short for engine='inductor', got engine={engine!r} as well")
            replaced["engine"] = "inductor" if compiled else engine
        for name in replaced:
            if name not in known:
                raise TypeError(f"unknown option {name!r}{suggest(name, known)}; available: {', '.join(known)}")
        return cls(preset, **replaced)

    def as_arguments(self) -> dict[str, Any]:
        """Return the options as arguments of :func:`difffast.patch`."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @property
    def name(self) -> str:
        """The preset's name, or "custom" where a part of it was replaced."""
        replaced = (self.propagation, self.cfg, self.fused)
        return self.preset if all(value is None for value in replaced) else "custom"

    @property
    def sharing(self) -> Sharing:
        """How steps share features."""
        return self.propagation or PRESETS[self.preset].propagation

    @property
    def wanted_cfg(self) -> CfgReuse | None:
        """How guidance's halves are to be reused, where the pipeline can."""
        return self.cfg if self.cfg is not None or self.propagation is not None else PRESETS[self.preset].cfg

    def resolve(self, target: Target) -> Settings:
        """Return the settings for a target, with the methods attached to it.

        Raises:
            ValueError: what the pipeline's kind, or its UNet, rules out.
        """
        sharing = self.sharing
        if self.propagation is None and not target.support.prior_noise and isinstance(sharing, EncoderPropagation):
            sharing = replace(sharing, prior_noise=None)  # what was asked for by name is refused instead
        methods = (() if self.binding is None else (self.binding,)) + self.steering
        _check_sharing(sharing, target, steered=bool(methods))
        _check_controlnet(self.controlnet, sharing, target)
        obstacle = target.refuse_cfg_reuse()
        if self.cfg is not None and obstacle:
            raise ValueError(f"guidance cannot be reused with {target.name}: {obstacle}")
        extensions: list[Extension] = [method.attach(target.pipe, target.unet) for method in methods]
        if isinstance(sharing, EncoderPropagation) and sharing.prior_noise:
            extensions.append(PriorNoise(sharing.prior_noise))
        settings = Settings(
            target.pipe,
            target.support,
            sharing,
            cfg=None if obstacle else self.wanted_cfg,
            fused=PRESETS[self.preset].fused if self.fused is None else self.fused,
            engine=self.engine,
            force=self.force,
            extensions=extensions,
        )
        settings.controlnet = self.controlnet or settings.controlnet
        settings.division = None if self.mesh is None else self._join_mesh(self.mesh, sharing, target)
        settings.precision, settings.profile = self.precision, self.profile
        return settings

    def _join_mesh(self, mesh: DeviceMesh, sharing: Sharing, target: Target) -> Division:
        """Return the other processes of a mesh, once it is known that all of them work alike.

        Raises:
            TypeError, ValueError: the mesh does not fit, or the processes differ.
        """
        from .distributed.division import MeshDivision

        division = MeshDivision(mesh, self.encoder)
        obstacle = target.refuse_cfg_reuse()
        if division.divides("cfg") and obstacle:
            raise ValueError(
                f"mesh {division!r} divides guidance's halves, which {target.name} does not have: {obstacle}"
            )
        if division.divides("cfg") and self.wanted_cfg is not None:
            raise ValueError(
                f"mesh {division!r} needs both of guidance's halves at every step, got cfg={self.wanted_cfg}"
            )
        if division.divides("dec") and not _decodes_ahead(sharing):
            raise ValueError(
                f"mesh {division!r} divides steps that are decoded together, of which {sharing} has none: use "
                "propagation=EncoderPropagation(...) or the preset 'faster-diffusion'"
            )
        asked = {n: v for n, v in self.as_arguments().items() if n not in ("mesh", "binding", "steering")}
        asked["methods"] = [type(each).__name__ for each in (self.binding, *self.steering) if each is not None]
        division.check_equal(target.pipe, ", ".join(f"{name}={value}" for name, value in asked.items()))
        return division


def _decodes_ahead(sharing: Sharing) -> bool:
    """Return whether any step is decoded from the features of another."""
    if isinstance(sharing, Plan):
        ran = len(sharing.key_steps) + len(sharing.forecasts)
        return sharing.reuse is None and ran < sharing.total - sharing.start
    return isinstance(sharing, EncoderPropagation) and sharing.key_steps != 1


def _check_switch(name: str, value: Any) -> None:
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def _check_precision(engine: str | None, precision: str | None) -> None:
    """Refuse an engine that is not installed, and a precision that it does not have."""
    if precision is not None and engine != "openvino":
        raise ValueError(f"precision={precision!r} needs engine='openvino', got engine={engine!r}")
    if precision not in (None, *PRECISIONS):
        names = ", ".join(map(repr, PRECISIONS))
        raise ValueError(f"precision must be one of {names}, None, got {precision!r}")
    if engine == "openvino":
        missing = find_missing()
        if missing is not None:
            raise ModuleNotFoundError(missing)


def _check_methods(methods: Any) -> tuple[Method, ...]:
    found = tuple(methods) if isinstance(methods, (list, tuple)) else (methods,)
    for method in found:
        if not isinstance(method, Method):
            wanted = "a method such as difffast.NegativeAttention, or several"
            raise TypeError(f"steering must be {wanted}, got {type(method).__name__}")
    return found


def _check_sharing(sharing: Sharing, target: Target, *, steered: bool) -> None:
    """Refuse what the pipeline's kind rules out, with the reason."""
    support = target.support
    reuse = sharing.reuse if isinstance(sharing, Plan) else sharing if isinstance(sharing, FeatureReuse) else None
    if support.exact_only:
        whole = isinstance(sharing, EncoderPropagation) and sharing.key_steps == 1 and not sharing.prior_noise
        if not whole or steered:
            raise ValueError(
                f"{target.name} can only have what is exact, difffast.patch(pipe, 'exact'), got "
                f"{'binding or steering' if whole else sharing}: {support.exact_only}"
            )
    elif reuse is not None:
        if not support.reuse:
            why = f": {support.note}" if support.note else ""
            raise ValueError(f"feature reuse does not work with {target.name}{why}")
        find_reentry(target.unet, reuse.branch)
    elif isinstance(sharing, EncoderPropagation) and sharing.prior_noise and not support.prior_noise:
        raise ValueError(
            f"prior noise is not meant for {target.name} ({support.family}), got prior_noise={sharing.prior_noise}: "
            "use prior_noise=None"
        )


def _check_controlnet(cadence: str | None, sharing: Sharing, target: Target) -> None:
    """Refuse a cadence without a ControlNet, and one that encoder propagation cannot have."""
    if cadence is not None and getattr(target.pipe, "controlnet", None) is None:
        raise ValueError(f"controlnet={cadence!r} needs a pipeline with a ControlNet, and {target.name} has none")
    if cadence == "every step" and isinstance(sharing, EncoderPropagation) and sharing.key_steps != 1:
        raise ValueError(
            "controlnet='every step' needs steps that see the current latents: use propagation=FeatureReuse(...), or "
            f"EncoderPropagation(key_steps=1), got {sharing}"
        )


def suggest(name: Any, known: Iterable[str]) -> str:
    """Return " (did you mean ...?)" with the nearest known name, or nothing."""
    plain = str(name).lower().replace("_", "-")
    near = {each.lower().replace("_", "-"): each for each in known}
    found = difflib.get_close_matches(plain, near, n=1, cutoff=0.6)
    return f" (did you mean {near[found[0]]!r}?)" if found else ""
