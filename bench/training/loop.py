"""Steps of one model that can be cut off anywhere: budget, checkpoints, averaged weights, losses."""

from __future__ import annotations

import json
import pickle
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from tqdm import tqdm

from difffast.files import write_whole

SAVE_EVERY = 100


class Budget:
    """Tells when a run has used up its minutes or its steps (None: any number), and logs what each stage took.

    A SIGTERM uses up the budget as well: the step that is under way ends, and its stage is saved.
    """

    def __init__(self, minutes: float | None, steps: int | None, log: Path) -> None:
        self._start, self._minutes, self._steps = time.monotonic(), minutes, steps
        self._log, self._earlier = log, json.loads(log.read_text()) if log.is_file() else []
        self._stages: dict[str, dict[str, float]] = {}

    def stop(self, *_: Any) -> None:
        self._steps = 0

    def stop_on_terminate(self) -> None:
        signal.signal(signal.SIGTERM, self.stop)

    def spend(self) -> bool:
        """Take one step from it; False: there is none left."""
        if self._steps is not None:
            self._steps -= 1
        late = self._minutes is not None and (time.monotonic() - self._start) / 60 >= self._minutes
        return (self._steps is None or self._steps >= 0) and not late

    def record(self, stage: str, *, steps: int, since: tuple[float, float]) -> None:
        """Log a stage of this run: what it has taken so far since (monotonic, processor) seconds."""
        wall, processor = time.monotonic() - since[0], time.process_time() - since[1]
        self._stages[stage] = {
            "steps": steps,
            "minutes": round(wall / 60, 2),
            "processor_minutes": round(processor / 60, 2),
            "threads": torch.get_num_threads(),
        }
        write_json(self._log, [*self._earlier, self._stages])


def clock() -> tuple[float, float]:
    """(monotonic, processor) seconds, for :meth:`Budget.record`."""
    return time.monotonic(), time.process_time()


def write_json(path: Path, content: Any) -> None:
    with write_whole(path) as part:
        part.write_text(json.dumps(content, indent=1) + "\n")


def find_device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def rate_at(step: int, count: int, warmup: int) -> float:
    """Share of the learning rate: rises over ``warmup`` steps, falls linearly to 0 over the last fifth of ``count``."""
    return min(1.0, (step + 1) / warmup, max(0.0, 5 * (1 - step / count)))


class Average:
    """Moving average of weights, quick at first: after n steps it keeps min(decay, (1 + n) / (10 + n)) of itself."""

    def __init__(self, model: nn.Module, decay: float) -> None:
        self._decay, self._steps = decay, 0
        self._weights = [weight.detach().clone() for weight in model.parameters()]

    @torch.no_grad()
    def step(self, model: nn.Module) -> None:
        self._steps += 1
        kept = min(self._decay, (1 + self._steps) / (10 + self._steps))
        torch._foreach_lerp_(self._weights, [weight.detach() for weight in model.parameters()], 1 - kept)

    @torch.no_grad()
    def swap(self, model: nn.Module) -> None:
        """Exchange the model's weights for the averaged ones; a second call puts them back."""
        for own, weight in zip(self._weights, model.parameters(), strict=True):
            kept = weight.detach().clone()
            weight.copy_(own)
            own.copy_(kept)

    @torch.no_grad()
    def copy_to(self, model: nn.Module) -> None:
        for own, weight in zip(self._weights, model.parameters(), strict=True):
            weight.copy_(own)

    def state_dict(self) -> dict[str, Any]:
        return {"steps": self._steps, "weights": self._weights}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._steps = state["steps"]
        for own, weight in zip(self._weights, state["weights"], strict=True):
            own.copy_(weight)


def load_checkpoint(path: Path, restore: Callable[[dict[str, Any]], None]) -> None:
    """Read a checkpoint and hand it to ``restore``.

    Raises:
        ValueError: it is damaged, or of another model; the error names the file and what to do.
    """
    try:
        restore(torch.load(path, map_location="cpu", weights_only=True))
    except (RuntimeError, ValueError, KeyError, TypeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{path} is damaged or of another recipe ({type(error).__name__}); remove it to begin its stage anew"
        ) from error


