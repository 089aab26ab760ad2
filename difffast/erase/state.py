"""What a run has become, as tensors by name, and back."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .checkpoint import Checkpoint, random_states, restore_random_states
from .optimiser import MOMENTS, AdamW
from .params import Weights
from .points import Point, Points
from .processes import Processes


@dataclass
class TrainingState:
    """Everything that the rest of a run depends on.

    Attributes:
        weights: what is trained.
        optimiser: its AdamW, with the master weights of narrow ones.
        points: what is waiting in the pool.
        generator: of this process's draws.
        average: the average of students, in at least float32, if the method has one; else empty.
        step, losses: how many steps were made, and the erasing loss of each.
    """

    weights: Weights
    optimiser: AdamW
    points: Points
    generator: torch.Generator
    average: list[Tensor]
    step: int = 0
    losses: list[float] = field(default_factory=list)

    @property
    def device(self) -> torch.device:
        return self.weights.parameters[0].device

    def collect(self, processes: Processes) -> dict[str, Tensor]:
        """Return all tensors by name; every process must call it."""
        own = {f"random.{name}": state for name, state in random_states(self.generator, self.device).items()}
        for i, point in enumerate(self.points.waiting):
            own[f"point.{i:04d}.latents"] = point.latents
            own[f"point.{i:04d}.place"] = torch.tensor([point.concept, point.moves])
        gathered = enumerate(processes.gather(own))
        found = {f"process.{rank}.{name}": tensor for rank, each in gathered for name, tensor in each.items()}
        self.optimiser.take_over()
        states = zip(self.weights.names, self.optimiser.masters, self.optimiser.moments(), strict=True)
        for name, master, moments in states:
            found[f"weight.{name}"] = master
            found.update({f"optimiser.{key}.{name}": value for key, value in moments.items()})
        for name, value in zip(self.weights.names, self.average, strict=False):
            found[f"average.{name}"] = value
        return found | {"losses": self.stored_losses()}

    def stored_losses(self) -> Tensor:
        """Return the losses as checkpoints hold them, [step], float64."""
        return torch.tensor(self.losses, dtype=torch.float64)

    def restore(self, checkpoint: Checkpoint, rank: int) -> None:
        """Go back to a checkpoint of the same run.

        Raises:
            ValueError: the checkpoint lacks something.
        """
        tensors, names = checkpoint.tensors, self.weights.names
        try:
            values = [tensors[f"weight.{name}"] for name in names]
            average = [tensors[f"average.{name}"] for name in names] if self.average else []
            moments = [  # a parameter without a gradient has none
                {key: tensors[f"optimiser.{key}.{name}"] for key in MOMENTS}
                if f"optimiser.step.{name}" in tensors
                else {}
                for name in names
            ]
            mine = f"process.{rank}."
            own = {name.removeprefix(mine): value for name, value in tensors.items() if name.startswith(mine)}
            states = {name: own[f"random.{name}"] for name in ("own", "cpu")}
            losses = tensors["losses"].tolist()
        except KeyError as error:
            raise ValueError(f"the checkpoint of step {checkpoint.step} is incomplete: it lacks {error}") from None
        self.optimiser.load(values, moments)
        for value, stored in zip(self.average, average, strict=True):
            value.copy_(stored)
        restore_random_states(
            states | {"cuda": own["random.cuda"]} if "random.cuda" in own else states, self.generator, self.device
        )
        self.points.waiting = []
        for place in sorted(name for name in own if name.endswith(".place")):
            concept, moves = own[place].tolist()
            latents = own[place.removesuffix("place") + "latents"].to(self.device)
            self.points.waiting.append(Point(concept, moves, latents))
        self.step, self.losses = checkpoint.step, losses
