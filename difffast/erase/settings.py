"""What a training is asked for, checked in one place."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, fields
from typing import Any

from .losses import METHODS
from .ranges import check_finite, check_positive, check_whole


@dataclass(frozen=True)
class Settings:
    """The numbers of :class:`~.trainer.EraseTrainer`, all of which have defaults.

    Attributes:
        learning_rate, eta: of the optimiser, and the strength of ESD's negative guidance; None: the method's own.
        weight_decay: 0 makes AdamW the Adam that ESD is published with; None: 0, but with a trap of
            ``compat="published"`` that one's 1e-4.
        clip: largest norm of the gradient; None: any, but with a trap of ``compat="published"`` that one's 1.
        erase_from: of "esd-2025", the prompt that the concept is erased from, one for all concepts.
        sampling_steps, guidance_scale: of the trajectories from noise.
        pool: points that one trajectory of the teacher serves; None: each point has its own, as published.
        lora_rank: train a LoRA of this rank on the linear layers among the chosen; None: the weights themselves.
        gradient_checkpointing: less memory for a second forward pass.
        save_every: steps between checkpoints, of which ``keep`` stay.
        seed: of all draws.

    Raises:
        ValueError: a number out of its range.
    """

    learning_rate: float | None = None
    eta: float | None = None
    weight_decay: float | None = None
    clip: float | None = None
    erase_from: str | None = None
    sampling_steps: int = 50
    guidance_scale: float = 3.0
    pool: int | None = None
    lora_rank: int | None = None
    gradient_checkpointing: bool = False
    save_every: int = 100
    keep: int = 2
    seed: int = 0

    @staticmethod
    def of(options: dict[str, Any]) -> Settings:
        """Make settings of options by name.

        Raises:
            ValueError: as the class does.
            TypeError: there is no such option.
        """
        known = [field.name for field in fields(Settings)]
        for name in options:
            if name not in known:
                near = difflib.get_close_matches(name, known, 1)
                raise TypeError(f"unknown option {name!r}{f', did you mean {near[0]!r}?' if near else ''}")
        return Settings(**options)

    def __post_init__(self) -> None:
        for name in ("learning_rate", "clip"):
            if getattr(self, name) is not None:
                check_positive(name, getattr(self, name))
        for name in ("save_every", "keep", "sampling_steps"):
            check_whole(name, getattr(self, name))
        for name in ("pool", "lora_rank"):
            if getattr(self, name) is not None:
                check_whole(name, getattr(self, name))
        check_whole("seed", self.seed, 0)
        check_finite("guidance_scale", self.guidance_scale)
        if self.eta is not None:
            check_finite("eta", self.eta)
        if self.weight_decay is not None:
            check_finite("weight_decay", self.weight_decay, 0)
        if self.pool is not None and self.pool > self.sampling_steps:
            raise ValueError(f"pool must be at most sampling_steps, {self.sampling_steps}, got {self.pool}")

    def check_method(self, method: str) -> None:
        """Refuse what a method has no use for.

        Raises:
            ValueError: an unknown method, or a setting that is not its own.
        """
        if method not in METHODS:
            raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
        if self.erase_from is not None and method != "esd-2025":
            raise ValueError(f"erase_from belongs to method 'esd-2025', got method {method!r}")
        if self.eta is not None and METHODS[method].eta is None:
            raise ValueError(f"method {method!r} has no eta, got {self.eta}")