class Training:
    """Steps of one model with everything that a resumed run needs: optimiser, averages, position, losses."""

    def __init__(
        self,
        name: str,
        model: nn.Module,
        out: Path,
        *,
        rate: float,
        count: int,
        warmup: int,
        decay: float,
        precision: str,
    ) -> None:
        self.device = find_device()
        self.model, self.losses = model.to(self.device), []
        self.average = Average(self.model, decay)
        parameters = [weight for weight in model.parameters() if weight.requires_grad]
        self._optimiser = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.99), weight_decay=1e-2, fused=True)
        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._optimiser, lambda step: rate_at(step, count, warmup))
        self._parameters, self._precision = parameters, precision
        self._out, self._name, self._count = out, name, count
        self._begun = clock()
        if self._checkpoint.is_file():
            load_checkpoint(self._checkpoint, self._restore)

    @property
    def _checkpoint(self) -> Path:
        return self._out / f"{self._name}-checkpoint.pt"

    def _parts(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "average": self.average,
            "optimiser": self._optimiser,
            "schedule": self._schedule,
        }

    def _restore(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint, or from what :mod:`training.kept` has left of one: its averaged weights."""
        self.losses = list(state["losses"])
        if "optimiser" in state:
            for name, part in self._parts().items():
                part.load_state_dict(state[name])
            return
        self.average.load_state_dict(state["average"])
        self.average.copy_to(self.model)
        self._schedule.last_epoch = len(self.losses)
        for group, rate, share in zip(
            self._optimiser.param_groups, self._schedule.base_lrs, self._schedule.lr_lambdas, strict=True
        ):
            group["lr"] = rate * share(len(self.losses))

    @property
    def finished(self) -> bool:
        return len(self.losses) >= self._count

    def autocast(self) -> AbstractContextManager[None]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self._precision == "bf16")

    def steps(self, budget: Budget) -> Iterator[int]:
        """Positions still to do; saves every ``SAVE_EVERY`` steps and at the end."""
        first = len(self.losses)
        with tqdm(total=self._count, initial=first, desc=self._name, mininterval=10) as bar:
            while not self.finished and budget.spend():
                yield len(self.losses)
                bar.update()
                bar.set_postfix(loss=f"{np.mean(self.losses[-100:]):.4f}", refresh=False)
                if len(self.losses) % SAVE_EVERY == 0:
                    self._save(budget, first)
        if len(self.losses) > first:
            self._save(budget, first)

    def step(self, loss: Tensor) -> None:
        loss.backward()
        nn.utils.clip_grad_norm_(self._parameters, 1.0, foreach=True)
        self._optimiser.step()
        self._schedule.step()
        self._optimiser.zero_grad(set_to_none=True)
        self.average.step(self.model)
        self.losses.append(float(loss.detach()))

    def _save(self, budget: Budget, first: int) -> None:
        state = {name: part.state_dict() for name, part in self._parts().items()}
        with write_whole(self._checkpoint) as part:
            torch.save({**state, "losses": self.losses}, part)
        write_json(self._out / f"{self._name}-losses.json", self.losses)
        plot(self.losses, self._out / f"{self._name}-loss.png", self._name)
        budget.record(self._name, steps=len(self.losses) - first, since=self._begun)

    def averaged(self) -> nn.Module:
        """The model with the averaged weights; training ends here."""
        self.average.swap(self.model)
        return self.model.eval()


def plot(losses: list[float], path: Path, name: str) -> None:
    """Loss over steps: every step, and the mean of 100."""
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    axes.semilogy(losses, color="lightgrey", linewidth=0.5)
    window = min(100, len(losses))
    axes.semilogy(np.arange(window - 1, len(losses)), np.convolve(losses, np.ones(window) / window, "valid"))
    axes.set(xlabel="step", ylabel="loss", title=f"{name}, {len(losses)} steps")
    with write_whole(path) as part:
        figure.savefig(part)
